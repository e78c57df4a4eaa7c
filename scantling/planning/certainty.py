"""How sure the choice is: the candidates under every draw of the law, and the choice when the plan's numbers change."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scantling.planning.config import PlanConfig
from scantling.planning.costs import NEEDS_PRICE
from scantling.planning.outcome import Problem, outcome
from scantling.planning.price import Priced
from scantling.planning.result import Candidate, Sensitivity
from scantling.planning.shapes import Shapes
from scantling.planning.variants import Floats

DRAWS = 200  # of the law's, evenly thinned
FACTORS = (0.5, 2.0)


def scores_by_draw(problem: Problem, shapes: Shapes, priced: Priced, draws: int = DRAWS) -> Floats:
    """(draws, shapes) objective under each draw of the law, infinite where impossible; no rows without draws."""
    laws = problem.law.drawn(draws)
    return np.array([_score(problem, shapes, priced, law) for law in laws]).reshape(len(laws), len(shapes))


def _score(problem: Problem, shapes: Shapes, priced: Priced, law: object) -> Floats:
    if problem.limit is None and problem.goal <= law.E:  # type: ignore[attr-defined]
        return np.full(len(shapes), np.inf)
    return outcome(problem, shapes, priced, law).score  # type: ignore[arg-type]


def with_probabilities(
    problem: Problem, candidates: Sequence[Candidate], shapes: Shapes, pool: Shapes, priced: Priced
) -> tuple[Candidate, ...]:
    """The candidates with their probability of being best of them, expected regret, and probability of being possible.

    Args:
        problem: the plan.
        candidates, shapes: in the same order.
        pool, priced: the shapes that the regret is measured against.
    """
    mine = scores_by_draw(problem, shapes, problem.price(shapes))
    if not mine.size:
        return tuple(candidates)
    best = np.minimum(scores_by_draw(problem, pool, priced).min(axis=1), mine.min(axis=1))
    usable = np.isfinite(mine).any(axis=1)
    if not usable.any():
        return tuple(candidates)
    winners = np.bincount(mine[usable].argmin(axis=1), minlength=len(candidates)) / len(mine)
    found = []
    for i, item in enumerate(candidates):
        reached = np.isfinite(mine[:, i])
        regret = float(np.mean(mine[reached, i] - best[reached])) if reached.any() else None
        share = float(reached.mean())
        found.append(
            dataclasses.replace(
                item, probability_best=float(winners[i]), expected_regret=regret, probability_reached=share
            )
        )
    return tuple(found)


# --- sensitivity -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """One number of the plan multiplied by a factor."""

    key: str
    factor: float
    value: float
    config: PlanConfig


def changes(problem: Problem) -> list[Change]:
    """The plan with its context, served tokens, batch and price at half and at double, where they matter."""
    config, found = problem.config, []
    serving, hardware = config.serving, config.hardware
    for factor in FACTORS:
        if serving.context is not None:
            pairs = tuple((max(1, round(length * factor)), share) for length, share in serving.context)
            served = serving.model_copy(update={"context": pairs})
            found.append(Change("serving.context", factor, pairs[-1][0], _with(config, serving=served)))
        if serving.tokens is not None:
            served = serving.model_copy(update={"tokens": serving.tokens * factor})
            found.append(Change("serving.tokens", factor, serving.tokens * factor, _with(config, serving=served)))
        if serving.batch * factor >= 1 and serving.batch > 1:
            served = serving.model_copy(update={"batch": round(serving.batch * factor)})
            found.append(Change("serving.batch", factor, round(serving.batch * factor), _with(config, serving=served)))
        if hardware is not None and problem.asked & set(NEEDS_PRICE) and config.site is not None:
            rate = (config.site.usd_per_hour or 0.0) * factor
            priced = hardware.model_copy(update={"usd_per_hour": rate})
            found.append(Change("hardware.usd_per_hour", factor, rate, _with(config, hardware=priced)))
    return found


def _with(config: PlanConfig, **sections: object) -> PlanConfig:
    """The plan with other sections; what was derived from the old ones is forgotten."""
    changed = config.model_copy(update=sections)
    changed.__dict__.pop("site", None)
    return changed


def sensitivity(problem: Problem, chosen: Shapes, pool: Shapes) -> tuple[Sensitivity, ...]:
    """What would be best of the pool after each change, and how much worse the chosen shape is there."""
    found = []
    for change in changes(problem):
        there = dataclasses.replace(problem, config=change.config)
        score = outcome(there, pool, there.price(pool)).score
        mine = float(outcome(there, chosen, there.price(chosen)).score[0])
        if np.isfinite(score).any() or np.isfinite(mine):
            found.append(compared(change, chosen, mine, pool, score))
    return tuple(found)


def compared(change: Change, chosen: Shapes, mine: float, pool: Shapes, score: Floats) -> Sensitivity:
    """The best of a pool after a change, against the shape chosen before it."""
    best = int(np.argmin(score)) if score.size else 0
    shape = pool.take([best]) if score.size and score[best] <= mine else chosen
    least = min(float(score[best]) if score.size else np.inf, mine)
    sizes = {
        name: float(getattr(shape, name)[0])
        for name in ("num_attention_heads", "num_key_value_heads", "hidden_size", "num_hidden_layers")
    }
    same = all(
        getattr(shape, name)[0] == getattr(chosen, name)[0] for name in ("num_attention_heads", "num_key_value_heads")
    )
    regret = 100 * (mine / least - 1) if np.isfinite(mine) else None
    family = change.config.space.variants[int(shape.variant[0])].name
    return Sensitivity(
        change.key, change.factor, change.value, **sizes, same_heads=same, regret_percent=regret, family=family
    )
