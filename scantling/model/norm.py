"""Norms over the last axis."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from scantling.parts import LayerNorm, RMSNorm


class Norm(nn.Module):
    """RMSNorm or LayerNorm with a learned gain, and a shift where the spec has one."""

    def __init__(self, spec: RMSNorm | LayerNorm, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if isinstance(spec, LayerNorm) and spec.bias else None

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        if self.spec.statistic_size not in (None, x.shape[-1]):
            y = normalised(x, self.spec) * self.weight
            return y if self.bias is None else y + self.bias
        if isinstance(self.spec, LayerNorm):
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.spec.eps)
        if x.device.type == "cpu" and x.dtype == torch.float32 and torch.is_grad_enabled():
            return _RMSNorm.apply(x, self.weight, self.spec.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.spec.eps)


def normalised(x: Float[Tensor, "*batch width"], spec: RMSNorm | LayerNorm) -> Float[Tensor, "*batch width"]:
    """x divided by its statistic, without gain and shift."""
    width = (x.shape[-1],)
    if spec.statistic_size in (None, *width):
        return (
            F.layer_norm(x, width, eps=spec.eps) if isinstance(spec, LayerNorm) else F.rms_norm(x, width, eps=spec.eps)
        )
    first = x[..., : spec.statistic_size]
    if isinstance(spec, LayerNorm):
        variance, mean = torch.var_mean(first, -1, correction=0, keepdim=True)
        return (x - mean) * torch.rsqrt(variance + spec.eps)
    return x * torch.rsqrt(first.square().mean(-1, keepdim=True) + spec.eps)


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) x gain. torch's own has no fused backward pass on a CPU; this takes 0.6 of its time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean.add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        normed, g = x * scale, gradients[0]
        dweight = (g * normed).flatten(0, -2).sum(0)
        inner = g * weight
        share = torch.linalg.vecdot(inner, normed).unsqueeze(-1).div_(x.shape[-1])
        return inner.addcmul_(normed, share, value=-1).mul_(scale), dweight, None


def for_products(x: Tensor) -> Tensor:
    """x as matrix products will read it: under autocast cast once here, and not by each product anew."""
    kind = x.device.type
    lower = kind != "meta" and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if lower else x
