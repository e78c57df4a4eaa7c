"""The search: the real-valued optimum, a screen of every whole-number shape around it, and the best rebuilt exactly.

(1) Real-valued shapes have one unknown, their depth: it fixes what a token costs, and the law or the budget then fixes the
tokens. (2) Every whole-number shape around them is priced as arrays. (3) The best are rebuilt as `ModelSpec`s and priced
again by `cost`.

Sources: compute-optimal training, arXiv 2203.15556; training plus serving, arXiv 2401.00448; head configurations and the
combined cost Z, arXiv 2503.09579.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import numpy as np

from scantling.planning import notes
from scantling.planning.answer import front as fronts
from scantling.planning.answer import memory_front, real_candidate, whole_candidates, with_margins
from scantling.planning.certainty import sensitivity, with_probabilities
from scantling.planning.config import PlanConfig
from scantling.planning.limits import family_allowed, smallest_width
from scantling.planning.next_runs import next_runs
from scantling.planning.optima import family_probabilities, law_optimum, real_grid, real_optima, real_sensitivity
from scantling.planning.outcome import Problem, outcome, pose
from scantling.planning.result import Plan
from scantling.planning.screen import Screened, ranked, screen
from scantling.planning.shapes import WIDTH_STEP, Family, families, shape_count
from scantling.planning.space import MAX_SHAPES
from scantling.planning.studies import testing_study
from scantling.planning.variants import Array

NEAR = 1000  # shapes that the regret is measured against


def plan(config: PlanConfig) -> Plan:
    """The cost-optimal shapes for a budget or a target loss.

    With several head configurations each gets an equal share of the candidates, at least one.

    Raises:
        InputError: the law is unknown, the target lies at or below E, the space is empty, or no shape meets the target,
            the budget or the constraints; the message says what would.
    """
    problem = pose(config)
    config = problem.config
    allowed = partial(family_allowed, config.constraints, config.serving.devices)
    kinds = [kind for kind in families(config.space, problem.law.heads) if allowed(kind)]
    if not kinds:
        raise notes.no_heads(problem)
    optima, priced = real_optima(problem, kinds)
    found = outcome(problem, optima, priced)
    order = ranked(found.score, len(optima))
    real = [real_candidate(problem, optima.take([i])) for i in order]
    screened: Screened | None = None
    if not config.space.real_valued:
        screened = _screened(problem, kinds, _widths_around(problem, kinds, optima.hidden_size[order]))
        shapes, pool, quote = screened.best, screened.pool, screened.quote
        shapes, candidates = whole_candidates(problem, shapes, screened)
        front = fronts(problem, lambda at: (pool, quote))
        turned = sensitivity(problem, shapes.take([0]), pool)
    elif real:
        candidates, shapes, pool, quote = (
            real[: config.candidates],
            optima.take(order[: config.candidates]),
            optima,
            priced,
        )
        front = fronts(problem, lambda at: real_optima(at, kinds))
        turned = real_sensitivity(problem, kinds, shapes.take([0]))
    else:
        grid = real_grid(problem, kinds)
        priced = problem.price(grid)
        raise notes.impossible(problem, outcome(problem, grid, priced), grid, priced)
    if config.space.real_valued and problem.law.heads is not None:
        sure = family_probabilities(problem, kinds, candidates, shapes)
    else:
        near = pool.take(ranked(outcome(problem, pool, quote).score, NEAR))
        sure = with_probabilities(problem, candidates, shapes, near, problem.price(near))
    real_optimum = real[0] if real else candidates[0]
    memory_cost, memory = memory_front(problem, pool, quote)
    serving = config.serving
    return Plan(
        minimize=config.objective,
        cost_convention=config.convention,
        parameters=problem.law.count,
        law=problem.law.name,
        candidates=with_margins(sure),
        law_optimum=law_optimum(problem),
        real_optimum=real_optimum,
        front_cost=problem.limit or config.objective,
        front=front,
        screened=screened.count if screened else 0,
        notes=(
            *notes.notes(problem, candidates, real_optimum),
            *notes.about_limits(problem, screened, candidates[0], turned),
        ),
        serving={
            "context": config.context,
            "contexts": config.contexts,
            "batch": serving.batch,
            "dtype": serving.dtype,
            "devices": serving.devices,
            "tokens": serving.tokens,
        },
        sensitivity=turned,
        memory_front=memory,
        memory_front_cost=memory_cost,
        study=testing_study(problem, candidates),
        next=next_runs(problem, kinds, candidates, pool, quote),
        no_probability=None if sure[0].probability_best is not None else problem.law.no_draws,
    )


# --- the search --------------------------------------------------------------------------------------------------------


def _widths_around(problem: Problem, kinds: Sequence[Family], best: Array) -> tuple[float, float]:
    """Lowest and highest hidden_size screened: a third to three times the real-valued optima; without one, all up to there
    of the same plan without its constraints. The smallest width that can be built is among them."""
    least = min(smallest_width(problem.config.constraints, problem.config.serving.devices, kind) for kind in kinds)
    if best.size:
        return best.min() / 3, max(float(least), best.max() * 3)
    bare = dataclasses.replace(problem, limits=problem.limits[: problem.limit is not None])
    optima, priced = real_optima(bare, kinds)
    widths = optima.hidden_size[np.isfinite(outcome(bare, optima, priced).score)]
    return WIDTH_STEP / 3, max(float(least), 3 * max([float(WIDTH_STEP), *widths.tolist()]))


def _screened(problem: Problem, kinds: Sequence[Family], around: tuple[float, float]) -> Screened:
    """The screen, or why it found nothing."""
    expected = shape_count(problem.config.space, kinds, around)
    if expected > MAX_SHAPES:
        raise notes.wrong_number(problem, expected)
    found = screen(problem, kinds, around, problem.config.candidates)
    if not found.count:
        raise notes.wrong_number(problem, 0)
    if not len(found.best):
        raise notes.impossible(problem, found.found, found.pool, found.quote)
    return found
