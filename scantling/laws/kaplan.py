"""The law of Kaplan et al. 2020 (arXiv 2001.08361, eq. 1.5): L(N, D) = [(Nc/N)^(alpha_N/alpha_D) + Dc/D]^alpha_D.

At a given q = alpha_D it is a sum of power laws for L^(1/q): A N^-p + B D^-1 with p = alpha_N/q, A = Nc^p and B = Dc. So the
one fitter does the rest, and q is searched on a grid and then by golden section, for all resamples, hold-outs and variants
in one batch. It has no irreducible loss: on data with one, chinchilla extrapolates better.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from scantling.errors import InputError
from scantling.laws.bootstrap import enough_runs, independent_rows, noisy_losses, residual_sd, run_weights, share_inside
from scantling.laws.checks import (
    EVERY,
    Mask,
    cut_offs,
    dearest,
    dearest_shares,
    fitted_rows,
    judged,
    largest,
    loss_ahead,
    residual_doubts,
    residual_structure,
)
from scantling.laws.descent import Design, Objective
from scantling.laws.evidence import Certificate, HoldOut, Sensitivity
from scantling.laws.forms import Floats
from scantling.laws.formula import parse_law
from scantling.laws.intervals import NEAR, Profile, information, inverse, smoothed
from scantling.laws.lawfit import LawFit
from scantling.laws.layout import Layout
from scantling.laws.newton import in_pieces, minimise
from scantling.laws.rows import Rows, usable_rows
from scantling.laws.solving import SINGULAR, Problem, place, refuse_few

NAMES = ("Nc", "Dc", "alpha_N", "alpha_D")
INNER = "A*N^-p + B*D^-1"
GRID = np.geomspace(0.02, 1.0, 24)  # values of alpha_D searched first
GOLDEN = (np.sqrt(5) - 1) / 2
ROUNDS = 40  # golden sections: the bracket shrinks to 4e-9 of itself
FINE, COARSE = 1e-7, 1e-4  # width of the last bracket in log alpha_D: for a fit, and for a profile
HELD_STEPS = (*NEAR, 6.0)
MOST_CELLS = 200_000  # runs x rows up to which every run is left out in turn


@dataclass(frozen=True, eq=False)
class Found:
    """S fits: (S,) alpha_D, (S, 3) the inner law's vector, (S,) objectives."""

    q: Floats
    theta: Floats
    value: Floats


@dataclass(frozen=True, eq=False)
class Inner:
    """The inner law on given rows, with the fits of all rows at each alpha_D of the grid."""

    rows: Rows
    where: Layout
    design: Design
    begun: Found

    def at(self, q: Floats, theta: Floats, losses: Floats, weights: Floats, deltas: Floats) -> Found:
        """Refits at each q: the residual of log L is q times that of log L^(1/q). Losses (S or 1, n), deltas (S,)."""
        size = q[:, None]
        target = Objective(1.0, scale=deltas[:, None] / size)
        theta, value = in_pieces(self.design, losses ** (1 / size), weights * size**2, target, theta)
        return Found(q, theta, value)

    def all_from_grid(self, weights: Floats, deltas: Floats) -> Found:
        """V fits to weighted rows, (V, n), each from the best alpha_D of the grid."""
        cases, grid = len(weights), len(GRID)
        case = np.repeat(np.arange(cases), grid)
        q, theta = np.tile(GRID, cases), np.tile(self.begun.theta, (cases, 1))
        first = self.at(q, theta, self.rows.loss[None], weights[case], deltas[case])
        best = np.argmin(first.value.reshape(cases, grid), axis=1) + grid * np.arange(cases)
        return self.searched(first.q[best], first.theta[best], self.rows.loss[None], weights, deltas)

    def searched(self, q: Floats, theta: Floats, losses: Floats, weights: Floats, deltas: Floats) -> Found:
        """Fits from a near alpha_D."""
        return _search(lambda one, start: self.at(one, start, losses, weights, deltas), q, theta, FINE)

    def params(self, found: Found) -> Floats:
        """(S, 4) Nc, Dc, alpha_N, alpha_D."""
        a, b, p = self.where.values(found.theta).T
        with np.errstate(all="ignore"):
            return np.stack([np.exp(np.log(a) / p), b, p * found.q, found.q], axis=1)


