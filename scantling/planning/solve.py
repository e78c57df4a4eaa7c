"""The search: the real-valued optimum, a screen of every whole-number shape around it, and the best rebuilt exactly.

(1) Real-valued shapes have one unknown, their depth: it fixes what a token costs, and the law or the budget then fixes the
tokens. (2) Every whole-number shape around them is priced as arrays. (3) The best are rebuilt as `ModelSpec`s and priced
again by `cost`.

Sources: compute-optimal training, arXiv 2203.15556; training plus serving, arXiv 2401.00448; head configurations and the
combined cost Z, arXiv 2503.09579.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from scantling.costing import cost
from scantling.planning import notes
from scantling.planning.config import PlanConfig
from scantling.planning.loss import HeadLaw
from scantling.planning.outcome import Outcome, Problem, outcome, pose
from scantling.planning.price import Priced
from scantling.planning.result import Candidate, FrontPoint, LawOptimum, Plan
from scantling.planning.shapes import (
    MAX_SHAPES,
    WIDTH_STEP,
    Array,
    Family,
    Floats,
    Shapes,
    families,
    real_shapes,
    whole_shapes,
)
from scantling.resolve import spec_from, to_mapping, to_yaml
from scantling.rows import Number
from scantling.spec import ModelSpec

DEPTHS = (0.02, 4096.0)  # num_hidden_layers searched for real-valued optima
SIZES = (1e3, 1e17)  # N searched for the optimum of the law alone
ROUNDS, POINTS = 7, 513

Front = tuple[FrontPoint, ...]


def plan(config: PlanConfig) -> Plan:
    """The cost-optimal shapes for a budget or a target loss.

    With several head configurations each gets an equal share of the candidates, at least one.

    Raises:
        InputError: the law is unknown, the target lies at or below E, the space is empty, or no shape meets the target or
            the budget; the message says what would.
    """
    problem = pose(config)
    kinds = families(config.space, problem.law.heads)
    if not kinds:
        raise notes.no_heads(problem)
    optima, priced = _real_optima(problem, kinds)
    found = outcome(problem, optima, priced)
    order = _ranked(found.score)
    real = [_real_candidate(problem, optima.take([i])) for i in order]
    if not config.space.real_valued:
        widths = optima.hidden_size[order] if real else np.array([float(WIDTH_STEP)])
        candidates, front, screened = _screen(problem, kinds, (widths.min() / 3, widths.max() * 3))
    elif real:
        candidates, screened = real[: config.candidates], 0
        front = _front(problem, lambda at: _real_optima(at, kinds))
    else:
        raise notes.impossible(problem, priced, found)
    real_optimum = real[0] if real else candidates[0]
    return Plan(
        minimize=config.objective,
        cost_convention=config.convention,
        parameters=problem.law.count,
        law=problem.law.name,
        candidates=_with_margins(candidates),
        law_optimum=_law_optimum(problem),
        real_optimum=real_optimum,
        front_cost=problem.limit or config.objective,
        front=front,
        screened=screened,
        notes=notes.notes(problem, candidates, real_optimum),
    )


# --- the search --------------------------------------------------------------------------------------------------------


def minimise(score: Callable[[Floats], Floats], low: float, high: float, lines: int = 1) -> Floats:
    """(lines,) where `score` (infinite where impossible) is least: one unknown per line.

    A grid in the logarithm, narrowed to the two steps around its best point until they are 1e-14 wide.

    Args:
        score: of a (lines, points) array.
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


def _real_optima(problem: Problem, kinds: Sequence[Family]) -> tuple[Shapes, Priced]:
    """The best real-valued shape of each family (any where none is possible), and what it costs."""
    space = problem.config.space

    def score(depth: Floats) -> Floats:
        shapes = real_shapes(space, kinds, depth)
        return outcome(problem, shapes, problem.price(shapes)).score

    best = real_shapes(space, kinds, minimise(score, *DEPTHS, len(kinds))[:, None]).take(np.s_[:, 0])
    return best, problem.price(best)


