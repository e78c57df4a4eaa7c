"""Cross-entropy of a large vocabulary without keeping the logits.

Logits are made for some rows at a time and turned into their own gradient at once, so that neither they nor their softmax
wait for the backward pass; memory is that of `ROWS_BYTES` whatever the batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from scantling.memory import CHUNKED_VOCABULARY as SMALL

ROWS_BYTES = 512 * 2**20  # of gradients of logits held at a time
CACHE_BYTES = 8 * 2**20  # of logits worked on at a time on a CPU


@dataclass(frozen=True)
class Head:
    """How logits come from the last hidden state: (x W^T + bias) / scaling, then softcap x tanh(. / softcap)."""

    weight: Float[Tensor, "vocab width"]
    bias: Float[Tensor, " vocab"] | None = None
    scaling: float = 1.0
    softcap: float | None = None

    def logits(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch vocab"]:
        """Logits of all given positions."""
        return finished(F.linear(x, self.weight, self.bias), self.scaling, self.softcap)


def finished(products: Float[Tensor, "*batch vocab"], scaling: float, softcap: float | None) -> Tensor:
    """Logits from the products with the unembedding."""
    logits = products if scaling == 1.0 else products / scaling
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def cross_entropy(
    x: Float[Tensor, "tokens width"], head: Head, labels: Int[Tensor, " tokens"], z_loss: float = 0.0
) -> Float[Tensor, ""]:
    """Sum over tokens of -log p(label) + z_loss x (log normaliser)^2, in nats; label -1 is ignored.

    In float32 at least, whatever the precision of the matrix products. z-loss: arXiv 2204.02311, section 5.
    """
    if head.weight.shape[0] < SMALL or x.device.type == "meta":
        logits = head.logits(x)
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(precise, labels, ignore_index=-1, reduction="sum")
        if z_loss:
            loss = loss + z_loss * (precise.logsumexp(-1).square() * (labels >= 0)).sum()
        return loss
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    with torch.autocast(x.device.type, enabled=False):
        loss = _Chunked.apply(x.to(dtype), head, head.weight, head.bias, labels, z_loss, torch.is_grad_enabled())
    return loss


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        head: Head,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        z_loss: float,
        wanted: bool,
    ) -> Tensor:
        scaling, softcap = head.scaling, head.softcap
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        tokens, vocabulary = x.shape[0], weight.shape[0]
        precise = torch.promote_types(x.dtype, torch.float32)
        rows = max(1, ROWS_BYTES // (vocabulary * x.element_size()))
        cached = max(1, CACHE_BYTES // (vocabulary * 4)) if x.device.type == "cpu" else rows
        loss = torch.zeros((), dtype=precise, device=x.device)
        dx = torch.empty_like(x) if wanted else None
        dweight = torch.zeros(weight.shape, dtype=precise, device=x.device) if wanted else None
        dbias = torch.zeros(vocabulary, dtype=precise, device=x.device) if wanted and bias is not None else None
        for start in range(0, tokens, rows):
            part = x[start : start + rows]
            gradient = torch.empty(len(part), vocabulary, dtype=x.dtype, device=x.device) if wanted else None
            for at in range(0, len(part), cached):
                span = slice(at, min(len(part), at + cached))
                wide = F.linear(part[span], weight, bias).to(precise)
                wide = wide.div_(scaling) if scaling != 1.0 else wide
                slope = None
                if softcap is not None:
                    bent = torch.tanh(wide / softcap)
                    slope, wide = 1 - bent.square(), softcap * bent
                ids = labels[start + at : start + span.stop]
                known = ids >= 0
                normaliser = wide.logsumexp(-1)
                picked = wide.gather(1, ids.clamp(min=0)[:, None]).squeeze(1)
                terms = normaliser - picked + z_loss * normaliser.square()
                loss += torch.where(known, terms, 0.0).sum()
                if gradient is None:
                    continue
                p = wide.sub_(normaliser[:, None]).exp_()
                if z_loss:
                    p.mul_((1 + 2 * z_loss * normaliser)[:, None])
                p.scatter_add_(1, ids.clamp(min=0)[:, None], p.new_full((len(ids), 1), -1.0))
                if slope is not None:
                    p.mul_(slope)
                torch.mul(p, (known / scaling)[:, None], out=gradient[span])
            if gradient is not None:
                torch.mm(gradient, weight, out=dx[start : start + rows])  # type: ignore[index]
                dweight.add_(gradient.T @ part)  # type: ignore[union-attr]
                if dbias is not None:
                    dbias += gradient.sum(0, dtype=precise)
        if wanted:
            ctx.gradients = dx, dweight, dbias
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dx, dweight, dbias), ctx.gradients = ctx.gradients, None  # scaled in place, so good for one backward pass
        g = gradients[0]
        return dx.mul_(g), None, dweight.mul_(g), None if dbias is None else dbias.mul_(g), None, None, None
