"""Real-valued optima: of each head configuration, of the law alone, and how they move when the law or the plan does."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from scantling.planning.certainty import changes, compared
from scantling.planning.loss import FittedLaw, Law
from scantling.planning.outcome import Outcome, Problem, outcome
from scantling.planning.price import Priced, Quote
from scantling.planning.result import Candidate, LawOptimum, Sensitivity
from scantling.planning.shapes import Family, Shapes, real_shapes
from scantling.planning.variants import Floats
from scantling.rows import Number

DEPTHS = (0.02, 4096.0)  # num_hidden_layers searched for real-valued optima
SIZES = (1e3, 1e17)  # N searched for the optimum of the law alone
ROUNDS, POINTS = 7, 513
ASPECTS, ASPECT_ROUNDS = 13, 4  # aspect ratios tried for each family, narrowed so often, where the law knows them
FAMILY_DRAWS = 60


def minimise(score: Callable[[Floats], Floats], low: float, high: float, lines: int = 1) -> Floats:
    """(lines,) where `score` (infinite where impossible) is least: one unknown per line.

    A grid in the logarithm, narrowed to the two steps around its best point until they are 1e-14 wide.

    Args:
        score: of a (lines, points) array; `Outcome.guide` where few points may be possible.
        low, high: the range searched.
        lines: number of independent problems.
    """
    first, last = np.full((lines, 1), math.log(low)), np.full((lines, 1), math.log(high))
    row = np.arange(lines)[:, None]
    for _ in range(ROUNDS):
        x = first + (last - first) * np.linspace(0, 1, POINTS)
        best = np.argmin(score(np.exp(x)), axis=1)[:, None]
        first, last = x[row, (best - 1).clip(0)], x[row, (best + 1).clip(max=POINTS - 1)]
    found: Floats = np.exp(x[row, best]).ravel()
    return found


def real_optima(problem: Problem, kinds: Sequence[Family]) -> tuple[Shapes, Quote]:
    """The best real-valued shape of each family (any where none is possible), and what it costs."""
    space = problem.config.space
    low, high = space.aspects

    def best(lines: Sequence[Family], aspect: Floats | None) -> Shapes:
        def score(depth: Floats) -> Floats:
            shapes = real_shapes(space, lines, depth, aspect)
            return outcome(problem, shapes, problem.price(shapes)).guide(problem)

        depth = minimise(score, *DEPTHS, len(lines))[:, None]
        return real_shapes(space, lines, depth, aspect).take(np.s_[:, 0])

    if low == high or not problem.knows_aspect:
        found = best(kinds, None)
        return found, problem.price(found)
    lines = [kind for kind in kinds for _ in range(ASPECTS)]
    around = np.tile(np.log([[low, high]]), (len(kinds), 1))
    for _ in range(ASPECT_ROUNDS):
        aspect = np.exp(np.linspace(around[:, 0], around[:, 1], ASPECTS, axis=1))
        found = best(lines, aspect.reshape(-1, 1))
        score = outcome(problem, found, problem.price(found)).score.reshape(len(kinds), ASPECTS)
        place = score.argmin(axis=1)
        row = np.arange(len(kinds))
        ends = [aspect[row, (place + side).clip(0, ASPECTS - 1)] for side in (-1, 1)]
        around = np.log(np.stack(ends, axis=1))
    found = found.take(row * ASPECTS + place)
    return dataclasses.replace(found, family=row), problem.price(dataclasses.replace(found, family=row))


def real_grid(problem: Problem, kinds: Sequence[Family], points: int = 30001) -> Shapes:
    """Real-valued shapes of every family over all depths searched: what a refusal names is among them."""
    depth = np.tile(np.geomspace(*DEPTHS, points), (len(kinds), 1))
    return real_shapes(problem.config.space, kinds, depth).take(np.ones(depth.shape, dtype=bool))


def real_sensitivity(problem: Problem, kinds: Sequence[Family], chosen: Shapes) -> tuple[Sensitivity, ...]:
    """As `certainty.sensitivity`, each family at its own real-valued optimum after the change."""
    turned = []
    for change in changes(problem):
        there = dataclasses.replace(problem, config=change.config)
        optima, priced = real_optima(there, kinds)
        score = outcome(there, optima, priced).score
        mine = float(score[int(chosen.family[0])])
        if np.isfinite(score).any():
            turned.append(compared(change, optima.take([int(chosen.family[0])]), mine, optima, score))
    return tuple(turned)


def family_scores(problem: Problem, kinds: Sequence[Family], laws: Sequence[Law]) -> tuple[Floats, list[Law]]:
    """(laws, families) the objective at each family's own real-valued optimum, and the laws that reach the target."""
    scores, used = [], []
    for law in laws:
        there = dataclasses.replace(problem, law=law)
        if there.limit is not None or there.goal > law.E:
            scores.append(outcome(there, *real_optima(there, kinds)).score)
            used.append(law)
    return np.array(scores).reshape(len(used), len(kinds)), used


