"""What a fit is put through before it is believed: hold-outs, other defensible fits, residuals, and doubts in words."""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from scantling.errors import InputError
from scantling.laws.bootstrap import run_correlation
from scantling.laws.descent import Objective
from scantling.laws.evidence import FittedRows, HoldOut, Residuals, Sensitivity
from scantling.laws.forms import Chinchilla, Floats, compute_optimum, from_overtraining
from scantling.laws.formula import Formula, base_of
from scantling.laws.rows import Rows, levels
from scantling.laws.solving import Problem, Solved, imposed, solve, solve_all
from scantling.laws.starts import EXPONENTS
from scantling.laws.statistics import excess_kurtosis, line, rank_correlation

Mask = npt.NDArray[np.bool_]
HELD_SHARE = 0.1  # the largest sizes (or multipliers), as few as hold at least this share of the rows, are held out
SHARES = (0.5, 0.7, 0.9)  # of the rows, cheapest first, fitted for the extrapolation table
FEW = 12  # rows below which the extrapolation table says nothing
SHOWN, WORST = 400, 20  # rows of a drawing of a large table
EVERY = 2000  # rows beyond which sensitivity and extrapolation are judged on evenly spaced rows


def predict_rows(solved: Solved, rows: Rows) -> Floats:
    """The estimate's prediction for rows of the same columns and groups."""
    return solved.problem.formula.predict(solved.estimate, rows.columns, rows.groups)


def closed_form(law: str, params: Mapping[str, float]) -> Chinchilla | None:
    """The law of N and D that a fit amounts to, or None where it is another kind or unusable."""
    try:
        if law == "overtraining":
            return from_overtraining(**params)
        return Chinchilla(**params) if law == "chinchilla" else None
    except InputError:
        return None


def hold_outs(
    rows: Rows, solved: Solved, *, shares: bool
) -> tuple[tuple[HoldOut, ...], tuple[HoldOut, ...], list[str]]:
    """Rows predicted by a fit without them.

    Args:
        rows: the rows fitted.
        solved: the fit.
        shares: also hold out the dearest shares of the rows.

    Returns:
        The largest sizes and the largest token multipliers; the dearest shares of the rows; and why not, where not.
    """
    masks = dict(largest(rows, solved.problem.formula.columns[0]))
    if len(rows.loss) <= EVERY:
        cases = masks | (dict(dearest_shares(rows, price(rows, solved))) if shares else {})
        held = _held_out(rows, solved, cases)
    else:
        held = _held_out(rows, solved, masks)
        if shares:
            some = thinned(rows)
            held |= _held_out(some, solved, dict(dearest_shares(some, price(some, solved))))
    missing = [
        f"no hold-out of the {rule}: without them {found.faults[0]}"
        for rule, found in held.items()
        if rule in masks and isinstance(found, InputError)
    ]
    kept = {rule: found for rule, found in held.items() if isinstance(found, HoldOut)}
    return (
        tuple(found for rule, found in kept.items() if rule in masks),
        tuple(found for rule, found in kept.items() if rule not in masks),
        missing,
    )


def price(rows: Rows, solved: Solved) -> Floats:
    """(n,) what makes a row dear: its compute, or where none is known how low its predicted loss is."""
    return rows.C if rows.C is not None else -predict_rows(solved, rows)


def largest(rows: Rows, column: str) -> Iterator[tuple[str, Mask]]:
    """The largest sizes and token multipliers; the largest values of `column` for a law without them."""
    axes = [("largest sizes", rows.columns["N"], 1.05)] if "N" in rows.columns else []
    if rows.M is not None and {"D", "M"} & set(rows.columns):
        axes.append(("largest token multipliers", rows.M, 1.1))
    if not axes:
        axes.append((f"largest {column}", rows.columns[column], 1.05))
    for rule, values, width in axes:
        codes = levels(values, width)
        counts = np.bincount(codes)
        held_levels = 1 + int(np.argmax(np.cumsum(counts[::-1]) >= HELD_SHARE * len(codes)))
        yield rule, codes >= len(counts) - held_levels


def dearest_shares(rows: Rows, price: Floats) -> Iterator[tuple[str, Mask]]:
    """All that is dearer than the cheapest half, 70% and 90% of the rows."""
    if len(rows.loss) < FEW:
        return
    order = np.argsort(price, kind="stable")
    for share in SHARES:
        edge = price[order[math.ceil(share * len(order)) - 1]]
        held = price > edge * (1 + 1e-9) if edge > 0 else price > edge
        if held.any():
            yield f"dearest {1 - share:.0%} of the rows", held


