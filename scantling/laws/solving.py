"""One law on given rows: the global minimum under fixed, tied and bounded parameters, refused where rows cannot carry it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from scantling.errors import InputError, suggest
from scantling.laws.descent import Design, Objective
from scantling.laws.forms import Floats
from scantling.laws.formula import Formula, base_of, group_of
from scantling.laws.layout import Layout, layout
from scantling.laws.newton import Minimum, minimise, minimise_all
from scantling.laws.rows import Rows, levels

SINGULAR = 1e6  # condition number of the Jacobian beyond which the rows cannot separate the parameters
NOTHING = 1e-6  # a constant below this share of the lowest loss has run to zero, its bound
BATCHED = 4000  # rows beyond which fits of one table are made one after the other
MOST_BOUNDED = 4  # bounded parameters: every way they can sit at a bound is tried


@dataclass(frozen=True)
class Problem:
    """A law with what is imposed on it.

    Attributes:
        formula: the law.
        target: the objective.
        fixed: parameters held; a name without its group holds all groups.
        tied: parameters that copy another.
        bounds: lowest and highest values allowed.
    """

    formula: Formula
    target: Objective
    fixed: Mapping[str, float]
    tied: Mapping[str, str]
    bounds: Mapping[str, tuple[float, float]]

    def with_fixed(self, **values: float) -> "Problem":
        """The same with more parameters held."""
        kept = {name: pair for name, pair in self.bounds.items() if name not in values}
        return Problem(self.formula, self.target, {**self.fixed, **values}, self.tied, kept)


@dataclass(frozen=True, eq=False)
class Solved:
    """A minimum with what is needed to turn its vector into the law's parameters.

    Attributes:
        problem: what was asked.
        actual: the same with the parameters at a bound held there; what the vector belongs to.
        layout: where each parameter sits.
        design: the terms on the rows.
        minimum: the best of the starts.
        at_bound: parameters that the minimum pushes against a bound.
    """

    problem: Problem
    actual: Problem
    layout: Layout
    design: Design
    minimum: Minimum
    at_bound: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The law's parameters in order."""
        return self.layout.names

    def params(self, theta: Floats) -> Floats:
        """(S, parameters) from (S, free)."""
        return self.layout.values(theta)

    @property
    def estimate(self) -> dict[str, float]:
        """The point estimate by name."""
        return dict(zip(self.names, map(float, self.params(self.minimum.theta[None])[0]), strict=True))

    @property
    def log_prediction(self) -> Floats:
        """(n,) at the point estimate."""
        return np.asarray(self.design.log_prediction(self.minimum.theta[None])[0], dtype=np.float64)


def solve(rows: Rows, problem: Problem) -> Solved:
    """The fit itself.

    Raises:
        InputError: the rows cannot identify the law, or it does not describe them.
    """
    refuse_few(rows, problem)
    return _settled(rows, problem, _free(rows, problem))


def solve_all(
    rows: Rows, cases: Sequence[tuple[npt.NDArray[np.bool_], Problem]]
) -> list[tuple[Rows, Solved | InputError]]:
    """`solve` for selections of the rows and variants of a problem: those with the same unknowns in one batch.

    Args:
        rows: all rows.
        cases: for each fit, the rows it keeps and what is asked.

    Returns:
        For each fit its rows, and the fit or why there is none.
    """
    found: dict[int, tuple[Rows, Solved | InputError]] = {}
    batches: dict[tuple[object, ...], list[int]] = {}
    for i, (keep, problem) in enumerate(cases):
        some = rows if keep.all() else rows.only(keep)
        try:
            refuse_few(some, problem)
        except InputError as error:
            found[i] = (some, error)
            continue
        if place_names(some, problem) != place_names(rows, problem) or len(rows.loss) > BATCHED:
            found[i] = (some, _tried(some, problem))
            continue
        alike = (tuple(problem.fixed.items()), tuple(problem.tied.items()), problem.target.raw)
        batches.setdefault(alike, []).append(i)
        found[i] = (some, InputError("not fitted"))
    for numbers in batches.values():
        where, design = place(rows, cases[numbers[0]][1])
        weights = np.stack([np.where(cases[i][0], rows.weight, 0.0) for i in numbers])
        minima = minimise_all(design, rows.loss, weights, [cases[i][1].target for i in numbers])
        for i, minimum in zip(numbers, minima, strict=True):
            (keep, problem), some = cases[i], found[i][0]
            try:
                begun = Solved(problem, problem, where, design if keep.all() else design.rows(keep), minimum)
                found[i] = (some, _settled(some, problem, begun))
            except InputError as error:
                found[i] = (some, error)
    return [found[i] for i in range(len(cases))]


