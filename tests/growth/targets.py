"""Targets one expansion away from a spec: the operations that the conformance suite composes."""

import math
from typing import Any

from hypothesis import strategies as st

from scantling.parts import (
    BlockDenseFFN,
    BlockShuffleFFN,
    CarryForward,
    Compress,
    DenseFFN,
    LayerNorm,
    LowRankFFN,
    MoEFFN,
    NoPosition,
    Norm,
    RMSNorm,
    Rope,
    Zero,
)
from scantling.spec import LayerSpec, ModelSpec


def all_layers(spec: ModelSpec, index: int | None, **changes: Any) -> ModelSpec:
    """Layers changed in every branch: one, or all for None; values may be functions of the layer."""
    depth = len(spec.stacks[0])
    layers = [
        layer.replace(**{key: value(layer) if callable(value) else value for key, value in changes.items()})
        if index is None or at % depth == index
        else layer
        for at, layer in enumerate(spec.layers)
    ]
    return spec.replace(layers=tuple(layers))


def mlp(draw: st.DrawFn, spec: ModelSpec, index: int) -> ModelSpec:
    def wider(ffn: Any) -> Any:
        if isinstance(ffn, MoEFFN):
            return ffn.replace(expert=wider(ffn.expert))
        step = ffn.num_blocks**2 if isinstance(ffn, BlockShuffleFFN) else getattr(ffn, "num_blocks", 1)
        return ffn.replace(intermediate_size=ffn.intermediate_size + step * more)

    more = draw(st.integers(1, 5))
    return all_layers(spec, index, ffn=lambda layer: wider(layer.ffn))


def rank(draw: st.DrawFn, spec: ModelSpec, index: int) -> ModelSpec:
    more = draw(st.integers(1, 3))

    def richer(layer: LayerSpec) -> Any:
        ffn = layer.ffn
        if isinstance(ffn, LowRankFFN | BlockDenseFFN):
            return ffn.replace(rank=ffn.rank + more * getattr(ffn, "num_blocks", 1))
        return ffn

    return all_layers(spec, index, ffn=richer)


def structure(draw: st.DrawFn, spec: ModelSpec, index: int) -> ModelSpec:
    merge = draw(st.booleans())

    def simpler(layer: LayerSpec) -> Any:
        ffn = layer.ffn
        if isinstance(ffn, BlockDenseFFN) and merge:
            return ffn.replace(num_blocks=1)
        if isinstance(ffn, LowRankFFN | BlockDenseFFN | BlockShuffleFFN):
            keys = {"gated", "hidden_act", "intermediate_size", "bias"}
            return DenseFFN(kind="dense", **{key: getattr(ffn, key) for key in keys})
        return ffn

    return all_layers(spec, index, ffn=simpler)


def experts(draw: st.DrawFn, spec: ModelSpec, index: int) -> ModelSpec:
    ffn = spec.layers[index].ffn
    if isinstance(ffn, MoEFFN):
        return spec
    shared, count = draw(st.booleans()), draw(st.integers(1, 4))
    routing = {"num_local_experts": count, "num_experts_per_tok": draw(st.integers(1, count))}
    if shared:
        routed = MoEFFN(
            kind="moe", expert=ffn, shared_expert=ffn, router_softmax="before", norm_topk_prob=False, **routing
        )
    else:
        routed = MoEFFN(kind="moe", expert=ffn, router_softmax=draw(st.sampled_from(["after", "before"])), **routing)
    return all_layers(spec, index, ffn=routed)


def heads(draw: st.DrawFn, spec: ModelSpec, index: int) -> ModelSpec:
    layer = spec.layers[index]
    groups = layer.num_key_value_heads + draw(st.integers(0, 2))
    if layer.head_to_group is None:
        more = draw(st.integers(0 if groups > layer.num_key_value_heads else 1, 2))
        share = layer.num_attention_heads // layer.num_key_value_heads + more
        return all_layers(spec, index, num_attention_heads=groups * share, num_key_value_heads=groups)
    extra = draw(st.lists(st.integers(0, groups - 1), min_size=groups == layer.num_key_value_heads, max_size=3))
    mapped = draw(st.permutations([*layer.head_to_group, *extra]))
    return all_layers(
        spec, index, num_attention_heads=len(mapped), head_to_group=tuple(mapped), num_key_value_heads=groups
    )


