"""What every axis of every parameter is: the one table that all expansions read.

A parameter's axes are named after the dimensions of the model that they belong to, once for the side that makes a coordinate
and once for the side that uses it. An expansion then says which dimensions grow, where their old coordinates go, and what the
new ones hold; which tensors that touches, and where, follows from this table. Shapes follow from it too, without torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from scantling.parts import (
    FFN,
    BlockDenseFFN,
    BlockShuffleFFN,
    Compress,
    ConvDiff,
    DenseFFN,
    ExpertFFN,
    Gated,
    Linear,
    LinearDiff,
    LowRankFFN,
    MoEFFN,
    Norm,
    TransposedConv,
)
from scantling.spec import LayerSpec, ModelSpec

Form = Literal["flat", "blocks", "lanes"]


class Dim(NamedTuple):
    """A dimension of the model, seen from one side.

    Kinds: `vocabulary`, `positions`; `write` (into a residual stream), `read` (from it), `norm` (gains along it); `query`,
    `key`, `value` (what the projections make, head by head), `context` (what the output projection reads), `query_gain`,
    `key_gain`; `inner` and `inner_pair` (what gate and up make; gate before up in one matrix), `inner_used` (what down reads);
    `rank_made`, `rank_used` (between the factors of a structured linear); `router` (an expert each).
    """

    kind: str
    layer: int | None = None
    part: str = ""


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter.

    Attributes:
        size: of the axis.
        dim: None where nothing can grow.
        form: how the dimension lies on it. `flat`: in order. `blocks`: coordinate i is entry i mod size of block i // size (the
            block is the tensor's first axis). `lanes`: it is entry i // blocks of block i mod blocks.
        blocks: number of blocks.
    """

    size: int
    dim: Dim | None = None
    form: Form = "flat"
    blocks: int = 1


Axes = tuple[Axis, ...]
Named = tuple[str, Axes]


def axes(spec: ModelSpec) -> dict[str, Axes]:
    """The axes of every parameter by name, in the model's order; a tied table once, as `embed_tokens.weight`."""
    return dict(_axes(spec))