def _held_out(rows: Rows, full: Solved, masks: Mapping[str, Mask]) -> dict[str, HoldOut | InputError]:
    """Each selection predicted by a fit to the other rows, and by one with equal exponents; all fits in one batch."""
    found: dict[str, HoldOut | InputError] = {}
    for rule, held in masks.items():
        gone = [
            group
            for values in rows.groups.values()
            for group in set(values) - {value for value, out in zip(values, held, strict=True) if not out}
        ]
        if held.all():
            found[rule] = InputError("nothing is left to fit")
        elif gone:
            found[rule] = InputError(f"no row of {min(gone)} is left")
    problem = full.problem
    tied = None
    if len(problem.formula.exponents) > 1 and not problem.tied and not problem.bounds:
        with suppress(InputError):
            fixed, ties, _ = imposed(
                problem.formula, full.names, fixed=dict(problem.fixed), ties={}, bounds={}, tied=True
            )
            tied = Problem(problem.formula, problem.target, fixed, ties, {})
    floor = full.estimate.get(problem.formula.constant or "", problem.fixed.get("E", 0.0))
    rules = [rule for rule in masks if rule not in found]
    problems = [problem] if tied is None else [problem, tied]
    solved = solve_all(rows, [(~masks[rule], one) for one in problems for rule in rules])
    for i, rule in enumerate(rules):
        cheap, fitted = solved[i]
        dear = rows.only(masks[rule])
        if isinstance(fitted, InputError):
            found[rule] = fitted
            continue
        other = solved[len(rules) + i][1] if tied is not None else None
        tied_are = None
        if isinstance(other, Solved):
            tied_are = float(np.mean(np.abs(predict_rows(other, dear) / dear.loss - 1)))
        found[rule] = judged(rule, cheap, dear, floor, predict_rows(fitted, dear), tied_are)
    return {rule: found[rule] for rule in masks}


def judged(
    rule: str, cheap: Rows, dear: Rows, floor: float, predicted: Floats, tied_are: float | None = None
) -> HoldOut:
    """The score of a prediction of `dear` from `cheap`; `floor` is E of the fit to all rows."""
    error = predicted / dear.loss - 1
    above = dear.loss - floor
    return HoldOut(
        rule=rule,
        n_fit=len(cheap.loss),
        n_held=len(dear.loss),
        are=float(np.mean(np.abs(error))),
        bias=float(np.mean(error)),
        baseline_are=float(np.mean(np.abs(cheap.loss.min() / dear.loss - 1))),
        compute_ratio=None if dear.C is None or cheap.C is None else float(np.max(dear.C) / np.sum(cheap.C)),
        reducible_are=float(np.mean(np.abs(error) * dear.loss / above)) if (above > 0).all() else None,
        tied_are=tied_are,
    )


def sensitivity(rows: Rows, solved: Solved, law: str, also: Mapping[str, Rows]) -> tuple[Sensitivity, ...]:
    """Other objectives, cut-offs, exponents tied or freed, and other ways of counting.

    Args:
        rows: the rows fitted.
        solved: the fit.
        law: its name.
        also: the same runs under other counting conventions, by what they are called.
    """
    whole, rows = len(rows.loss) <= EVERY, thinned(rows)
    problem = solved.problem
    now = problem.target
    every = np.ones(len(rows.loss), dtype=np.bool_)
    cases: dict[str, tuple[Mask, Problem]] = {} if whole else {"as fitted": (every, problem)}
    targets = {f"Huber, delta {delta:g}": Objective(delta) for delta in (1e-4, 1e-3, 1e-2)}
    for name, target in (targets | {"least squares of log loss": Objective(math.inf)}).items():
        if target != now:
            cases[name] = (every, Problem(problem.formula, target, problem.fixed, problem.tied, problem.bounds))
    if len(problem.formula.exponents) > 1 or any(name in problem.formula.by for name in problem.formula.exponents):
        tie = not problem.tied
        kept = {name: value for name, value in problem.fixed.items() if base_of(name) not in problem.formula.exponents}
        if kept == dict(problem.fixed):
            fixed, ties, limits = imposed(
                problem.formula, solved.names, fixed=kept, ties={}, bounds=dict(problem.bounds), tied=tie
            )
            changed = Problem(problem.formula, now, fixed, ties, limits)
            cases["equal exponents" if tie else "free exponents"] = (every, changed)
    cases |= {name: (keep, problem) for name, keep in cut_offs(rows).items()}
    top = dearest(rows)
    found = [_varied("as fitted", rows, solved, law, top)] if whole else []
    found += [
        _varied(name, some, one, law, top)
        for name, (some, one) in zip(cases, solve_all(rows, list(cases.values())), strict=True)
    ]
    for name, other in also.items():
        few = thinned(other)
        _, one = solve_all(few, [(np.ones(len(few.loss), dtype=np.bool_), problem)])[0]
        found.append(_varied(name, few, one, law, dearest(other)))
    return tuple(found)


