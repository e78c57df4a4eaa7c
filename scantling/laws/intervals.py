"""What the rows leave open: resampled fits, profiles of the objective, and fits with one run left out."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import chdtri

from scantling.laws.bootstrap import (
    case_counts,
    enough_runs,
    independent_rows,
    noisy_losses,
    run_weights,
    share_inside,
)
from scantling.laws.descent import Design, Objective, curvature, refine
from scantling.laws.forms import Floats
from scantling.laws.formula import base_of
from scantling.laws.newton import in_pieces, nudge, resample
from scantling.laws.rows import Rows
from scantling.laws.solving import Solved, place

SMOOTH = 0.05  # absolute deviations are resampled as Huber's loss with this share of the median residual
LARGE = 20_000  # rows beyond which a resample is one Newton step
NEAR = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)  # where a profile is taken, in standard errors
FAR = (6.0, 10.0, 20.0)  # where it is followed on a side that has not yet risen to
FAR_BELOW = 6.63  # chi-square's 99% point
CLOSE = 1e-10  # of the objective: how near a profile's fits come to their minimum
MOST_RUNS = 400  # runs that are left out one by one with a full refit; beyond, with one Newton step


@dataclass(frozen=True)
class Profile:
    """The objective with one parameter held at each of several values.

    Attributes:
        name: the parameter.
        values: (G,) where it was held, ascending.
        statistic: (G,) twice the scaled excess of the objective: chi-square with 1 degree of freedom at the truth.
    """

    name: str
    values: tuple[float, ...]
    statistic: tuple[float, ...]

    def interval(self, level: float = 0.95) -> tuple[float | None, float | None]:
        """Where the statistic crosses its quantile on either side; None where it never does in the range followed."""
        x, y = np.array(self.values), np.array(self.statistic)
        low = int(np.argmin(y))
        limit = float(chdtri(1, 1 - level))
        ends: list[float | None] = []
        for side in (slice(low, None, -1), slice(low, None)):
            xs, ys = x[side], np.sqrt(np.maximum.accumulate(np.maximum(y[side], 0.0)))
            if ys[-1] < np.sqrt(limit):
                ends.append(None)
                continue
            k = int(np.argmax(ys >= np.sqrt(limit)))
            share = (np.sqrt(limit) - ys[k - 1]) / max(ys[k] - ys[k - 1], 1e-300) if k else 0.0
            ends.append(float(xs[k - 1] + share * (xs[k] - xs[k - 1])) if k else float(xs[0]))
        return ends[0], ends[1]


def bootstrap(
    solved: Solved, rows: Rows, residuals: Floats, *, resamples: int, seed: int
) -> tuple[Floats | None, str, list[str]]:
    """(R, parameters) draws or None, how they were made, and a sentence about resamples that gave no law."""
    free, n_runs, n = len(solved.layout.free), int(rows.run.max()) + 1, len(rows.loss)
    if resamples == 0:
        return None, "no resamples were asked for", []
    if n <= free:
        return None, f"{n} rows for {free} parameters leave no residuals to judge the noise by", []
    target = smoothed(solved.problem.target, residuals)
    rng = np.random.default_rng(seed)
    start = solved.minimum.theta
    if enough_runs(n_runs, free):
        inside = share_inside(_kept(solved, rows, residuals), target.delta)
        if n > LARGE:
            how = f"{resamples} resamples of {n_runs} runs, one Newton step each"
            pieces = []
            for part in _parts(resamples, n):
                change = rows.weight * (case_counts(rows.run, part, rng) - 1)
                pieces.append(
                    nudge(solved.design, rows.loss, change, target, start, weights=rows.weight, inside=inside)
                )
            theta = np.concatenate(pieces)
        else:
            weights, wider, how = run_weights(rows.run, free, inside, resamples, rng)
            theta = _resolved(solved, rows, rows.loss[None], rows.weight * weights, target, wider)
    else:
        how = (
            f"parametric: {resamples} draws of noise around the fitted law, because {n_runs} runs are few to draw again"
        )
        losses = noisy_losses(
            rows.loss * np.exp(-residuals), residuals, rows.run, free=free, resamples=resamples, rng=rng
        )
        theta = _resolved(solved, rows, losses, rows.weight[None], target)
    draws = solved.params(theta)
    usable = np.isfinite(draws).all(1)
    for i, name in enumerate(solved.names):
        if base_of(name) != solved.problem.formula.constant:
            usable &= draws[:, i] > 0
    lost = int(np.sum(~usable))
    if lost > resamples / 2:
        return None, f"{lost} of {resamples} resamples gave no law with falling loss: the rows do not determine one", []
    sentence = f"{lost} of {resamples} resamples gave no law with falling loss and are not in the intervals"
    return draws[usable], how, [sentence] if lost else []


def smoothed(target: Objective, residuals: Floats) -> Objective:
    """Absolute deviations as Huber's loss far below the noise: as good, and much quicker to resample."""
    if target.delta > 1e-5:
        return target
    return Objective(max(1e-5, SMOOTH * float(np.median(np.abs(residuals)))), target.raw)


