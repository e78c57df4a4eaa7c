"""One decoder layer, and the caches of all of them."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from scantling.model.attention import Attention, LayerCache
from scantling.model.ffn import feed_forward
from scantling.model.norm import Norm
from scantling.spec import LayerSpec, ModelSpec


def add(x: Tensor, y: Tensor, multiplier: float) -> Tensor:
    """x + multiplier y in one pass."""
    return torch.add(x, y, alpha=multiplier)


class Layer(nn.Module):
    """Attention and feed-forward around the residual stream, all at this layer's width."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.placement, self.parallel, self.multiplier = (
            spec.norm_placement,
            spec.use_parallel_residual,
            spec.residual_multiplier,
        )
        self.input_layernorm = Norm(spec.norm, spec.hidden_size)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = Norm(spec.norm, spec.hidden_size)
        if self.placement == "sandwich":
            self.pre_feedforward_layernorm = Norm(spec.norm, spec.hidden_size)
            self.post_feedforward_layernorm = Norm(spec.norm, spec.hidden_size)
        self.width, self.written = spec.hidden_size, spec.ffn_output_size or spec.hidden_size
        self.mlp = feed_forward(spec.ffn, self.width, self.written)

    def update(self, x: Float[Tensor, "batch seq width"], past: LayerCache | None = None) -> None:
        """`forward` written back into x itself, a view of the wide stream; without gradients only."""
        if self.placement == "pre" and not self.parallel:
            x.add_(self.self_attn(self.input_layernorm(x), past), alpha=self.multiplier)
            x[..., : self.written].add_(self.mlp(self.post_attention_layernorm(x)), alpha=self.multiplier)
        else:
            x.copy_(self(x, past))

    def forward(
        self,
        x: Float[Tensor, "batch seq width"],
        past: LayerCache | None = None,
        documents: Int[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq width"]:
        """The stream after this layer."""
        first, second, m = self.input_layernorm, self.post_attention_layernorm, self.multiplier
        attention, mlp = self.self_attn, self.mlp
        match self.placement:
            case "pre" if self.parallel:
                return add(add(x, attention(first(x), past, documents), m), self._written(second(x)), m)
            case "pre":
                x = add(x, attention(first(x), past, documents), m)
                return add(x, self._written(second(x)), m)
            case "post_residual":
                x = first(add(x, attention(x, past, documents), m))
                return second(add(x, mlp(x), m))
            case "post_branch":
                x = add(x, first(attention(x, past, documents)), m)
                return add(x, second(mlp(x)), m)
        x = add(x, second(attention(first(x), past, documents)), m)
        return add(x, self.post_feedforward_layernorm(mlp(self.pre_feedforward_layernorm(x))), m)

    def _written(self, x: Tensor) -> Tensor:
        """The feed-forward's output, zero in coordinates it does not write."""
        y: Tensor = self.mlp(x)
        return F.pad(y, (0, self.width - self.written)) if self.written < self.width else y


class Cache:
    """Key/value caches of every layer, for `batch` sequences of up to `capacity` positions."""

    def __init__(
        self,
        spec: ModelSpec,
        batch: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.layers = [LayerCache(layer, batch, capacity, torch.device(device), dtype) for layer in spec.layers]

    @property
    def length(self) -> int:
        """Positions cached so far."""
        return max(layer.length for layer in self.layers)
