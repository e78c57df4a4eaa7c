"""Candidates with everything that is said of them, and the fronts: loss against cost, memory against FLOPs."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from scantling.costing import cost
from scantling.errors import InputError
from scantling.planning import notes
from scantling.planning.loss import FittedLaw, HeadLaw
from scantling.planning.optima import one
from scantling.planning.outcome import Outcome, Problem, all_costs, blocked_by, outcome
from scantling.planning.price import Priced, Quote
from scantling.planning.result import Candidate, FrontPoint, MemoryPoint
from scantling.planning.screen import Screened
from scantling.planning.shapes import Shapes
from scantling.resolve import spec_from, to_mapping, to_yaml
from scantling.spec import ModelSpec

Front = tuple[FrontPoint, ...]


def real_candidate(problem: Problem, shape: Shapes) -> Candidate:
    quote = problem.price(shape, everything=True)
    found = outcome(problem, shape, quote)
    full = [i for i, least in found.least.items() if not least[0] < problem.limits[i].most * (1 - 1e-6)]
    full = [i for i in full if i or not problem.limit or problem.limit == "memory_bytes"]
    return _candidate(problem, shape, quote, problem.limits[full[0]].name if full else _default(problem, found), None)


def _default(problem: Problem, found: Outcome) -> str:
    """The limit that holds the tokens of one shape down, or the target."""
    if found.binding is not None:
        return problem.limits[int(found.binding[0])].name
    return problem.limit or "loss"


def whole_candidate(problem: Problem, shapes: Shapes, index: int, screened: Screened) -> tuple[Candidate, float]:
    """One screened shape as a spec, priced again from the spec itself, and its score."""
    config = problem.config
    positions = max(config.context, config.training.sequence_length)
    spec = spec_from(shapes.mapping(index, config.space, positions))
    shape = shapes.take([index])
    quote = problem.beside_parent(problem.quote(spec, everything=True), shape, int(shape.variant[0]))
    found = outcome(problem, shape, quote)
    blocked = blocked_by(problem, screened.found, float(np.asarray(found.objective).ravel()[0]))
    binding = (
        problem.limits[blocked[0]].name if blocked else _default(problem, outcome(problem, shape, problem.price(shape)))
    )
    return _candidate(problem, shape, quote, binding, spec), float(found.score.ravel()[0])


def whole_candidates(problem: Problem, shapes: Shapes, screened: Screened) -> tuple[Shapes, list[Candidate]]:
    """The best screened shapes as specs, priced again, best first.

    The rounding of a width profile's layers is in the spec and not in the screen, so such shapes may change places, miss the
    goal, or be impossible to build; then they are left out.
    """
    found: list[tuple[float, int, Candidate]] = []
    faults: list[str] = []
    for index in range(len(shapes)):
        rounded = problem.config.space.variants[int(shapes.variant[index])].profile is not None
        try:
            item, score = whole_candidate(problem, shapes, index, screened)
        except InputError as error:
            if not rounded:
                raise
            faults += error.faults
            continue
        if np.isfinite(score) or not rounded:
            found.append((item.objective, index, item))
    if not found:
        raise (
            InputError(*dict.fromkeys(faults))
            if faults
            else notes.impossible(problem, screened.found, screened.pool, screened.quote)
        )
    found.sort(key=lambda entry: entry[:2])
    return shapes.take([index for _, index, _ in found]), [item for *_, item in found]


def _candidate(problem: Problem, shape: Shapes, priced: Quote, binding: str, spec: ModelSpec | None) -> Candidate:
    """The answer for one shape (arrays of one entry), its costs in `priced`."""
    law, found = problem.law, outcome(problem, shape, priced)
    n, d = one(priced.parameters), one(found.tokens)
    heads, kv_heads = (_whole(one(count)) for count in (shape.num_attention_heads, shape.num_key_value_heads))
    low, high, no_interval = law.interval(shape, priced, d)
    outside = law.outside(shape, priced, d)
    n_star = None
    if isinstance(law, HeadLaw) and problem.limit is None:
        n_star = law.size_for_loss((int(heads), int(kv_heads)), problem.goal)
    costs = {name: one(value) for name, value in all_costs(problem, priced, found.tokens).items()}
    errors = None
    if isinstance(law, FittedLaw) and law.fit.downstream:
        errors = {task: one(down.error(found.loss)) for task, down in law.fit.downstream.items()}
    sizes = {
        name: one(getattr(shape, name)) if spec is None else int(one(getattr(shape, name)))
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
        loss=one(found.loss),
        loss_low=low,
        loss_high=high,
        no_interval=no_interval,
        training_flops=one(found.training_flops),
        serving_flops=one(found.serving_flops),
        lifetime_flops=one(found.training_flops) + one(found.serving_flops),
        flops=one(priced.flops),
        weight_bytes=one(priced.weight_bytes),
        kv_cache_bytes=one(priced.kv_cache_bytes),
        memory_bytes=one(priced.memory_bytes),
        z=costs.get("z"),
        objective=one(found.objective),
        binding=binding,
        extrapolated=bool(outside),
        extrapolation=outside,
        params=dict(cost(spec).params) if spec else None,
        spec=to_mapping(spec) if spec else None,
        yaml=to_yaml(spec) if spec else None,
        hash=spec.hash if spec else None,
        costs=costs,
        family=problem.config.space.variants[int(shape.variant.flat[0])].name,
        errors=errors,
    )


def _whole(value: float) -> float:
    """An integer where the value is whole."""
    return int(value) if value == int(value) else value


def with_margins(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The candidates, each but the last with its margin over the next."""
    ahead = [
        dataclasses.replace(item, margin_percent=100 * (after.objective / item.objective - 1))
        for item, after in itertools.pairwise(candidates)
    ]
    return (*ahead, candidates[-1])


# --- fronts ----------------------------------------------------------------------------------------------------------


def front(problem: Problem, offers: Callable[[Problem], tuple[Shapes, Priced]]) -> Front:
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
        family=problem.config.space.variants[int(shapes.variant[best])].name,
    )


def memory_front(problem: Problem, shapes: Shapes, quote: Priced) -> tuple[str, tuple[MemoryPoint, ...]]:
    """The shapes that will do and that no other beats in both memory and FLOPs, and which: `lifetime_flops`, or `flops` (of one
    context) where the convention counts these or the life's are the same for all."""
    found = outcome(problem, shapes, quote)
    does = np.flatnonzero(np.isfinite(found.score))
    memory = np.broadcast_to(np.asarray(quote.memory_bytes, dtype=np.float64), found.tokens.shape)[does]
    cost, work = "lifetime_flops", found.training_flops + found.serving_flops
    if problem.config.convention == "paper-figure-2" or not np.ptp(work[does]) > 1e-9 * work[does].max():
        cost, work = "flops", np.broadcast_to(np.asarray(quote.flops, dtype=np.float64), found.tokens.shape)
    work = work[does]
    order = np.lexsort((work, memory))
    least = np.minimum.accumulate(work[order])
    kept = order[np.flatnonzero(np.r_[True, least[1:] < least[:-1]])]
    kept = kept[np.unique(np.linspace(0, len(kept) - 1, 25).round().astype(int))]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return cost, tuple(
        MemoryPoint(float(memory[i]), float(work[i]), **{name: float(getattr(shapes, name)[does[i]]) for name in names})
        for i in kept
    )