def dearest(rows: Rows) -> Rows:
    """The rows of the largest compute; all where compute is unknown."""
    compute = rows.C
    return rows if compute is None else rows.only(np.isclose(compute, compute.max()))


def cut_offs(rows: Rows) -> dict[str, Mask]:
    """The rows that each cut-off of the sensitivity table keeps."""
    cuts = {}
    m = rows.M
    if m is not None:
        for least in (5, 10):
            cuts[f"only D/N of {least} and more"] = m >= least * (1 - 1e-6)
    n = rows.columns.get("N")
    if n is not None:
        codes = levels(n, 1.05)
        cuts["without the smallest size"] = codes > 0
        cuts["without the largest size"] = codes < codes.max()
    if rows.C is not None and len(rows.loss) >= FEW:
        cuts["without the cheapest 10% of rows"] = np.quantile(rows.C, 0.1) < rows.C
    if len(rows.loss) >= FEW:
        cuts["without the highest 5% of losses"] = rows.loss < np.quantile(rows.loss, 0.95)
    return {name: keep for name, keep in cuts.items() if keep.any() and not keep.all()}


def _varied(change: str, rows: Rows, solved: Solved | InputError, law: str, top: Rows) -> Sensitivity:
    """One line of the table; `top` are the dearest rows, ahead of which it predicts."""
    if isinstance(solved, InputError):
        return Sensitivity(change, {}, len(rows.loss), None, None, solved.faults[0])
    ahead = optimum = None
    form = closed_form(law, solved.estimate)
    if top.C is not None:
        ahead = loss_ahead(solved.problem.formula, solved.estimate, top)
        if form is not None:
            optimum = float(compute_optimum(form.vector, top.C[0]).M)
    return Sensitivity(change, solved.estimate, len(rows.loss), ahead, optimum)


def loss_ahead(formula: Formula, params: Mapping[str, float], top: Rows) -> float:
    """The prediction at ten times the compute of the dearest rows, N and D both larger by sqrt 10."""
    grown = {"N": 10**0.5, "D": 10**0.5, "C": 10.0}
    point = {name: values[:1] * grown.get(name, 1.0) for name, values in top.columns.items()}
    groups = {name: values[:1] for name, values in top.groups.items()}
    return float(formula.predict(params, point, groups)[0])


def thinned(rows: Rows) -> Rows:
    """All rows of a usual table, evenly spaced ones of a very large one."""
    if len(rows.loss) <= EVERY:
        return rows
    keep = np.zeros(len(rows.loss), dtype=np.bool_)
    keep[np.linspace(0, len(rows.loss) - 1, EVERY).astype(np.intp)] = True
    return rows.only(keep)


def residual_structure(rows: Rows, residuals: Floats, prediction: Floats) -> Residuals | None:
    """Correlations with what should not matter, curvature, and the worst rows; None for fewer than five rows."""
    if len(residuals) < 5 or np.ptp(residuals) == 0:
        return None
    axes = {f"log {name}": np.log(values) for name, values in rows.columns.items()} | {
        "log prediction": np.log(prediction)
    }
    rho, p, bend = {}, {}, {}
    for name, x in axes.items():
        if np.ptp(x) < 1e-9:
            continue
        rho[name], p[name] = rank_correlation(x, residuals)
        centred = (x - x.mean()) / x.std()
        straight = line(centred, residuals)
        square = centred**2 - np.polyval(np.polyfit(centred, centred**2, 1), centred)
        squared = line(square, residuals - straight.intercept - straight.slope * centred)
        if np.isfinite(squared.stderr) and squared.stderr > 0:
            bend[name] = float(squared.slope / squared.stderr)
    worst = np.argsort(-np.abs(residuals))[:3]
    return Residuals(
        rank_correlation=rho,
        p_values=p,
        curvature=bend,
        worst=tuple((int(i), float(residuals[i])) for i in worst),
        kurtosis=excess_kurtosis(residuals),
        run_correlation=run_correlation(residuals, rows.run),
    )


