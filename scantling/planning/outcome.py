"""What each shape must or can do for one goal: tokens, loss, costs and the objective, as arrays."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scantling.costing import cost
from scantling.planning.config import COSTS, PlanConfig
from scantling.planning.costs import (
    NEEDS_DEVICE,
    NEEDS_PRICE,
    NEEDS_SERVED_TOKENS,
    OF_TOKENS,
    TIMED,
    CostName,
    parts,
    serve,
)
from scantling.planning.evidence import Evidence
from scantling.planning.limits import Limit
from scantling.planning.loss import FittedLaw, Law, read_law
from scantling.planning.posing import SHAPE_COLUMNS, resolved
from scantling.planning.price import Priced, Quote, price
from scantling.planning.shapes import Shapes
from scantling.planning.variants import Array, Floats, Variant
from scantling.rows import rows
from scantling.yamlio import KeyPath


@dataclass(frozen=True)
class Problem:
    """A plan with its law, and the one number that the front varies.

    Attributes:
        goal: the target loss, or the amount of the budget named `limit`.
        limit: what is spent; None with a target loss.
        limits: every upper limit, the budget's first.
        ratio: fixed tokens per parameter, or None when the tokens are free.
        evidence: about families, where the plan names it.
        parents: of each variant, the same sizes in the evidence's baseline architecture.
    """

    config: PlanConfig
    law: Law
    goal: float
    limit: CostName | None
    limits: tuple[Limit, ...]
    ratio: float | None
    evidence: Evidence | None = None
    parents: tuple[Variant, ...] = ()

    def at(self, goal: float) -> "Problem":
        """The same plan with another target or budget."""
        limits = self.limits
        if self.limit is not None:
            limits = (dataclasses.replace(limits[0], most=goal), *limits[1:])
        return dataclasses.replace(self, goal=goal, limits=limits)

    @property
    def goal_path(self) -> KeyPath:
        """The key of the plan that states the goal."""
        if self.limit is not None:
            return ("budget", self.limit)
        return ("target", "error" if self.config.target and self.config.target.error else "loss")

    @property
    def knows_aspect(self) -> bool:
        """Whether the law tells shapes of one size apart by width and depth."""
        return isinstance(self.law, FittedLaw) and bool({*SHAPE_COLUMNS} & set(self.law.columns))

    @property
    def asked(self) -> set[CostName]:
        """The costs that decide: minimised or limited."""
        return {*self.config.weights, *(limit.name for limit in self.limits)}

    def price(self, shapes: Shapes, everything: bool = False) -> Quote:
        """What shapes cost in the plan's convention; `everything`, or only what decides."""
        if len(self.config.space.variants) < 2 or np.ptp(shapes.variant) == 0:
            return self._one_variant(shapes, int(shapes.variant.flat[0]) if len(shapes) else 0, everything)
        used = np.unique(shapes.variant)
        masks = [shapes.variant == number for number in used]
        quotes = [
            self._one_variant(shapes.take(mask), int(number), everything)
            for mask, number in zip(masks, used, strict=True)
        ]
        merged: Quote = _merged(quotes, masks, shapes.variant.shape)
        return merged

    def _one_variant(self, shapes: Shapes, number: int, everything: bool) -> Quote:
        """The price of shapes of one architecture."""
        quote = self.quote(shapes.stack(self.config.space, self.config.space.variants[number]), everything)
        return self.beside_parent(quote, shapes, number)

    def beside_parent(self, quote: Quote, shapes: Shapes, number: int) -> Quote:
        """The price with its ratios to the same shapes in the baseline architecture of the evidence, where there is one."""
        if not isinstance(self.law, FittedLaw) or not self.law.gains:
            return quote
        variant, parent = self.config.space.variants[number], self.parents[number]
        if variant.keys == parent.keys:
            return quote
        width = shapes.hidden_size
        heads, kv_heads = shapes.num_attention_heads, shapes.num_key_value_heads
        if variant.heads or variant.kv_heads:
            heads = np.full_like(width, parent.heads) if parent.heads else width // shapes.head_dim
            kv_heads = np.full_like(width, parent.kv_heads) if parent.kv_heads else heads
        plain = dataclasses.replace(
            shapes,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            intermediate_size=parent.ffn.inner(width),
        )
        base = self.quote(plain.stack(self.config.space, parent))
        return dataclasses.replace(
            quote,
            size_ratio=base.parameters / quote.parameters,
            work_ratio=quote.training_flops_per_token / base.training_flops_per_token,
        )

    def quote(self, model: Any, everything: bool = False) -> Quote:
        """As `price`, for a spec or a `Stack` of arrays."""
        config, serving = self.config, self.config.serving
        priced_at = {
            length: cost(model, length, serving.batch, serving.bytes_per_value)
            for length in (config.contexts if everything or self.asked & {*TIMED, "decode_bytes"} else ())
        }
        one = None
        if priced_at and config.site is not None:
            one = cost(model, config.context, 1, serving.bytes_per_value)
        table = priced_at[config.context].rows if priced_at else rows(model)
        priced = price(
            table,
            config.convention,
            self.law.count,
            sequence_length=config.training.sequence_length,
            context=config.context,
            shares=config.contexts,
            batch=serving.batch,
            bytes_per_value=serving.bytes_per_value,
        )
        served = serve(priced_at, config.contexts, one, config.site, serving.dtype) if priced_at else None
        values = {item.name: getattr(priced, item.name) for item in dataclasses.fields(Priced)}
        return Quote(**values, served=served)

    def parts(self, name: CostName, priced: Priced) -> tuple[Floats, Floats]:
        """(a, b) of a cost a + b D."""
        config, served = self.config, getattr(priced, "served", None)
        fixed, per_token = parts(name, priced, served, config.serving.tokens or 0.0, config.site)
        return _floats(fixed), _floats(per_token)


