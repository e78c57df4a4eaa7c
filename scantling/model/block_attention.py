"""Exact causal attention in blocks of queries, for training on a CPU.

A block of queries reads only the keys up to its own end, so about half of the scores are never computed; the rest are plain
matrix products with a softmax between them, which a CPU runs faster than torch's fused kernel (benchmarks/results/
training_speed.md). The backward pass reuses the kept probabilities.

Shape letters: n batch x key/value heads, r query heads per key/value head, t positions, c queries of a block, e its end,
k head_dim, v v_head_dim.
"""

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from scantling.model.norm import for_products

BLOCK = 64  # queries; 64 and 128 measured alike, 32 and 256 slower


def block_attention(
    q: Float[Tensor, "batch heads seq head_dim"],
    k: Float[Tensor, "batch kv_heads seq head_dim"],
    v: Float[Tensor, "batch kv_heads seq v_head_dim"],
    scale: float,
    window: int | None = None,
    documents: Int[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch heads seq v_head_dim"]:
    """softmax(q k^T scale) v over earlier positions, within `window` and the same document where those are given."""
    batch, heads, length, _ = q.shape
    groups = k.shape[1]
    q, k, v = for_products(q), for_products(k), for_products(v)
    rows = (q * scale).reshape(batch * groups, heads // groups, length, -1)
    keys, values = k.reshape(batch * groups, length, -1), v.reshape(batch * groups, length, -1)
    with torch.autocast(q.device.type, enabled=False):  # which would have the softmax in float32
        out = _Blocks.apply(rows, keys, values, window, documents)
    return out.view(batch, heads, length, -1)


@lru_cache(maxsize=64)
def _bias(start: int, end: int, first: int, window: int | None, dtype: torch.dtype) -> Float[Tensor, "queries keys"]:
    """0 where query start..end may see key first..end, -inf elsewhere."""
    with torch.inference_mode(False):
        behind = torch.arange(start, end)[:, None] - torch.arange(first, end)
        hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
        return torch.zeros(end - start, end - first, dtype=dtype).masked_fill_(hidden, float("-inf"))


def _spans(length: int, window: int | None) -> list[tuple[int, int, int]]:
    """(first query, end of queries and keys, first key) of every block."""
    starts = range(0, length, BLOCK)
    return [(s, min(length, s + BLOCK), 0 if window is None else max(0, s - window + 1)) for s in starts]


def _flat(x: Tensor, start: int, end: int) -> Tensor:
    """Queries start to end of all heads of a group as rows: (n, r x c, .)."""
    return x[:, :, start:end].flatten(1, 2)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_nrtk: Tensor, k_ntk: Tensor, v_ntv: Tensor, window: int | None, documents: Tensor | None
    ) -> Tensor:
        groups, heads, length, _ = q_nrtk.shape
        out_nrtv = q_nrtk.new_empty(groups, heads, length, v_ntv.shape[-1])
        kept = []
        for start, end, first in _spans(length, window):
            scores = torch.bmm(_flat(q_nrtk, start, end), k_ntk[:, first:end].transpose(1, 2))
            by_head = scores.view(groups, heads, end - start, end - first)
            if window is None:  # only the block on the diagonal has hidden keys
                by_head[..., start:].add_(_bias(start, end, start, None, scores.dtype))
            else:
                by_head.add_(_bias(start, end, first, window, scores.dtype))
            if documents is not None:
                other = documents[:, start:end, None] != documents[:, None, first:end]
                split = by_head.view(documents.shape[0], -1, end - start, end - first)
                split.masked_fill_(other[:, None], float("-inf"))
            weights = torch.softmax(scores, -1)
            kept.append(weights)
            out_nrtv[:, :, start:end] = torch.bmm(weights, v_ntv[:, first:end]).view(groups, heads, end - start, -1)
        ctx.save_for_backward(q_nrtk, k_ntk, v_ntv, *kept)
        ctx.window = window
        return out_nrtv

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_nrtk, k_ntk, v_ntv, *kept = ctx.saved_tensors
        heads, length = q_nrtk.shape[1:3]
        dq, dk, dv = torch.empty_like(q_nrtk), torch.zeros_like(k_ntk), torch.zeros_like(v_ntv)
        for weights, (start, end, first) in zip(kept, _spans(length, ctx.window), strict=True):
            g = _flat(gradients[0], start, end)
            dv[:, first:end].baddbmm_(weights.transpose(1, 2), g)
            dweights = torch.bmm(g, v_ntv[:, first:end].transpose(1, 2))
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            rows = torch.bmm(dscores, k_ntk[:, first:end])
            dq[:, :, start:end] = rows.view(-1, heads, end - start, rows.shape[-1])
            dk[:, first:end].baddbmm_(dscores.transpose(1, 2), _flat(q_nrtk, start, end))
        return dq, dk, dv, None, None