def _parts(resamples: int, rows: int) -> list[int]:
    size = max(1, 20_000_000 // rows)
    return [min(size, resamples - start) for start in range(0, resamples, size)]


def _resolved(
    solved: Solved, rows: Rows, losses: Floats, weights: Floats, target: Objective, wider: float = 1.0
) -> Floats:
    """Refits in one batch; those that leave a bound are refitted with that parameter held there."""
    problem, start = solved.problem, solved.minimum.theta
    theta = start + wider * (resample(solved.design, losses, weights, target, start) - start)
    for name, (low, high) in problem.bounds.items():
        if name not in solved.layout.free:
            continue
        column = solved.names.index(name)
        for edge, beyond in ((low, np.less), (high, np.greater)):
            values = solved.params(theta)[:, column]
            out = beyond(values, edge)
            if not np.isfinite(edge) or not out.any():
                continue
            index = solved.layout.free.index(name)
            where, design = place(rows, solved.actual, centre=False)
            start = _uncentred(solved, theta[out])
            start[:, index] = edge if solved.design.exponent[index] else np.log(max(edge, 1e-300))
            hold = np.arange(len(where.free)) == index
            y, w = (x if len(x) == 1 else x[out] for x in (np.atleast_2d(losses), np.atleast_2d(weights)))
            held, _ = refine(design, y, w, target, start, hold=hold)
            theta[out] = _centred(solved, held)
    return theta


def _uncentred(solved: Solved, theta: Floats) -> Floats:
    """The vector with every prefactor as the logarithm of its value."""
    values = solved.params(theta)
    found = theta.copy()
    for i, name in enumerate(solved.layout.free):
        if not solved.design.exponent[i]:
            with np.errstate(divide="ignore", over="ignore"):
                found[:, i] = np.log(np.clip(values[:, solved.names.index(name)], 1e-300, 1e300))
    return found


def _centred(solved: Solved, theta: Floats) -> Floats:
    """The inverse of `_uncentred`: shifts by what centring adds, which is linear in the exponents."""
    return theta - (_uncentred(solved, theta) - theta)


def profiles(solved: Solved, rows: Rows, residuals: Floats) -> tuple[Profile, ...]:
    """The profile of every free parameter.

    The excess of the objective is scaled as a quasi-likelihood ratio: 2 (F - F_min) E[psi'] / E[psi^2], with psi the
    clipped residual and E[psi'] the smoothed share of residuals inside delta (Ronchetti's tau-test), times
    (n_eff - p) / n for the parameters fitted and the correlation of checkpoints of one run.
    """
    free = len(solved.layout.free)
    if len(rows.loss) <= free + 1 or len(rows.loss) > LARGE:
        return ()
    target = smoothed(solved.problem.target, residuals)
    _, design = place(rows, solved.actual, centre=False)
    best, lowest = refine(design, rows.loss, rows.weight, target, _uncentred(solved, solved.minimum.theta[None]))
    kept = _kept(solved, rows, residuals)
    scale = 2 * information(kept, target, independent_rows(residuals, rows.run) - free)
    inside = share_inside(kept, target.delta)
    spread = (
        inverse(curvature(design, rows.loss, rows.weight, Objective(np.inf, target.raw), best)) / inside / (scale / 2)
    )
    deviation = np.sqrt(np.maximum(np.diag(spread), 1e-24))
    stride = spread / deviation[:, None]
    points = _held_at(design, rows, target, np.repeat(np.arange(free), 2 * len(NEAR)),
                      np.tile(np.r_[-np.array(NEAR), NEAR], free), best, stride)  # fmt: skip
    ends = [(i, sign) for i in range(free) for sign in (-1, 1)
            if scale * (points[(i, sign * NEAR[-1])][1] - lowest) < FAR_BELOW]  # fmt: skip
    if ends:
        held, signs = (np.repeat([end[k] for end in ends], len(FAR)) for k in (0, 1))
        points |= _held_at(design, rows, target, held, signs * np.tile(FAR, len(ends)), best, stride)
    found = []
    for i, name in enumerate(solved.layout.free):
        own = sorted((value, level) for (held_one, _), (value, level) in points.items() if held_one == i)
        own = sorted([*own, (float(best[0, i]), float(lowest[0]))])
        shown = np.array([value for value, _ in own])
        shown = shown if solved.design.exponent[i] else np.exp(np.clip(shown, -700, 700))
        excess = np.maximum(scale * (np.array([level for _, level in own]) - lowest), 0.0)
        found.append(Profile(name, tuple(map(float, shown)), tuple(map(float, excess))))
    return tuple(found)


def _held_at(
    design: Design,
    rows: Rows,
    target: Objective,
    held: npt.NDArray[np.intp],
    steps: Floats,
    best: Floats,
    stride: Floats,
) -> dict[tuple[int, float], tuple[float, float]]:
    """For each parameter held and step in standard errors: its value there, and the objective's minimum over the others."""
    starts = best + steps[:, None] * stride[held]
    hold = held[:, None] == np.arange(best.shape[1])
    _, level = in_pieces(design, rows.loss, rows.weight, target, starts, CLOSE, hold)
    return {
        (int(i), float(step)): (float(value), float(found))
        for i, step, value, found in zip(held, steps, starts[hold], level, strict=True)
    }


def inverse(matrix: Floats) -> Floats:
    """The inverse of a positive definite matrix, scaled to ones on the diagonal for the sake of its accuracy."""
    size = np.sqrt(np.maximum(np.diag(matrix), 1e-300))
    return np.asarray(
        np.linalg.pinv(matrix / np.outer(size, size), rcond=1e-14) / np.outer(size, size), dtype=np.float64
    )


def _kept(solved: Solved, rows: Rows, residuals: Floats) -> Floats:
    """(n,) what the objective is a sum of: log residuals, or raw ones."""
    return rows.loss - np.exp(solved.log_prediction) if solved.problem.target.raw else residuals


def information(kept: Floats, target: Objective, worth: float) -> float:
    """E[psi'] / E[psi^2] x worth / n, the factor that makes the objective a log-likelihood.

    Args:
        kept: (n,) residuals that the objective sums.
        target: the objective.
        worth: what the rows are worth, n_eff - p.
    """
    psi = np.clip(kept, -target.delta, target.delta)
    return share_inside(kept, target.delta) / max(float(np.mean(psi**2)), 1e-300) * max(worth, 1.0) / len(kept)


def left_out(solved: Solved, rows: Rows, residuals: Floats) -> Floats:
    """(runs, parameters) the law without each run in turn."""
    runs = int(rows.run.max()) + 1
    target = smoothed(solved.problem.target, residuals)
    start = solved.minimum.theta
    if runs > MOST_RUNS or len(rows.loss) > LARGE:
        return np.empty((0, len(solved.names)))
    gone = rows.weight * (np.arange(runs)[:, None] != rows.run)
    return solved.params(resample(solved.design, rows.loss, gone, target, start, again=False))