def fitted_rows(
    columns: Mapping[str, Floats], measured: Floats, predicted: Floats, groups: Mapping[str, list[str]] | None = None
) -> FittedRows:
    """The rows of a drawing: all of a usual table, `SHOWN` of a large one and its `WORST` largest residuals."""
    keep = np.arange(len(measured))
    if len(keep) > SHOWN + WORST:
        order = np.argsort(predicted, kind="stable")
        spaced = order[np.linspace(0, len(order) - 1, SHOWN).astype(np.intp)]
        keep = np.unique(np.r_[spaced, np.argsort(-np.abs(np.log(measured / predicted)))[:WORST]])

    def short(values: Floats) -> tuple[float, ...]:
        return tuple(float(f"{value:.7g}") for value in values[keep])

    return FittedRows(
        columns={name: short(values) for name, values in columns.items()},
        groups={name: tuple(values[i] for i in keep) for name, values in (groups or {}).items()},
        measured=short(measured),
        predicted=short(predicted),
        total=len(measured),
    )


def doubts(rows: Rows, solved: Solved, law: str) -> list[str]:
    """Sentences on what these rows leave unsure."""
    problem, n = solved.problem, len(rows.loss)
    free = solved.layout.free
    estimate = solved.estimate
    said = []
    if n <= len(free) + 2:
        said.append(f"{n} rows for {len(free)} parameters: residuals and intervals mean little")
    if law == "chinchilla":
        said += _few_levels(rows, bool(problem.tied))
    axes = [("N", rows.columns.get("N"), 1.5), ("D/N", rows.M, 1.0)]
    axes += [(name, rows.columns[name], 0.5) for name in rows.columns if name not in ("N", "D", "M", "C")]
    for name, values, decades in axes:
        if values is None:
            continue
        span = math.log10(values.max() / values.min())
        if span < decades and not (name == "D/N" and "D" not in rows.columns):
            said.append(f"{name} spans {span:.2f} decades, less than the {decades:g} an extrapolation should rest on")
    low = 0 if rows.M is None else int(np.sum(rows.M < 5))
    if low:
        said.append(
            f"{low} rows have fewer than 5 tokens per parameter, where power laws fail; compare a fit without them"
        )
    lowest = EXPONENTS[0] if law != "head-count" else 0.0
    for name in free:
        value = estimate[name]
        if base_of(name) in problem.formula.exponents and not lowest <= value <= EXPONENTS[1]:
            said.append(
                f"{name} = {value:.3g} is outside the usual {EXPONENTS[0]} to {EXPONENTS[1]}: it is not identified"
            )
    constant = problem.formula.constant
    if constant in free or constant in solved.at_bound:
        said += _doubt_floor(rows, solved, str(constant))
    for name in (name for name in solved.at_bound if name != constant):
        said.append(
            f"{name} = {estimate[name]:.4g} is at its bound: the rows would have it beyond; intervals are one-sided"
        )
    form = closed_form(law, estimate)
    if form is not None and rows.C is not None and rows.M is not None:
        m, best = rows.M, form.optimum(np.max(rows.C))
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


def _few_levels(rows: Rows, tied: bool) -> list[str]:
    m = rows.M
    assert m is not None
    sizes, multipliers = int(levels(rows.N, 1.05).max()) + 1, int(levels(m, 1.1).max()) + 1
    said = [f"only {sizes} sizes: A and alpha are weakly identified"] if sizes < 3 else []
    if multipliers < 3:
        said.append(
            f"only {multipliers} token multipliers: B, beta and the optimal D/N are weakly identified"
            + (", and equal exponents are assumed, not tested" if tied else "")
        )
    return said


def _doubt_floor(rows: Rows, solved: Solved, name: str) -> list[str]:
    """Whether E is identified: a likelihood-ratio test (95%) against E = 0, and E against the losses seen."""
    value = solved.estimate[name]
    if name in solved.at_bound or 1e-3 * rows.loss.min() > value:
        return [
            f"{name} runs to zero: it is not identified, and the intervals do without it; fix it or add larger models"
        ]
    if rows.loss.min() < value:
        return [f"{name} = {value:.4g} lies above the lowest observed loss {rows.loss.min():.4g}"]
    try:
        without = solve(thinned(rows), solved.problem.with_fixed(**{name: 0.0}))
        with_it = solved if len(rows.loss) <= EVERY else solve(thinned(rows), solved.problem)
    except InputError:
        return []
    ratio = without.minimum.value / max(with_it.minimum.value, 1e-300)
    if min(len(rows.loss), EVERY) * math.log(max(ratio, 1.0)) < 3.84:
        return [
            f"{name} = {value:.4g} is not identified: a law with {name} = 0 fits about as well; fix {name} or add larger models"
        ]
    return []


def residual_doubts(shape: Residuals | None, rows: int) -> list[str]:
    """Sentences on residuals that have a pattern: strongly curved in a column, or correlated with it."""
    if shape is None or rows < FEW:
        return []
    said = [
        f"the residuals bend with {name} (t = {value:+.1f}): the law's form misses something there"
        for name, value in shape.curvature.items()
        if abs(value) > 4 and name != "log prediction"
    ]
    return said