def family_probabilities(
    problem: Problem, kinds: Sequence[Family], candidates: Sequence[Candidate], shapes: Shapes
) -> Sequence[Candidate]:
    """Share of the law's draws in which each family's own real-valued optimum is the best of all."""
    table, _ = family_scores(problem, kinds, problem.law.drawn(FAMILY_DRAWS))
    table = table[np.isfinite(table).any(axis=1)]
    if not table.size:
        return candidates
    wins = np.bincount(table.argmin(axis=1), minlength=len(kinds)) / len(table)
    best = table.min(axis=1)
    found = []
    for item, family in zip(candidates, shapes.family, strict=True):
        column = table[:, int(family)]
        reached = np.isfinite(column)
        found.append(
            dataclasses.replace(
                item,
                probability_best=float(wins[int(family)]),
                expected_regret=float(np.mean(column[reached] - best[reached])) if reached.any() else None,
                probability_reached=float(reached.mean()),
            )
        )
    return found


def law_optimum(problem: Problem) -> LawOptimum | None:
    """The optimum of the law alone, where it has one: tokens free, and FLOPs are what is spent or saved."""
    law = problem.law
    flops = {"training_flops", "lifetime_flops", "loss"}
    if (
        not isinstance(law, FittedLaw)
        or not law.plain
        or problem.ratio is not None
        or not {problem.config.objective, problem.limit or "loss"} <= flops
    ):
        return None
    bare = dataclasses.replace(problem, limits=problem.limits[: problem.limit is not None])

    def at(n: Floats) -> Outcome:
        return outcome(bare, None, Priced(n, 6 * n, 2 * n))

    n = minimise(lambda grid: at(grid).score, *SIZES)
    found, form = at(n), law.fit.form
    if not np.isfinite(found.score).all():
        return None
    size, d, loss, training = (one(x) for x in (n, found.tokens, found.loss, found.training_flops))
    lifetime = training + one(found.serving_flops)
    cheapest = form.optimum(form.compute_for_loss(loss))
    served = problem.config.serving.tokens
    other = float(cheapest.C + 2 * cheapest.N * served) if served else lifetime
    intervals = None
    if problem.limit == "training_flops" and law.fit.draws is not None:
        spread = law.fit.optimum(problem.goal)
        estimates = {"N": spread.N, "D": spread.D, "M": spread.M, "loss": spread.loss}
        intervals = {
            name: (estimate.low, estimate.high)
            for name, estimate in estimates.items()
            if estimate.low is not None and estimate.high is not None
        }
    return LawOptimum(
        parameters=size,
        tokens=d,
        tokens_per_parameter=d / size,
        loss=loss,
        training_flops=training,
        lifetime_flops=lifetime,
        compute_optimal_parameters=float(cheapest.N),
        compute_optimal_tokens=float(cheapest.D),
        saving_flops=max(0.0, other - lifetime),
        saving_percent=max(0.0, 100 * (1 - lifetime / other)),
        intervals=intervals,
    )


def one(value: Number) -> float:
    """The only entry of an array, or a number."""
    return float(np.asarray(value).item())