def _screen(
    problem: Problem, kinds: Sequence[Family], around: tuple[float, float]
) -> tuple[list[Candidate], Front, int]:
    """The best whole-number shapes, their front, and how many were priced; `around` bounds widths that are not listed."""
    config = problem.config
    shapes = whole_shapes(config.space, kinds, around)
    if not 0 < len(shapes) <= MAX_SHAPES:
        raise notes.wrong_number(problem, len(shapes))
    priced = problem.price(shapes)
    found = outcome(problem, shapes, priced)
    order = _ranked(found.score)
    if not order.size:
        raise notes.impossible(problem, priced, found)
    share = max(1, config.candidates // len(kinds))
    ranks = np.concatenate([np.flatnonzero(shapes.family[order] == kind)[:share] for kind in range(len(kinds))])
    best = order[np.sort(ranks)[: config.candidates]]
    candidates = [_whole_candidate(problem, shapes, int(i), found) for i in best]
    return candidates, _front(problem, lambda at: (shapes, priced)), len(shapes)


def _ranked(score: Floats) -> Array:
    """Places of the finite scores, best first."""
    return np.argsort(score, kind="stable")[: np.isfinite(score).sum()]


# --- candidates --------------------------------------------------------------------------------------------------------


def _real_candidate(problem: Problem, shape: Shapes) -> Candidate:
    priced = problem.price(shape)
    full = float(priced.memory_bytes[0]) >= problem.memory * (1 - 1e-6)
    return _candidate(problem, shape, priced, "memory_bytes" if full else problem.limit or "loss", None)


def _whole_candidate(problem: Problem, shapes: Shapes, index: int, screened: Outcome) -> Candidate:
    """One screened shape as a spec, priced again from the spec itself."""
    config = problem.config
    positions = max(config.context, config.training.sequence_length)
    spec = spec_from(shapes.mapping(index, config.space, positions))
    priced = problem.price_rows(cost(spec).rows)
    blocked = screened.possible & ~screened.fits & (screened.objective < screened.objective[index])
    binding = "memory_bytes" if blocked.any() else problem.limit or "loss"
    return _candidate(problem, shapes.take([index]), priced, binding, spec)


def _candidate(problem: Problem, shape: Shapes, priced: Priced, binding: str, spec: ModelSpec | None) -> Candidate:
    """The answer for one shape (arrays of one entry), its costs in `priced`."""
    law, found = problem.law, outcome(problem, shape, priced)
    n, d = _one(priced.parameters), _one(found.tokens)
    heads, kv_heads = (_whole(_one(count)) for count in (shape.num_attention_heads, shape.num_key_value_heads))
    low, high, no_interval = law.interval(n, d)
    outside = law.outside((heads, kv_heads), n, d)
    n_star = None
    if isinstance(law, HeadLaw) and problem.limit is None:
        n_star = law.size_for_loss((int(heads), int(kv_heads)), problem.goal)
    sizes = {
        name: _one(getattr(shape, name)) if spec is None else int(_one(getattr(shape, name)))
        for name in ("hidden_size", "num_hidden_layers", "head_dim", "intermediate_size")
    }
    return Candidate(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **sizes,
        parameters=n,
        n_star=n_star,
        tokens=d,
        tokens_per_parameter=d / n,
        loss=_one(found.loss),
        loss_low=low,
        loss_high=high,
        no_interval=no_interval,
        training_flops=_one(found.training_flops),
        serving_flops=_one(found.serving_flops),
        lifetime_flops=_one(found.training_flops) + _one(found.serving_flops),
        flops=_one(priced.flops),
        weight_bytes=_one(priced.weight_bytes),
        kv_cache_bytes=_one(priced.kv_cache_bytes),
        memory_bytes=_one(priced.memory_bytes),
        z=_one(found.z) if problem.config.convention == "paper-figure-2" else None,
        objective=_one(found.objective),
        binding=binding,
        extrapolated=bool(outside),
        extrapolation=outside,
        params=dict(cost(spec).params) if spec else None,
        spec=to_mapping(spec) if spec else None,
        yaml=to_yaml(spec) if spec else None,
        hash=spec.hash if spec else None,
    )


def _one(value: Number) -> float:
    """The only entry of an array, or a number."""
    return float(np.asarray(value).item())


def _whole(value: float) -> float:
    """An integer where the value is whole."""
    return int(value) if value == int(value) else value


def _with_margins(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The candidates, each but the last with its margin over the next."""
    ahead = [
        dataclasses.replace(item, margin_percent=100 * (after.objective / item.objective - 1))
        for item, after in itertools.pairwise(candidates)
    ]
    return (*ahead, candidates[-1])


# --- the front, and the law alone --------------------------------------------------------------------------------------


def _front(problem: Problem, offers: Callable[[Problem], tuple[Shapes, Priced]]) -> Front:
    """The plan again for reducible losses x 0.8 to 1.25, or budgets x 0.1 to 10; impossible ones left out.

    Args:
        problem: the plan.
        offers: the shapes to choose from, and their prices, for each of these goals.
    """
    if problem.limit is None:
        goals = problem.law.E + (problem.goal - problem.law.E) * np.geomspace(0.8, 1.25, 15)
    else:
        goals = problem.goal * np.geomspace(0.1, 10, 15)
    problems = [problem.at(float(goal)) for goal in goals]
    found = (_best_point(at, *offers(at)) for at in problems)
    return tuple(point for point in found if point is not None)


def _best_point(problem: Problem, shapes: Shapes, priced: Priced) -> FrontPoint | None:
    """The best of these shapes, or None where none is possible."""
    found = outcome(problem, shapes, priced)
    best = int(np.argmin(found.score))
    if not np.isfinite(found.score[best]):
        return None
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return FrontPoint(
        cost=float(problem.goal if problem.limit else found.objective[best]),
        loss=float(found.loss[best]),
        parameters=float(priced.parameters[best]),
        tokens=float(found.tokens[best]),
        **{name: float(getattr(shapes, name)[best]) for name in names},
    )


def _law_optimum(problem: Problem) -> LawOptimum | None:
    """The optimum of the law alone, where it has one: tokens free, and FLOPs are what is spent or saved."""
    law = problem.law
    if isinstance(law, HeadLaw) or problem.ratio is not None:
        return None
    bare = dataclasses.replace(problem, memory=math.inf)

    def at(n: Floats) -> Outcome:
        return outcome(bare, None, Priced(n, 6 * n, 2 * n))

    n = minimise(lambda grid: at(grid).score, *SIZES)
    found, form = at(n), law.fit.form
    if not np.isfinite(found.score).all():
        return None
    size, d, loss, training = (_one(x) for x in (n, found.tokens, found.loss, found.training_flops))
    lifetime = training + _one(found.serving_flops)
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