def copies(draw: st.DrawFn, spec: ModelSpec, index: int) -> ModelSpec:
    layer = spec.layers[index]
    if layer.head_to_group is not None:
        return spec
    share = layer.num_attention_heads // layer.num_key_value_heads
    times = draw(st.sampled_from([n for n in range(min(2, share), share + 1) if share % n == 0]))
    return all_layers(spec, index, num_key_value_heads=layer.num_key_value_heads * times)


def uneven_heads(draw: st.DrawFn, spec: ModelSpec, index: int) -> ModelSpec:
    layer = spec.layers[index]
    extra = draw(st.lists(st.integers(0, layer.num_key_value_heads - 1), min_size=1, max_size=3))
    mapped = (*layer.groups, *extra)
    return all_layers(spec, index, num_attention_heads=len(mapped), head_to_group=mapped)


def value(draw: st.DrawFn, spec: ModelSpec, index: int) -> ModelSpec:
    more = draw(st.integers(1, 5))
    return all_layers(spec, index, v_head_dim=lambda layer: layer.v_head_dim + more)


def key(draw: st.DrawFn, spec: ModelSpec, index: int) -> ModelSpec:
    layer = spec.layers[index]
    size, position, norm = layer.head_dim, layer.position, layer.qk_norm
    fixed_scale = draw(st.booleans())
    changes: dict[str, Any] = {"attention_multiplier": layer.scale if fixed_scale else layer.attention_multiplier}
    if isinstance(position, NoPosition):
        new = size + draw(st.integers(1, 5))
    else:
        assert isinstance(position, Rope)
        was = position.rotated(size)
        way = "partial" if norm is not None else draw(st.sampled_from(["partial", "append", "theta", "spread"]))
        plain = position.scaling is None and position.frequency_size is None
        new = size + 2 * draw(st.integers(1, 3))
        if way == "partial" or (way in ("theta", "spread") and not (plain and was == size)):
            changes["position"] = position.replace(partial_rotary_factor=was / new)
        elif way == "append":
            rotated = was + new - size
            factor = rotated / new
            changes["position"] = position.replace(
                frequency_size=position.frequency_size or was, partial_rotary_factor=min(1.0, factor)
            )
        elif way == "theta":
            changes["position"] = position.replace(rope_theta=position.rope_theta ** (new / size))
        else:
            new = size * draw(st.integers(2, 3))
    if norm is not None and norm.over == "head":
        changes["qk_norm"] = norm.replace(statistic_size=norm.statistic_size or size)
    return all_layers(spec, index, head_dim=new, **changes)


