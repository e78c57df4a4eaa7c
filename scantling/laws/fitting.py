"""Fitting a law to a table of runs, with uncertainty, checks and honest refusals."""

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import pandas as pd

from scantling.errors import InputError, suggest
from scantling.laws.bootstrap import residual_sd
from scantling.laws.checks import (
    doubts,
    fitted_rows,
    hold_outs,
    residual_doubts,
    residual_structure,
    sensitivity,
)
from scantling.laws.descent import Objective
from scantling.laws.evidence import Certificate
from scantling.laws.formula import Formula, parse_law
from scantling.laws.frontiers import fit_frontier
from scantling.laws.intervals import bootstrap, left_out, profiles
from scantling.laws.kaplan import fit_kaplan
from scantling.laws.lawfit import LawFit
from scantling.laws.rows import Rows, usable_rows
from scantling.laws.solving import SINGULAR, Problem, imposed, solve

OBJECTIVES = ("huber", "lad", "ols", "ols_raw")
LAD_DELTA = 1e-9
FRONTIERS = ("isoflop", "envelope")  # the optimum read off runs, without a law of loss


def fit(
    table: pd.DataFrame,
    law: str = "chinchilla",
    *,
    loss: str = "loss",
    params: str = "N",
    tokens: str = "D",
    columns: Mapping[str, str] | None = None,
    weights: str | None = None,
    clusters: str | None = None,
    objective: Literal["huber", "lad", "ols", "ols_raw"] = "huber",
    delta: float = 1e-3,
    tied: bool = False,
    fixed: Mapping[str, float] | None = None,
    ties: Mapping[str, str] | None = None,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    also: Mapping[str, str] | None = None,
    conventions: Mapping[str, str] | None = None,
    excluded: tuple[str, ...] = (),
    resamples: int = 1000,
    seed: int = 0,
    checks: bool = True,
) -> LawFit:
    """Fits a scaling law by robust regression of log losses (arXiv 2203.15556, section 3.3; 2404.10102).

    The objective is a sum over rows, minimised from a grid of exponents with the linear part solved, centred in the log of
    each column. Runs are drawn again for the intervals; with fewer than 8 runs, or 3 per parameter, noise is drawn around
    the fitted law instead. The largest sizes, and separately the largest token multipliers, are held out in turn and
    predicted.

    Args:
        table: one row per run or checkpoint.
        law: a name of `formula.LAWS`, such as "chinchilla", L = E + A N^-alpha + B D^-beta; or an equation.
        loss: column of losses, nats per token.
        params: column of parameter counts N.
        tokens: column of training tokens D.
        columns: the table's column for any other column of the law, such as {"width": "d_model"}.
        weights: column of weights (1 / variance); without it rows weigh the same, or runs do when `clusters` is given.
        clusters: column naming the run of each row, when several rows are checkpoints of one run.
        objective: "huber" and "ols" (squares) of log residuals, "lad" (absolute log residuals), "ols_raw" (squares of
            L - prediction).
        delta: Huber's delta, in log loss.
        tied: impose one exponent for all (alpha = beta).
        fixed: parameters to hold, such as {"E": 1.69}; E = 0 drops the term.
        ties: parameters that copy another, such as {"beta": "alpha"}.
        bounds: lowest and highest values allowed, such as {"E": (1.5, 2.0)}.
        also: other columns of parameter counts for the sensitivity table, by what they are called.
        conventions: how N, D, C and loss are counted, in words; replaces the column names.
        excluded: sentences about rows that were left out before, to be kept with the warnings.
        resamples: bootstrap resamples; 0 for none.
        seed: of the bootstrap.
        checks: also make profiles, left-out runs, sensitivity and extrapolation tables (about a second).

    Returns:
        The law with intervals, hold-out errors and warnings.

    Raises:
        InputError: an argument or the table is wrong, or the rows cannot identify the law.
    """
    formula = parse_law(law)
    target = _objective(objective, delta)
    if resamples < 0 or resamples == 1:
        raise InputError(f"resamples: expected 0 or at least 2, got {resamples}")
    if law == "kaplan" or law in FRONTIERS:
        imposing = [
            name for name, given in (("tied", tied), ("fixed", fixed), ("ties", ties), ("bounds", bounds)) if given
        ]
        if imposing:
            raise InputError(f"law {law!r}: {', '.join(imposing)} cannot be imposed on it; leave it out")
    if law == "kaplan":
        return fit_kaplan(
            table,
            target,
            objective=objective,
            loss=loss,
            params=params,
            tokens=tokens,
            weights=weights,
            clusters=clusters,
            also=dict(also or {}),
            conventions=dict(conventions or {}),
            excluded=excluded,
            resamples=resamples,
            seed=seed,
            checks=checks,
        )
    if law in FRONTIERS:
        return fit_frontier(
            table,
            law,
            loss=loss,
            params=params,
            tokens=tokens,
            clusters=clusters,
            also=dict(also or {}),
            conventions=dict(conventions or {}),
            excluded=excluded,
            resamples=resamples,
            seed=seed,
            checks=checks,
        )
    wanted = {"N": params, "D": tokens} | dict(columns or {})
    known = (*formula.columns, *formula.by.values(), "N", "D")
    unknown = [name for name in columns or {} if name not in known]
    if unknown:
        raise InputError(f"columns: the law {law!r} has no column {unknown[0]!r}{suggest(unknown[0], known)}")
    sources = {name: wanted.get(name, name) for name in formula.columns}
    groups = {name: wanted.get(name, name) for name in dict.fromkeys(formula.by.values())}
    if not groups:
        _check_names(formula, fixed, ties, bounds, tied)
    rows, warnings = usable_rows(
        table, sources, loss=loss, weights=weights, clusters=clusters, groups=groups, sizes=(params, tokens)
    )
    names = formula.parameters({name: sorted(set(values)) for name, values in rows.groups.items()})
    held, copies, limits = imposed(
        formula, names, fixed=dict(fixed or {}), ties=dict(ties or {}), bounds=dict(bounds or {}), tied=tied
    )
    try:
        solved = solve(rows, Problem(formula, target, held, copies, limits))
    except InputError as error:
        raise InputError(*excluded, *warnings, *error.faults) from None
    estimate = solved.estimate
    residuals = np.log(rows.loss) - solved.log_prediction
    free, n_runs = len(solved.layout.free), int(rows.run.max()) + 1
    draws, how, lost = bootstrap(solved, rows, residuals, resamples=resamples, seed=seed)
    holdouts, dearest, missing = hold_outs(rows, solved, shares=checks)
    shape = residual_structure(rows, residuals, np.exp(solved.log_prediction)) if checks else None
    curves = profiles(solved, rows, residuals) if checks else ()
    without = left_out(solved, rows, residuals) if checks else np.empty((0, len(names)))
    usable = without[np.isfinite(without).all(1)] if len(without) > free else without[:0]
    others = {}
    if checks:
        for name, column in (also or {}).items():
            swapped = sources | ({"N": column} if "N" in sources else {})
            gone = [made for made in ("C", "M") if sources.get(made) == made and made in table.columns]
            others[f"N counted as {name}"] = usable_rows(
                table.drop(columns=gone),
                swapped,
                loss=loss,
                weights=weights,
                clusters=clusters,
                groups=groups,
                sizes=(column, tokens),
            )[0]
    absolute = float(np.sum(rows.weight * np.abs(residuals)))
    return LawFit(
        law=law,
        params=estimate,
        source=f"fitted to {len(rows.loss)} rows, columns {', '.join([*sources.values(), *groups.values(), loss])}",
        conventions={name: f"column {column!r}" for name, column in (sources | groups).items()}
        | ({"C": "6 N D"} if "C" not in sources or sources["C"] not in table.columns else {})
        | {
            "loss": f"column {loss!r}, nats per token",
            "weights": f"column {weights!r}" if weights else "equal per run" if clusters else "equal per row",
        }
        | dict(conventions or {}),
        ranges=_ranges(rows),
        tied=tied,
        fixed=held,
        draws=draws,
        bootstrap=how,
        objective=objective,
        delta=delta if objective == "huber" else None,
        objective_value=absolute if objective == "lad" else solved.minimum.value,
        n=len(rows.loss),
        n_runs=n_runs,
        residual_sd=residual_sd(residuals, free) if len(residuals) > free else None,
        certificate=Certificate(
            gradient=solved.minimum.gradient,
            starts=solved.minimum.starts,
            agreeing=solved.minimum.agreeing,
            condition=solved.design.condition(solved.minimum.theta, rows.weight),
            basins=solved.minimum.basins,
        ),
        holdouts=holdouts,
        fingerprint=rows.fingerprint,
        warnings=(
            *excluded,
            *warnings,
            *missing,
            *lost,
            *doubts(rows, solved, law),
            *residual_doubts(shape, len(rows.loss)),
        ),
        groups={name: tuple(sorted(set(values))) for name, values in rows.groups.items()},
        ties=copies,
        bounds=limits,
        at_bound=solved.at_bound,
        profiles={curve.name: curve.interval() for curve in curves},
        profile_curves={curve.name: (curve.values, curve.statistic) for curve in curves},
        left_out={
            name: (float(usable[:, i].min()), float(usable[:, i].max()))
            for i, name in enumerate(names)
            if len(usable) and name not in held
        },
        residuals=shape,
        sensitivity=sensitivity(rows, solved, law, others) if checks else (),
        extrapolation=dearest,
        rows=fitted_rows(rows.columns, rows.loss, np.exp(solved.log_prediction), rows.groups),
    )


def _ranges(rows: Rows) -> dict[str, tuple[float, float]]:
    values = dict(rows.columns)
    if rows.M is not None:
        values.setdefault("M", rows.M)
    return {name: (float(v.min()), float(v.max())) for name, v in {**values, "loss": rows.loss}.items()}


def _check_names(
    formula: Formula,
    fixed: Mapping[str, float] | None,
    ties: Mapping[str, str] | None,
    bounds: Mapping[str, tuple[float, float]] | None,
    tied: bool,
) -> None:
    """Wrong names are told before the table is read."""
    imposed(
        formula, formula.bases, fixed=dict(fixed or {}), ties=dict(ties or {}), bounds=dict(bounds or {}), tied=tied
    )


def _objective(name: str, delta: float) -> Objective:
    if name not in OBJECTIVES:
        raise InputError(f"objective: unknown {name!r}{suggest(name, OBJECTIVES)}")
    if not (delta > 0 and math.isfinite(delta)):
        raise InputError(f"delta: expected a positive number such as 1e-3, got {delta}")
    return Objective({"huber": delta, "lad": LAD_DELTA}.get(name, math.inf), raw=name == "ols_raw")


__all__ = ["SINGULAR", "fit"]