def fit_kaplan(
    table: pd.DataFrame,
    target: Objective,
    *,
    objective: str,
    loss: str = "loss",
    params: str = "N",
    tokens: str = "D",
    weights: str | None = None,
    clusters: str | None = None,
    also: dict[str, str] | None = None,
    conventions: dict[str, str] | None = None,
    excluded: tuple[str, ...] = (),
    resamples: int = 1000,
    seed: int = 0,
    checks: bool = True,
) -> LawFit:
    """Nc, Dc, alpha_N, alpha_D with bootstrap and profile intervals; arguments as in `fitting.fit`.

    Raises:
        InputError: too few sizes or token multipliers, or squares of the raw loss were asked for.
    """
    if target.raw:
        raise InputError("kaplan: fitted to log losses only; use the objective huber, ols or lad")
    rows, warnings = usable_rows(table, {"N": params, "D": tokens}, loss=loss, weights=weights, clusters=clusters)
    problem = Problem(parse_law(INNER), target, {}, {}, {})
    refuse_few(rows, problem)
    where, design = place(rows, problem)
    starts = [minimise(design, rows.loss ** (1 / q), rows.weight * q**2, Objective(target.delta / q)) for q in GRID]
    begun = Found(GRID, np.array([one.theta for one in starts]), np.array([one.value for one in starts]))
    inner = Inner(rows, where, design, begun)
    best = int(np.argmin(begun.value))
    delta = np.array([target.delta])
    fitted = inner.searched(GRID[[best]], begun.theta[[best]], rows.loss[None], rows.weight[None], delta)
    if design.condition(fitted.theta[0], rows.weight) > SINGULAR or not fitted.theta[0][design.names.index("p")] > 0:
        raise InputError("kaplan: the rows cannot separate its parameters; add sizes or token multipliers")
    residuals = np.log(rows.loss) - fitted.q[0] * design.log_prediction(fitted.theta)[0]
    estimate = inner.params(fitted)[0]
    draws, how = _draws(inner, fitted, residuals, target, resamples, np.random.default_rng(seed))
    checked = checks and len(rows.loss) <= EVERY
    curves = _profiles(inner, fitted, residuals, target) if checked else ()
    held, far, missing = _hold_outs(inner, target) if checked else ((), (), [])
    shape = residual_structure(rows, residuals, rows.loss * np.exp(-residuals)) if checks else None
    others = {
        name: usable_rows(table, {"N": column, "D": tokens}, loss=loss, weights=weights, clusters=clusters)[0]
        for name, column in (also or {}).items()
    }
    return LawFit(
        law="kaplan",
        params=dict(zip(NAMES, map(float, estimate), strict=True)),
        source=f"fitted to {len(rows.loss)} rows, columns {params}, {tokens}, {loss}",
        conventions={
            "N": f"column {params!r}", "D": f"column {tokens!r}", "C": "6 N D", "loss": f"column {loss!r}, nats per token",
        } | (conventions or {}),
        ranges={
            name: (float(x.min()), float(x.max()))
            for name, x in {"N": rows.N, "D": rows.D, "M": rows.D / rows.N, "loss": rows.loss}.items()
        },
        draws=draws,
        bootstrap=how,
        objective=objective,
        delta=target.delta if objective == "huber" else None,
        objective_value=float(fitted.value[0]),
        n=len(rows.loss),
        n_runs=int(rows.run.max()) + 1,
        residual_sd=residual_sd(residuals, 4) if len(residuals) > 4 else None,
        certificate=Certificate(
            gradient=starts[best].gradient, starts=starts[best].starts, agreeing=starts[best].agreeing,
            condition=design.condition(fitted.theta[0], rows.weight),
        ),
        holdouts=held,
        extrapolation=far,
        profiles={curve.name: curve.interval() for curve in curves},
        profile_curves={curve.name: (curve.values, curve.statistic) for curve in curves},
        left_out=_left_out(inner, fitted, target) if checked else {},
        residuals=shape,
        rows=fitted_rows(rows.columns, rows.loss, rows.loss * np.exp(-residuals)),
        sensitivity=_sensitivity(inner, estimate, target, problem, others) if checked else (),
        fingerprint=rows.fingerprint,
        warnings=(*excluded, *warnings, *missing, *_doubts(fitted.q[0], rows), *residual_doubts(shape, len(rows.loss))),
    )  # fmt: skip


