"""What to do when a step's loss or gradient is not finite, or the loss is a spike: see `recipe.Guard`."""

import math
import statistics
from dataclasses import dataclass, field
from typing import Any, Literal

from scantling.recipe import Guard

WINDOW = 64  # losses that the threshold is made from
SETTLED = 16  # fewer make no threshold

Decision = Literal["ok", "skip", "rollback", "stop"]


@dataclass
class Watch:
    """The losses of late and the events so far; both travel in checkpoints."""

    guard: Guard
    losses: list[float] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def threshold(self) -> float:
        """The loss from which on a step is a spike; infinite while there is none to tell."""
        if self.guard.spike == "ignore" or len(self.losses) < SETTLED:
            return math.inf
        middle = statistics.median(self.losses)
        deviation = 1.4826 * statistics.median(abs(loss - middle) for loss in self.losses)
        return middle + self.guard.spike_sigmas * max(deviation, 0.01 * middle)

    def judge(self, step: int, loss: float, norm: float, applied: bool) -> Decision:
        """Note a step's outcome and decide.

        Args:
            step: 1-based.
            applied: the update was made; if not, loss or gradient were not finite, or the loss above the threshold.
        """
        if applied:
            self.losses = [*self.losses[1 - WINDOW :], loss]
            return "ok"
        finite = math.isfinite(loss) and math.isfinite(norm)
        policy: str = self.guard.spike if finite else self.guard.non_finite
        decision: Decision = "skip" if policy == "skip" else "rollback" if policy == "rollback" else "stop"
        if len(self.events) + 1 >= self.guard.most:
            decision = "stop"
        self.events.append(
            {
                "step": step,
                "what": "loss spike" if finite else "loss or gradient not finite",
                "loss": repr(loss),
                "grad_norm": repr(norm),
                "decision": decision,
            }
        )
        return decision

    def sentences(self) -> list[str]:
        """The events, for a person."""
        done = {"skip": "update left out", "rollback": "went back to the last checkpoint", "stop": "stopped"}
        return [
            f"step {event['step']}: {event['what']} (loss {event['loss']}, gradient norm {event['grad_norm']}): "
            f"{done[event['decision']]}"
            for event in self.events
        ]
