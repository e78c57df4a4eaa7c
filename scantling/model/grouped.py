"""Parallel stacks computed together: layer i of all P stacks as one grouped computation.

Equal stacks (arXiv 2404.14462) have equal shapes in layer i, so their matrix products are one batched product over
weights stacked on the fly. Parameters keep their per-stack names, and the result is the loop's up to rounding.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from scantling.model.attention import Attention, LayerCache, attend
from scantling.model.ffn import FeedForward
from scantling.model.layer import Cache, Layer
from scantling.model.norm import Norm, normalised
from scantling.model.rotary import rotary_table, rotate
from scantling.model.stream import Stream
from scantling.parts import DenseFFN, Gaussian, Rope
from scantling.spec import ModelSpec

Stacked = Float[Tensor, "stacks batch seq width"]


def groupable(spec: ModelSpec) -> bool:
    """Whether the stacks of a model can be grouped: dense feed-forward layers, and no fresh noise between layers."""
    dense = all(isinstance(layer.ffn, DenseFFN) for layer in spec.layers)
    return spec.branches is not None and dense and not isinstance(spec.transition, Gaussian)


def grouped_stacks(
    spec: ModelSpec,
    all_layers: nn.ModuleList,
    resize: nn.ModuleList,
    inputs: Sequence[Float[Tensor, "batch seq width"]],
    cache: Cache | None,
) -> list[tuple[Tensor, Stream]]:
    """The output and the residual stream of every stack, as a decoder gets them one by one."""
    count, depth = len(inputs), len(spec.stacks[0])
    streams, xs, stacked = [Stream() for _ in inputs], list(inputs), None
    for level in range(depth):
        indices = [branch * depth + level for branch in range(count)]
        layers = [cast(Layer, all_layers[index]) for index in indices]
        if stacked is None or stacked.shape[-1] != spec.layers[level].hidden_size:
            xs = list(stacked.unbind()) if stacked is not None else xs
            resized = [resize[at](x, stream) for at, x, stream in zip(indices, xs, streams, strict=True)]
            stacked = torch.stack(resized)
        past = [cache.layers[index] for index in indices] if cache else None
        stacked = cast(Tensor, GroupedLayer(layers)(stacked, past))
    assert stacked is not None
    return list(zip(stacked.unbind(), streams, strict=True))


class GroupedLayer(Layer):
    """Equal layers of different stacks, made for one pass: a `Layer` whose sub-layers act on all stacks."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        nn.Module.__init__(self)  # no parameters of its own
        one = layers[0]
        for name, value in vars(one).items():
            if not name.startswith("_"):  # numbers and words of the spec, the same in all
                setattr(self, name, value)
        self.self_attn = cast(Any, GroupedAttention([layer.self_attn for layer in layers]))
        self.mlp = cast(Any, GroupedFeedForward([cast(FeedForward, layer.mlp) for layer in layers]))
        for name, module in one.named_children():
            if isinstance(module, Norm):
                setattr(self, name, GroupedNorm([cast(Norm, getattr(layer, name)) for layer in layers]))


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor with the stacks as its first axis; gradients flow back to each."""
    return torch.stack(list(tensors))


class GroupedNorm:
    """One norm per stack."""

    def __init__(self, norms: Sequence[Norm]) -> None:
        self.spec = norms[0].spec
        self.weight = stack([norm.weight for norm in norms])
        biases = [norm.bias for norm in norms if norm.bias is not None]
        self.bias = stack(biases) if biases else None

    def __call__(self, x: Float[Tensor, "stacks *batch width"]) -> Float[Tensor, "stacks *batch width"]:
        shape = (-1, *(1,) * (x.ndim - 2), x.shape[-1])
        y = normalised(x, self.spec) * self.weight.view(shape)
        return y if self.bias is None else y + self.bias.view(shape)


def grouped_linear(linears: Sequence[nn.Module], x: Stacked) -> Stacked:
    """Each stack's own linear as one batched product."""
    dense = [cast(nn.Linear, linear) for linear in linears]
    weight = stack([linear.weight for linear in dense]).transpose(1, 2)
    flat = x.flatten(1, 2)
    if dense[0].bias is None:
        y = torch.bmm(flat, weight)
    else:
        y = torch.baddbmm(stack([linear.bias for linear in dense])[:, None], flat, weight)
    return y.view(*x.shape[:-1], -1)


class GroupedAttention:
    """The attention of every stack; without a cache all stacks attend as one larger batch."""

    def __init__(self, parts: Sequence[Attention]) -> None:
        self.parts, self.spec = parts, parts[0].spec

    def __call__(self, x: Stacked, past: Sequence[LayerCache] | None, documents: None = None) -> Stacked:
        spec, parts = self.spec, self.parts
        stacks, batch, length, _ = x.shape
        start = past[0].length if past is not None else 0
        x = x[..., : spec.attention_input_size]
        q = self._heads([part.q_proj for part in parts], [part.q_norm for part in parts], x)
        k = self._heads([part.k_proj for part in parts], [part.k_norm for part in parts], x)
        v = grouped_linear([part.v_proj for part in parts], x).unflatten(-1, (-1, spec.v_head_dim)).transpose(2, 3)
        if isinstance(spec.position, Rope):
            cos, sin = rotary_table(spec.position, spec.head_dim, start + length, x.device, x.dtype)
            q, k = rotate(q, cos[start:], sin[start:]), rotate(k, cos[start:], sin[start:])
        core = partial(
            attend,
            scale=spec.scale,
            window=spec.sliding_window,
            softcap=spec.attn_logit_softcapping,
            head_to_group=spec.head_to_group,
        )
        if past is None:
            y = core(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (stacks, batch))
        else:
            kept = [cache.append(*new) for cache, *new in zip(past, k, v, strict=True)]
            y = stack([core(mine, *seen) for mine, seen in zip(q, kept, strict=True)])
        return grouped_linear([part.o_proj for part in parts], y.transpose(2, 3).flatten(3))

    def _heads(self, linears: Sequence[nn.Module], norms: Sequence[Norm | None], x: Stacked) -> Tensor:
        """(stacks, batch, heads, seq, head_dim), normalised per head or over all heads."""
        present = [norm for norm in norms if norm is not None]
        over_all = self.spec.qk_norm is not None and self.spec.qk_norm.over == "all"
        projected = grouped_linear(linears, x)
        if present and over_all:
            projected = GroupedNorm(present)(projected)
        split = projected.unflatten(-1, (-1, self.spec.head_dim))
        if present and not over_all:
            split = GroupedNorm(present)(split)
        return split.transpose(2, 3)


class GroupedFeedForward:
    """The dense feed-forward of every stack."""

    def __init__(self, parts: Sequence[FeedForward]) -> None:
        self.parts = parts

    def __call__(self, x: Stacked) -> Stacked:
        one = self.parts[0]
        hidden = grouped_linear([part.up_proj for part in self.parts], x)
        gate = grouped_linear([part.gate_proj for part in self.parts], x) if one.gated else None
        hidden = one.act(hidden) if gate is None else one.act(gate) * hidden
        return grouped_linear([part.down_proj for part in self.parts], hidden)
