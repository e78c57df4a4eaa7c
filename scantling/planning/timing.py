"""When to grow, as data: the schedule, what it saves with intervals, and the keys for the run's file."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from scantling.laws.evidence import Estimate
from scantling.planning.schedule import Leg, shares
from scantling.planning.stacking import Stacking


@dataclass(frozen=True)
class Shape:
    """A model on the way.

    Attributes:
        name: the file, as it was given.
        parameters: N as the law counts it.
        flops_per_token: of training.
        columns: the other sizes that a law may be of.
        non_embedding: parameters without tables; None where only N is known.
    """

    name: str
    parameters: float
    flops_per_token: float
    columns: Mapping[str, float] = field(default_factory=dict)
    non_embedding: float | None = None


@dataclass(frozen=True)
class Switch:
    """A growth in the schedule, with 95% intervals over the law's draws; each draw has a best schedule of its own.

    Attributes:
        source, target: the shapes' names.
        loss: l*, where marginal costs are equal.
        tokens_before: of the source shape from scratch to that loss, D1: what it took over or was paid for counts.
        tokens_worth: of the target shape from scratch, for the same loss.
        share: of the tokens of the whole run that come before; where a checkpoint was paid for, of the new run.
        left_out: share of the draws whose best schedule has no such growth.
    """

    source: str
    target: str
    loss: Estimate
    tokens_before: Estimate
    tokens_worth: Estimate
    share: Estimate
    left_out: float


@dataclass(frozen=True)
class Reuse:
    """What a checkpoint already paid for is worth to the target.

    Attributes:
        paid: tokens it was trained on.
        loss: where the law puts it.
        tokens_worth: tokens of the target from scratch to the same loss; infinite below the target's floor.
        covered: these over the tokens of the target's run.
        ahead: its loss is at or below the one that the target would reach.
        floors: the lowest losses of the checkpoint's shape and of the target.
    """

    paid: float
    loss: Estimate
    tokens_worth: Estimate
    covered: Estimate
    ahead: bool
    floors: tuple[float, float]


@dataclass(frozen=True)
class SixND:
    """The same question at 6 N FLOPs per token.

    Attributes:
        losses: of the switches.
        saved: share of the target's FLOPs from scratch.
        closed_form: l* of two shapes under a law of N and D.
    """

    losses: tuple[float, ...]
    saved: float
    closed_form: float | None


@dataclass(frozen=True)
class Timing:
    """The answer; losses in nats per token, tokens and FLOPs of training.

    Attributes:
        tokens: of the target from scratch; they set the loss to reach.
        legs: the cheapest way there; empty when the checkpoint is there already.
        grows: whether the schedule ends in the target.
        saved: share of `from_scratch_flops` that is not spent (again), the advised tokens held over the draws.
        loss_at_same_flops: where the target ends if what is saved is spent on it.
    """

    laws: tuple[str, ...]
    shapes: tuple[Shape, ...]
    tokens: float
    target_loss: Estimate
    from_scratch_flops: float
    legs: tuple[Leg, ...]
    switches: tuple[Switch, ...]
    grows: bool
    flops: float
    saved: Estimate | None
    loss_at_same_flops: float | None
    six_nd: SixND | None
    reuse: Reuse | None
    stacking: Stacking | None
    notes: tuple[str, ...]

    @property
    def run_tokens(self) -> float:
        """Tokens of the run to do."""
        return sum(leg.tokens for leg in self.legs)

    @property
    def run_config(self) -> str | None:
        """The keys for the run's file; None where nothing is to be grown."""
        if not self.grows:
            return None
        lines = [f"# train.tokens: {self.run_tokens:.4g}"]
        first = self.shapes[self.legs[0].shape].name
        if self.reuse is None:
            lines.append(f"# model: as in {first}")
        elif self.legs[0].shape:
            lines += [f"# first: scantling grow CHECKPOINT --to {first} --out grown", "start: {checkpoint: grown}"]
        else:
            lines += [f"# CHECKPOINT: the {first} already trained", "start: {checkpoint: CHECKPOINT}"]
        if len(self.legs) > 1:
            lines.append("growth:")
        for share, leg in zip(shares(self.legs), self.legs[1:], strict=True):
            lines += [f"  - at: {share:.6g} of tokens", f"    to: {self.shapes[leg.shape].name}"]
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; what is infinite is null."""
        plain = asdict(self)
        for leg in plain["legs"]:
            leg["shape"] = self.shapes[leg["shape"]].name
        found: dict[str, Any] = _finite(plain)
        return found | {"run_tokens": self.run_tokens if self.legs else None, "run_config": self.run_config}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
