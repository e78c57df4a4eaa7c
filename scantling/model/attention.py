"""Grouped-query attention with free head sizes, rotary positions and a key/value cache.

Shape letters: b batch, t new positions, s attended positions, h query heads, g key/value heads, k head_dim, v v_head_dim.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from scantling.spec import LayerSpec, Rope

PLAIN_LENGTH = 512  # longest sequence for which scores are kept for the backward pass on a CPU


class Attention(nn.Module):
    """softmax(q k^T scale) v with `num_attention_heads` query heads sharing `num_key_value_heads` key/value heads.

    Query head j reads key/value head j // (heads / kv_heads). Causal.
    """

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        width, bias = spec.hidden_size, spec.attention_bias
        self.spec = spec
        self.q_proj = nn.Linear(width, spec.num_attention_heads * spec.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, spec.num_key_value_heads * spec.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, spec.num_key_value_heads * spec.v_head_dim, bias=bias)
        self.o_proj = nn.Linear(spec.num_attention_heads * spec.v_head_dim, width, bias=bias)

    def forward(
        self, x: Float[Tensor, "batch seq width"], past: "LayerCache | None" = None
    ) -> Float[Tensor, "batch seq width"]:
        """Attend; with `past`, to the cached positions too, which the new ones then join."""
        spec = self.spec
        batch, length, _ = x.shape
        q_bhtk = self.q_proj(x).view(batch, length, spec.num_attention_heads, spec.head_dim).transpose(1, 2)
        k_bgtk = self.k_proj(x).view(batch, length, spec.num_key_value_heads, spec.head_dim).transpose(1, 2)
        v_bgtv = self.v_proj(x).view(batch, length, spec.num_key_value_heads, spec.v_head_dim).transpose(1, 2)
        start = past.length if past is not None else 0
        if isinstance(spec.position, Rope):
            cos, sin = rotary_table(start + length, spec.head_dim, spec.position.rope_theta, x.device, x.dtype)
            q_bhtk = rotate(q_bhtk, cos[start:], sin[start:])
            k_bgtk = rotate(k_bgtk, cos[start:], sin[start:])
        if past is not None:
            k_bgtk, v_bgtv = past.append(k_bgtk, v_bgtv)
        y_bhtv = attend(q_bhtk, k_bgtk, v_bgtv, spec.scale)
        return self.o_proj(y_bhtv.transpose(1, 2).reshape(batch, length, -1))


def attend(
    q: Float[Tensor, "batch heads seq head_dim"],
    k: Float[Tensor, "batch kv_heads attended head_dim"],
    v: Float[Tensor, "batch kv_heads attended v_head_dim"],
    scale: float,
) -> Float[Tensor, "batch heads seq v_head_dim"]:
    """Causal attention; the queries are the last `seq` of the `attended` positions.

    Training on a CPU at short lengths takes plain matrix products: torch's fused CPU kernel is slower there (LOG.md).
    """
    new, attended = q.shape[2], k.shape[2]
    if q.device.type == "cpu" and torch.is_grad_enabled() and new == attended <= PLAIN_LENGTH:
        return plain_attention(q, k, v, scale)
    mask = None
    if 1 < new < attended:
        mask = torch.ones(new, attended, dtype=torch.bool, device=q.device).tril(attended - new)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=new == attended and new > 1, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def plain_attention(
    q: Float[Tensor, "batch heads seq head_dim"],
    k: Float[Tensor, "batch kv_heads seq head_dim"],
    v: Float[Tensor, "batch kv_heads seq v_head_dim"],
    scale: float,
) -> Float[Tensor, "batch heads seq v_head_dim"]:
    """Causal attention of a whole sequence, written out; query heads of a group share one matrix product."""
    batch, heads, length, _ = q.shape
    groups = k.shape[1]
    stacked = (q * scale).reshape(batch, groups, heads // groups * length, -1)
    scores = (stacked @ k.transpose(-1, -2)).view(batch, groups, heads // groups, length, length)
    weights = (scores + causal_mask(length, q.device, scores.dtype)).softmax(-1)
    mixed = weights.view(batch, groups, heads // groups * length, length) @ v
    return mixed.view(batch, heads, length, -1)


@lru_cache(maxsize=16)
def causal_mask(length: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "seq seq"]:
    """0 where a position may be attended to, -inf above the diagonal."""
    with torch.inference_mode(False):
        return torch.full((length, length), float("-inf"), device=device, dtype=dtype).triu(1)


@lru_cache(maxsize=64)
def rotary_table(
    length: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[Float[Tensor, "seq half"], Float[Tensor, "seq half"]]:
    """cos and sin of position x theta^(-2i/head_dim), computed in float64."""
    with torch.inference_mode(False):
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
        angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * theta**-exponents
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(
    x: Float[Tensor, "batch heads seq head_dim"], cos: Float[Tensor, "seq half"], sin: Float[Tensor, "seq half"]
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Rotate dimension i against i + head_dim/2 (rotate-half pairing)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


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
