"""The minimiser behind every fit: spread-out starts refined in one batch, for one problem or many, and resamples likewise.

Starts (`starts`) are refined by damped Newton steps (`descent`) while Huber's delta is annealed from 0.1 down to its value.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from scantling.laws.descent import Design, Objective, derivatives, log_sum, refine
from scantling.laws.forms import Floats
from scantling.laws.starts import starting_points

CELLS = 100_000  # numbers held at once per array when a batch is cut into pieces (what the processor's cache holds)
THIN = 4000  # rows on which the starts of a large table are chosen and refined
SCREEN = 1000  # rows on which the grid of exponents is compared
LOOSE = 1e-10  # tolerance on the way to the last delta
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
    """The global minimum as far as a grid of starts can tell; `weights` (n,), `guesses` (S, P) further starts."""
    return minimise_all(design, loss, weights[None], [objective], guesses=guesses)[0]


def minimise_all(
    design: Design,
    loss: Floats,
    weights: Floats,
    objectives: Sequence[Objective],
    *,
    guesses: Floats | None = None,
) -> list[Minimum]:
    """The global minimum of V neighbouring problems, each from starts of its own, all refined in one batch.

    Starts that come to one point before delta has reached its value go on as one, and count as many. Tables of more than
    `THIN` rows choose and refine their starts on evenly spaced rows, and only the two best minima found there are refined
    on all of them.

    Args:
        design: the terms, the same for all.
        loss: (n,) nats per token.
        weights: (V, n); zero for rows that a problem leaves out.
        objectives: V of them, all of log or all of raw residuals.
        guesses: (S, P) further starts for each, such as the minimum of a neighbouring problem.
    """
    keep = _thinned(len(loss))
    some = design.rows(keep)
    few = keep[:: max(1, len(keep) // SCREEN)]
    starts = starting_points(design.rows(few), loss[few], weights[:, few])
    if guesses is not None:
        starts = [np.concatenate([own, guesses]) for own in starts]
    batch = _Batch(
        np.repeat(np.arange(len(starts)), [len(own) for own in starts]),
        np.concatenate(starts),
        np.ones(sum(map(len, starts)), dtype=np.intp),
        np.full(sum(map(len, starts)), np.inf),
    )
    deltas = [[d for d in ANNEAL if d > objective.delta] + [objective.delta] for objective in objectives]
    for stage in range(max(map(len, deltas))):
        now = [own[stage] if stage < len(own) else None for own in deltas]
        batch = batch.refined(some, loss[keep], weights[:, keep], now, objectives[0].raw, LOOSE)
    if len(keep) < len(loss):
        batch = batch.best(2)
        soft = [10 * objective.delta if np.isfinite(objective.delta) else None for objective in objectives]
        batch = batch.refined(design, loss, weights, soft, objectives[0].raw, LOOSE)
    last = [objective.delta for objective in objectives]
    batch = batch.refined(design, loss, weights, last, objectives[0].raw)
    return [
        _certified(design, loss, weights[v], objective, batch.only(batch.case == v))
        for v, objective in enumerate(objectives)
    ]


@dataclass(frozen=True, eq=False)
class _Batch:
    """Starts on their way: (S,) the problem each belongs to, (S, P) where it is, how many it stands for, (S,) objectives."""

    case: npt.NDArray[np.intp]
    theta: Floats
    count: npt.NDArray[np.intp]
    value: Floats

    def only(self, keep: npt.NDArray[np.bool_] | npt.NDArray[np.intp]) -> "_Batch":
        """Some of them."""
        return _Batch(self.case[keep], self.theta[keep], self.count[keep], self.value[keep])

    def refined(
        self,
        design: Design,
        loss: Floats,
        weights: Floats,
        deltas: Sequence[float | None],
        raw: bool,
        tolerance: float = 1e-15,
    ) -> "_Batch":
        """Each problem's starts refined at its delta; problems without one stay as they are."""
        moving = np.array([delta is not None for delta in deltas])[self.case]
        theta, value, case = self.theta.copy(), self.value.copy(), self.case[moving]
        if len(case):
            width = np.array([np.nan if delta is None else delta for delta in deltas])[case]
            same = bool((width == width[0]).all())
            target = Objective(float(width[0]), raw) if same else Objective(1.0, raw, width[:, None])
            w = weights[0] if len(weights) == 1 else weights[case]
            theta[moving], value[moving] = in_pieces(design, loss, w, target, theta[moving], tolerance)
        return _Batch(self.case, theta, self.count, value)._merged()

    def _merged(self) -> "_Batch":
        """Starts of one problem that came to one point become one."""
        order = np.lexsort((self.value, self.case))
        kept: list[int] = []
        count = self.count.copy()
        for i in order:
            last = kept[-1] if kept else -1
            if (
                last >= 0
                and self.case[i] == self.case[last]
                and self.value[i] <= self.value[last] * (1 + 1e-7)
                and np.abs(self.theta[i] - self.theta[last]).max() < 1e-4
            ):
                count[last] += count[i]
            else:
                kept.append(int(i))
        return _Batch(self.case, self.theta, count, self.value).only(np.array(kept))

    def best(self, number: int) -> "_Batch":
        """The best few of each problem; the others are counted with the last of them."""
        kept, count = [], self.count.copy()
        for v in range(int(self.case.max()) + 1):
            own = np.flatnonzero(self.case == v)
            own = own[np.argsort(self.value[own], kind="stable")]
            count[own[:number][-1]] += count[own[number:]].sum()
            kept.extend(own[:number].tolist())
        return _Batch(self.case, self.theta, count, self.value).only(np.array(kept))


