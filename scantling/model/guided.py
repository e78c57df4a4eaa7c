"""Self-guided training of structured linears (arXiv 2406.16450, section 2.3): a dense guide that fades out.

While guided, a structured linear S with bias b gives alpha W x + (1 - alpha) S x + b with W a trainable dense matrix that
starts as the merged S, so switching guidance on changes no function. alpha falls from 1 to 0 over the guided steps. The
stochastic form applies this with probability alpha and S alone otherwise, which halves the cost. Two rules differ from the
authors' code: W starts from the true merged matrix for block-shuffle too (theirs leaves out both shuffles), and in
evaluation mode the structured map is always used alone (theirs evaluates the mixture, or draws).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from scantling.model.ffn import BlockDenseLinear, BlockShuffleLinear, LowRankLinear


class GuidedLinear(nn.Module):
    """A structured linear with a dense guide W (`guide`); `alpha` is its weight, set once per optimizer step.

    alpha None: the guided phase is over and the structured map is used alone. `structured` is then the trained linear: put
    it in this module's place, and W is gone.
    """

    def __init__(
        self, structured: LowRankLinear | BlockShuffleLinear | BlockDenseLinear, stochastic: bool = False
    ) -> None:
        super().__init__()
        self.structured, self.stochastic = structured, stochastic
        self.guide = nn.Parameter(structured.merge().detach().clone())
        self.alpha: float | None = 1.0

    @property
    def bias(self) -> Tensor | None:
        """The structured linear's bias."""
        structured = self.structured
        return structured.bias if isinstance(structured, BlockShuffleLinear) else structured.up.bias

    def guided(self, draw: float | None = None) -> bool:
        """Whether a call uses the guide.

        Args:
            draw: the uniform number that decides in the stochastic form; None draws a fresh one.
        """
        if not self.training or self.alpha is None:
            return False
        if not self.stochastic:
            return True
        return (float(torch.rand(())) if draw is None else draw) < self.alpha

    def forward(
        self, x: Float[Tensor, "*batch width_in"], draw: float | None = None
    ) -> Float[Tensor, "*batch width_out"]:
        """One draw serves the whole batch. The bias is in both terms with weights that sum to 1, so it counts once."""
        if self.alpha is None or not self.guided(draw):
            return self.structured(x)
        return self.alpha * F.linear(x, self.guide, self.bias) + (1 - self.alpha) * self.structured(x)

    def merge(self) -> Float[Tensor, "width_out width_in"]:
        """The dense matrix of the structured map alone, without guide and bias."""
        return self.structured.merge()


def guide_weight(step: int, guided_steps: int, shape: Literal["cosine", "linear"] = "cosine") -> float:
    """alpha at 0-based `step`: from 1 down to 0 at `guided_steps`, 0 from there on."""
    if step >= guided_steps:
        return 0.0
    done = step / guided_steps
    return 0.5 * (1 + math.cos(math.pi * done)) if shape == "cosine" else 1 - done


def guided_training_flops(forward: float, guide: float, steps: int, guided_steps: int, stochastic: bool) -> float:
    """Training FLOPs, 3 x forward, with guides during the first steps: all of them, or half of them when stochastic.

    Args:
        forward: forward FLOPs of one step without guides.
        guide: forward FLOPs of one step of all guides: 2 x tokens x sum of out x in.
        steps: all optimizer steps, repeated ones included.
        guided_steps: steps of the guided phase.
        stochastic: the guide is used with probability alpha, whose mean is 1/2.
    """
    return 3 * (forward * steps + guide * guided_steps * (0.5 if stochastic else 1.0))
