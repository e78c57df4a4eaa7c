"""The residual stream between layers of different widths (arXiv 2606.18246, section 2; compress: arXiv 2404.14462).

Carry-forward is one wide stream of which each layer reads and overwrites the first coordinates. Here the rest is kept
aside as views: narrowing cuts the tail off and remembers it, widening puts remembered coordinates back. Nothing is copied
where the width does not grow, and gradients flow through as through any concatenation.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from scantling.parts import (
    Compress,
    ConvDiff,
    Gated,
    Gaussian,
    Interpolate,
    LinearDiff,
    Transition,
    TransposedConv,
    Zero,
)
from scantling.parts import Linear as LinearTransition


class Stream:
    """Coordinates set aside on the way up, the nearest to the current width last."""

    def __init__(self) -> None:
        self.tails: list[Tensor] = []

    def narrow(self, x: Float[Tensor, "batch seq width"], width: int) -> Float[Tensor, "batch seq narrower"]:
        """The first coordinates; the rest is remembered."""
        self.tails.append(x[..., width:])
        return x[..., :width]

    def carried(self, x: Float[Tensor, "batch seq width"], width: int) -> Float[Tensor, "batch seq missing"]:
        """Coordinates from x's width up to `width`, each from the latest state that had it, zero if none had."""
        missing, pieces = width - x.shape[-1], []
        while missing and self.tails:
            tail = self.tails.pop()
            if tail.shape[-1] > missing:
                self.tails.append(tail[..., missing:])
                tail = tail[..., :missing]
            missing -= tail.shape[-1]
            pieces.append(tail)
        if missing:
            pieces.append(x.new_zeros(*x.shape[:-1], missing))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


class WideStream(Stream):
    """Carry-forward without gradients: one buffer as wide as the widest layer, of which layers update the first coordinates.

    Args:
        x: the stack's input; coordinates it does not have start at zero.
        width: of the widest layer or table.
    """

    def __init__(self, x: Float[Tensor, "batch seq width"], width: int) -> None:
        super().__init__()
        self.buffer = F.pad(x, (0, width - x.shape[-1]))

    def view(self, width: int) -> Float[Tensor, "batch seq some_width"]:
        """The first coordinates, to be updated in place."""
        return self.buffer[..., :width]

    def carried(self, x: Float[Tensor, "batch seq width"], width: int) -> Float[Tensor, "batch seq missing"]:
        return self.buffer[..., x.shape[-1] : width]


class Resize(nn.Module):
    """The change of width into one layer (or into the unembedding, `last`), by the model's transition.

    Learned kinds have their map here; framework default initialisation, as the authors leave it.
    """

    def __init__(self, transition: Transition | None, have: int, width: int, last: bool = False) -> None:
        super().__init__()
        self.transition, self.width, self.last = transition, width, last
        new = width - have
        if isinstance(transition, Compress) and new:
            self.linear = nn.Linear(have, width, bias=transition.bias)
        if new <= 0:
            return
        match transition:
            case Gated():
                self.linear, self.gate = (nn.Linear(new, new, bias=transition.bias) for _ in range(2))
            case LinearTransition():
                self.linear = nn.Linear(have, width, bias=transition.bias)
            case LinearDiff():
                self.linear = nn.Linear(have, new, bias=transition.bias)
            case TransposedConv():
                self.conv: nn.ConvTranspose1d | nn.Conv1d = nn.ConvTranspose1d(1, 1, new + 1, bias=False)
            case ConvDiff():
                self.conv = nn.Conv1d(1, 1, have - new + 1, bias=False)

    def forward(self, x: Float[Tensor, "batch seq width"], stream: Stream) -> Float[Tensor, "batch seq new_width"]:
        have, width = x.shape[-1], self.width
        if have == width:
            return x
        if isinstance(self.transition, Compress):
            return self.linear(x).to(x.dtype)  # under autocast too the stream keeps its precision
        if width < have:
            return stream.narrow(x, width)
        carried = stream.carried(x, width)  # taken also where unused: newer states cover these coordinates from now on
        match self.transition:
            case Zero():
                return torch.cat((x, carried if self.last else torch.zeros_like(carried)), dim=-1)
            case Gated():
                gate = torch.sigmoid(self.gate(carried))
                return torch.cat((x, gate * self.linear(carried) + (1 - gate) * carried), dim=-1)
            case LinearTransition():
                return self._mapped(x)
            case LinearDiff():
                return torch.cat((x, self._mapped(x)), dim=-1)
            case TransposedConv():
                return self._convolved(x)
            case ConvDiff():
                return torch.cat((x, self._convolved(x)), dim=-1)
            case Interpolate():
                flat = x.flatten(0, -2)[:, None]
                grown = F.interpolate(flat, width, mode="linear", align_corners=self.transition.align_corners)
                return grown[:, 0].unflatten(0, x.shape[:-1])
            case Gaussian():
                mean, spread = x.mean(-1, keepdim=True), x.std(-1, unbiased=False, keepdim=True)
                noise = torch.randn(*x.shape[:-1], width - have, dtype=x.dtype, device=x.device)
                return torch.cat((x, mean + spread * noise), dim=-1)
        return torch.cat((x, carried), dim=-1)

    def _mapped(self, x: Tensor) -> Tensor:
        assert isinstance(self.transition, LinearTransition | LinearDiff)
        iterations = self.transition.sinkhorn_iters
        weight = sinkhorn(self.linear.weight, iterations) if iterations else self.linear.weight
        return F.linear(x, weight, self.linear.bias).to(x.dtype)

    def _convolved(self, x: Tensor) -> Tensor:
        return self.conv(x.flatten(0, -2)[:, None])[:, 0].unflatten(0, x.shape[:-1]).to(x.dtype)


def sinkhorn(matrix: Float[Tensor, "out into"], iterations: int) -> Float[Tensor, "out into"]:
    """exp(matrix), rows scaled to sum 1 and columns to sum out/in, `iterations` times."""
    out, into = matrix.shape
    balanced = matrix.exp()
    for _ in range(iterations):
        balanced = balanced / balanced.sum(1, keepdim=True)
        balanced = balanced / balanced.sum(0, keepdim=True) * (out / into)
    return balanced