def _draws(
    inner: Inner, fitted: Found, residuals: Floats, target: Objective, resamples: int, rng: np.random.Generator
) -> tuple[Floats | None, str]:
    rows, number = inner.rows, int(inner.rows.run.max()) + 1
    if not resamples:
        return None, "no resamples were asked for"
    if len(rows.loss) <= 4:
        return None, f"{len(rows.loss)} rows for 4 parameters leave no residuals to judge the noise by"
    wider, soft = 1.0, smoothed(target, residuals)
    if enough_runs(number, 4):
        counts, wider, how = run_weights(rows.run, 4, share_inside(residuals, soft.delta), resamples, rng)
        losses, weights = rows.loss[None], rows.weight * counts
    else:
        how = f"parametric: {resamples} draws of noise around the fitted law, because {number} runs are few to draw"
        losses = noisy_losses(rows.loss * np.exp(-residuals), residuals, rows.run, free=4, resamples=resamples, rng=rng)
        weights = np.broadcast_to(rows.weight, losses.shape)
    q, theta = np.repeat(fitted.q, resamples), np.repeat(fitted.theta, resamples, 0)
    draws = inner.params(inner.searched(q, theta, losses, weights, np.full(resamples, soft.delta)))
    draws = draws[np.isfinite(draws).all(1) & (draws > 0).all(1)]
    estimate = inner.params(fitted)[0]
    return estimate * (draws / estimate) ** wider, how


def _hold_outs(inner: Inner, target: Objective) -> tuple[tuple[HoldOut, ...], tuple[HoldOut, ...], list[str]]:
    """The largest sizes and multipliers, and the dearest shares of the rows, each predicted by a fit without them."""
    rows, missing = inner.rows, []
    first = dict(largest(rows, "N"))
    assert rows.C is not None
    masks = first | dict(dearest_shares(rows, rows.C))
    fits = {}
    for rule, held in masks.items():
        try:
            refuse_few(rows.only(~held), Problem(parse_law(INNER), target, {}, {}, {}))
            fits[rule] = held
        except InputError as error:
            missing += [f"no hold-out of the {rule}: without them {error.faults[0]}"] if rule in first else []
    found: dict[str, HoldOut] = {}
    if fits:
        weights = np.stack([np.where(held, 0.0, rows.weight) for held in fits.values()])
        values = inner.params(inner.all_from_grid(weights, np.full(len(fits), target.delta)))
        for (rule, held), one in zip(fits.items(), values, strict=True):
            cheap, dear = rows.only(~held), rows.only(held)
            predicted = parse_law("kaplan").predict(dict(zip(NAMES, one, strict=True)), dear.columns, {})
            if np.isfinite(predicted).all():
                found[rule] = judged(rule, cheap, dear, 0.0, predicted)
    return (
        tuple(item for rule, item in found.items() if rule in first),
        tuple(item for rule, item in found.items() if rule not in first),
        missing,
    )


