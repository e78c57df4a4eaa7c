"""Norms over the last axis."""

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
        if isinstance(self.spec, RMSNorm):
            return F.rms_norm(x, self.weight.shape, self.weight, self.spec.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.spec.eps)
