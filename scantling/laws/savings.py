"""How many FLOPs one architecture saves over another at equal loss, with an interval.

Definition. Two families of runs, A (baseline) and B, share data, tokenizer and validation set. C is the actual training
compute of each run in its own architecture (not 6 N of the baseline), M the rule by which its tokens were chosen (its
path). All runs are fitted at once:

    one path:            L_X(C)    = E + lambda_X C^-eta
    two or more paths:   L_X(C, M) = E + (a_X M^eta + b_X M^-eta) C^-eta

with E (same data, same floor) and eta shared, and the prefactors of each family its own. The second line is the
over-training form (arXiv 2403.08540, eq. 4). Both of its prefactors are free per family: sharing b would say that an
architecture cannot change what it learns per token, and on a path of known M nothing is gained by saying so, because
only lambda_X(M) = a_X M^eta + b_X M^-eta enters. Then C_B(l) is the compute at which B reaches loss l on the same path,

    S(C0) = 1 - C_B(L_A(C0)) / C0      at the largest compute C0 both families were measured at,

which is 1 - (lambda_B / lambda_A)^(1/eta): the same at every scale as long as eta is shared.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from scantling.errors import InputError
from scantling.laws.bootstrap import (
    FEWEST_RUNS,
    case_counts,
    enough_runs,
    equal_run_weights,
    noisy_losses,
    residual_sd,
)
from scantling.laws.descent import Design, Objective
from scantling.laws.fitting import SINGULAR
from scantling.laws.forms import Floats
from scantling.laws.matched import MatchedRuns, matched_runs
from scantling.laws.newton import Minimum, minimise, resample
from scantling.laws.rows import levels
from scantling.laws.statistics import line

OBJECTIVE = Objective(delta=1e-2)  # squares for the usual seed noise of 0.2 to 0.5%, robust to a run that went wrong
FEWEST_PAIRS = 4  # of equal runs in both families, to see a trend in their gap
HELD_SHARE = 0.2  # the largest budgets of each family, as few as hold a fifth of its rows, test the shared exponent


@dataclass(frozen=True)
class SavingAt:
    """The saving on one path: value and 95% interval (None without draws)."""

    multiplier: float
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Saving:
    """A loss-matched FLOP saving of `candidate` over `baseline`.

    Attributes:
        baseline: family A.
        candidate: family B.
        value: S = 1 - C_B(L_A(C0)) / C0; positive when the candidate needs less.
        low: 2.5% point of the resamples, or None; -inf when that many never reach the loss.
        high: 97.5% point, or None.
        probability: share of resamples with S > 0; undefined ones count as no saving.
        undefined: resamples in which the candidate never reaches the loss.
        compute: C0, the largest compute both families were measured at.
        multiplier: M of the path the saving is stated for: the geometric middle of those measured; None without paths.
        by_multiplier: the saving on each measured path.
        E: shared floor, nats per token.
        eta: shared exponent of C.
        residual_sd: standard deviation of the log residuals.
        measured: model-free check, median of 1 - C_B / C_A(L_B) on A's interpolated curve; None without overlap.
        measured_points: runs of B inside A's measured losses.
        held_out_shared: mean relative error on the held-out largest budgets with one eta; None when too few rows.
        held_out_separate: the same with one eta per family.
        runs: runs of A and of B.
        bootstrap: how the interval was made.
        notes: extrapolation, disagreement, rows left out.
    """

    baseline: str
    candidate: str
    value: float
    low: float | None
    high: float | None
    probability: float | None
    undefined: int
    compute: float
    multiplier: float | None
    by_multiplier: tuple[SavingAt, ...]
    E: float
    eta: float
    residual_sd: float
    measured: float | None
    measured_points: int
    held_out_shared: float | None
    held_out_separate: float | None
    runs: tuple[int, int]
    bootstrap: str
    notes: tuple[str, ...]

    def sentence(self) -> str:
        """The finding in plain English, with what weakens it."""
        at = f"at {self.compute:.3g} training FLOPs"
        if self.multiplier is not None:
            at += f" and {self.multiplier:.3g} tokens per parameter"
        amount = f"{abs(self.value):.1%} {'fewer' if self.value >= 0 else 'more'} FLOPs"
        unsure = (
            f"{self.candidate} is not distinguishable from {self.baseline} {at}: the estimate is {amount} for the same "
            "loss, but "
        )
        if self.low is None or self.high is None:
            found = f"{unsure}there is no interval ({self.bootstrap})"
        elif self.low <= 0 <= self.high:
            low = f"{self.low:.1%}" if np.isfinite(self.low) else "never reaching that loss"
            found = f"{unsure}the 95% interval of the saving, {low} to {self.high:.1%}, includes 0"
        else:
            ends = sorted((abs(self.low), abs(self.high)))
            found = (
                f"{self.candidate} needs {amount} than {self.baseline} for the same loss {at} "
                f"(95% interval {ends[0]:.1%} to {ends[1]:.1%}; {self.runs[0]} and {self.runs[1]} runs)"
            )
        return ". ".join((found, *(note[:1].upper() + note[1:] for note in self.notes))) + "."


def saving(
    table: pd.DataFrame,
    *,
    baseline: str,
    candidate: str | None = None,
    family: str = "family",
    compute: str = "C",
    loss: str = "loss",
    run: str = "run",
    path: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Saving:
    """The loss-matched FLOP saving between two families of runs; the module's docstring has the definition.

    Huber loss of log residuals, delta = 0.01, every run weighing the same. With 8 or more runs per family (and three
    per parameter) whole runs are drawn again for the interval, as pairs when both families name the same runs (shared
    seeds or budgets); otherwise noise is drawn around the fitted laws, without pairing, which is the cautious side.

    Args:
        table: one row per run or checkpoint.
        baseline: name of family A.
        candidate: name of family B; may be left out when the table holds two families.
        family: column naming the family.
        compute: column of actual training FLOPs of that architecture.
        loss: column of losses, nats per token.
        run: column naming the run; the same name in both families makes a pair.
        path: column of the rule for tokens, M; without it every run is taken to lie on one path.
        resamples: bootstrap resamples; 0 for none.
        seed: of the bootstrap.

    Raises:
        InputError: columns or families are missing, or the families share no path or no range of compute.
    """
    if resamples < 0 or resamples == 1:
        raise InputError(f"resamples: expected 0 or at least 2, got {resamples}")
    wanted = {"family": family, "compute": compute, "loss": loss, "run": run} | ({"path": path} if path else {})
    rows, names, candidate, notes = matched_runs(table, baseline, candidate, wanted)
    weight = equal_run_weights(rows.run)
    design, middle = _design(rows, shared=True)
    minimum = _minimise(design, rows, weight)
    estimate = minimum.theta[None]
    free = len(design.names)
    prediction = np.exp(design.log_prediction(estimate)[0])
    residuals = np.log(rows.loss / prediction)

    per_family = (len(np.unique(rows.run[~rows.second])), len(np.unique(rows.run[rows.second])))
    rng = np.random.default_rng(seed)
    draws: Floats | None = None
    if resamples == 0:
        how = "no resamples were asked for"
    elif len(rows.C) <= free:
        how = f"{len(rows.C)} rows for {free} parameters leave no residuals to judge the noise by"
    elif min(per_family) >= FEWEST_RUNS and enough_runs(sum(per_family), free):
        counts, how = _case_counts(rows, names, resamples, rng)
        draws = resample(design, rows.loss, weight * counts, OBJECTIVE, minimum.theta)
    else:
        how = f"parametric: {resamples} draws of noise around the fitted laws, because there are few runs"
        losses = noisy_losses(prediction, residuals, rows.run, free=free, resamples=resamples, rng=rng)
        draws = resample(design, losses, weight, OBJECTIVE, minimum.theta)

    floor = float(np.exp(minimum.theta[design.names.index("E")]))
    top = min(rows.C[~rows.second].max(), rows.C[rows.second].max())
    measured_paths = [float(np.exp(np.log(rows.M[rows.path == p]).mean())) for p in range(int(rows.path.max()) + 1)]
    m = float(np.sqrt(measured_paths[0] * measured_paths[-1]))
    value = float(_savings(design, estimate, middle, top, m)[0])
    low, high, probability, undefined = _interval(design, draws, middle, top, m)
    by_path = []
    for one in measured_paths:
        ends = _interval(design, draws, middle, top, one)
        by_path.append(SavingAt(one, float(_savings(design, estimate, middle, top, one)[0]), ends[0], ends[1]))

    measured, points = _model_free(rows, floor)
    held = _held_out(rows)
    needed = top * (1 - value)
    reach = rows.C[rows.second]
    if not reach.min() <= needed <= reach.max():
        notes.append(
            f"extrapolated: {candidate} would need {needed:.3g} FLOPs, outside its measured {reach.min():.3g} to "
            f"{reach.max():.3g}"
        )
    if measured is None:
        notes.append(
            "no measured losses of the two families overlap on one path: the saving rests on the fitted curves"
        )
    elif low is not None and high is not None and not low <= measured <= high:
        notes.append(
            f"interpolating the measured losses gives {measured:.1%}, outside the interval: the form fits poorly"
        )
    notes += _gap_notes(rows, names, value, baseline, candidate)
    if held[0] is not None and held[1] is not None and held[1] < held[0]:
        notes.append(
            f"separate exponents predict the largest budgets better ({held[1]:.2%} against {held[0]:.2%}): the saving "
            "may change with scale"
        )
    return Saving(
        baseline=baseline,
        candidate=candidate,
        value=value,
        low=low,
        high=high,
        probability=probability,
        undefined=undefined,
        compute=float(top),
        multiplier=m if path else None,
        by_multiplier=tuple(by_path) if path else (),
        E=floor,
        eta=float(minimum.theta[design.names.index("eta")]),
        residual_sd=residual_sd(residuals, free) if len(rows.C) > free else 0.0,
        measured=measured,
        measured_points=points,
        held_out_shared=held[0],
        held_out_separate=held[1],
        runs=per_family,
        bootstrap=how,
        notes=tuple(notes),
    )


def _design(rows: MatchedRuns, shared: bool) -> tuple[Design, tuple[float, float]]:
    """The joint law in centred (log C, log M); `shared` gives both families one exponent."""
    log_c, log_m = np.log(rows.C), np.log(rows.M)
    middle = (float(log_c.mean()), float(log_m.mean()))
    c, m = log_c - middle[0], log_m - middle[1]
    paths = int(rows.path.max()) + 1
    parts = [("a", 1.0), ("b", -1.0)] if paths > 1 else [("a", 0.0)]
    names = [f"{part}_{x}" for part, _ in parts for x in "AB"] + ["E"]
    names += ["eta"] if shared else ["eta_A", "eta_B"]
    terms = np.zeros((len(parts) + 1, len(c), len(names)))
    for k, (part, sign) in enumerate(parts):
        for x, mask in (("A", ~rows.second), ("B", rows.second)):
            terms[k, mask, names.index(f"{part}_{x}")] = 1.0
            terms[k, mask, names.index("eta" if shared else f"eta_{x}")] = (sign * m - c)[mask]
    terms[-1, :, names.index("E")] = 1.0
    return Design(tuple(names), tuple(n.startswith("eta") for n in names), terms, np.zeros(terms.shape[:2])), middle


def _minimise(design: Design, rows: MatchedRuns, weight: Floats) -> Minimum:
    if len(rows.C) < len(design.names):
        raise InputError(f"expected at least {len(design.names)} rows, got {len(rows.C)}; add runs")
    return minimise(design, rows.loss, weight, OBJECTIVE)


def _savings(design: Design, theta: Floats, middle: tuple[float, float], compute: float, m: float) -> Floats:
    """(S,) savings at C0 and M for (S, P) parameters; -inf where the candidate never gets there."""
    column = dict(zip(design.names, theta.T, strict=True))
    eta, log_m = column["eta"], np.log(m) - middle[1]
    with np.errstate(all="ignore"):
        size = {
            x: np.logaddexp(column[f"a_{x}"] + eta * log_m, column[f"b_{x}"] - eta * log_m)
            if "b_A" in column
            else column[f"a_{x}"]
            for x in "AB"
        }
        log_c = np.log(compute) - middle[0]
        log_needed = (size["B"] - (size["A"] - eta * log_c)) / eta
        found = -np.expm1(log_needed - log_c)
    return np.where(np.isfinite(found) & (eta > 0), found, -np.inf)


def _interval(
    design: Design, draws: Floats | None, middle: tuple[float, float], compute: float, m: float
) -> tuple[float | None, float | None, float | None, int]:
    """95% interval, P(S > 0) and the number of undefined resamples, which count as no saving."""
    if draws is None:
        return None, None, None, 0
    found = _savings(design, draws, middle, compute, m)
    low, high = np.quantile(found, 0.025, method="lower"), np.quantile(found, 0.975, method="higher")
    return float(low), float(high), float(np.mean(found > 0)), int(np.sum(np.isneginf(found)))


def _case_counts(rows: MatchedRuns, names: list[str], resamples: int, rng: np.random.Generator) -> tuple[Floats, str]:
    """Counts for runs drawn again: as pairs when both families name the same runs, else within each family."""
    named = np.array(names)
    if set(named[rows.second]) == set(named[~rows.second]):
        pairs = np.unique(named, return_inverse=True)[1]
        return case_counts(pairs, resamples, rng), f"{resamples} resamples of {int(pairs.max()) + 1} pairs of runs"
    counts = np.empty((resamples, len(named)))
    for mask in (~rows.second, rows.second):
        counts[:, mask] = case_counts(np.unique(rows.run[mask], return_inverse=True)[1], resamples, rng)
    return counts, f"{resamples} resamples of the runs within each family (no pairs: their names differ)"


def _model_free(rows: MatchedRuns, floor: float) -> tuple[float | None, int]:
    """Median of 1 - C_B / C_A(L_B) over B's runs within A's measured losses, and how many.

    A's curve is linear in (log C, log(L - E)) between its measured points on the same path (repeats averaged); points
    that do not improve on a cheaper one are passed over.
    """
    found = []
    for p in range(int(rows.path.max()) + 1):
        a, b = ~rows.second & (rows.path == p), rows.second & (rows.path == p)
        above = rows.loss > floor
        budget = levels(rows.C[a & above], 1.02)
        if not len(budget):
            continue
        number = np.bincount(budget)
        x = np.bincount(budget, np.log(rows.C[a & above])) / number
        y = np.bincount(budget, np.log(rows.loss[a & above] - floor)) / number
        best = np.r_[True, y[1:] < np.minimum.accumulate(y)[:-1]]
        x, y = x[best][::-1], y[best][::-1]
        target = np.log(rows.loss[b & above] - floor)
        inside = (target >= y[0]) & (target <= y[-1])
        if len(y) > 1:
            found += list(1 - rows.C[b & above][inside] / np.exp(np.interp(target[inside], y, x)))
    return (float(np.median(found)), len(found)) if found else (None, 0)


def _gap_notes(rows: MatchedRuns, names: list[str], value: float, baseline: str, candidate: str) -> list[str]:
    """What pairs of equal runs say without any law: a gap that changes with compute, or turns round at the top."""
    named = np.array(names)
    budgets, gaps = [], []
    for name in sorted(set(named[rows.second]) & set(named[~rows.second])):
        a, b = (named == name) & ~rows.second, (named == name) & rows.second
        budgets.append(float(np.log(rows.C[a | b]).mean()))
        gaps.append(float(np.log(rows.loss[b]).mean() - np.log(rows.loss[a]).mean()))
    if len(gaps) < FEWEST_PAIRS:
        return []
    notes = []
    slope = line(np.array(budgets), np.array(gaps))
    low, high = (float(slope.intercept + slope.slope * x) for x in (min(budgets), max(budgets)))
    if slope.p_value < 0.05:
        notes.append(
            f"the gap changes with compute: equal runs of {candidate} differ from {baseline} in loss by "
            f"{np.expm1(low):+.1%} at {np.exp(min(budgets)):.2g} FLOPs and by {np.expm1(high):+.1%} at "
            f"{np.exp(max(budgets)):.2g}, a trend beyond chance (p = {slope.p_value:.2g}): one saving does not hold at "
            "every scale"
        )
    largest = gaps[int(np.argmax(budgets))]
    if largest * value > 0:
        notes.append(
            f"at the largest budget measured, the pair of equal runs says the opposite: the loss of {candidate} is "
            f"{abs(np.expm1(largest)):.2%} {'higher' if largest > 0 else 'lower'}"
        )
    return notes


def _held_out(rows: MatchedRuns) -> tuple[float | None, float | None]:
    """Mean relative error on each family's largest budgets with a shared and with separate exponents."""
    held = np.zeros(len(rows.C), dtype=np.bool_)
    for mask in (~rows.second, rows.second):
        order = np.sort(rows.C[mask])
        held |= mask & (order[-max(1, round(HELD_SHARE * len(order)))] / 1.02 <= rows.C)
    cheap = rows.only(~held)
    errors: list[float | None] = []
    for shared in (True, False):
        design, _ = _design(rows, shared)
        kept = design.rows(~held)
        if len(cheap.C) <= len(kept.names) or not (cheap.second.any() and (~cheap.second).any()):
            errors.append(None)
            continue
        weight = equal_run_weights(cheap.run)
        minimum = minimise(kept, cheap.loss, weight, OBJECTIVE)
        if kept.condition(minimum.theta, weight) > SINGULAR:
            errors.append(None)
            continue
        predicted = np.exp(design.log_prediction(minimum.theta[None])[0])
        errors.append(float(np.mean(np.abs(predicted[held] / rows.loss[held] - 1))))
    return errors[0], errors[1]
