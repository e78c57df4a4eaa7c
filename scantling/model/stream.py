"""The residual stream between layers of different widths (arXiv 2606.18246, section 2).

Carry-forward is one wide stream of which each layer reads and overwrites the first coordinates. Here the rest is kept
aside as views: narrowing cuts the tail off and remembers it, widening puts remembered coordinates back. Nothing is copied
where the width does not grow, and gradients flow through as through any concatenation.
"""

import torch
from jaxtyping import Float
from torch import Tensor


class Stream:
    """Coordinates set aside on the way up, the nearest to the current width last.

    Args:
        carry: put set-aside coordinates back when widening (carry_forward); otherwise widen with zeros.
    """

    def __init__(self, carry: bool) -> None:
        self.carry = carry
        self.tails: list[Tensor] = []

    def resize(self, x: Float[Tensor, "batch seq width"], width: int) -> Float[Tensor, "batch seq new_width"]:
        """x at `width`: its first coordinates, or x followed by what is carried and then zeros."""
        have = x.shape[-1]
        if width == have:
            return x
        if width < have:
            self.tails.append(x[..., width:])
            return x[..., :width]
        pieces = [x]
        missing = width - have
        while missing and self.tails:
            tail = self.tails.pop()
            if tail.shape[-1] > missing:
                self.tails.append(tail[..., missing:])
                tail = tail[..., :missing]
            missing -= tail.shape[-1]
            pieces.append(tail if self.carry else torch.zeros_like(tail))
        if missing:
            pieces.append(x.new_zeros(*x.shape[:-1], missing))
        return torch.cat(pieces, dim=-1)