def pose(config: PlanConfig) -> Problem:
    """The plan with its law.

    Raises:
        InputError: the law is unknown, or it and the plan contradict each other.
    """
    config, law, evidence, parents = resolved(config, read_law(config))
    ratio = config.training.tokens_per_parameter or law.tokens_per_parameter
    limit: CostName | None = None
    goal = 0.0
    if config.target is not None:
        goal = config.target.loss or 0.0
        if config.target.error is not None:
            goal = _loss_for_error(config, law)
        if goal <= law.E:
            raise config.fault(
                ("target", "loss"),
                f"the law never goes down to E = {law.E:.6g} nats per token, got the target {goal:.6g}; raise it",
            )
    elif config.budget is not None:
        limit = config.budget.limit
        goal = config.limits[0].most
    free = ratio is None and not config.limits_tokens
    if free and (limit is not None or not any(name in OF_TOKENS for name in config.weights)):
        what = "a budget of memory alone" if limit else f"minimize: {config.objective}"
        raise config.fault(
            ("training", "tokens_per_parameter"),
            f"{what} has no optimum while tokens are free: training longer costs nothing; give a number such as 20"
            + (", or budget.training_flops" if limit else ", or constraints.training_flops"),
        )
    return Problem(config, law, goal, limit, config.limits, ratio, evidence, parents)


def _loss_for_error(config: PlanConfig, law: Law) -> float:
    """The loss at which the law's own law from loss to error gives the target error."""
    target = config.target
    assert target is not None and target.error is not None
    known = law.fit.downstream if isinstance(law, FittedLaw) else {}
    if not known:
        raise config.fault(
            ("target", "error"),
            f"the law {law.name} has no law from loss to error; give target.loss, or fit one with "
            "`scantling fit --error COLUMN`",
        )
    task = target.task or (next(iter(known)) if len(known) == 1 else "")
    if task not in known:
        raise config.fault(("target", "task"), f"expected one of {', '.join(known)}, got {task or 'nothing'}")
    down = known[task]
    least = float(down.error(law.E))
    if not least < target.error < down.epsilon:
        raise config.fault(
            ("target", "error"),
            f"the law of {task} goes from {least:.4g} (at the irreducible loss) to {down.epsilon:.4g}, got "
            f"{target.error:g}; choose an error between",
        )
    return -math.log((down.epsilon - target.error) / down.k) / down.gamma


@dataclass(frozen=True)
class Outcome:
    """What each shape must or can do, as arrays.

    Attributes:
        tokens: D.
        loss: nats per token.
        training_flops, serving_flops: of all tokens trained on and served.
        objective: what the plan minimises.
        possible: the target is reached, or the budget suffices, other limits aside.
        fits: within all other limits.
        needs: the smallest goal at which the shape would be possible.
        least: by place in `Problem.limits`, the smallest value at which the shape would keep that limit.
        binding: place in `Problem.limits` of the one that holds the tokens down, or -1.
    """

    tokens: Floats
    loss: Floats
    training_flops: Floats
    serving_flops: Floats
    objective: Floats
    possible: Array
    fits: Array
    needs: Floats
    least: Mapping[int, Floats] = field(default_factory=dict)
    binding: Array | None = None

    @property
    def score(self) -> Floats:
        """The objective, infinite where the shape is not possible or does not fit."""
        return np.where(self.possible & self.fits, self.objective, np.inf)

    def guide(self, problem: Problem) -> Floats:
        """The score; where impossible, beyond every score and the larger the further the shape is from being possible, so
        that a search finds possible shapes between impossible ones."""
        score = self.score
        with np.errstate(all="ignore"):
            goals = np.full(score.shape, problem.goal if problem.limit is None or problem.goal > 0 else 1.0)
            excess = np.where(self.possible, 0.0, np.abs(np.log(self.needs / goals)))
            for i, least in self.least.items():
                excess = np.maximum(excess, np.log(least / problem.limits[i].most))
        return np.where(
            np.isfinite(score), score, 1e300 * (1 + np.nan_to_num(excess, nan=1e7, posinf=1e7).clip(0, 1e7))
        )


