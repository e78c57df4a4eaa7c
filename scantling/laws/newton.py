"""The minimiser behind every fit: sums of power-law terms, many starts or resamples in one batch.

A law is a sum of terms whose logarithms are linear in the unknowns, so that
    log prediction_i = logsumexp_k(terms[k, i] . theta + offset[k, i])
covers L = E + A N^-alpha + B D^-beta, tied or fixed parameters, and prefactors per family alike. Starts come from a
grid of exponents with the linear part solved (variable projection); each is then refined by damped Newton steps with
the closed-form gradient and Hessian, because library minimisers stop early on objectives near 1e-3 (arXiv 2404.10102).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import huber

from scantling.laws.forms import Floats

EXPONENTS = (0.05, 1.2)  # the range of exponents searched for starts
CELLS = 2_000_000  # numbers held at once per array when a batch is cut into pieces
ANNEAL = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)


@dataclass(frozen=True, eq=False)
class Design:
    """The terms of a law on given rows.

    Attributes:
        names: the P free parameters; logarithms of prefactors, or exponents.
        exponent: (P,) which of them are exponents; the others are logarithms and enter a term with coefficient 0 or 1.
        terms: (K, n, P) coefficients.
        offset: (K, n) fixed part of each term's logarithm; -inf for a term that is zero.
    """

    names: tuple[str, ...]
    exponent: tuple[bool, ...]
    terms: Floats
    offset: Floats

    def rows(self, keep: npt.NDArray[np.bool_]) -> "Design":
        """The same law on a selection of rows."""
        return Design(self.names, self.exponent, self.terms[:, keep], self.offset[:, keep])

    def log_prediction(self, theta: Floats) -> Floats:
        """(S, n) log predictions at (S, P) parameters."""
        return _log_sum(self, theta)[0]

    def condition(self, theta: Floats, weights: Floats) -> float:
        """Condition number of the weighted Jacobian of the log prediction at (P,) parameters, columns scaled to 1."""
        shares = _log_sum(self, theta[None])[1][0]
        jacobian = np.einsum("kn,knp->np", shares, self.terms) * np.sqrt(weights)[:, None]
        return float(np.linalg.cond(jacobian / np.maximum(np.linalg.norm(jacobian, axis=0), 1e-300)))


@dataclass(frozen=True)
class Objective:
    """sum_i w_i Huber_delta(r_i), Huber_delta(r) = r^2/2 up to |r| = delta and delta (|r| - delta/2) beyond.

    Attributes:
        delta: infinite for least squares; tiny for least absolute deviations.
        raw: r = L - prediction instead of log L - log prediction.
    """

    delta: float
    raw: bool = False


@dataclass(frozen=True, eq=False)
class Minimum:
    """The best of several starts.

    Attributes:
        theta: (P,) parameters.
        value: objective.
        gradient: largest |gradient| relative to the sum of the absolute contributions that cancel in it.
        starts: starts tried.
        agreeing: starts that end within 1e-7 (relative) of the best objective, or that fit the rows exactly.
    """

    theta: Floats
    value: float
    gradient: float
    starts: int
    agreeing: int


def minimise(design: Design, loss: Floats, weights: Floats, objective: Objective) -> Minimum:
    """The global minimum as far as a grid of starts can tell."""
    theta = starting_points(design, loss, weights)
    stages = [Objective(d, objective.raw) for d in ANNEAL if d > objective.delta] + [objective]
    for stage in stages:
        theta, value = refine(design, loss, weights, stage, theta)
    best = int(np.argmin(value))
    _, gradient, _, _, size = _derivatives(design, loss, weights, objective, theta[best : best + 1])
    return Minimum(
        theta=theta[best],
        value=float(value[best]),
        gradient=float(np.max(np.abs(gradient[0]) / size[0])),
        starts=len(value),
        agreeing=int(np.sum(value <= value[best] * (1 + 1e-7) + 1e-24 * np.sum(weights))),
    )


def resample(design: Design, loss: Floats, weights: Floats, objective: Objective, start: Floats) -> Floats:
    """(R, P) minima for R weight vectors (R, n) or R loss vectors (R, n), all begun at the full-data optimum.

    Two passes, one direct and one that anneals delta from ten times above, keep the better: a single pass may miss the
    best known minimum in a few resamples of a thousand.
    """
    loss, weights = np.broadcast_arrays(np.atleast_2d(loss), np.atleast_2d(weights))
    resamples = len(loss)
    size = max(1, CELLS // design.offset.size)
    pieces = []
    for low in range(0, resamples, size):
        y, w = loss[low : low + size], weights[low : low + size]
        first = np.tile(start, (len(y), 1))
        theta, value = refine(design, y, w, objective, first)
        if np.isfinite(objective.delta):
            smooth, _ = refine(design, y, w, Objective(10 * objective.delta, objective.raw), theta)
            other, other_value = refine(design, y, w, objective, smooth)
            theta = np.where((other_value < value)[:, None], other, theta)
        pieces.append(theta)
    return np.concatenate(pieces)


def starting_points(design: Design, loss: Floats, weights: Floats, count: int = 6) -> Floats:
    """(count, P) spread-out starts: a grid of exponents, prefactors by least squares of relative error."""
    exponent = np.array(design.exponent)
    dims = int(exponent.sum())
    side = max(2, round(576 ** (1 / max(dims, 1)))) if dims else 1
    axis = np.linspace(*EXPONENTS, side if dims > 1 else 48)
    grid = np.stack(np.meshgrid(*[axis] * dims, indexing="ij"), -1).reshape(-1, dims) if dims else np.zeros((1, 0))

    shape = np.exp(np.einsum("knp,gp->gkn", design.terms[:, :, exponent], grid) + design.offset)
    member = design.terms[:, :, ~exponent]
    columns = np.einsum("gkn,knc->gnc", shape, member)
    constant = np.einsum("gkn,kn->gn", shape, 1 - member.sum(-1))
    root = np.sqrt(weights) / loss
    x, y = columns * root[:, None], (loss - constant) * root
    gram = np.einsum("gnc,gnd->gcd", x, x)
    ridge = 1e-12 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(gram.shape[-1])
    solved = np.linalg.solve(gram + ridge + 1e-300, np.einsum("gnc,gn->gc", x, y)[..., None])[..., 0]
    smallest = 1e-4 / np.maximum(columns.mean(1), 1e-300) * loss.mean()
    solved = np.maximum(solved, smallest)  # a prefactor must be positive: such starts rank by what they then miss
    missed = np.sum((np.einsum("gnc,gc->gn", x, solved) - y) ** 2, -1)

    chosen: list[int] = []
    for candidate in np.argsort(missed, kind="stable"):
        apart = [np.max(np.abs(grid[candidate] - grid[c]), initial=1.0 if not dims else 0.0) for c in chosen]
        if min(apart, default=1.0) >= 0.1:
            chosen.append(int(candidate))
        if len(chosen) == count:
            break
    theta = np.empty((len(chosen), len(exponent)))
    theta[:, exponent], theta[:, ~exponent] = grid[chosen], np.log(solved[chosen])
    return theta


def refine(
    design: Design, loss: Floats, weights: Floats, objective: Objective, theta: Floats, *, steps: int = 100
) -> tuple[Floats, Floats]:
    """Damped Newton from (S, P) starts, each to its own minimum. `loss`, `weights`: (n,) or (S, n).

    A step is taken only when the objective falls. Where the Hessian is not positive definite the iteratively reweighted
    Gauss-Newton matrix takes its place; damping shrinks by 5 after a success and grows by 6 after a failure.

    Returns:
        (S, P) parameters and (S,) objectives.
    """
    theta = theta.copy()
    starts = len(theta)
    y = np.broadcast_to(loss, (starts, loss.shape[-1]))
    w = np.broadcast_to(weights, (starts, weights.shape[-1]))
    value, gradient, hessian, gauss, _ = _derivatives(design, y, w, objective, theta)
    damping = np.full(starts, 1e-3)
    live = np.arange(starts)
    for _ in range(steps):
        h, g = hessian[live], gradient[live]
        lowest = np.linalg.eigvalsh(h)
        h = np.where((lowest[:, 0] > 1e-12 * np.abs(lowest[:, -1]))[:, None, None], h, gauss[live])
        scale = np.einsum("spp->sp", h)
        scale = damping[live, None] * scale + 1e-14 * scale.max(-1, keepdims=True) + 1e-300
        step = np.linalg.solve(h + scale[:, :, None] * np.eye(h.shape[-1]), -g[..., None])[..., 0]
        step *= np.minimum(1.0, 3.0 / np.maximum(np.abs(step).max(-1, keepdims=True), 1e-300))
        gain = -np.einsum("sp,sp->s", g, step)
        moving = (gain > 1e-15 * value[live]) & (damping[live] < 1e12)
        live, step = live[moving], step[moving]
        if not len(live):
            break
        trial = theta[live] + step
        found = _derivatives(design, y[live], w[live], objective, trial)
        better = found[0] < value[live]
        damping[live] = np.where(better, np.maximum(damping[live] * 0.2, 1e-12), damping[live] * 6)
        taken = live[better]
        theta[taken] = trial[better]
        value[taken], gradient[taken], hessian[taken], gauss[taken] = (part[better] for part in found[:4])
    return theta, value


def _log_sum(design: Design, theta: Floats) -> tuple[Floats, Floats]:
    """(S, n) log predictions and (S, K, n) shares of the terms."""
    logs = np.einsum("knp,sp->skn", design.terms, theta, optimize=True) + design.offset
    top = logs.max(1, keepdims=True)
    shares = np.exp(logs - top)
    total = shares.sum(1, keepdims=True)
    shares /= total
    return (top + np.log(total))[:, 0], shares


def _derivatives(
    design: Design, loss: Floats, weights: Floats, objective: Objective, theta: Floats
) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """Objective (S,), gradient (S, P), Hessian and Gauss-Newton matrices (S, P, P), and the gradient's scale (S, P).

    With mu the log prediction, p_k the terms' shares, v_k their coefficients and J = sum_k p_k v_k:
    d mu = J and d2 mu = sum_k p_k v_k v_k' - J J'. With log residuals the Hessian of one row is
    (c + psi) J J' - psi sum_k p_k v_k v_k', psi the clipped residual and c its derivative; with raw residuals
    c pred^2 J J' - psi pred sum_k p_k v_k v_k'.
    """
    terms, P = design.terms, theta.shape[1]
    mu, shares = _log_sum(design, theta)
    with np.errstate(over="ignore", invalid="ignore"):
        slope = np.exp(mu) if objective.raw else np.ones_like(mu)
        residual = loss - slope if objective.raw else np.log(loss) - mu
        inside = np.abs(residual) <= objective.delta
        psi = np.clip(residual, -objective.delta, objective.delta)
        value = np.einsum("...n,...n->...", weights, huber(objective.delta, residual))
        value = np.where(np.isfinite(value), value, np.inf)

        pull = weights * psi * slope
        jacobian = np.matmul(shares.transpose(2, 0, 1), terms.transpose(1, 0, 2)).transpose(1, 0, 2)
        gradient = -np.einsum("sn,snp->sp", pull, jacobian, optimize=True)
        floor = np.abs(weights) * slope * np.maximum(np.abs(psi), 1e-12)
        size = np.einsum("sn,snp->sp", floor, np.abs(jacobian), optimize=True) + 1e-300

        curve = weights * inside * slope**2 + (0.0 if objective.raw else pull)
        outer = np.einsum("knp,knq->knpq", terms, terms).reshape(-1, P * P)
        second = (shares * pull[:, None, :]).reshape(len(theta), -1) @ outer
        hessian = _weighted_outer(curve, jacobian) - second.reshape(-1, P, P)
        soft = np.minimum(1.0, objective.delta / np.maximum(np.abs(residual), 1e-300))
        gauss = _weighted_outer(weights * soft * slope**2, jacobian)
    return value, gradient, hessian, gauss, size


def _weighted_outer(weight: Floats, jacobian: Floats) -> Floats:
    """sum_i weight_i J_i J_i' for each start."""
    scaled = jacobian * np.broadcast_to(weight, jacobian.shape[:2])[..., None]
    return np.asarray(np.matmul(scaled.transpose(0, 2, 1), jacobian), dtype=np.float64)