def _sensitivity(
    inner: Inner, estimate: Floats, target: Objective, problem: Problem, others: Mapping[str, Rows]
) -> tuple[Sensitivity, ...]:
    """Other deltas, cut-offs and counts."""
    rows, top = inner.rows, dearest(inner.rows)
    every = np.ones(len(rows.loss), dtype=np.bool_)
    cases: dict[str, tuple[Mask, float]] = {f"Huber, delta {d:g}": (every, d) for d in (1e-4, 1e-3, 1e-2)}
    cases["least squares of log loss"] = (every, np.inf)
    cases = {name: case for name, case in cases.items() if case[1] != target.delta}
    cases |= {name: (keep, target.delta) for name, keep in cut_offs(rows).items()}
    found = [_line("as fitted", estimate, len(rows.loss), top)]
    weights = np.stack([np.where(keep, rows.weight, 0.0) for keep, _ in cases.values()])
    values = inner.params(inner.all_from_grid(weights, np.array([delta for _, delta in cases.values()])))
    for (change, (keep, _)), one in zip(cases.items(), values, strict=True):
        some = rows.only(keep)
        try:
            refuse_few(some, problem)
            found.append(_line(change, one, len(some.loss), top))
        except InputError as error:
            found.append(Sensitivity(change, {}, len(some.loss), None, None, error.faults[0]))
    for name, other in others.items():
        where, design = place(other, problem)
        again = Inner(other, where, design, inner.begun)
        one = again.params(again.all_from_grid(other.weight[None], np.array([target.delta])))[0]
        found.append(_line(f"N counted as {name}", one, len(other.loss), dearest(other)))
    return tuple(found)


def _line(change: str, values: Floats, rows: int, top: Rows) -> Sensitivity:
    params = dict(zip(NAMES, map(float, values), strict=True))
    if not np.isfinite(values).all():
        return Sensitivity(change, {}, rows, None, None, "the rows cannot separate its parameters")
    return Sensitivity(change, params, rows, loss_ahead(parse_law("kaplan"), params, top), None)


def _left_out(inner: Inner, fitted: Found, target: Objective) -> dict[str, tuple[float, float]]:
    """The range of each parameter over fits with one run left out."""
    rows, number = inner.rows, int(inner.rows.run.max()) + 1
    if number * len(rows.loss) > MOST_CELLS or number <= 4:
        return {}
    weights = rows.weight * (np.arange(number)[:, None] != rows.run)
    q, theta = np.repeat(fitted.q, number), np.repeat(fitted.theta, number, 0)
    found = inner.params(inner.searched(q, theta, rows.loss[None], weights, np.full(number, target.delta)))
    found = found[np.isfinite(found).all(1)]
    return {name: (float(found[:, i].min()), float(found[:, i].max())) for i, name in enumerate(NAMES)}


def _profiles(inner: Inner, fitted: Found, residuals: Floats, target: Objective) -> tuple[Profile, ...]:
    """The objective with each parameter held, minimised over the others; scaled as in `intervals.profiles`."""
    rows, soft = inner.rows, smoothed(target, residuals)
    if len(rows.loss) <= 5:
        return ()
    best = np.log(inner.params(fitted)[0])
    law, steps = parse_law("kaplan"), 1e-5 * np.eye(4)
    ends = [
        [np.log(law.predict(dict(zip(NAMES, np.exp(best + sign * step), strict=True)), rows.columns, {})) for step in steps]
        for sign in (1, -1)
    ]  # fmt: skip
    jacobian = (np.array(ends[0]) - np.array(ends[1])).T / 2e-5
    scale = 2 * information(residuals, soft, independent_rows(residuals, rows.run) - 4)
    inside = share_inside(residuals, soft.delta)
    spread = inverse((jacobian * rows.weight[:, None]).T @ jacobian) / inside / (scale / 2)
    stride = spread / np.sqrt(np.maximum(np.diag(spread), 1e-24))[:, None]
    lowest = inner.searched(fitted.q, fitted.theta, rows.loss[None], rows.weight[None], np.array([soft.delta])).value[0]
    found = []
    for i, name in enumerate(NAMES):
        starts = best + np.r_[-np.array(HELD_STEPS)[::-1], HELD_STEPS][:, None] * stride[i]
        held = _held(inner, i, starts, soft.delta)
        values = np.insert(np.exp(starts[:, i]), len(HELD_STEPS), np.exp(best[i]))
        excess = np.insert(np.maximum(scale * (held - lowest), 0.0), len(HELD_STEPS), 0.0)
        found.append(Profile(name, tuple(map(float, values)), tuple(map(float, excess))))
    return tuple(found)


