"""Grouped-query attention with free head sizes, positions, windows and a key/value cache.

Shape letters: b batch, t new positions, s attended positions, h query heads, g key/value heads, k head_dim, v v_head_dim.
"""

from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from scantling.memory import BLOCK_LENGTH
from scantling.model.block_attention import block_attention
from scantling.model.norm import Norm, for_products
from scantling.model.rotary import rotary_table, rotate
from scantling.parts import RMSNorm, Rope
from scantling.spec import LayerSpec

Kernel = Literal["auto", "block", "fused"]


class Attention(nn.Module):
    """softmax(q k^T scale) v with `num_attention_heads` query heads sharing `num_key_value_heads` key/value heads.

    Query head j reads key/value head j // (heads / kv_heads), or the one `head_to_group` names. Causal, optionally within a
    sliding window.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        width, bias, heads, kv_heads = (
            spec.hidden_size,
            spec.attention_bias,
            spec.num_attention_heads,
            spec.num_key_value_heads,
        )
        self.spec = spec
        self.kernel: Kernel = "auto"  # training engines measure and set it
        read = spec.attention_input_size or width
        self.q_proj = nn.Linear(read, heads * spec.head_dim, bias=bias)
        self.k_proj = nn.Linear(read, kv_heads * spec.head_dim, bias=bias)
        self.v_proj = nn.Linear(read, kv_heads * spec.v_head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * spec.v_head_dim, width, bias=spec.out_bias)
        self.q_norm = self.k_norm = None
        if spec.qk_norm is not None:
            norm = RMSNorm(kind="rms_norm", eps=spec.qk_norm.eps, statistic_size=spec.qk_norm.statistic_size)
            over_all = spec.qk_norm.over == "all"
            self.q_norm = Norm(norm, spec.head_dim * (heads if over_all else 1))
            self.k_norm = Norm(norm, spec.head_dim * (kv_heads if over_all else 1))

    def forward(
        self,
        x: Float[Tensor, "batch seq width"],
        past: "LayerCache | None" = None,
        documents: Int[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq width"]:
        """Attend; with `past`, to the cached positions too, which the new ones then join."""
        spec, x = self.spec, for_products(x)
        batch, length, _ = x.shape
        if spec.attention_input_size is not None:
            x = x[..., : spec.attention_input_size]
        q_bhtk = self._heads(self.q_proj(x), self.q_norm)
        k_bgtk = self._heads(self.k_proj(x), self.k_norm)
        v_bgtv = self.v_proj(x).view(batch, length, -1, spec.v_head_dim).transpose(1, 2)
        start = past.length if past is not None else 0
        if isinstance(spec.position, Rope):
            cos, sin = rotary_table(spec.position, spec.head_dim, start + length, x.device, q_bhtk.dtype)
            q_bhtk = rotate(q_bhtk, cos[start:], sin[start:])
            k_bgtk = rotate(k_bgtk, cos[start:], sin[start:])
        if past is not None:
            k_bgtk, v_bgtv = past.append(k_bgtk, v_bgtv)
        y_bhtv = attend(
            q_bhtk,
            k_bgtk,
            v_bgtv,
            spec.scale,
            spec.sliding_window,
            spec.attn_logit_softcapping,
            documents,
            self.kernel,
            spec.head_to_group,
        )
        return self.o_proj(y_bhtv.transpose(1, 2).reshape(batch, length, -1))

    def _heads(self, projected: Tensor, norm: Norm | None) -> Tensor:
        """(b, t, heads x k) as (b, heads, t, k), normalised per head or over all heads."""
        over_all = self.spec.qk_norm is not None and self.spec.qk_norm.over == "all"
        if norm is not None and over_all:
            projected = norm(projected)
        split = projected.unflatten(-1, (-1, self.spec.head_dim))
        if norm is not None and not over_all:
            split = norm(split)
        return split.transpose(1, 2)


def attend(
    q: Float[Tensor, "batch heads seq head_dim"],
    k: Float[Tensor, "batch kv_heads attended head_dim"],
    v: Float[Tensor, "batch kv_heads attended v_head_dim"],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    documents: Int[Tensor, "batch seq"] | None = None,
    kernel: Kernel = "auto",
    head_to_group: tuple[int, ...] | None = None,
) -> Float[Tensor, "batch heads seq v_head_dim"]:
    """Causal attention; the queries are the last `seq` of the `attended` positions.

    Soft-capped scores take plain matrix products, which no fused kernel knows.

    Args:
        head_to_group: the key/value head of each query head; None is equal groups, in order.
    """
    if head_to_group is not None:
        each = torch.tensor(head_to_group, device=q.device)
        k, v = k.index_select(1, each), v.index_select(1, each)
    new, attended = q.shape[2], k.shape[2]
    if softcap is not None:
        return plain_attention(q, k, v, scale, window, softcap, documents)
    if kernel == "auto":
        short = q.device.type == "cpu" and attended <= BLOCK_LENGTH
        kernel = "block" if short else "fused"
    whole = window is None or window >= attended
    if kernel == "block" and new == attended and torch.is_grad_enabled():
        return block_attention(q, k, v, scale, None if whole else window, documents)
    grouped = q.shape[1] != k.shape[1]
    if whole and documents is None and new in (1, attended):
        return F.scaled_dot_product_attention(q, k, v, is_causal=new > 1, scale=scale, enable_gqa=grouped)
    mask = visible(new, attended, window, q.device)
    if documents is not None:
        mask = mask & (documents[:, None, -new:, None] == documents[:, None, None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


def plain_attention(
    q: Float[Tensor, "batch heads seq head_dim"],
    k: Float[Tensor, "batch kv_heads attended head_dim"],
    v: Float[Tensor, "batch kv_heads attended v_head_dim"],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    documents: Int[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch heads seq v_head_dim"]:
    """`attend` written out; query heads of a group share one matrix product."""
    batch, heads, new, _ = q.shape
    groups, attended = k.shape[1], k.shape[2]
    stacked = (q * scale).reshape(batch, groups, heads // groups * new, -1)
    scores = (stacked @ k.transpose(-1, -2)).view(batch, groups, heads // groups, new, attended)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + hidden(new, attended, window, q.device, scores.dtype)
    if documents is not None:
        other = documents[:, -new:, None] != documents[:, None]
        scores = scores.masked_fill(other[:, None, None], float("-inf"))
    weights = scores.softmax(-1)
    mixed = weights.view(batch, groups, heads // groups * new, attended) @ v
    return mixed.view(batch, heads, new, -1)


@lru_cache(maxsize=32)
def visible(new: int, attended: int, window: int | None, device: torch.device) -> Bool[Tensor, "seq attended"]:
    """Which of the attended positions each of the last `new` may look at."""
    with torch.inference_mode(False):
        mask = torch.ones(new, attended, dtype=torch.bool, device=device).tril(attended - new)
        return mask if window is None else mask.triu(attended - new - window + 1)


@lru_cache(maxsize=32)
def hidden(
    new: int, attended: int, window: int | None, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "seq attended"]:
    """0 where a position may be attended to, -inf elsewhere."""
    with torch.inference_mode(False):
        zeros = torch.zeros(new, attended, device=device, dtype=dtype)
        return zeros.masked_fill(~visible(new, attended, window, device), float("-inf"))


class LayerCache:
    """Keys and values of one layer, preallocated for `capacity` positions; `length` counts this layer's own."""

    def __init__(self, spec: LayerSpec, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        heads = spec.num_key_value_heads
        self.k = torch.empty(batch, heads, capacity, spec.head_dim, device=device, dtype=dtype)
        self.v = torch.empty(batch, heads, capacity, spec.v_head_dim, device=device, dtype=dtype)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values; return all so far."""
        end = self.length + k.shape[2]
        if end > self.k.shape[2]:
            raise ValueError(f"the cache holds {self.k.shape[2]} positions, {end} were asked for")
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]