def _tried(rows: Rows, problem: Problem) -> Solved | InputError:
    try:
        return solve(rows, problem)
    except InputError as error:
        return error


def _settled(rows: Rows, problem: Problem, first: Solved) -> Solved:
    """The minimum with bounds kept and a vanished constant taken away, refused where it is no law."""
    best = _bounded(rows, problem, first) if problem.bounds else first
    constant = problem.formula.constant
    if constant in best.layout.free and best.estimate[constant] < NOTHING * rows.loss.min():
        without = best.actual.with_fixed(**{constant: 0.0})
        one = _free(rows, without)
        one = _bounded(rows, without, one) if without.bounds else one
        best = Solved(problem, one.actual, one.layout, one.design, one.minimum, (*one.at_bound, constant))
    free = best.layout.free
    if free and best.design.condition(best.minimum.theta, rows.weight) > SINGULAR:
        raise InputError(
            f"the rows cannot separate {', '.join(free)}: different values give the same losses; add sizes or token "
            "multipliers, use tied=True, or fix a parameter"
        )
    estimate = best.estimate
    faults = []
    for term in problem.formula.terms:
        for power in term.powers:
            for name in [n for n in best.names if base_of(n) == power.exponent]:
                if not estimate[name] > 0:
                    where = f" of {group_of(name)}" if group_of(name) else ""
                    faults.append(
                        f"loss does not fall with {power.column} in these rows{where} ({name} = {estimate[name]:.3g}); "
                        "a scaling law does not describe them"
                    )
    if faults:
        raise InputError(*dict.fromkeys(faults))
    return best


def place(rows: Rows, problem: Problem, *, centre: bool = True) -> tuple[Layout, Design]:
    """The fitter's vector and the terms on the rows."""
    found = layout(problem.formula, rows.columns, rows.groups, problem.fixed, problem.tied, centre=centre)
    return found, found.design(rows.columns, rows.groups)


def _free(rows: Rows, problem: Problem) -> Solved:
    where, design = place(rows, problem)
    return Solved(problem, problem, where, design, minimise(design, rows.loss, rows.weight, problem.target))


def _bounded(rows: Rows, problem: Problem, first: Solved) -> Solved:
    """The best minimum within bounds: each bounded parameter is free (`first`), at its lowest, or at its highest."""
    if not _outside(first, problem.bounds):
        return first
    found: list[Solved] = []
    names = list(problem.bounds)
    for choice in product((None, 0, 1), repeat=len(names)):
        held = {name: problem.bounds[name][side] for name, side in zip(names, choice, strict=True) if side is not None}
        if not held or not all(np.isfinite(value) for value in held.values()):
            continue
        one = _free(rows, problem.with_fixed(**held))
        if not _outside(one, problem.bounds):
            found.append(Solved(problem, one.problem, one.layout, one.design, one.minimum, tuple(held)))
    if not found:
        raise InputError(f"bounds: no fit lies within {', '.join(names)}; widen them")
    return min(found, key=lambda one: one.minimum.value)


def _outside(solved: Solved, bounds: Mapping[str, tuple[float, float]]) -> list[str]:
    estimate = solved.estimate
    return [
        name
        for name, (low, high) in bounds.items()
        if not low * (1 - 1e-9) <= estimate[name] <= high * (1 + 1e-9)
    ]  # fmt: skip