def _certified(design: Design, loss: Floats, weights: Floats, objective: Objective, ends: _Batch) -> Minimum:
    """The best end of one problem, with the evidence."""
    best = int(np.argmin(ends.value))
    _, gradient, _, _, size = derivatives(design, loss, weights, objective, ends.theta[best : best + 1])
    near = ends.value <= ends.value[best] * (1 + 1e-7) + 1e-24 * np.sum(weights)
    return Minimum(
        theta=ends.theta[best],
        value=float(ends.value[best]),
        gradient=float(np.max(np.abs(gradient[0]) / size[0])),
        starts=int(ends.count.sum()),
        agreeing=int(ends.count[near].sum()),
        basins=_basins(ends.value, ends.count, float(np.sum(weights))),
    )


def _thinned(rows: int) -> npt.NDArray[np.intp]:
    """All rows of a small table, `THIN` evenly spaced ones of a large one."""
    return np.arange(rows) if rows <= 2 * THIN else np.unique(np.linspace(0, rows - 1, THIN).astype(np.intp))


def _basins(value: Floats, count: npt.NDArray[np.intp], weight: float) -> tuple[tuple[float, int], ...]:
    """Objective and number of starts of each distinct minimum (1e-6 relative apart), best first."""
    found: list[tuple[float, int]] = []
    for i in np.argsort(value, kind="stable"):
        if found and value[i] <= found[-1][0] * (1 + 1e-6) + 1e-24 * weight:
            found[-1] = (found[-1][0], found[-1][1] + int(count[i]))
        else:
            found.append((float(value[i]), int(count[i])))
    return tuple(found)


def in_pieces(
    design: Design,
    loss: Floats,
    weights: Floats,
    objective: Objective,
    theta: Floats,
    tolerance: float = 1e-15,
    hold: npt.NDArray[np.bool_] | None = None,
) -> tuple[Floats, Floats]:
    """`refine` for many starts, in pieces that fit the processor's cache; `hold` (S, P)."""
    size = max(1, CELLS // design.offset.size)
    pieces = []
    for low in range(0, len(theta), size):
        part = slice(low, low + size)
        y, w = (x if x.ndim == 1 else x[part] for x in (loss, weights))
        held = None if hold is None else hold[part]
        pieces.append(refine(design, y, w, objective.only(part), theta[part], tolerance=tolerance, hold=held))
    return np.concatenate([one for one, _ in pieces]), np.concatenate([value for _, value in pieces])


def resample(
    design: Design, loss: Floats, weights: Floats, objective: Objective, start: Floats, *, again: bool = True
) -> Floats:
    """(R, P) minima for R weight vectors (R, n) or R loss vectors (R, n), all begun at the full-data optimum.

    Two passes, one direct and one that anneals delta from ten times above, keep the better: a single pass may miss the
    best known minimum in a few resamples of a thousand. `again=False` leaves the second away.
    """
    loss, weights = np.broadcast_arrays(np.atleast_2d(loss), np.atleast_2d(weights))
    theta, value = in_pieces(design, loss, weights, objective, np.tile(start, (len(loss), 1)))
    if again and np.isfinite(objective.delta):
        soft = Objective(10 * objective.delta, objective.raw)
        smooth, _ = in_pieces(design, loss, weights, soft, theta, LOOSE)
        other, other_value = in_pieces(design, loss, weights, objective, smooth)
        theta = np.where((other_value < value)[:, None], other, theta)
    return theta


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
