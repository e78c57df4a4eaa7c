"""Weights under Hugging Face's names and layouts, and under ours: lazy views in both directions from one correspondence.

Our parameter names are Llama's without the leading `model.`; a `Family` says what a class calls the same modules. Where a class
keeps a tensor in another layout (transposed, fused, a gain without its 1), a `Layout` makes theirs of ours and ours of theirs.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scantling.errors import InputError
from scantling.hf_classes import MODEL_TYPES
from scantling.hf_writer import to_hf_config
from scantling.model import build_meta
from scantling.spec import ModelSpec
from scantling.tensor_files import Rows, Shape, Tensors

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BUFFERS = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|attention\.bias|attention\.masked_bias)$"
)
FAULTS_SHOWN = 8


# --- layouts -----------------------------------------------------------------------------------------------------------


class Layout:
    """One of their tensors is one of ours."""

    def join(self, *ours: Tensor) -> Tensor:
        """Theirs."""
        return ours[0]

    def split(self, theirs: Tensor, at: int) -> Tensor:
        """Number `at` of ours."""
        return theirs

    def dtype(self, theirs: torch.dtype) -> torch.dtype:
        """Of ours."""
        return theirs


class Gain(Layout):
    """Theirs is the gain less 1, which the class adds in float32 (Gemma); so ours is at least float32, or bits would be lost."""

    def join(self, *ours: Tensor) -> Tensor:
        return ours[0] - 1

    def split(self, theirs: Tensor, at: int) -> Tensor:
        return theirs.to(self.dtype(theirs.dtype)) + 1

    def dtype(self, theirs: torch.dtype) -> torch.dtype:
        return torch.promote_types(theirs, torch.float32)


@dataclass(frozen=True)
class Stacked(Layout):
    """Theirs is ours one after the other along the outputs; transposed to (in, out) in GPT-2."""

    count: int
    transposed: bool

    def join(self, *ours: Tensor) -> Tensor:
        return torch.cat([each.T for each in ours], -1) if self.transposed else torch.cat(ours)

    def split(self, theirs: Tensor, at: int) -> Tensor:
        return (theirs.T if self.transposed else theirs).chunk(self.count)[at]


@dataclass(frozen=True)
class ByHead(Layout):
    """Theirs holds query, key and value of one head, then of the next (GPT-NeoX)."""

    heads: int

    def join(self, *ours: Tensor) -> Tensor:
        return torch.stack([each.view(self.heads, -1, *each.shape[1:]) for each in ours], 1).flatten(0, 2)

    def split(self, theirs: Tensor, at: int) -> Tensor:
        return theirs.view(self.heads, 3, -1, *theirs.shape[1:])[:, at].flatten(0, 1)


# --- families ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """What a class calls our modules.

    Attributes:
        base: what the names of all but the head begin with; files of the bare model leave it out.
        layers: what the list of layers is called.
        names: other modules, in a layer by their name in it; a pattern and its replacement.
        fused: the module that holds query, key and value.
    """

    base: str = "model."
    layers: str = "layers"
    names: Mapping[str, str] = field(default_factory=dict)
    fused: str | None = None


FAMILIES: dict[str, Family] = {kind: Family() for kind in MODEL_TYPES} | {
    "mixtral": Family(
        names={
            r"mlp\.gate": "block_sparse_moe.gate",
            r"mlp\.experts\.(\d+)\.gate_proj": r"block_sparse_moe.experts.\1.w1",
            r"mlp\.experts\.(\d+)\.down_proj": r"block_sparse_moe.experts.\1.w2",
            r"mlp\.experts\.(\d+)\.up_proj": r"block_sparse_moe.experts.\1.w3",
        }
    ),
    "olmo2": Family(
        names={
            "input_layernorm": "post_attention_layernorm",
            "post_attention_layernorm": "post_feedforward_layernorm",
        }
    ),
    "gpt2": Family(
        base="transformer.",
        layers="h",
        names={
            "embed_tokens": "wte",
            "embed_positions": "wpe",
            "norm": "ln_f",
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
            r"self_attn\.o_proj": "attn.c_proj",
            r"mlp\.up_proj": "mlp.c_fc",
            r"mlp\.down_proj": "mlp.c_proj",
        },
        fused="attn.c_attn",
    ),
    "gpt_neox": Family(
        base="gpt_neox.",
        names={
            "embed_tokens": "embed_in",
            "norm": "final_layer_norm",
            "lm_head": "embed_out",
            r"self_attn\.o_proj": "attention.dense",
            r"mlp\.up_proj": "mlp.dense_h_to_4h",
            r"mlp\.down_proj": "mlp.dense_4h_to_h",
        },
        fused="attention.query_key_value",
    ),
}


@dataclass(frozen=True)
class Pair:
    """One of their tensors and the parameters of ours that it holds."""

    theirs: str
    ours: tuple[str, ...]
    layout: Layout


def correspondence(spec: ModelSpec, model_type: str) -> Iterator[Pair]:
    """Every parameter of the model once, a tied table once, in our order."""
    family = FAMILIES[model_type]
    for name, parameter in build_meta(spec).named_parameters():
        place = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.(weight|bias)", name)
        assert place is not None, name
        layer, module, leaf = place.groups()
        before = f"{family.base}{family.layers}.{layer}." if layer else "" if module == "lm_head" else family.base
        projection = re.fullmatch(r"self_attn\.([qkv])_proj", module)
        if family.fused and projection:
            if projection[1] == "q":
                fused = tuple(f"layers.{layer}.self_attn.{each}_proj.{leaf}" for each in "qkv")
                yield Pair(f"{before}{family.fused}.{leaf}", fused, _fused(spec, model_type, leaf))
            continue
        patterns = (re.sub(f"^{ours}$", theirs, module) for ours, theirs in family.names.items())
        renamed = next((found for found in patterns if found != module), module)
        layout = Layout()
        if model_type in ("gemma", "gemma2") and module.endswith("norm"):
            layout = Gain()
        elif model_type == "gpt2" and parameter.ndim == 2 and layer:
            layout = Stacked(1, transposed=True)
        yield Pair(f"{before}{renamed}.{leaf}", (name,), layout)


def _fused(spec: ModelSpec, model_type: str, leaf: str) -> Layout:
    if model_type == "gpt2":
        return Stacked(3, transposed=leaf == "weight")
    return ByHead(spec.layers[0].num_attention_heads)


# --- views -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Made:
    """How one tensor of a view is made of its source's."""

    sources: tuple[str, ...]
    shape: Shape
    dtype: torch.dtype
    make: Callable[..., Tensor] | None  # None: the source's, as it is