def outcome(problem: Problem, shapes: Shapes | None, priced: Priced, law: Law | None = None) -> Outcome:
    """What shapes at these prices do for the goal; without shapes, for a law that knows none.

    Args:
        problem: the plan.
        shapes: for a law that knows any of their sizes.
        priced: from `Problem.price`.
        law: another one than the plan's: one of its draws.
    """
    law = law or problem.law
    n, per_token = _floats(priced.parameters), _floats(priced.training_flops_per_token)
    if shapes is not None:
        n = np.broadcast_to(n, shapes.hidden_size.shape)
    serving_flops = _floats(priced.serving_flops_per_token) * (problem.config.serving.tokens or 0.0)
    costs = {name: problem.parts(name, priced) for name in problem.asked}
    limits = [(limit, *costs[limit.name]) for limit in problem.limits]
    curve = law.curve(shapes, priced)
    sequence, binding = float(problem.config.training.sequence_length), None
    with np.errstate(all="ignore"):
        if problem.ratio is not None:
            tokens = least = problem.ratio * n
        elif problem.limit is None:
            tokens = least = curve.tokens(problem.goal)
        else:
            caps = [np.where(b > 0, (limit.most - a) / b, np.inf) for limit, a, b in limits]
            stacked = np.stack(np.broadcast_arrays(*caps, n))[:-1]
            tokens, binding, least = stacked.min(axis=0), stacked.argmin(axis=0), np.full_like(n, sequence)
        loss = curve.loss(np.where(tokens > 0, tokens, np.nan))
        spent = {i: _floats(a + b * least) for i, (_, a, b) in enumerate(limits)}
        keeps = [_within(spent[i], limit.most) for i, (limit, _, _) in enumerate(limits)]
        if problem.limit is None:
            possible, others = (loss <= problem.goal, keeps) if problem.ratio else (np.isfinite(tokens), keeps)
            needs = loss if problem.ratio else curve.loss(np.inf)
        elif np.any(limits[0][2] > 0):
            possible, others, needs = keeps[0], keeps[1:], spent[0]
        else:
            possible, others, needs = np.full(n.shape, True), keeps, spent[0]
        fits = np.logical_and.reduce([np.full(n.shape, True), *others])
        training_flops = per_token * tokens
        objective = loss
        if weights := problem.config.weights:
            objective = _floats(
                sum(weight * (costs[name][0] + costs[name][1] * tokens) for name, weight in weights.items())
            )
    return Outcome(
        tokens=tokens,
        loss=loss,
        training_flops=training_flops,
        serving_flops=serving_flops,
        objective=np.broadcast_to(objective, n.shape),
        possible=np.broadcast_to(possible, n.shape),
        fits=fits,
        needs=np.broadcast_to(needs, n.shape),
        least={i: np.broadcast_to(value, n.shape) for i, value in spent.items()},
        binding=binding,
    )


def all_costs(problem: Problem, priced: Quote, tokens: Floats) -> dict[str, Floats]:
    """Every cost that the plan says enough for, by name."""
    site, found = problem.config.site, {}
    for name in COSTS:
        if name in NEEDS_DEVICE and site is None:
            continue
        if name in NEEDS_PRICE and (site is None or site.usd_per_hour is None):
            continue
        if name in NEEDS_SERVED_TOKENS and problem.config.serving.tokens is None and name != "lifetime_flops":
            continue
        if name == "z" and problem.config.convention != "paper-figure-2":
            continue
        a, b = problem.parts(name, priced)
        found[str(name)] = a + b * tokens
    return found


def _merged(parts: Sequence[Any], masks: Sequence[Array], form: tuple[int, ...]) -> Any:
    """Prices of parts of an array of shapes, put together; dataclasses field by field."""
    first = parts[0]
    if first is None:
        return None
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [item.name for item in dataclasses.fields(first)]
        return type(first)(**{name: _merged([getattr(part, name) for part in parts], masks, form) for name in names})
    found = np.zeros(form, dtype=np.result_type(*parts))
    for part, mask in zip(parts, masks, strict=True):
        found[mask] = part
    return found


def _within(value: Floats, most: float) -> Array:
    """Whether a limit is kept, rounding aside."""
    return np.asarray(value <= most * (1 + 1e-12))


def _floats(value: object) -> Floats:
    return np.asarray(value, dtype=np.float64)


def blocked_by(problem: Problem, found: Outcome, objective: float) -> tuple[int, float] | None:
    """The limit that alone keeps out a better shape than `objective`, and the best objective behind it."""
    kept = {i: least <= problem.limits[i].most * (1 + 1e-12) for i, least in found.least.items()}
    blocked = []
    for i, keeps in kept.items():
        others = np.logical_and.reduce([found.possible, ~keeps, *(kept[j] for j in kept if j != i)])
        better = others & (found.objective < objective)
        if better.any():
            blocked.append((float(found.objective[better].min()), i))
    return (min(blocked)[1], min(blocked)[0]) if blocked else None