def hidden(draw: st.DrawFn, spec: ModelSpec, index: int) -> ModelSpec:
    """Every layer at least as wide as one of the widths, in one of the three forms."""
    widths = spec.stream_widths
    kept = any(norm is not None and norm.statistic_size for norm in (spec.final_norm, *(e.norm for e in spec.layers)))
    bare = spec.final_norm is None or (spec.unembedding_size > spec.norm_width and not compresses(spec))
    forms = ["gain", *["writer"] * (not bare and not kept), *["statistic"] * (len(set(widths)) == 1)]
    form = draw(st.sampled_from(forms))
    start = min(widths) if form == "writer" or compresses(spec) else draw(st.sampled_from(sorted(set(widths))))
    blocks = [getattr(inner, "num_blocks", 1) for layer in spec.layers for inner in parts(layer)]
    step = math.lcm(*blocks) ** 2
    more = step * draw(st.integers(1, 3)) * (2 if step % 2 else 1)

    def grown(width: int) -> int:
        if form == "writer":
            return width * 2
        return width + more if width >= start else width

    def norm(old: Norm, width: int) -> Norm:
        new = grown(width)
        if new == width or form == "writer":
            return old
        if form == "gain" and old.statistic_size is None:
            return old.replace(eps=old.eps * width / new)
        return old.replace(statistic_size=old.statistic_size or width)

    def size(width: int | None) -> int | None:
        return None if width is None else grown(width)

    layers = tuple(
        layer.replace(
            hidden_size=grown(layer.hidden_size),
            attention_input_size=size(layer.attention_input_size),
            ffn_output_size=size(layer.ffn_output_size),
            norm=norm(layer.norm, layer.hidden_size),
        )
        for layer in spec.layers
    )
    split = spec.branches is not None and spec.branches.entry == "split"
    count = spec.branches.count if spec.branches is not None and split else 1
    embedding = grown(spec.embedding_size // count) * count
    if spec.branches is not None and spec.branches.entry == "projection":
        embedding = spec.embedding_size + (more if not spec.tie_word_embeddings else 0)
    return spec.replace(
        layers=layers,
        embedding_size=embedding,
        unembedding_size=embedding if spec.tie_word_embeddings else grown(spec.unembedding_size),
        final_norm=None if spec.final_norm is None else norm(spec.final_norm, spec.norm_width),
    )


def compresses(spec: ModelSpec) -> bool:
    return isinstance(spec.transition, Compress)


def parts(layer: LayerSpec) -> list[Any]:
    ffn = layer.ffn
    if isinstance(ffn, MoEFFN):
        return [each for each in (ffn.expert, ffn.shared_expert) if each is not None]
    return [ffn]


def narrow_layers(spec: ModelSpec) -> list[int]:
    """Layers that carry-forward streams pass by, but for the last one, whose width the final norm shares."""
    if not isinstance(spec.transition, CarryForward):
        return []
    widest = max(spec.stream_widths)
    return [at for at, layer in enumerate(spec.stacks[0][:-1]) if layer.hidden_size < widest]


def narrow(draw: st.DrawFn, spec: ModelSpec, index: int) -> ModelSpec:
    """One layer alone, into coordinates that wider ones use."""
    if not narrow_layers(spec):
        return spec
    index = draw(st.sampled_from(narrow_layers(spec)))
    layer = spec.layers[index]
    return all_layers(
        spec,
        index,
        hidden_size=draw(st.integers(layer.hidden_size + 1, max(spec.stream_widths))),
        norm=layer.norm.replace(statistic_size=layer.norm.statistic_size or layer.hidden_size),
        attention_input_size=layer.attention_input_size or layer.hidden_size,
        ffn_output_size=layer.ffn_output_size or layer.hidden_size,
    )


def depth(draw: st.DrawFn, spec: ModelSpec, index: int) -> ModelSpec:
    """A copy of one layer: anywhere, or beside it where the stream is mapped between widths or normalised at the last one."""
    end = len(spec.stacks[0])
    if len(set(spec.stream_widths)) == 1:
        place = draw(st.integers(0, end))
    elif isinstance(spec.transition, CarryForward):
        projected = spec.branches is not None and spec.branches.entry == "projection"
        place = draw(st.integers(int(projected and index > 0), end if index == end - 1 else max(1, end - 1)))
    else:
        place = draw(st.integers(index, index + 1))
    stacks = [[*stack[:place], stack[index], *stack[place:]] for stack in spec.stacks]
    return spec.replace(layers=tuple(layer for stack in stacks for layer in stack))


def constants(draw: st.DrawFn, spec: ModelSpec, index: int) -> ModelSpec:
    """Any two; under a tied table that no norm makes up for, two that leave the logits alone."""
    multiplier = draw(st.sampled_from([2.0, 3.0, 12.0])) * spec.embedding_multiplier
    logits = draw(st.sampled_from([1.0, 2.5])) * spec.logits_scaling
    seen = spec.final_norm is not None and (spec.unembedding_size <= spec.norm_width or compresses(spec))
    if spec.tie_word_embeddings and not seen:
        logits = spec.logits_scaling * spec.embedding_multiplier / multiplier
    return spec.replace(embedding_multiplier=multiplier, logits_scaling=logits)


def tables(draw: st.DrawFn, spec: ModelSpec, index: int) -> ModelSpec:
    return spec.replace(
        vocab_size=spec.vocab_size + draw(st.integers(0, 3)),
        max_position_embeddings=spec.max_position_embeddings + draw(st.integers(0, 3)),
        tie_word_embeddings=spec.tie_word_embeddings and draw(st.booleans()),
        lm_head_bias=True,
        layers=tuple(layer.replace(attention_bias=True) for layer in spec.layers),
    )


OPERATIONS = (
    mlp, rank, structure, experts, heads, copies, uneven_heads, value, key, hidden, narrow, depth, constants, tables,
)  # fmt: skip


# --- specs that an operation can grow --------------------------------------------------------------------------------


def ready(spec: ModelSpec) -> ModelSpec:
    """The nearest spec of which every dimension that can grow anywhere grows: no statistic over what may be added, norms of
    one kind in places where they allow growth, transitions that leave old coordinates alone, blocks only in equal widths."""
    equal = len(set(spec.stream_widths)) == 1
    centred = all(
        norm is None or isinstance(norm, LayerNorm) for norm in (spec.final_norm, *(e.norm for e in spec.layers))
    )
    centred = centred and (equal or compresses(spec))
    transition = spec.transition if isinstance(spec.transition, CarryForward | Zero | Compress) else None
    return spec.replace(
        transition=None if equal else transition or CarryForward(kind="carry_forward"),
        final_norm=plain(spec.final_norm, centred),
        layers=tuple(
            layer.replace(
                norm=plain(layer.norm, centred),
                norm_placement="pre" if centred or layer.norm_placement == "post_residual" else layer.norm_placement,
                use_parallel_residual=layer.use_parallel_residual and layer.norm_placement == "pre",
                qk_norm=layer.qk_norm and layer.qk_norm.replace(over="head"),
                ffn=layer.ffn if equal and not centred else unblocked(layer.ffn),
            )
            for layer in spec.layers
        ),
    )


def plain(norm: Norm | None, centred: bool) -> Norm | None:
    if norm is None or centred:
        return norm and norm.replace(statistic_size=None)
    return RMSNorm(kind="rms_norm", eps=norm.eps)


def unblocked(ffn: Any) -> Any:
    """Dense instead of what has blocks."""
    if isinstance(ffn, MoEFFN):
        return ffn.replace(
            expert=unblocked(ffn.expert), shared_expert=ffn.shared_expert and unblocked(ffn.shared_expert)
        )
    return dense(ffn) if hasattr(ffn, "num_blocks") else ffn


def dense(ffn: Any) -> DenseFFN:
    return DenseFFN(
        kind="dense", **{key: getattr(ffn, key) for key in ("gated", "hidden_act", "intermediate_size", "bias")}
    )


def suited(draw: st.DrawFn, spec: ModelSpec, operation: Any) -> ModelSpec:
    """`ready`, with layers that have what the operation grows."""
    spec = ready(spec)
    if operation in (rank, structure):
        kind = draw(st.sampled_from(["low_rank", "low_rank", "block_dense"]))
        blocks = {"num_blocks": 2} if kind == "block_dense" else {}
        model = BlockDenseFFN if blocks else LowRankFFN
        ffn = model(kind=kind, rank=8, **{**draw_ffn(draw), **blocks})
        return all_layers(spec, None, ffn=ffn)
    if operation is experts:
        return all_layers(
            spec, None, ffn=lambda layer: layer.ffn.expert if isinstance(layer.ffn, MoEFFN) else layer.ffn
        )
    if operation is copies:
        return all_layers(spec, None, head_to_group=None, num_attention_heads=lambda each: 4 * each.num_key_value_heads)
    if operation is narrow:
        whole = all_layers(spec, None, norm_placement="pre", ffn=lambda layer: unblocked(layer.ffn))
        return whole.replace(transition=CarryForward(kind="carry_forward")) if spec.transition else whole
    return spec


def draw_ffn(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "gated": draw(st.booleans()), "hidden_act": draw(st.sampled_from(["silu", "gelu", "relu"])),
        "bias": draw(st.booleans()), "intermediate_size": 8 * draw(st.integers(1, 3)),
    }  # fmt: skip


def has_something(operation: Any, spec: ModelSpec, index: int) -> bool:
    """Whether a layer has what the operation grows."""
    layer = spec.layers[index]
    ffn = layer.ffn
    if operation is rank:
        return isinstance(ffn, LowRankFFN | BlockDenseFFN)
    if operation is structure:
        return isinstance(ffn, LowRankFFN | BlockDenseFFN | BlockShuffleFFN)
    if operation is experts:
        return not isinstance(ffn, MoEFFN)
    if operation is copies:
        return layer.head_to_group is None and layer.num_attention_heads > layer.num_key_value_heads
    return operation is not narrow or bool(narrow_layers(spec))
