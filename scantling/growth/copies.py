"""Growth by copies (HyperCloning, arXiv 2409.12903; Net2Net): whole multiples of width, heads and feed-forward.

Every matrix is repeated along each side that grows and divided by the number of copies once if its input side grew; tables,
gains and biases are repeated as they are. Every coordinate of the stream, head and inner unit then has equally many copies, so
that every statistic stays: exact for RMSNorm and LayerNorm, wherever the norm stands, and for any positions.

Equal copies get equal gradients and would stay equal for ever. Noise that one copy's share of an input has more and the next
one's less keeps the function and tells them apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from scantling.growth.axes import Dim, axes
from scantling.growth.feedforward import common_parts, inside, parts_of, with_ffn
from scantling.growth.hidden import constant_scales
from scantling.growth.steps import Change, Index, Inexact, Step, copied, in_blocks, with_layer
from scantling.parts import BlockDenseFFN, BlockShuffleFFN, CarryForward, Compress, Norm, Zero
from scantling.spec import LayerSpec, ModelSpec

NOISE = 10.0  # dB; the paper's noisy variants
EQUAL = (
    "the copies are equal and get equal gradients: without dropout they stay equal however long the model trains, and add "
    f"nothing to what it can learn; snr_db {NOISE:g} tells them apart by noise that cancels"
)
ADDED_UP = ("read", "context", "inner_used")  # kinds of dimension whose coordinates a matrix adds up


def grow_by_copies(spec: ModelSpec, target: ModelSpec, snr_db: float | None = None) -> Step | None:
    """One step to the target's widths, heads and inner sizes, layers corresponding one to one; None where none of them grows.

    Args:
        snr_db: of the noise on the copies' shares; None leaves them equal.

    Raises:
        Inexact: a size is no whole multiple, or its places have a meaning that copies would not keep.
    """
    times = _Times.between(spec, target)
    after = _resized(spec, target, times)
    texts: dict[str, list[int]] = {}
    for index, (old, new) in enumerate(zip(spec.stacks[0], after.stacks[0], strict=True)):
        for text in _texts(old, new):
            texts.setdefault(text, []).append(index)
    if not texts and times.embedding == 1:
        return None
    changes = {
        dim: Change(places, copies="shares" if dim.kind in ADDED_UP else "whole") for dim, places in _maps(spec, times)
    }
    scales = constant_scales(spec, target, copies=times.stream) if times.stream > 1 else {}
    how = "equal copies" if snr_db is None else f"copies that differ by noise of {snr_db:g} dB"
    what = "; ".join(
        text if len(found) == len(spec.stacks[0]) else f"{_layers(found)}: {text}" for text, found in texts.items()
    )
    return Step(
        "copies", f"{what or 'embedding_size'}; {how}", spec, after, changes,
        {name: factor for name, factor in scales.items() if factor != 1},
        snr_db=snr_db, warning=EQUAL if snr_db is None else None,
    )  # fmt: skip


@dataclass(frozen=True)
class _Times:
    """How often everything is copied.

    Attributes:
        stream: all coordinates of the residual stream; embedding: those of the input table, which may differ only before maps
            into branches.
        heads: by layer of a stack, the old head of every new query head and of every new key/value head.
        inner: by layer of a stack and part of its feed-forward.
    """

    stream: int
    embedding: int
    heads: dict[int, tuple[Index, Index]] = field(default_factory=dict)
    inner: dict[tuple[int, str], int] = field(default_factory=dict)

    @classmethod
    def between(cls, spec: ModelSpec, target: ModelSpec) -> "_Times":
        """From the sizes of two specs.

        Raises:
            Inexact: some are no whole multiples, or not of one another.
        """
        stream, embedding = _stream(spec, target)
        times = cls(stream, embedding)
        for index, (old, new) in enumerate(zip(spec.stacks[0], target.stacks[0], strict=True)):
            if new.num_attention_heads != old.num_attention_heads:
                times.heads[index] = _heads(f"layers[{index}]", old, new)
            for part in common_parts(old.ffn, new.ffn):
                where = f"layers[{index}].ffn{'.' * bool(part)}{part}"
                was, now = inside(old.ffn, part), inside(new.ffn, part)
                times.inner[index, part] = _ratio(
                    f"{where}.intermediate_size", was.intermediate_size, now.intermediate_size
                )
                if isinstance(was, BlockShuffleFFN) and (stream > 1 or times.inner[index, part] > 1):
                    raise Inexact(
                        f"{where}: the shuffle of a block_shuffle feed-forward would mix copies up; expected kind: dense, which "
                        "it can become first, or padded width (width: pad)"
                    )
        return times


def _ratio(name: str, old: int, new: int) -> int:
    if new % old == 0:
        return new // old
    below = new // old * old
    nearest = f"{below} or {below + old}" if below else f"at least {old}"
    raise Inexact(
        f"{name}: {new} is no whole number of copies of {old}; expected {nearest}, or padded width (width: pad)"
    )


def _stream(spec: ModelSpec, target: ModelSpec) -> tuple[int, int]:
    """Copies of the stream and of the embedding."""
    sizes = {
        f"layers[{index}].hidden_size": (old.hidden_size, new.hidden_size)
        for index, (old, new) in enumerate(zip(spec.stacks[0], target.stacks[0], strict=True))
    }
    widths, wanted = spec.stream_widths, target.stream_widths
    sizes |= {"embedding_size": (widths[0], wanted[0]), "unembedding_size": (widths[-1], wanted[-1])}
    projected = spec.branches is not None and spec.branches.entry == "projection"
    found = {name: _ratio(name, old, new) for name, (old, new) in sizes.items()}
    first = next(iter(found))
    for name, times in found.items():
        if times != found[first]:
            raise Inexact(
                f"{name}: {times} times as wide, but {first} {found[first]} times; the whole stream is copied, so expected one "
                "multiple everywhere"
            )
    if found[first] > 1 and len(set(widths)) > 1 and not isinstance(spec.transition, CarryForward | Zero | Compress):
        assert spec.transition is not None
        raise Inexact(
            f"transition {spec.transition.kind} mixes neighbouring coordinates, which copies would move; expected "
            "carry_forward, zero or compress, or equally wide layers"
        )
    embedding = _ratio("embedding_size", spec.embedding_size, target.embedding_size) if projected else found[first]
    return found[first], embedding


def _heads(where: str, old: LayerSpec, new: LayerSpec) -> tuple[Index, Index]:
    """The old head of every new one: all of them again, or copies side by side, as the groups need."""
    (heads, more), (groups, more_groups) = (
        (getattr(old, name), _ratio(f"{where}.{name}", getattr(old, name), getattr(new, name)))
        for name in ("num_attention_heads", "num_key_value_heads")
    )
    for blocks, group_blocks in ((1, 1), (heads, groups)):
        queries, keys = copied(heads, more, blocks), copied(groups, more_groups, group_blocks)
        if all(old.groups[query] == keys[group] for query, group in zip(queries, new.groups, strict=True)):
            return queries, keys
    exact = [group + groups * (copy % more_groups) for copy in range(more) for group in old.groups]
    raise Inexact(f"{where}.head_to_group: a copy of a head would read another head's keys; expected {exact}")


def _resized(spec: ModelSpec, target: ModelSpec, times: _Times) -> ModelSpec:
    """The spec with copied sizes; the rest of the target's changes are other steps."""
    m = times.stream

    def norm(norm: Norm) -> Norm:
        return norm if norm.statistic_size is None else norm.replace(statistic_size=norm.statistic_size * m)

    def size(size: int | None) -> int | None:
        return None if size is None else size * m

    after = spec
    if m > 1 or times.embedding > 1:
        layers = tuple(
            layer.replace(
                hidden_size=layer.hidden_size * m,
                attention_input_size=size(layer.attention_input_size),
                ffn_output_size=size(layer.ffn_output_size),
                norm=norm(layer.norm),
            )
            for layer in spec.layers
        )
        after = spec.replace(
            layers=layers,
            embedding_size=spec.embedding_size * times.embedding,
            unembedding_size=spec.unembedding_size * m,
            final_norm=None if spec.final_norm is None else norm(spec.final_norm),
            embedding_multiplier=target.embedding_multiplier if m > 1 else spec.embedding_multiplier,
            logits_scaling=target.logits_scaling if m > 1 else spec.logits_scaling,
        )
    for index in times.heads:
        names = ("num_attention_heads", "num_key_value_heads", "head_to_group")
        after = with_layer(after, index, **{name: getattr(target.layers[index], name) for name in names})
    for (index, part), copies in times.inner.items():
        ffn = inside(after.layers[index].ffn, part)
        after = with_ffn(after, index, part, ffn.replace(intermediate_size=ffn.intermediate_size * copies))
    return after


