"""Fitting L(N, D) = E + A N^-alpha + B D^-beta to a table of runs, with uncertainty and honest refusals."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from scantling.errors import InputError, suggest
from scantling.laws.bootstrap import Codes, case_counts, enough_runs, noisy_losses, residual_sd
from scantling.laws.forms import Chinchilla, Floats, chinchilla_loss
from scantling.laws.lawfit import PARAMETERS, Certificate, HoldOut, LawFit
from scantling.laws.newton import EXPONENTS, Design, Minimum, Objective, minimise, resample
from scantling.laws.rows import Rows, levels, usable_rows

OBJECTIVES = ("huber", "lad", "ols", "ols_raw")
LAD_DELTA = 1e-9
SINGULAR = 1e6  # condition number of the Jacobian beyond which the rows cannot separate the parameters
HELD_SHARE = 0.1  # the largest sizes (or multipliers), as few as hold at least this share of the rows, are held out


@dataclass(frozen=True, eq=False)
class Solved:
    """A minimum with what is needed to turn its parameters into A, B, E, alpha, beta."""

    design: Design
    minimum: Minimum
    centre: tuple[float, float]
    tied: bool
    fixed: Mapping[str, float]

    def params(self, theta: Floats) -> Floats:
        """(S, 5) A, B, E, alpha, beta from (S, P) centred parameters: log A = log A_centred + alpha mean(log N)."""
        column = dict(zip(self.design.names, theta.T, strict=True))
        full = {name: np.full(len(theta), value) for name, value in self.fixed.items()}
        full |= {name: column[name] for name in ("alpha", "beta") if name in column}
        if self.tied:
            full.setdefault("beta", full["alpha"])
        with np.errstate(over="ignore"):
            for name, exponent, middle in (("A", "alpha", self.centre[0]), ("B", "beta", self.centre[1])):
                if name in column:
                    full[name] = np.exp(column[name] + full[exponent] * middle)
            if "E" in column:
                full["E"] = np.exp(column["E"])
        return np.stack([full[name] for name in PARAMETERS["chinchilla"]], axis=1)


def fit(
    table: pd.DataFrame,
    law: str = "chinchilla",
    *,
    loss: str = "loss",
    params: str = "N",
    tokens: str = "D",
    weights: str | None = None,
    clusters: str | None = None,
    objective: Literal["huber", "lad", "ols", "ols_raw"] = "huber",
    delta: float = 1e-3,
    tied: bool = False,
    fixed: Mapping[str, float] | None = None,
    conventions: Mapping[str, str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> LawFit:
    """Fits a scaling law by robust regression of log losses (arXiv 2203.15556, section 3.3; 2404.10102).

    The objective is a sum over rows, minimised from a grid of starts in (log A, log B, log E, alpha, beta) with centred
    log N and log D. Runs are drawn again for the intervals; with fewer than 8 runs, or 3 per parameter, noise is drawn
    around the fitted law instead. The largest sizes, and separately the largest token multipliers, are held out in turn
    and predicted.

    Args:
        table: one row per run or checkpoint.
        law: "chinchilla", L = E + A N^-alpha + B D^-beta.
        loss: column of losses, nats per token.
        params: column of parameter counts N.
        tokens: column of training tokens D.
        weights: column of weights (1 / variance); without it rows weigh the same, or runs do when `clusters` is given.
        clusters: column naming the run of each row, when several rows are checkpoints of one run.
        objective: "huber" and "ols" (squares) of log residuals, "lad" (absolute log residuals), "ols_raw" (squares of
            L - prediction).
        delta: Huber's delta, in log loss.
        tied: impose alpha = beta.
        fixed: parameters to hold, such as {"E": 1.69}; E = 0 drops the term.
        conventions: how N, D, C and loss are counted, in words; replaces the column names.
        resamples: bootstrap resamples; 0 for none.
        seed: of the bootstrap.

    Returns:
        The law with intervals, hold-out errors and warnings.

    Raises:
        InputError: an argument or the table is wrong, or the rows cannot identify the law.
    """
    if law not in PARAMETERS:
        raise InputError(f"law: unknown {law!r}{suggest(law, PARAMETERS)}")
    target = _objective(objective, delta)
    held = _fixed(fixed or {}, tied)
    if resamples < 0 or resamples == 1:
        raise InputError(f"resamples: expected 0 or at least 2, got {resamples}")
    rows, warnings = usable_rows(
        table, {"params": params, "tokens": tokens, "loss": loss}, weights=weights, clusters=clusters
    )
    solved = _solve(rows, target, tied, held)
    estimate = solved.params(solved.minimum.theta[None])[0]
    residuals = np.log(rows.loss) - np.log(chinchilla_loss(estimate, rows.N, rows.D))
    free, n_runs = len(solved.design.names), int(rows.run.max()) + 1
    draws, how, lost = _bootstrap(solved, rows, target, residuals, resamples=resamples, seed=seed)

    holdouts = []
    for rule, values, width in (("largest sizes", rows.N, 1.05), ("largest token multipliers", rows.D / rows.N, 1.1)):
        try:
            holdouts.append(_hold_out(rule, rows, levels(values, width), target, tied=tied, fixed=held))
        except InputError as error:
            warnings.append(f"no hold-out of the {rule}: without them {error.faults[0]}")

    absolute = float(np.sum(rows.weight * np.abs(residuals)))
    condition = solved.design.condition(solved.minimum.theta, rows.weight)
    return LawFit(
        law=law,
        params=dict(zip(PARAMETERS[law], map(float, estimate), strict=True)),
        source=f"fitted to {len(rows.N)} rows, columns {params}, {tokens}, {loss}",
        conventions={
            "N": f"column {params!r}",
            "D": f"column {tokens!r}",
            "C": "6 N D",
            "loss": f"column {loss!r}, nats per token",
            "weights": f"column {weights!r}" if weights else "equal per run" if clusters else "equal per row",
        }
        | dict(conventions or {}),
        ranges={
            name: (float(values.min()), float(values.max()))
            for name, values in (("N", rows.N), ("D", rows.D), ("M", rows.D / rows.N), ("loss", rows.loss))
        },
        tied=tied,
        fixed=held,
        draws=draws,
        bootstrap=how,
        objective=objective,
        delta=delta if objective == "huber" else None,
        objective_value=absolute if objective == "lad" else solved.minimum.value,
        n=len(rows.N),
        n_runs=n_runs,
        residual_sd=residual_sd(residuals, free) if len(residuals) > free else None,
        certificate=Certificate(
            solved.minimum.gradient, solved.minimum.starts, solved.minimum.agreeing, condition=condition
        ),
        holdouts=tuple(holdouts),
        fingerprint=rows.fingerprint,
        warnings=(*warnings, *lost, *_doubts(rows, solved, target, Chinchilla(*map(float, estimate)))),
    )


def _objective(name: str, delta: float) -> Objective:
    if name not in OBJECTIVES:
        raise InputError(f"objective: unknown {name!r}{suggest(name, OBJECTIVES)}")
    if not (delta > 0 and math.isfinite(delta)):
        raise InputError(f"delta: expected a positive number such as 1e-3, got {delta}")
    return Objective({"huber": delta, "lad": LAD_DELTA}.get(name, math.inf), raw=name == "ols_raw")


def _fixed(fixed: Mapping[str, float], tied: bool) -> dict[str, float]:
    known = PARAMETERS["chinchilla"]
    faults = [f"fixed: unknown parameter {name!r}{suggest(name, known)}" for name in fixed if name not in known]
    faults += [
        f"fixed: {name} must be a finite number above zero{' or zero' if name == 'E' else ''}, got {value}"
        for name, value in fixed.items()
        if name in known and not (math.isfinite(value) and (value > 0 or (name == "E" and value == 0)))
    ]
    held = {name: float(value) for name, value in fixed.items()}
    if tied and ("alpha" in held) != ("beta" in held):
        held["alpha"] = held["beta"] = held.get("alpha", held.get("beta", math.nan))
    if tied and held.get("alpha") != held.get("beta"):
        faults.append(f"fixed: tied exponents cannot be alpha = {held['alpha']} and beta = {held['beta']}")
    if set(held) >= set(known):
        faults.append("fixed: every parameter is fixed; leave at least one to fit")
    if faults:
        raise InputError(*faults)
    return held


def _solve(rows: Rows, target: Objective, tied: bool, fixed: Mapping[str, float]) -> Solved:
    """The fit itself, refused when the rows cannot carry it."""
    _refuse_few(rows, tied, fixed)
    log_n, log_d = np.log(rows.N), np.log(rows.D)
    centre = (float(log_n.mean()), float(log_d.mean()))
    names = [name for name in PARAMETERS["chinchilla"] if name not in fixed and not (tied and name == "beta")]
    terms, offset = np.zeros((3, len(rows.N), len(names))), np.zeros((3, len(rows.N)))
    for k, (prefactor, exponent, x, middle) in enumerate(
        (("A", "alpha", log_n, centre[0]), ("B", "beta", log_d, centre[1]), ("E", "", log_n, 0.0))
    ):
        z = x - middle if prefactor in names else x
        if prefactor in names:
            terms[k, :, names.index(prefactor)] = 1.0
        else:
            offset[k] += math.log(fixed[prefactor]) if fixed[prefactor] > 0 else -math.inf
        shared = "alpha" if exponent == "beta" and tied else exponent
        if shared in names:
            terms[k, :, names.index(shared)] = -z
        elif exponent:
            offset[k] -= fixed[exponent] * z
    design = Design(tuple(names), tuple(name in ("alpha", "beta") for name in names), terms, offset)
    solved = Solved(design, minimise(design, rows.loss, rows.weight, target), centre, tied, fixed)

    if design.condition(solved.minimum.theta, rows.weight) > SINGULAR:
        raise InputError(
            f"the rows cannot separate {', '.join(names)}: different values give the same losses; add sizes or token "
            "multipliers, use tied=True, or fix a parameter"
        )
    faults = [
        f"loss does not fall with {axis} in these rows ({name} = {value:.3g}); a scaling law does not describe them"
        for name, axis, value in zip(
            ("alpha", "beta"), ("N", "D"), solved.params(solved.minimum.theta[None])[0, 3:], strict=True
        )
        if not value > 0
    ]
    if faults:
        raise InputError(*faults)
    return solved


def _refuse_few(rows: Rows, tied: bool, fixed: Mapping[str, float]) -> None:
    """Each axis needs one level more than it has free parameters; tied exponents count for neither."""
    free = [name for name in PARAMETERS["chinchilla"] if name not in fixed and not (tied and name == "beta")]
    faults = []
    for what, values, width, prefactor, exponent in (
        ("sizes N", rows.N, 1.05, "A", "alpha"),
        ("token multipliers D/N", rows.D / rows.N, 1.1, "B", "beta"),
    ):
        needed = 1 + (prefactor in free) + (exponent in free and not tied)
        found = int(levels(values, width).max()) + 1
        if found < needed:
            faults.append(
                f"expected at least {needed} distinct {what} to fit {prefactor} and {exponent}, got {found}; add runs"
                + ("" if tied or found < 2 else ", or impose equal exponents with tied=True")
            )
    if len(rows.N) < len(free):
        faults.append(f"expected at least {len(free)} rows for {len(free)} parameters, got {len(rows.N)}; add runs")
    if faults:
        raise InputError(*faults)


def _bootstrap(
    solved: Solved, rows: Rows, target: Objective, residuals: Floats, *, resamples: int, seed: int
) -> tuple[Floats | None, str, list[str]]:
    """(R, 5) draws or None, how they were made, and a sentence about resamples that gave no law."""
    free, n_runs = len(solved.design.names), int(rows.run.max()) + 1
    if resamples == 0:
        return None, "no resamples were asked for", []
    if len(rows.N) <= free:
        return None, f"{len(rows.N)} rows for {free} parameters leave no residuals to judge the noise by", []
    if target.delta < 1e-5:
        target = Objective(1e-5, target.raw)  # far below the noise, so as good as absolute deviations, and quicker
    rng = np.random.default_rng(seed)
    if enough_runs(n_runs, free):
        how = f"{resamples} resamples of {n_runs} runs"
        theta = resample(
            solved.design, rows.loss, rows.weight * case_counts(rows.run, resamples, rng), target, solved.minimum.theta
        )
    else:
        how = (
            f"parametric: {resamples} draws of noise around the fitted law, because {n_runs} runs are few to draw again"
        )
        losses = noisy_losses(
            rows.loss * np.exp(-residuals), residuals, rows.run, free=free, resamples=resamples, rng=rng
        )
        theta = resample(solved.design, losses, rows.weight, target, solved.minimum.theta)
    draws = solved.params(theta)
    valid = np.isfinite(draws).all(1) & (draws[:, [0, 1, 3, 4]] > 0).all(1)
    lost = int(np.sum(~valid))
    if lost > resamples / 2:
        return None, f"{lost} of {resamples} resamples gave no law with falling loss: the rows do not determine one", []
    sentence = f"{lost} of {resamples} resamples gave no law with falling loss and are not in the intervals"
    return draws[valid], how, [sentence] if lost else []


def _hold_out(
    rule: str, rows: Rows, codes: Codes, target: Objective, *, tied: bool, fixed: Mapping[str, float]
) -> HoldOut:
    """Fits without the highest levels, as few as hold a tenth of the rows, and predicts them."""
    counts = np.bincount(codes)
    held_levels = 1 + int(np.argmax(np.cumsum(counts[::-1]) >= HELD_SHARE * len(codes)))
    held = codes >= len(counts) - held_levels
    if held.all():
        raise InputError("nothing is left to fit")
    cheap, dear = rows.only(~held), rows.only(held)
    solved = _solve(cheap, target, tied, fixed)
    error = chinchilla_loss(solved.params(solved.minimum.theta[None])[0], dear.N, dear.D) / dear.loss - 1
    return HoldOut(
        rule=rule,
        n_fit=len(cheap.N),
        n_held=len(dear.N),
        are=float(np.mean(np.abs(error))),
        bias=float(np.mean(error)),
        baseline_are=float(np.mean(np.abs(cheap.loss.min() / dear.loss - 1))),
        compute_ratio=float(np.max(dear.N * dear.D) / np.sum(cheap.N * cheap.D)),
    )


def _doubts(rows: Rows, solved: Solved, target: Objective, law: Chinchilla) -> list[str]:
    """Sentences on what these rows leave unsure."""
    m, n = rows.D / rows.N, len(rows.N)
    sizes, multipliers = int(levels(rows.N, 1.05).max()) + 1, int(levels(m, 1.1).max()) + 1
    free = solved.design.names
    said = []
    if n <= len(free) + 2:
        said.append(f"{n} rows for {len(free)} parameters: residuals and intervals mean little")
    if sizes < 3:
        said.append(f"only {sizes} sizes: A and alpha are weakly identified")
    if multipliers < 3:
        said.append(
            f"only {multipliers} token multipliers: B, beta and the optimal D/N are weakly identified"
            + (", and equal exponents are assumed, not tested" if solved.tied else "")
        )
    for name, values, decades in (("N", rows.N, 1.5), ("D/N", m, 1.0)):
        span = math.log10(values.max() / values.min())
        if span < decades:
            said.append(f"{name} spans {span:.2f} decades, less than the {decades:g} an extrapolation should rest on")
    low = int(np.sum(m < 5))
    if low:
        said.append(
            f"{low} rows have fewer than 5 tokens per parameter, where power laws fail; compare a fit without them"
        )
    for name in ("alpha", "beta"):
        value = getattr(law, name)
        if name in free and not EXPONENTS[0] <= value <= EXPONENTS[1]:
            said.append(
                f"{name} = {value:.3g} is outside the usual {EXPONENTS[0]} to {EXPONENTS[1]}: it is not identified"
            )
    if "E" in free:
        said += _doubt_floor(rows, solved, target, law)
    best = law.optimum(6 * np.max(rows.N * rows.D))
    if not m.min() <= best.M <= m.max():
        said.append(
            f"the optimal D/N at the largest compute is {float(best.M):.3g}, outside the sampled {m.min():.3g} to "
            f"{m.max():.3g}: do not plan by it"
        )
    if solved.minimum.gradient > 1e-5:
        said.append(
            f"the minimiser stopped with a relative gradient of {solved.minimum.gradient:.1e}: not a clean minimum"
        )
    if solved.minimum.agreeing < min(2, solved.minimum.starts):
        said.append(
            f"only 1 of {solved.minimum.starts} starts reached the best objective: it may not be the global one"
        )
    return said


def _doubt_floor(rows: Rows, solved: Solved, target: Objective, law: Chinchilla) -> list[str]:
    """Whether E is identified: a likelihood-ratio test (95%) against E = 0, and E against the losses seen."""
    if 1e-3 * rows.loss.min() > law.E:
        return [f"E runs to zero ({law.E:.2g}): it is not identified; fix it or add larger models"]
    if rows.loss.min() < law.E:
        return [f"E = {law.E:.4g} lies above the lowest observed loss {rows.loss.min():.4g}"]
    try:
        without = _solve(rows, target, solved.tied, {**solved.fixed, "E": 0.0})
    except InputError:
        return []
    ratio = without.minimum.value / max(solved.minimum.value, 1e-300)
    if len(rows.N) * math.log(max(ratio, 1.0)) < 3.84:
        return [f"E = {law.E:.4g} is not identified: a law with E = 0 fits about as well; fix E or add larger models"]
    return []