def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by name."""
    return {name: tuple(axis.size for axis in each) for name, each in _axes(spec)}


def _axes(spec: ModelSpec) -> Iterator[Named]:
    table = Axis(spec.embedding_size, Dim("write", None, "embedding"))
    yield "embed_tokens.weight", (Axis(spec.vocab_size, Dim("vocabulary")), table)
    if spec.learned_positions:
        yield "embed_positions.weight", (Axis(spec.max_position_embeddings, Dim("positions")), table)
    yield from _branches(spec)
    for index, layer in enumerate(spec.layers):
        yield from _layer(layer, index)
    yield from _resizes(spec)
    if spec.final_norm is not None:
        yield from _norm(spec.final_norm, "norm", spec.norm_width, Dim("norm", None, "norm"))
    if not spec.tie_word_embeddings:
        read = Axis(spec.unembedding_size, Dim("read", None, "head"))
        yield "lm_head.weight", (Axis(spec.vocab_size, Dim("vocabulary")), read)
    if spec.lm_head_bias:
        yield "lm_head.bias", (Axis(spec.vocab_size, Dim("vocabulary")),)


def _branches(spec: ModelSpec) -> Iterator[Named]:
    if spec.branches is None:
        return
    count = spec.branches.count
    yield "branches.weight", (Axis(count if spec.branches.mixing == "softmax" else 1),)
    if spec.branches.entry == "projection":
        width = spec.stacks[0][0].hidden_size
        for branch in range(count):
            out = Axis(width, Dim("write", None, f"entry {branch}"))
            read = Axis(spec.embedding_size, Dim("read", None, f"entry {branch}"))
            yield f"branches.entries.{branch}.weight", (out, read)
            yield f"branches.entries.{branch}.bias", (out,)


def _norm(norm: Norm, name: str, width: int, dim: Dim) -> Iterator[Named]:
    yield f"{name}.weight", (Axis(width, dim),)
    if norm.kind == "layer_norm" and norm.bias:
        yield f"{name}.bias", (Axis(width, dim),)


def _layer(layer: LayerSpec, index: int) -> Iterator[Named]:
    prefix, width = f"layers.{index}", layer.hidden_size
    names = ["input_layernorm", "post_attention_layernorm"]
    if layer.norm_placement == "sandwich":
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for name in names:
        yield from _norm(layer.norm, f"{prefix}.{name}", width, Dim("norm", index, name))
    yield from _attention(layer, index)
    written = layer.ffn_output_size or width
    yield from _ffn(layer.ffn, f"{prefix}.mlp", index, "", Axis(width), Axis(written, Dim("write", index, "ffn")))


def _attention(layer: LayerSpec, index: int) -> Iterator[Named]:
    prefix, heads, groups = f"layers.{index}.self_attn", layer.num_attention_heads, layer.num_key_value_heads
    read = Axis(layer.attention_input_size or layer.hidden_size, Dim("read", index, "attention"))
    made = {
        "q_proj": Axis(heads * layer.head_dim, Dim("query", index)),
        "k_proj": Axis(groups * layer.head_dim, Dim("key", index)),
        "v_proj": Axis(groups * layer.v_head_dim, Dim("value", index)),
    }
    for name, out in made.items():
        yield f"{prefix}.{name}.weight", (out, read)
        if layer.attention_bias:
            yield f"{prefix}.{name}.bias", (out,)
    write = Axis(layer.hidden_size, Dim("write", index, "attention"))
    yield f"{prefix}.o_proj.weight", (write, Axis(heads * layer.v_head_dim, Dim("context", index)))
    if layer.out_bias:
        yield f"{prefix}.o_proj.bias", (write,)
    if layer.qk_norm is not None:
        over_all = layer.qk_norm.over == "all"
        for name, kind, count in (("q_norm", "query_gain", heads), ("k_norm", "key_gain", groups)):
            yield f"{prefix}.{name}.weight", (Axis(layer.head_dim * (count if over_all else 1), Dim(kind, index)),)


def _ffn(ffn: FFN, prefix: str, index: int, part: str, read: Axis, write: Axis) -> Iterator[Named]:
    if isinstance(ffn, MoEFFN):
        read_router = Axis(read.size, Dim("read", index, "ffn"))
        yield f"{prefix}.gate.weight", (Axis(ffn.num_local_experts, Dim("router", index)), read_router)
        for expert in range(ffn.num_local_experts):
            name = f"experts.{expert}"
            yield from _ffn(ffn.expert, f"{prefix}.{name}", index, f"{name}.", read, write)
        if ffn.shared_expert is not None:
            yield from _ffn(ffn.shared_expert, f"{prefix}.shared_expert", index, "shared_expert.", read, write)
        return
    inner, read = ffn.intermediate_size, Axis(read.size, Dim("read", index, "ffn"))
    made, used = Axis(inner, Dim("inner", index, part)), Axis(inner, Dim("inner_used", index, part))
    if not ffn.gated:
        into = {"up_proj": made}
    elif isinstance(ffn, DenseFFN):
        into = {"gate_proj": made, "up_proj": made}
    else:
        into = {"gate_up_proj": Axis(2 * inner, Dim("inner_pair", index, part))}
    for name, out in into.items():
        yield from linear_axes(ffn, f"{prefix}.{name}", out, read, index, f"{part}{name}")
    yield from linear_axes(ffn, f"{prefix}.down_proj", write, used, index, f"{part}down_proj")


def linear_axes(ffn: ExpertFFN, name: str, out: Axis, read: Axis, index: int, part: str) -> Iterator[Named]:
    """The axes of one feed-forward linear of any structure."""

    def blocked(axis: Axis, form: Form, blocks: int) -> Axis:
        return Axis(axis.size // blocks, axis.dim, form, blocks)

    def between(size: int) -> tuple[Axis, Axis]:
        return Axis(size, Dim("rank_made", index, part)), Axis(size, Dim("rank_used", index, part))

    match ffn:
        case DenseFFN():
            yield f"{name}.weight", (out, read)
            bias = f"{name}.bias"
        case LowRankFFN():
            made, used = between(ffn.rank)
            yield f"{name}.down.weight", (made, read)
            yield f"{name}.up.weight", (out, used)
            bias = f"{name}.up.bias"
        case BlockDenseFFN(num_blocks=blocks):
            made, used = between(ffn.rank)
            yield (
                f"{name}.down.weight",
                (Axis(blocks), blocked(made, "blocks", blocks), blocked(read, "blocks", blocks)),
            )
            yield f"{name}.up.weight", (out, used)
            bias = f"{name}.up.bias"
        case BlockShuffleFFN(num_blocks=blocks):
            made, used = between(min(read.size, out.size))
            yield (
                f"{name}.down.weight",
                (Axis(blocks), blocked(made, "blocks", blocks), blocked(read, "blocks", blocks)),
            )
            yield f"{name}.up.weight", (Axis(blocks), blocked(out, "lanes", blocks), blocked(used, "lanes", blocks))
            bias = f"{name}.bias"
    if ffn.bias:
        yield bias, (out,)


def _resizes(spec: ModelSpec) -> Iterator[Named]:
    """Learned changes of width; only `compress` maps have dimensions that can grow."""
    widths, kind = spec.stream_widths, spec.transition
    inside = [pair for _ in spec.stacks for pair in pairwise(widths[:-1])]
    for index, (have, width) in enumerate([*inside, widths[-2:]]):
        name, new = f"resize.{index}" if index < len(inside) else "resize_last", width - have
        if isinstance(kind, Compress) and new:
            layer = index if index < len(inside) else None
            out, read = Axis(width, Dim("write", layer, "resize")), Axis(have, Dim("read", layer, "resize"))
            yield f"{name}.linear.weight", (out, read)
            if kind.bias:
                yield f"{name}.linear.bias", (out,)
        if new <= 0:
            continue
        match kind:
            case Gated():
                for each in ("linear", "gate"):
                    yield from _fixed(f"{name}.{each}", new, new, kind.bias)
            case Linear():
                yield from _fixed(f"{name}.linear", width, have, kind.bias)
            case LinearDiff():
                yield from _fixed(f"{name}.linear", new, have, kind.bias)
            case TransposedConv():
                yield f"{name}.conv.weight", (Axis(1), Axis(1), Axis(new + 1))
            case ConvDiff():
                yield f"{name}.conv.weight", (Axis(1), Axis(1), Axis(have - new + 1))


def _fixed(name: str, out: int, into: int, bias: bool) -> Iterator[Named]:
    yield f"{name}.weight", (Axis(out), Axis(into))
    if bias:
        yield f"{name}.bias", (Axis(out),)