def refuse_few(rows: Rows, problem: Problem) -> None:
    """Each column needs one level more than it has parameters of its own; shared exponents count for no column."""
    formula = problem.formula
    copied = {*problem.tied, *problem.tied.values()}
    names = place_names(rows, problem)
    free = {base_of(name) for name in names if name not in problem.fixed and name not in problem.tied}
    shared = {base_of(name) for name in copied}
    faults = []
    for column in formula.columns:
        own = [b for b in formula.bases if b in free and formula.owner(b, column)]
        own = [b for b in own if not (b in formula.exponents and b in shared)]
        told = [b for b in formula.bases if formula.owner(b, column)]
        values, width, what = rows.columns[column], 1.05, f"values of {column}"
        if column == "N":
            what = "sizes N"
        if column == "D" and rows.M is not None:
            values, width, what = rows.M, 1.1, "token multipliers D/N"
        needed = 1 + len(own)
        found = int(levels(values, width).max()) + 1
        if found < needed:
            tied = bool(shared & set(told)) or len([b for b in told if b in formula.exponents]) == 0
            faults.append(
                f"expected at least {needed} distinct {what} to fit {' and '.join(told) or 'the law'}, got {found}; "
                "add runs" + ("" if tied or found < 2 else ", or impose equal exponents with tied=True")
            )
    count = len([name for name in names if name not in problem.fixed and name not in problem.tied])
    if len(rows.loss) < count:
        faults.append(f"expected at least {count} rows for {count} parameters, got {len(rows.loss)}; add runs")
    if np.ptp(rows.loss) == 0:
        faults.append(f"every loss is {rows.loss[0]:g}: nothing scales in these rows; check the column of losses")
    if faults:
        raise InputError(*faults)


def place_names(rows: Rows, problem: Problem) -> tuple[str, ...]:
    """The law's parameters, groups expanded."""
    return problem.formula.parameters({name: sorted(set(values)) for name, values in rows.groups.items()})


def imposed(
    formula: Formula,
    names: tuple[str, ...],
    *,
    fixed: Mapping[str, float],
    ties: Mapping[str, str],
    bounds: Mapping[str, tuple[float, float]],
    tied: bool,
) -> tuple[dict[str, float], dict[str, str], dict[str, tuple[float, float]]]:
    """What a caller imposes, with groups expanded: values held, parameters tied, bounds.

    Raises:
        InputError: an unknown parameter, an impossible value, or nothing left to fit.
    """
    known = [*names, *formula.bases]
    constant = formula.constant
    faults = []
    for what, given in (("fixed", fixed), ("ties", {**ties, **{v: k for k, v in ties.items()}}), ("bounds", bounds)):
        faults += [f"{what}: unknown parameter {name!r}{suggest(name, known)}" for name in given if name not in known]
    if faults:
        raise InputError(*faults)
    faults += [
        f"fixed: {name} must be a finite number above zero{' or zero' if name == constant else ''}, got {value}"
        for name, value in fixed.items()
        if not (np.isfinite(value) and (value > 0 or (name == constant and value == 0)))
    ]
    faults += [
        f"bounds: {name} must have 0 <= low < high, got {low:g} to {high:g}"
        for name, (low, high) in bounds.items()
        if not 0 <= low < high
    ]
    if len(bounds) > MOST_BOUNDED:
        faults.append(f"bounds: expected at most {MOST_BOUNDED} bounded parameters, got {len(bounds)}; fix some")
    every = {name: [n for n in names if name in (n, base_of(n))] for name in known}
    held = {n: float(value) for name, value in fixed.items() for n in every[name]}
    copies: dict[str, str] = {}
    pairs = dict(ties)
    if tied and formula.exponents:
        first = formula.exponents[0]
        pairs |= {other: first for other in formula.exponents[1:]}
        if first in formula.by:
            pairs[first] = every[first][0]
    for name, other in pairs.items():
        for n in every[name]:
            same = f"{base_of(other)}[{group_of(n)}]"
            source = other if other in names else same if same in names else every[other][0]
            if n != source:
                copies[n] = source
    copies = {n: copies.get(source, source) for n, source in copies.items()}
    for n, source in copies.items():
        if n in held and source not in held:
            held[source] = held[n]
    for n, source in copies.items():
        if held.get(n, held.get(source)) != held.get(source):
            faults.append(f"fixed: tied exponents cannot be {source} = {held[source]} and {n} = {held[n]}")
    held |= {n: held[source] for n, source in copies.items() if source in held}
    copies = {n: source for n, source in copies.items() if source not in held}
    if set(held) | set(copies) >= set(names):
        faults.append("fixed: every parameter is fixed; leave at least one to fit")
    if faults:
        raise InputError(*faults)
    limits = {copies.get(n, n): pair for name, pair in bounds.items() for n in every[name] if n not in held}
    return held, copies, limits
