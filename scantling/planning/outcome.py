"""What each shape must or can do for one goal: tokens, loss, costs and the objective, as arrays."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scantling.planning.config import Limit, PlanConfig
from scantling.planning.loss import Law, TokenLaw, read_law
from scantling.planning.price import Priced, price
from scantling.planning.shapes import Array, Floats, Shapes
from scantling.rows import Row
from scantling.yamlio import KeyPath

Z_MEMORY_SHARE, Z_MEMORY_POWER, Z_FLOPS_POWER = 0.9, 1 / 2, 1 / 3  # lambda, alpha, beta of arXiv 2503.09579, eq. 5


@dataclass(frozen=True)
class Problem:
    """A plan with its law, and the one number that the front varies.

    Attributes:
        goal: `target.loss`, or the amount of the budget named `limit`.
        limit: what is spent; None with a target loss.
        memory: bytes allowed.
        ratio: fixed tokens per parameter, or None when the tokens are free.
    """

    config: PlanConfig
    law: Law
    goal: float
    limit: Limit | None
    memory: float
    ratio: float | None

    def at(self, goal: float) -> "Problem":
        """The same plan with another target or budget."""
        return dataclasses.replace(self, goal=goal, memory=goal if self.limit == "memory_bytes" else self.memory)

    @property
    def goal_path(self) -> KeyPath:
        """The key of the plan that states the goal."""
        return ("target", "loss") if self.limit is None else ("budget", self.limit)

    def price(self, shapes: Shapes) -> Priced:
        """What shapes cost in the plan's convention."""
        return self.price_rows(shapes.rows(self.config.space))

    def price_rows(self, table: Sequence[Row]) -> Priced:
        """As `price`, from cost rows."""
        config = self.config
        return price(
            table,
            config.convention,
            self.law.count,
            sequence_length=config.training.sequence_length,
            context=config.context,
            batch=config.serving.batch,
            bytes_per_value=config.serving.bytes_per_value,
        )


def pose(config: PlanConfig) -> Problem:
    """The plan with its law.

    Raises:
        InputError: the law is unknown, or it and the plan contradict each other.
    """
    law = read_law(config)
    ratio = config.training.tokens_per_parameter or law.tokens_per_parameter
    limit, goal, memory = None, 0.0, math.inf
    if config.target is not None:
        goal = config.target.loss
        if goal <= law.E:
            raise config.fault(
                ("target", "loss"),
                f"the law never goes down to E = {law.E:.6g} nats per token, got the target {goal:.6g}; raise it",
            )
    elif config.budget is not None:
        limit, goal = config.budget.limit
        memory = config.budget.memory_bytes or math.inf
    if ratio is None and (limit == "memory_bytes" or config.objective in ("memory_bytes", "z")):
        what = "a budget of memory alone" if limit else f"minimize: {config.objective}"
        raise config.fault(
            ("training", "tokens_per_parameter"),
            f"{what} has no optimum while tokens are free: training longer costs nothing; give a number such as 20"
            + (", or budget.training_flops" if limit else ""),
        )
    return Problem(config, law, goal, limit, memory, ratio)


@dataclass(frozen=True)
class Outcome:
    """What each shape must or can do, as arrays.

    Attributes:
        tokens: D.
        loss: nats per token.
        training_flops, serving_flops: of all tokens trained on and served.
        z: the combined cost of memory and FLOPs.
        objective: what the plan minimises.
        possible: the target is reached, or the budget suffices, memory aside.
        fits: within the memory allowed.
        needs: the smallest goal at which the shape would be possible.
    """

    tokens: Floats
    loss: Floats
    training_flops: Floats
    serving_flops: Floats
    z: Floats
    objective: Floats
    possible: Array
    fits: Array
    needs: Floats

    @property
    def score(self) -> Floats:
        """The objective, infinite where the shape is not possible or does not fit."""
        return np.where(self.possible & self.fits, self.objective, np.inf)


def outcome(problem: Problem, shapes: Shapes | None, priced: Priced) -> Outcome:
    """What shapes at these prices do for the goal; without shapes, for a law that knows none (`TokenLaw`)."""
    n, per_token, per_served = (
        _floats(x) for x in (priced.parameters, priced.training_flops_per_token, priced.serving_flops_per_token)
    )
    memory, flops = _floats(priced.memory_bytes), _floats(priced.flops)
    serving_flops = per_served * (problem.config.serving.tokens or 0.0)
    with np.errstate(all="ignore"):
        if problem.limit is None:
            tokens, loss, possible, needs = _to_target(problem, shapes, n)
        else:
            tokens, loss, possible, needs = _within_budget(problem, shapes, n, per_token, serving_flops)
        training_flops = per_token * tokens
        z = Z_MEMORY_SHARE * memory**Z_MEMORY_POWER + (1 - Z_MEMORY_SHARE) * flops**Z_FLOPS_POWER
    objectives = {
        "training_flops": training_flops,
        "lifetime_flops": training_flops + serving_flops,
        "memory_bytes": memory,
        "z": z,
        "loss": loss,
    }
    return Outcome(
        tokens=tokens,
        loss=loss,
        training_flops=training_flops,
        serving_flops=serving_flops,
        z=z,
        objective=objectives[problem.config.objective],
        possible=possible,
        fits=memory <= problem.memory,
        needs=needs,
    )


def _to_target(problem: Problem, shapes: Shapes | None, n: Floats) -> tuple[Floats, Floats, Array, Floats]:
    """Tokens, loss, possible, needs: the tokens that reach the target, or the loss that a fixed ratio gives."""
    law = problem.law
    if problem.ratio is not None:
        tokens = problem.ratio * n
        loss = law.loss(shapes, n, tokens)
        return tokens, loss, loss <= problem.goal, loss
    assert isinstance(law, TokenLaw)  # the other kind has a ratio of its own
    tokens = law.tokens(n, problem.goal)
    return tokens, law.loss(shapes, n, tokens), np.isfinite(tokens), law.loss(shapes, n, np.inf)


def _within_budget(
    problem: Problem, shapes: Shapes | None, n: Floats, per_token: Floats, serving_flops: Floats
) -> tuple[Floats, Floats, Array, Floats]:
    """Tokens, loss, possible, needs: the tokens that the budget leaves, or a fixed ratio where it leaves enough."""
    before = serving_flops if problem.limit == "lifetime_flops" else np.zeros_like(n)
    left = np.full_like(n, np.inf) if problem.limit == "memory_bytes" else (problem.goal - before) / per_token
    if problem.ratio is not None:
        tokens = least = problem.ratio * n
    else:
        tokens, least = left, np.full_like(n, problem.config.training.sequence_length)
    loss = problem.law.loss(shapes, n, np.where(tokens > 0, tokens, np.nan))
    return tokens, loss, left >= least, before + per_token * least


def _floats(value: object) -> Floats:
    return np.asarray(value, dtype=np.float64)