def _maps(spec: ModelSpec, times: _Times) -> Iterator[tuple[Dim, Index]]:
    """Every dimension that is copied, and the old coordinate of every new one."""
    depth = len(spec.stacks[0])
    beside = _has_places(spec)
    parts = {
        (index, prefix): (copies, getattr(inside(spec.layers[index].ffn, part), "num_blocks", 1))
        for (index, part), copies in times.inner.items()
        for prefix in parts_of(spec.layers[index].ffn, part)
    }
    for axis in (axis for each in axes(spec).values() for axis in each):
        if axis.dim is None:
            continue
        dim, size = axis.dim, axis.size * axis.blocks
        at = None if dim.layer is None else dim.layer % depth
        if dim.kind in ("write", "norm", "read"):
            table = dim.part == "embedding" or (dim.kind == "read" and dim.part.startswith("entry"))
            copies = times.embedding if table else times.stream
            if copies > 1:
                yield dim, copied(size, copies, size if beside else 1)
        elif at in times.heads and (index := _of_heads(dim, spec.layers[at], *times.heads[at])) is not None:
            yield dim, index
        elif dim.kind.startswith("inner"):
            assert at is not None
            copies, blocks = parts.get((at, dim.part), (1, 1))
            if copies > 1:
                yield dim, copied(size, copies, 2 * blocks if dim.kind == "inner_pair" else blocks)


