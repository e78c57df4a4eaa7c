"""Rotary positions: frequencies with their scalings, tables of cos and sin, the rotation."""

import math
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from scantling.parts import LinearScaling, Llama3Scaling, NTKScaling, Rope, YarnScaling


def frequencies(rope: Rope, head_dim: int) -> tuple[Float[Tensor, " half"], float]:
    """Radians per position of each rotated pair (float64), and what cos and sin are multiplied by."""
    size = rope.frequency_size or rope.rotated(head_dim)
    exponents = torch.arange(0, rope.rotated(head_dim), 2, dtype=torch.float64) / size
    plain = rope.rope_theta**-exponents
    match rope.scaling:
        case None:
            return plain, 1.0
        case LinearScaling(factor=factor):
            return plain / factor, 1.0
        case NTKScaling(factor=factor):
            return (rope.rope_theta * factor ** (size / (size - 2))) ** -exponents, 1.0
        case Llama3Scaling():
            return _llama3(plain, rope.scaling), 1.0
        case YarnScaling():
            return _yarn(plain, rope, rope.scaling, size)


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Long waves / factor, short ones as they are, a linear ramp in original_context / wavelength between."""
    waves = 2 * math.pi / plain
    turns = scaling.original_max_position_embeddings / waves
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = ramp.clamp(0, 1)
    return (1 - share) * plain / scaling.factor + share * plain


def _yarn(plain: Tensor, rope: Rope, scaling: YarnScaling, size: int) -> tuple[Tensor, float]:
    """Pairs that turn more than beta_fast times over the original context stay, fewer than beta_slow are interpolated."""

    def pair_of(turns: float) -> float:
        length = scaling.original_max_position_embeddings
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low = max(math.floor(pair_of(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of(scaling.beta_slow)), size - 1)
    pairs = torch.arange(len(plain), dtype=torch.float64)
    interpolated = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    factor = scaling.attention_factor
    stretch = factor if factor is not None else 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
    return plain / scaling.factor * interpolated + plain * (1 - interpolated), stretch


@lru_cache(maxsize=256)
def rotary_table(
    rope: Rope, head_dim: int, length: int, device: torch.device, dtype: torch.dtype
) -> tuple[Float[Tensor, "seq half"], Float[Tensor, "seq half"]]:
    """cos and sin of position x frequency for positions 0 to length - 1, computed in float64."""
    with torch.inference_mode(False):
        radians, stretch = frequencies(rope, head_dim)
        angles = torch.arange(length, dtype=torch.float64)[:, None] * radians
        if device.type == "meta":
            return torch.empty_like(angles, device=device, dtype=dtype), torch.empty_like(
                angles, device=device, dtype=dtype
            )
        return (angles.cos() * stretch).to(device, dtype), (angles.sin() * stretch).to(device, dtype)


def rotate(
    x: Float[Tensor, "*batch seq head_dim"], cos: Float[Tensor, "seq half"], sin: Float[Tensor, "seq half"]
) -> Float[Tensor, "*batch seq head_dim"]:
    """Rotate dimension i against i + rotated/2 (rotate-half pairing); dimensions beyond the rotated ones pass by."""
    return _Rotation.apply(x, cos, sin)


class _Rotation(torch.autograd.Function):
    """Its gradient is the rotation back: half the time of recorded slices and products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradients[0], cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    partners = turned.roll(half, -1)  # of dimension i: i + half, and the other way round
    y = torch.addcmul(turned * torch.cat((cos, cos), -1), partners, torch.cat((-sin, sin), -1))
    return y if rest.shape[-1] == 0 else torch.cat((y, rest), -1)
