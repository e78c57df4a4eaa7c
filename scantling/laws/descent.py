"""Newton's method on sums of power-law terms: objective, gradient and Hessian in closed form, many starts in one batch.

A law is a sum of terms whose logarithms are linear in the unknowns, so that
    log prediction_i = logsumexp_k(terms[k, i] . theta + offset[k, i])
covers L = E + A N^-alpha + B D^-beta, tied or fixed parameters, and prefactors per family alike. Library minimisers stop
early on objectives near 1e-3 (arXiv 2404.10102); this goes on until no step lowers the objective by 1e-15 of itself.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from scantling.laws.forms import Floats


@dataclass(frozen=True, eq=False)
class Design:
    """The terms of a law on given rows.

    Attributes:
        names: the P free parameters; logarithms of prefactors, or exponents.
        exponent: (P,) which of them are exponents; the others are logarithms and enter a term with coefficient 0 or 1.
        terms: (K, n, P) coefficients.
        offset: (K, n) fixed part of each term's logarithm; -inf for a term that is zero.
        kin: (P,) or empty: exponents with the same number start from the same value (one exponent per group of rows).
    """

    names: tuple[str, ...]
    exponent: tuple[bool, ...]
    terms: Floats
    offset: Floats
    kin: tuple[int, ...] = ()

    def rows(self, keep: npt.NDArray[np.bool_] | npt.NDArray[np.intp]) -> "Design":
        """The same law on a selection of rows."""
        return Design(self.names, self.exponent, self.terms[:, keep], self.offset[:, keep], self.kin)

    @cached_property
    def flat(self) -> Floats:
        """(P, K n) the coefficients as one matrix."""
        return np.ascontiguousarray(self.terms.reshape(-1, len(self.names)).T)

    @cached_property
    def outer(self) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Floats]:
        """Pairs of parameters that meet in a term, first and second, and (K n, pairs) products of their coefficients."""
        used = [np.flatnonzero(term.any(0)) for term in self.terms]
        pairs = sorted({(int(p), int(q)) for members in used for p in members for q in members if p <= q})
        first, second = (np.array([pair[i] for pair in pairs], dtype=np.intp) for i in (0, 1))
        products = self.terms[:, :, first] * self.terms[:, :, second]
        return first, second, np.ascontiguousarray(products.reshape(-1, len(pairs)))

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """The parameter and the term of every column of coefficients that is not all zero."""
        terms, _, parameters = self.terms.shape
        return [(p, k) for p in range(parameters) for k in range(terms) if self.terms[k, :, p].any()]

    def log_prediction(self, theta: Floats) -> Floats:
        """(S, n) log predictions at (S, P) parameters."""
        return log_sum(self, theta)[0]

    def condition(self, theta: Floats, weights: Floats) -> float:
        """Condition number of the weighted Jacobian of the log prediction at (P,) parameters, columns scaled to 1."""
        shares = log_sum(self, theta[None])[1][0]
        jacobian = np.einsum("kn,knp->np", shares, self.terms) * np.sqrt(weights)[:, None]
        return float(np.linalg.cond(jacobian / np.maximum(np.linalg.norm(jacobian, axis=0), 1e-300)))


@dataclass(frozen=True)
class Objective:
    """sum_i w_i Huber_delta(r_i), Huber_delta(r) = r^2/2 up to |r| = delta and delta (|r| - delta/2) beyond.

    Attributes:
        delta: infinite for least squares; tiny for least absolute deviations.
        raw: r = L - prediction instead of log L - log prediction.
        scale: (S, 1) factors of delta, one for each start, or None.
    """

    delta: float
    raw: bool = False
    scale: Floats | None = None

    @property
    def width(self) -> Floats | float:
        """delta, for each start where they differ."""
        return self.delta if self.scale is None else self.delta * self.scale

    def only(self, keep: npt.NDArray[np.bool_] | npt.NDArray[np.intp] | slice) -> "Objective":
        """For some of the starts."""
        return self if self.scale is None else Objective(self.delta, self.raw, self.scale[keep])


def refine(
    design: Design,
    loss: Floats,
    weights: Floats,
    objective: Objective,
    theta: Floats,
    *,
    steps: int = 100,
    tolerance: float = 1e-15,
    hold: npt.NDArray[np.bool_] | None = None,
) -> tuple[Floats, Floats]:
    """Damped Newton from (S, P) starts, each to its own minimum. `loss`, `weights`: (n,) or (S, n).

    A step is taken only when the objective falls. Where the Hessian is not positive definite the iteratively reweighted
    Gauss-Newton matrix takes its place; damping shrinks by 5 after a success and grows by 6 after a failure. A start has
    arrived when a step promises less than `tolerance` of the objective. Parameters marked in `hold`, (P,) or (S, P), keep
    their value.

    Returns:
        (S, P) parameters and (S,) objectives.
    """
    theta = theta.copy()
    starts = len(theta)
    moves = np.broadcast_to(1.0 if hold is None else (~hold).astype(np.float64), theta.shape)
    goal = np.broadcast_to(loss if objective.raw else np.log(loss), (starts, loss.shape[-1]))
    w = np.broadcast_to(weights, (starts, weights.shape[-1]))
    here = _evaluate(design, goal, w, objective, theta)
    value, gradient, matrix = here.value, here.gradient, _usable(here.hessian(), here)
    damping = np.full(starts, 1e-3)
    live = np.arange(starts)
    for _ in range(steps):
        h, g, move = matrix[live], gradient[live] * moves[live], moves[live]
        if hold is not None:
            h = h * move[:, :, None] * move[:, None, :]
            h += (1 - move)[:, :, None] * np.eye(h.shape[-1]) * np.abs(h).max((1, 2), keepdims=True)
        scale = np.einsum("spp->sp", h)
        scale = damping[live, None] * scale + 1e-14 * scale.max(-1, keepdims=True) + 1e-300
        step = np.linalg.solve(h + scale[:, :, None] * np.eye(h.shape[-1]), -g[..., None])[..., 0]
        step *= np.minimum(1.0, 3.0 / np.maximum(np.abs(step).max(-1, keepdims=True), 1e-300))
        gain = -np.einsum("sp,sp->s", g, step)
        moving = (gain > tolerance * value[live]) & (damping[live] < 1e12)
        live, step = live[moving], step[moving]
        if not len(live):
            break
        trial = theta[live] + step
        found = _evaluate(design, goal[live], w[live], objective.only(live), trial)
        better = found.value < value[live]
        damping[live] = np.where(better, np.maximum(damping[live] * 0.2, 1e-12), damping[live] * 6)
        if better.any():
            taken, found = live[better], found if better.all() else found.only(better)
            theta[taken], value[taken], gradient[taken] = trial[better], found.value, found.gradient
            matrix[taken] = _usable(found.hessian(), found)
    return theta, value


@dataclass(frozen=True, eq=False)
class _Point:
    """The objective at S parameters and what its derivatives are made of.

    With mu the log prediction, p_k the terms' shares, v_k their coefficients and J = sum_k p_k v_k:
    d mu = J and d2 mu = sum_k p_k v_k v_k' - J J'. With log residuals the Hessian of one row is
    (c + psi) J J' - psi sum_k p_k v_k v_k', psi the clipped residual and c its derivative; with raw residuals
    c pred^2 J J' - psi pred sum_k p_k v_k v_k'.

    Attributes:
        value: (S,) objectives.
        weight, residual, psi, slope: (S, n); slope is the prediction for raw residuals, 1 for log ones.
        shares: (S, K, n) of each term in the prediction.
        jacobian: (S, P, n) J.
    """

    design: Design
    objective: Objective
    value: Floats
    weight: Floats
    residual: Floats
    psi: Floats
    slope: Floats
    shares: Floats
    jacobian: Floats

    def only(self, keep: npt.NDArray[np.bool_]) -> "_Point":
        """Some of the S."""
        parts = (self.value, self.weight, self.residual, self.psi, self.slope, self.shares, self.jacobian)
        return _Point(self.design, self.objective.only(keep), *(part[keep] for part in parts))

    @property
    def gradient(self) -> Floats:
        """(S, P)."""
        pull = self.weight * self.psi * self.slope
        return np.asarray(-np.matmul(self.jacobian, pull[..., None])[..., 0], dtype=np.float64)

    def hessian(self) -> Floats:
        """(S, P, P)."""
        pull = self.weight * self.psi * self.slope
        curve = self.weight * (np.abs(self.residual) <= self.objective.width) * self.slope**2
        curve = curve if self.objective.raw else curve + pull
        first, second, products = self.design.outer
        met = (self.shares * pull[:, None, :]).reshape(len(self.value), -1) @ products
        found = _weighted_outer(curve, self.jacobian)
        found[:, first, second] -= met
        apart = first != second
        found[:, second[apart], first[apart]] -= met[:, apart]
        return found

    def gauss(self) -> Floats:
        """(S, P, P) the iteratively reweighted Gauss-Newton matrix, positive semidefinite everywhere."""
        soft = np.minimum(1.0, self.objective.width / np.maximum(np.abs(self.residual), 1e-300))
        return _weighted_outer(self.weight * soft * self.slope**2, self.jacobian)

    def size(self) -> Floats:
        """(S, P) the sum of the absolute contributions that cancel in the gradient."""
        floor = np.abs(self.weight) * self.slope * np.maximum(np.abs(self.psi), 1e-12)
        return np.asarray(np.matmul(np.abs(self.jacobian), floor[..., None])[..., 0] + 1e-300, dtype=np.float64)


def _evaluate(design: Design, goal: Floats, weights: Floats, objective: Objective, theta: Floats) -> _Point:
    """The objective at (S, P) parameters; `goal` is the loss for raw residuals and its log otherwise, (n,) or (S, n)."""
    mu, shares = log_sum(design, theta)
    with np.errstate(over="ignore", invalid="ignore"):
        slope = np.exp(mu) if objective.raw else np.ones_like(mu)
        residual = goal - (slope if objective.raw else mu)
        psi = np.clip(residual, -objective.width, objective.width)
        size = np.abs(psi)
        value = np.einsum("...n,...n->...", weights, size * (np.abs(residual) - 0.5 * size))
        value = np.where(np.isfinite(value), value, np.inf)
        jacobian = np.zeros((len(theta), theta.shape[1], mu.shape[1]))
        for p, k in design.places:
            jacobian[:, p] += shares[:, k] * design.terms[k, :, p]
    weights = np.broadcast_to(weights, mu.shape)
    return _Point(design, objective, value, weights, residual, psi, slope, shares, jacobian)


def _usable(hessian: Floats, point: _Point) -> Floats:
    """The Hessian where it is positive definite, the Gauss-Newton matrix elsewhere."""
    hessian = np.where(np.isfinite(hessian), hessian, 0.0)
    lowest = np.linalg.eigvalsh(hessian)
    poor = ~(lowest[:, 0] > 1e-12 * np.abs(lowest[:, -1]))
    if poor.any():
        hessian[poor] = np.nan_to_num(point.only(poor).gauss())
    return hessian


def log_sum(design: Design, theta: Floats) -> tuple[Floats, Floats]:
    """(S, n) log predictions and (S, K, n) shares of the terms."""
    logs = (theta @ design.flat).reshape(len(theta), *design.offset.shape) + design.offset
    top = logs.max(1, keepdims=True)
    logs -= top
    shares = np.exp(logs, out=logs)
    total = shares.sum(1, keepdims=True)
    shares /= total
    return (top + np.log(total))[:, 0], shares


def derivatives(
    design: Design, loss: Floats, weights: Floats, objective: Objective, theta: Floats
) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """Objective (S,), gradient (S, P), Hessian and Gauss-Newton matrices (S, P, P), and the gradient's scale (S, P)."""
    point = _evaluate(design, loss if objective.raw else np.log(loss), weights, objective, theta)
    return point.value, point.gradient, point.hessian(), point.gauss(), point.size()


def _weighted_outer(weight: Floats, jacobian: Floats) -> Floats:
    """sum_i weight_i J_i J_i' for each start; (S, n) and (S, P, n)."""
    return np.asarray(np.matmul(jacobian * weight[:, None], jacobian.transpose(0, 2, 1)), dtype=np.float64)


def curvature(design: Design, loss: Floats, weights: Floats, objective: Objective, theta: Floats) -> Floats:
    """(P, P) the iteratively reweighted Gauss-Newton matrix at (1, P) parameters."""
    return np.asarray(derivatives(design, loss, weights, objective, theta)[3][0], dtype=np.float64)