def _of_heads(dim: Dim, layer: LayerSpec, queries: Index, keys: Index) -> Index | None:
    """The map of a dimension that lies head by head; None for any other."""
    if dim.kind.endswith("_gain") and (layer.qk_norm is None or layer.qk_norm.over == "head"):
        return None
    made = {"query": queries, "query_gain": queries, "key": keys, "key_gain": keys, "value": keys, "context": queries}
    heads = made.get(dim.kind)
    size = layer.v_head_dim if dim.kind in ("value", "context") else layer.head_dim
    return None if heads is None else in_blocks(heads, size)


def _has_places(spec: ModelSpec) -> bool:
    """Whether some part reads or writes a stretch of the stream, so that copies must stand beside their originals."""
    norms = [*[layer.norm for layer in spec.layers], spec.final_norm]
    ffns = [
        ffn
        for layer in spec.layers
        for ffn in (layer.ffn, getattr(layer.ffn, "expert", None), getattr(layer.ffn, "shared_expert", None))
    ]
    return (
        len(set(spec.stream_widths)) > 1
        or (spec.branches is not None and spec.branches.entry == "split")
        or any(layer.attention_input_size or layer.ffn_output_size for layer in spec.layers)
        or any(norm is not None and norm.statistic_size for norm in norms)
        or any(isinstance(ffn, BlockDenseFFN) for ffn in ffns)
    )


def _texts(old: LayerSpec, new: LayerSpec) -> Iterator[str]:
    """What of a layer is copied, for people."""
    if new.hidden_size != old.hidden_size:
        yield f"hidden_size {old.hidden_size} to {new.hidden_size}"
    if new.num_attention_heads != old.num_attention_heads:
        heads = [f"{layer.num_attention_heads}/{layer.num_key_value_heads}" for layer in (old, new)]
        yield f"heads {heads[0]} to {heads[1]}"
    for part in common_parts(old.ffn, new.ffn):
        was, now = (inside(layer.ffn, part).intermediate_size for layer in (old, new))
        if now != was:
            yield f"{part}{' ' * bool(part)}intermediate_size {was} to {now}"


def _layers(found: list[int]) -> str:
    return f"layer{'s' * (len(found) > 1)} {', '.join(map(str, found))}"
