"""A schedule of shapes: at each loss train the one that improves it for the least compute (arXiv 2311.03233).

With C_i(l) the FLOPs that shape i needs from scratch to loss l, and growth handing a loss over unchanged, a schedule that grows
from shape k to k + 1 at loss l_k costs C_n(target) + sum_k [C_k(l_k) - C_{k+1}(l_k)]: each switch is a problem of its own, but
for their order. Inside, marginal costs |dC/dl| are equal at a switch. Losses are nats per token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from scantling.laws.forms import Chinchilla
from scantling.planning.curves import Curve
from scantling.planning.variants import Floats

POINTS = 800  # losses between the start and the target, evenly in log tokens of the target
BEYOND = 100.0  # log ratio of marginal costs where the smaller shape never gets to the loss
FIRST = 1e-3  # tokens: where a run from scratch begins on that grid; laws put no switch below


@dataclass(frozen=True)
class Trained:
    """A shape as the schedule sees it: its loss as a function of its tokens, and training FLOPs per token."""

    curve: Curve
    flops: float

    def compute(self, loss: Floats | float) -> Floats:
        """C(l): FLOPs from scratch to a loss; infinite where it is never reached."""
        return self.flops * self.curve.tokens(loss)

    def marginal(self, loss: float) -> float:
        """|dC/dl|: FLOPs per nat of improvement at a loss; infinite where it is never reached."""
        curve, d = self.curve, float(self.curve.tokens(loss))
        if not math.isfinite(d):
            return math.inf
        inner = float(curve.floor) + sum(float(size) * d ** -float(power) for size, power in curve.terms)
        slope = sum(float(power * size) * d ** -(float(power) + 1) for size, power in curve.terms)
        return float(self.flops / (slope * curve.outer * inner ** (curve.outer - 1)))


@dataclass(frozen=True)
class Leg:
    """A part of a schedule.

    Attributes:
        shape: its place among the shapes.
        from_loss: where it takes over; infinite from scratch.
        to_loss: where the next one takes over, or the target.
        already: tokens of this shape that the loss taken over is worth.
        tokens: trained in this part.
        flops: of these tokens.
    """

    shape: int
    from_loss: float
    to_loss: float
    already: float
    tokens: float
    flops: float


def cheapest(shapes: Sequence[Trained], goal: float, start: float = math.inf) -> list[Leg]:
    """The cheapest way from a loss to a lower one through shapes in this order, ending in the last; shapes may be left out.

    Args:
        shapes: smallest first.
        goal: the loss to reach, above the last shape's floor.
        start: the loss of the first shape where it begins; infinite from scratch.

    Returns:
        The parts with tokens; where the best way is never to grow, the last shape is missing.
    """
    last = shapes[-1].curve
    tokens = float(last.tokens(goal))
    first = float(last.tokens(start)) if math.isfinite(start) else min(FIRST, tokens / 2)
    grid = np.asarray(last.loss(np.geomspace(first, tokens, POINTS)), dtype=np.float64)
    if math.isfinite(start):
        grid[0] = start
    close = goal + (grid[-2] - goal) * 0.5 ** np.arange(1, 40)  # a switch may come just before the end
    grid = np.unique(np.r_[grid[:-1], close, goal])[::-1]
    cost = np.stack([shape.compute(grid) for shape in shapes])
    if not math.isfinite(start):
        grid, cost = np.r_[math.inf, grid], np.c_[np.zeros(len(shapes)), cost]
    order = _order(cost)
    ends = [_switch(shapes[a], shapes[b], grid, place) for (a, place), (b, _) in pairwise(order)]
    if any(after >= before for before, after in zip([start, *ends], [*ends, goal], strict=True)):
        ends = [float(grid[place]) for _, place in order[:-1]]
    return legs(shapes, [shape for shape, _ in order], [start, *ends, goal])


def legs(shapes: Sequence[Trained], order: Sequence[int], losses: Sequence[float]) -> list[Leg]:
    """The parts of a schedule from its shapes and the losses at which they begin and end."""
    found = []
    for shape, before, after in zip(order, losses[:-1], losses[1:], strict=True):
        one = shapes[shape]
        already = float(one.curve.tokens(before)) if math.isfinite(before) else 0.0
        tokens = float(one.curve.tokens(after)) - already
        found.append(Leg(shape, before, after, already, tokens, one.flops * tokens))
    return found


def shares(found: Sequence[Leg]) -> list[float]:
    """Shares of the schedule's tokens that come before each growth."""
    ends = np.cumsum([leg.tokens for leg in found])
    return [float(end / ends[-1]) for end in ends[:-1]]


