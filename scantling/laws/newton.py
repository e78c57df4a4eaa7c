"""The minimiser behind every fit: a grid of starts with the linear part solved, each refined; resamples in one batch.

Starts come from a grid of exponents with the prefactors solved by non-negative least squares (variable projection); each is
refined by damped Newton steps (`descent`) while Huber's delta is annealed from 0.1 down to its value.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scantling.laws.descent import Design, Objective, derivatives, log_sum, refine
from scantling.laws.forms import Floats

EXPONENTS = (0.05, 1.2)  # the range of exponents searched for starts
CELLS = 400_000  # numbers held at once per array when a batch is cut into pieces (what the processor's cache holds)
THIN = 4000  # rows on which the starts of a large table are chosen and refined
SCREEN = 1000  # rows on which the grid of exponents is compared
GRID = 576  # pairs (or triples, ...) of exponents tried for starts
ANNEAL = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)


@dataclass(frozen=True, eq=False)
class Minimum:
    """The best of several starts.

    Attributes:
        theta: (P,) parameters.
        value: objective.
        gradient: largest |gradient| relative to the sum of the absolute contributions that cancel in it.
        starts: starts tried.
        agreeing: starts that end within 1e-7 (relative) of the best objective, or that fit the rows exactly.
        basins: the distinct minima found: objective, and how many starts ended there; best first.
    """

    theta: Floats
    value: float
    gradient: float
    starts: int
    agreeing: int
    basins: tuple[tuple[float, int], ...] = ()


def minimise(
    design: Design, loss: Floats, weights: Floats, objective: Objective, *, guesses: Floats | None = None
) -> Minimum:
    """The global minimum as far as a grid of starts can tell.

    Tables of more than `THIN` rows choose and refine their starts on evenly spaced rows, and only the distinct minima
    found there are refined on all of them.

    Args:
        guesses: (S, P) further starts, such as the minimum of a neighbouring problem.
    """
    keep = _thinned(len(loss))
    some = design.rows(keep)
    few = keep[:: max(1, len(keep) // SCREEN)]
    theta = starting_points(design.rows(few), loss[few], weights[few])
    if guesses is not None:
        theta = np.concatenate([theta, guesses])
    stages = [Objective(d, objective.raw) for d in ANNEAL if d > objective.delta] + [objective]
    for stage in stages:
        theta, value = refine(some, loss[keep], weights[keep], stage, theta)
    count = np.ones(len(value), dtype=np.intp)
    if len(keep) < len(loss):
        found = _basins(value, np.sum(weights[keep]))
        count = np.array([number for _, number, _ in found])
        theta = theta[[index for _, _, index in found]][:2]
        count = np.array([count[0], count[1:].sum()])[: len(theta)]
        soft = [Objective(d, objective.raw) for d in (10 * objective.delta,) if np.isfinite(d)]
        for stage in (*soft, objective):
            theta, value = refine(design, loss, weights, stage, theta)
    best = int(np.argmin(value))
    _, gradient, _, _, size = derivatives(design, loss, weights, objective, theta[best : best + 1])
    near = value <= value[best] * (1 + 1e-7) + 1e-24 * np.sum(weights)
    return Minimum(
        theta=theta[best],
        value=float(value[best]),
        gradient=float(np.max(np.abs(gradient[0]) / size[0])),
        starts=int(count.sum()),
        agreeing=int(count[near].sum()),
        basins=tuple((level, int(number)) for level, number, _ in _basins(value, np.sum(weights), count)),
    )


def _thinned(rows: int) -> npt.NDArray[np.intp]:
    """All rows of a small table, `THIN` evenly spaced ones of a large one."""
    return np.arange(rows) if rows <= 2 * THIN else np.unique(np.linspace(0, rows - 1, THIN).astype(np.intp))


def _basins(value: Floats, weight: float, count: npt.NDArray[np.intp] | None = None) -> list[tuple[float, int, int]]:
    """Objective, number of starts and one of them, for each distinct minimum (1e-6 relative apart), best first."""
    number = np.ones(len(value), dtype=np.intp) if count is None else count
    found: list[tuple[float, int, int]] = []
    for i in np.argsort(value, kind="stable"):
        if found and value[i] <= found[-1][0] * (1 + 1e-6) + 1e-24 * weight:
            level, members, index = found[-1]
            found[-1] = (level, members + int(number[i]), index)
        else:
            found.append((float(value[i]), int(number[i]), int(i)))
    return found


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


def nudge(
    design: Design,
    loss: Floats,
    change: Floats,
    objective: Objective,
    theta: Floats,
    *,
    weights: Floats,
    inside: float,
) -> Floats:
    """(R, P) one Newton step from the minimum for weights that change by (R, n): theta + H^-1 sum_i change_i psi_i J_i.

    H = inside x sum_i w_i J_i J_i', with `inside` the expected share of residuals within delta. Among many rows a resample
    changes little, so that one step lands on its own minimum to second order.
    """
    mu, shares = log_sum(design, theta[None])
    slope = np.exp(mu[0]) if objective.raw else np.ones(len(loss))
    residual = loss - slope if objective.raw else np.log(loss) - mu[0]
    jacobian = np.einsum("kn,knp->np", shares[0], design.terms, optimize=True) * slope[:, None]
    psi = np.clip(residual, -objective.delta, objective.delta)
    hessian = inside * (jacobian * weights[:, None]).T @ jacobian
    return np.asarray(theta + np.linalg.solve(hessian, (change @ (psi[:, None] * jacobian)).T).T, dtype=np.float64)


def starting_points(design: Design, loss: Floats, weights: Floats, count: int = 6) -> Floats:
    """(count, P) spread-out starts: a grid of exponents, prefactors by least squares of relative error."""
    exponent = np.array(design.exponent)
    kin = np.array(design.kin or range(len(exponent)))[exponent]
    _, member_of = np.unique(kin, return_inverse=True)
    dims = int(member_of.max()) + 1 if len(kin) else 0
    if dims <= 3:
        side = max(2, round(GRID ** (1 / max(dims, 1))))
        axis = np.linspace(*EXPONENTS, side if dims > 1 else 48)
        grid = np.stack(np.meshgrid(*[axis] * dims, indexing="ij"), -1).reshape(-1, dims) if dims else np.zeros((1, 0))
    else:
        grid = np.random.default_rng(0).uniform(*EXPONENTS, (GRID, dims))
    few = grid
    grid = grid[:, member_of] if dims else grid

    shape = np.exp(np.einsum("knp,gp->gkn", design.terms[:, :, exponent], grid) + design.offset)
    member = design.terms[:, :, ~exponent]
    columns = np.matmul(shape.transpose(2, 0, 1), member.transpose(1, 0, 2)).transpose(1, 0, 2)
    constant = np.einsum("gkn,kn->gn", shape, 1 - member.sum(-1))
    root = np.sqrt(weights) / loss
    x, y = columns * root[:, None], (loss - constant) * root
    gram = np.matmul(x.transpose(0, 2, 1), x)
    ridge = 1e-12 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(gram.shape[-1])
    right = np.matmul(x.transpose(0, 2, 1), y[..., None])[..., 0]
    solved = _non_negative(gram + ridge + 1e-300, right)
    smallest = 1e-4 / np.maximum(columns.mean(1), 1e-300) * loss.mean()
    solved = np.maximum(solved, smallest)  # a prefactor must be positive: such starts rank by what they then miss
    missed = np.sum((np.matmul(x, solved[..., None])[..., 0] - y) ** 2, -1)

    chosen: list[int] = []
    for candidate in np.argsort(missed, kind="stable"):
        apart = [np.max(np.abs(few[candidate] - few[c]), initial=1.0 if not dims else 0.0) for c in chosen]
        if min(apart, default=1.0) >= 0.1:
            chosen.append(int(candidate))
        if len(chosen) == count:
            break
    theta = np.empty((len(chosen), len(exponent)))
    theta[:, exponent], theta[:, ~exponent] = grid[chosen], np.log(solved[chosen])
    return theta


def _non_negative(gram: Floats, right: Floats) -> Floats:
    """Least squares with the columns that come out negative taken away, one round after another; (G, c)."""
    gone = np.zeros(right.shape, dtype=np.bool_)
    eye = np.eye(right.shape[-1])
    for _ in range(right.shape[-1]):
        kept = (~gone).astype(np.float64)
        masked = gram * kept[:, :, None] * kept[:, None, :] + eye * gone[:, :, None]
        solved = np.linalg.solve(masked, (right * kept)[..., None])[..., 0]
        if not (solved < 0).any():
            break
        gone |= solved < 0
    return np.asarray(np.maximum(solved, 0.0), dtype=np.float64)