def _held(inner: Inner, held: int, starts: Floats, delta: float) -> Floats:
    """(S,) objectives with the parameter number `held` at its value in (S, 4) log Nc, log Dc, log alpha_N, log alpha_D."""
    rows, middle = inner.rows, inner.where.middle
    log_nc, log_dc, log_an, log_q = starts.T
    q, p = np.exp(log_q), np.exp(log_an - log_q)
    deltas = np.full(len(q), delta)
    free = dict(zip(inner.design.names, range(3), strict=True))
    theta = np.empty((len(q), 3))
    theta[:, free["A"]], theta[:, free["p"]] = p * (log_nc - middle["N"]), p
    theta[:, free["B"]] = log_dc - middle["D"]
    y, w = rows.loss[None], np.broadcast_to(rows.weight, (len(q), len(rows.loss)))
    if NAMES[held] == "alpha_D":
        return inner.at(q, theta, y, w, deltas).value
    if NAMES[held] == "Nc":  # A N^-p = (Nc/N)^p: linear in p at a given Nc, one design for each
        return np.array(
            [_at_nc(inner, log_nc[s], q[s : s + 1], p[s], theta[s, free["B"]], delta) for s in range(len(q))]
        )
    fixed = "B" if NAMES[held] == "Dc" else "p"
    hold = np.broadcast_to(np.array([name == fixed for name in inner.design.names]), theta.shape)

    def at(one: Floats, start: Floats) -> Found:
        start = start.copy()
        if fixed == "p":
            start[:, free["p"]] = np.exp(log_an) / one
        size = one[:, None]
        target = Objective(1.0, scale=deltas[:, None] / size)
        return Found(one, *in_pieces(inner.design, y ** (1 / size), w * size**2, target, start, hold=hold))

    return _search(at, q, theta, COARSE).value


def _at_nc(inner: Inner, log_nc: float, q: Floats, p: float, b: float, delta: float) -> float:
    rows = inner.rows
    terms, offset = np.zeros((2, len(rows.loss), 2)), np.zeros((2, len(rows.loss)))
    terms[0, :, 0], terms[1, :, 1] = log_nc - np.log(rows.N), 1.0
    offset[1] = inner.where.middle["D"] - np.log(rows.D)
    design = Design(("p", "B"), (True, False), terms, offset)

    def at(one: Floats, start: Floats) -> Found:
        size = one[:, None]
        target = Objective(1.0, scale=np.array([[delta]]) / size)
        return Found(one, *in_pieces(design, rows.loss[None] ** (1 / size), rows.weight[None] * size**2, target, start))

    return float(_search(at, q, np.array([[p, b]]), COARSE).value[0])


def _search(at: Callable[[Floats, Floats], Found], q: Floats, theta: Floats, close: float) -> Found:
    """Golden section over log q within a factor 2, one bracket for each of the S starts."""
    low, high = np.log(q) - np.log(2.0), np.log(q) + np.log(2.0)
    x = [high - GOLDEN * (high - low), low + GOLDEN * (high - low)]
    found = [at(np.exp(one), theta) for one in x]
    for _ in range(ROUNDS):
        left = found[0].value < found[1].value
        low, high = np.where(left, low, x[0]), np.where(left, x[1], high)
        kept, near = np.where(left, x[0], x[1]), _either(left, *found)
        new = np.where(left, high - GOLDEN * (high - low), low + GOLDEN * (high - low))
        fresh = at(np.exp(new), near.theta)
        x = [np.where(left, new, kept), np.where(left, kept, new)]
        found = [_either(left, fresh, near), _either(left, near, fresh)]
        if np.max(high - low) < close:
            break
    return _either(found[0].value < found[1].value, *found)


def _either(first: Mask, one: Found, other: Found) -> Found:
    return Found(
        np.where(first, one.q, other.q),
        np.where(first[:, None], one.theta, other.theta),
        np.where(first, one.value, other.value),
    )


def _doubts(q: float, rows: Rows) -> list[str]:
    said = []
    if q > 0.9 or q < 0.025:
        said.append(f"alpha_D = {q:.3g} is at the edge of what is searched: it is not identified")
    low = int(np.sum(rows.D / rows.N < 5))
    if low:
        said.append(
            f"{low} rows have fewer than 5 tokens per parameter, where power laws fail; compare a fit without them"
        )
    return said
