"""The screen: every buildable shape priced as arrays, a chunk at a time, and the best of them kept.

Millions of shapes pass through in the memory of one chunk. What stays: the best of each family, a pool of the best of all,
and an even sample of the whole space, from which the front, the sensitivity and the refusals are worked out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scantling.planning.limits import buildable
from scantling.planning.outcome import Outcome, Problem, outcome
from scantling.planning.price import Quote
from scantling.planning.shapes import Family, Shapes, joined, shape_chunks, shape_count
from scantling.planning.variants import Array, Floats

POOL = 1000  # of the best shapes kept
SAMPLE = 300_000  # shapes of the even sample; all of them in a smaller space


@dataclass(frozen=True)
class Screened:
    """What is left of a screen.

    Attributes:
        best: the best shapes, each family with its share, best first.
        pool: the best of all, and every shape of the even sample.
        quote, found: their prices and outcomes.
        count: shapes priced.
        stride: the sample holds every so-manieth shape.
    """

    best: Shapes
    pool: Shapes
    quote: Quote
    found: Outcome
    count: int
    stride: int


def screen(problem: Problem, kinds: Sequence[Family], around: tuple[float, float], wanted: int) -> Screened:
    """Price every whole-number shape; `around` bounds the widths where the space lists none.

    Args:
        problem: the plan.
        kinds: head configurations.
        around: lowest and highest hidden_size.
        wanted: candidates; each family gets an equal share, at least one.
    """
    config = problem.config
    share = max(1, wanted // len(kinds))
    stride = max(1, -(-shape_count(config.space, kinds, around) // SAMPLE))
    kept: dict[int, tuple[Shapes, Floats]] = {}  # by family
    sample: list[Shapes] = []
    count = 0
    for chunk in shape_chunks(config.space, kinds, around):
        shapes = chunk.take(buildable(config.constraints, config.serving.devices, chunk))
        sample.append(shapes.take(np.s_[-count % stride :: stride]))
        count += len(shapes)
        if not len(shapes):
            continue
        score = outcome(problem, shapes, problem.price(shapes)).score
        best = ranked(score, POOL)
        if best.size:
            number = int(shapes.family[0])  # of the whole chunk
            mine, scores = shapes.take(best), score[best]
            if number in kept:
                mine, scores = joined([kept[number][0], mine]), np.concatenate([kept[number][1], scores])
                order = ranked(scores, POOL)
                mine, scores = mine.take(order), scores[order]
            kept[number] = mine, scores
    if not kept:
        pool = joined(sample)
        quote = problem.price(pool)
        return Screened(pool.take(np.s_[:0]), pool, quote, outcome(problem, pool, quote), count, stride)
    found = joined([shapes for shapes, _ in kept.values()])
    score = np.concatenate([scores for _, scores in kept.values()])
    order = ranked(score, score.size)
    ranks = [np.flatnonzero(found.family[order] == kind)[:share] for kind in range(len(kinds))]
    best = order[np.sort(np.concatenate(ranks))[:wanted]]
    pool = joined([found.take(order[:POOL]), *sample]) if stride > 1 else joined(sample)
    quote = problem.price(pool)
    return Screened(found.take(best), pool, quote, outcome(problem, pool, quote), count, stride)


def ranked(score: Floats, most: int) -> Array:
    """Places of the finite scores, best first, at most so many."""
    if most < score.size:
        near = np.argpartition(score, most)[:most]
        near.sort()
        order = near[np.argsort(score[near], kind="stable")]
    else:
        order = np.argsort(score, kind="stable")
    return order[: int(np.isfinite(score[order]).sum())]