@dataclass(frozen=True)
class View(Tensors):
    """Tensors made of another's, each when asked for."""

    source: Tensors
    made: Mapping[str, _Made]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.made)

    def shape(self, name: str) -> Shape:
        return self.made[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.made[name].dtype

    def tensor(self, name: str) -> Tensor:
        one = self.made[name]
        sources = [self.source.tensor(source) for source in one.sources]
        return one.make(*sources).to(one.dtype) if one.make else sources[0]

    def rows(self, name: str) -> Rows:
        one = self.made[name]
        return super().rows(name) if one.make else self.source.rows(one.sources[0])

    def pieces(self, name: str) -> Iterator[memoryview]:
        one = self.made[name]
        return super().pieces(name) if one.make else self.source.pieces(one.sources[0])


def from_hf(source: Tensors, config: Mapping[str, Any], spec: ModelSpec) -> Tensors:
    """A checkpoint of a class as the parameters of our module, in the dtypes it has.

    A tied head and buffers (masks, rotary frequencies) are left out.

    Args:
        config: the checkpoint's `config.json`; only its model_type is read.
        spec: what the config says.

    Raises:
        InputError: tensors missing, left over, of another shape, or not of floating point; every fault found.
    """
    known = {name: name for name in source.names}
    base = FAMILIES[config["model_type"]].base
    known |= {f"{base}{name}": name for name in source.names if f"{base}{name}" not in known}
    shapes = {name: parameter.shape for name, parameter in build_meta(spec).named_parameters()}
    faults: list[str] = []
    made: dict[str, _Made] = {}
    used = {known.get("lm_head.weight"), known.get("embed_out.weight")} if spec.tie_word_embeddings else set()
    for pair in correspondence(spec, config["model_type"]):
        name = known.get(pair.theirs)
        used.add(name)
        wanted = pair.layout.join(*(torch.empty(shapes[ours], device="meta") for ours in pair.ours)).shape
        if name is None:
            faults.append(f"{pair.theirs}: missing; config.json asks for it")
        elif source.dtype(name) not in FLOATS:
            faults.append(
                f"{name}: expected float64, float32, bfloat16 or float16, got {source.dtype(name)}; dequantise it"
            )
        elif source.shape(name) != tuple(wanted):
            faults.append(f"{name}: expected shape {tuple(wanted)}, got {source.shape(name)}")
        else:
            for at, ours in enumerate(pair.ours):
                plain = type(pair.layout) is Layout
                make = None if plain else _split(pair.layout, at)
                made[ours] = _Made((name,), tuple(shapes[ours]), pair.layout.dtype(source.dtype(name)), make)
    for name in source.names:
        if name not in used and not BUFFERS.search(name):
            faults.append(f"{name}: config.json has no place for it")
    if faults:
        more = [f"and {len(faults) - FAULTS_SHOWN} more"] if len(faults) > FAULTS_SHOWN else []
        raise InputError(*faults[:FAULTS_SHOWN], *more)
    return View(source, {name: made[name] for name in shapes})


def _split(layout: Layout, at: int) -> Callable[[Tensor], Tensor]:
    return lambda theirs: layout.split(theirs, at)


def to_hf(source: Tensors, spec: ModelSpec, model_type: str) -> Tensors:
    """The parameters of our module as a checkpoint of a class; gains less 1 in the dtype that most of the weights have.

    Raises:
        InputError: the class cannot express the spec, or parameters are missing or of another shape.
    """
    to_hf_config(spec, model_type)
    have = {name: source.shape(name) for name in source.names}
    want = {name: tuple(parameter.shape) for name, parameter in build_meta(spec).named_parameters()}
    if have != want:
        odd = next(name for name in (*want, *have) if have.get(name) != want.get(name))
        raise InputError(f"{odd}: expected shape {want.get(odd)}, got {have.get(odd)}; not the weights of this model")
    made: dict[str, _Made] = {}
    main = main_dtype(source)
    for pair in correspondence(spec, model_type):
        parts = [torch.empty(source.shape(ours), dtype=source.dtype(ours), device="meta") for ours in pair.ours]
        whole = pair.layout.join(*parts)
        make = None if type(pair.layout) is Layout else pair.layout.join
        dtype = main if isinstance(pair.layout, Gain) else whole.dtype
        made[pair.theirs] = _Made(pair.ours, tuple(whole.shape), dtype, make)
    return View(source, made)


def main_dtype(tensors: Tensors) -> torch.dtype:
    """The dtype that most of the bytes have."""
    bytes_of: dict[torch.dtype, int] = {}
    for name in tensors.names:
        bytes_of[tensors.dtype(name)] = bytes_of.get(tensors.dtype(name), 0) + tensors.size(name)
    return max(bytes_of, key=lambda dtype: bytes_of[dtype])


def cast(source: Tensors, dtype: torch.dtype) -> Tensors:
    """The same in another dtype."""

    def one(name: str) -> _Made:
        same = source.dtype(name) == dtype
        return _Made((name,), source.shape(name), dtype, None if same else lambda tensor: tensor)

    return View(source, {name: one(name) for name in source.names})
