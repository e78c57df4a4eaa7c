"""Self-guided training of structured linears (arXiv 2406.16450, section 2.3): a dense guide that fades out.

While guided, a structured linear S with bias b gives alpha W x + (1 - alpha) S x + b with W a trainable dense matrix that
starts as the merged S, so switching guidance on changes no function. alpha falls from 1 to 0 over the guided steps
(`guidance.py` plans them). The stochastic form applies this with probability alpha and S alone otherwise, which halves the
cost. Two rules differ from the authors' code: W starts from the true merged matrix for block-shuffle too (theirs leaves out
both shuffles), and in evaluation mode the structured map is always used alone (theirs evaluates the mixture, or draws).

A training loop calls `attach_guides` once, `set_guides` before every micro-batch, and `remove_guides` when alpha is None.
"""

from collections.abc import Iterator

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from scantling.model.ffn import BlockDenseLinear, BlockShuffleLinear, LowRankLinear

STREAM = 0x67756964  # keeps these draws apart from other uses of a run's seed


class GuidedLinear(nn.Module):
    """A structured linear with a dense guide W (`guide`).

    Attributes:
        alpha: the guide's weight, set once per optimizer step. None: the guided phase is over and the structured map is used
            alone. `structured` is then the trained linear: put it in this module's place, and W is gone.
        draw: the uniform number that decides in the stochastic form, set once per micro-batch.
    """

    def __init__(
        self, structured: LowRankLinear | BlockShuffleLinear | BlockDenseLinear, stochastic: bool = False
    ) -> None:
        super().__init__()
        self.structured, self.stochastic = structured, stochastic
        self.guide = nn.Parameter(structured.merge().detach().clone())
        self.alpha: float | None = 1.0
        self.draw = 0.0

    @property
    def bias(self) -> Tensor | None:
        """The structured linear's bias."""
        structured = self.structured
        return structured.bias if isinstance(structured, BlockShuffleLinear) else structured.up.bias

    def guided(self, draw: float | None = None) -> bool:
        """Whether a call uses the guide.

        Args:
            draw: instead of the attribute.
        """
        if not self.training or self.alpha is None:
            return False
        return not self.stochastic or (self.draw if draw is None else draw) < self.alpha

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


def attach_guides(model: nn.Module, stochastic: bool) -> int:
    """Give every structured linear a guide, in place, before the model is compiled or sharded; returns how many.

    The function does not change. The guides are new parameters, so an optimizer is made after this.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        if not isinstance(parent, GuidedLinear)
        for name, child in parent.named_children()
        if isinstance(child, LowRankLinear | BlockShuffleLinear | BlockDenseLinear)
    ]
    for parent, name, child in found:
        setattr(parent, name, GuidedLinear(child, stochastic).train(child.training))
    return len(found)


def remove_guides(model: nn.Module) -> list[nn.Parameter]:
    """Put the structured linears back, in place; returns the guides, whose optimizer state can go."""
    guides = []
    for parent, name, child in list(_guided(model)):
        setattr(parent, name, child.structured)
        guides.append(child.guide)
    return guides


def set_guides(model: nn.Module, alpha: float | None, seed: int, step: int, micro_batch: int) -> None:
    """Prepare every guided linear for one forward pass and its backward pass.

    The draws are a function of the arguments and of each linear's place in the model, so a resumed run repeats them, and
    processes that share a model or a batch agree on them.

    Args:
        alpha: the guides' weight in this step; None uses the structured maps alone.
        seed: the run's.
        step, micro_batch: 0-based.
    """
    linears = [child for _, _, child in _guided(model)]
    draws = np.random.Generator(np.random.PCG64([STREAM, seed, step, micro_batch])).random(len(linears))
    for linear, draw in zip(linears, draws.tolist(), strict=True):
        linear.alpha, linear.draw = alpha, draw


def plain_name(name: str) -> str:
    """The name that a guided model's parameter has in the plain model: `layers.1.mlp.up_proj.structured.down.weight`."""
    return ".".join(part for part in name.split(".") if part != "structured")


def is_guide(name: str) -> bool:
    """Whether a parameter's name is a guide's: `layers.1.mlp.up_proj.guide`."""
    return name.rpartition(".")[2] == "guide"


def _guided(model: nn.Module) -> Iterator[tuple[nn.Module, str, GuidedLinear]]:
    """Every guided linear with its parent and its name there, in the model's order."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, GuidedLinear):
                yield parent, name, child
