"""Logits of a model that does not fit into memory: every part has weights only while it computes."""

from typing import Any

import torch
from torch import Tensor, nn

from scantling.model import Decoder, build_meta
from scantling.spec import ModelSpec
from scantling.tensor_files import Tensors


@torch.no_grad()
def layerwise_logits(spec: ModelSpec, tensors: Tensors, ids: Tensor) -> Tensor:
    """What the model of a spec with these weights computes, in float32; ids and result as in `Decoder.forward`."""
    model = build_meta(spec).eval()
    for name, part in _parts(model):
        part.register_forward_pre_hook(lambda module, _, prefix=name: _fill(module, prefix, tensors, spec))
        part.register_forward_hook(lambda module, *_: _empty(module))
    if model.branches is not None:  # its maps and shares are read from outside
        _fill(model.branches, "branches", tensors, spec)
    logits: Tensor = model(ids)
    return logits


def largest_part(spec: ModelSpec) -> int:
    """Parameters of the largest part, which are in memory together."""
    return max(sum(each.numel() for each in part.parameters()) for _, part in _parts(build_meta(spec)))


def _parts(model: Decoder) -> list[tuple[str, nn.Module]]:
    """Tables, head and norms, changes of width, and of every layer its norms, attention and feed-forward; by name."""
    found = [(name, part) for name, part in model.named_children() if name not in ("layers", "resize", "branches")]
    found += [(f"resize.{name}", part) for name, part in model.resize.named_children()]
    for index, layer in enumerate(model.layers):
        found += [(f"layers.{index}.{name}", part) for name, part in layer.named_children()]
    return found


def _fill(part: nn.Module, prefix: str, tensors: Tensors, spec: ModelSpec) -> None:
    part.to_empty(device="cpu")
    for name, parameter in part.named_parameters():
        tied = spec.tie_word_embeddings and (prefix, name) == ("lm_head", "weight")
        parameter.copy_(tensors.tensor("embed_tokens.weight" if tied else f"{prefix}.{name}"))


def _empty(part: nn.Module) -> Any:
    part.to("meta")