def _order(cost: Floats) -> list[tuple[int, int]]:
    """Shapes in use and the grid place where each ends.

    least[k][j], the least FLOPs to place j with shapes up to k, is C_k(j) + min over i <= j of (least[k-1][i] - C_k(i)).
    """
    least = [cost[0]]
    gaps = [cost[0]]
    for own in cost[1:]:
        reached = np.isfinite(own)
        gaps.append(np.where(reached, least[-1] - np.where(reached, own, 0.0), np.inf))
        taken = np.where(reached, own, np.inf) + np.minimum.accumulate(gaps[-1])
        least.append(np.minimum(least[-1], taken))
    found: list[tuple[int, int]] = []
    place = cost.shape[1] - 1
    for shape in range(len(cost) - 1, 0, -1):
        begin = int(np.argmin(gaps[shape][: place + 1]))
        taken_now = np.isfinite(gaps[shape][begin]) and np.isfinite(cost[shape][place])
        if begin < place and taken_now and cost[shape][place] + gaps[shape][begin] <= least[shape - 1][place]:
            found.append((shape, place))
            place = begin
    if place > 0:
        found.append((0, place))
    return found[::-1]


def _switch(small: Trained, large: Trained, grid: Floats, place: int) -> float:
    """The loss near a grid place where both marginal costs are equal; the grid's where none is."""
    from scipy.optimize import brentq  # loaded only when a schedule is asked for

    def gap(loss: float) -> float:
        return min(math.log(small.marginal(loss) / large.marginal(loss)), BEYOND) if reached(loss) else BEYOND

    def reached(loss: float) -> bool:
        return math.isfinite(small.marginal(loss)) and math.isfinite(large.marginal(loss))

    high, low = float(grid[place - 1]), float(grid[place + 1])
    if not math.isfinite(high) or not gap(high) < 0 < gap(low):
        return float(grid[place])
    return float(brentq(gap, low, high, xtol=1e-14))


def spent_holding(shapes: Sequence[Trained], plan: Sequence[Leg], tokens: float, paid: float = 0.0) -> float:
    """FLOPs of a schedule whose early parts keep their tokens while the last trains to the loss of `tokens` from scratch.

    Args:
        shapes: under other parameters than the schedule was made with, such as a bootstrap draw.
        plan: the schedule.
        tokens: of the last shape from scratch; they define the loss to reach.
        paid: tokens the first part's shape was trained before the schedule begins.
    """
    loss, spent = math.inf, 0.0
    if paid:
        loss = float(shapes[0].curve.loss(paid))
    for leg in plan:
        one = shapes[leg.shape]
        already = float(one.curve.tokens(loss)) if math.isfinite(loss) else 0.0
        if leg is plan[-1]:
            return spent + one.flops * max(0.0, tokens - already)
        spent += leg.flops
        loss = float(one.curve.loss(already + leg.tokens))
    return spent


def turns_back(shapes: Sequence[Trained], goal: float) -> bool:
    """Whether the shape of least marginal cost would somewhere be an earlier one again, which growth cannot do."""
    last = shapes[-1].curve
    grid = last.loss(np.geomspace(FIRST, max(2 * FIRST, float(last.tokens(goal))), 400))
    best = [int(np.argmin([shape.marginal(float(loss)) for shape in shapes])) for loss in grid]
    return any(after < before for before, after in pairwise(best))


def switching_loss(law: Chinchilla, sizes: tuple[float, float], flops: tuple[float, float] | None = None) -> float:
    """l* = E + A (N1^-alpha - r N2^-alpha) / (1 - r) with r = (c1 / c2)^(beta / (1 + beta)): marginal costs are equal there.

    Args:
        law: E + A N^-alpha + B D^-beta.
        sizes: N1 below N2.
        flops: c1 and c2 per token; default 6 N.
    """
    (n1, n2), (c1, c2) = sizes, flops or sizes
    ratio = (c1 / c2) ** (law.beta / (1 + law.beta))
    return float(law.E + law.A * (n1**-law.alpha - ratio * n2**-law.alpha) / (1 - ratio))
