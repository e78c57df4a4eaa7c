"""A small model of every architecture family, every rule of growth as a target of it, and which pairs are impossible."""

from collections.abc import Callable
from typing import Any

from scantling.parts import BlockDenseFFN, BlockShuffleFFN, DenseFFN, LowRankFFN, MoEFFN, NoPosition, Rope
from scantling.resolve import spec_from
from scantling.spec import LayerSpec, ModelSpec
from tests.growth.targets import all_layers

OURS: dict[str, Any] = {
    "vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 24, "rms_norm_eps": 1e-5, "max_position_embeddings": 32,
}  # fmt: skip
THEIRS: dict[str, Any] = {**OURS, "hidden_act": "silu", "tie_word_embeddings": False}
DENSE: dict[str, Any] = {"kind": "dense", "intermediate_size": 24}
LAYER_NORM = {"kind": "layer_norm", "eps": 1e-5}

FAMILIES: dict[str, dict[str, Any]] = {
    "paper": {  # arXiv 2308.06103, section 2: no epsilon, no final norm, learned positions
        **OURS, "num_key_value_heads": 4, "rms_norm_eps": 1e-30, "final_norm": "none", "position": "none",
        "learned_positions": True, "intermediate_size": None,
        "ffn": {**DENSE, "gated": False, "hidden_act": "relu", "bias": True},
    },
    "llama": {**THEIRS, "model_type": "llama"},
    "mistral": {**THEIRS, "model_type": "mistral", "sliding_window": 5},
    "qwen2": {**THEIRS, "model_type": "qwen2"},
    "qwen3": {**THEIRS, "model_type": "qwen3"},
    "gpt2": {"model_type": "gpt2", "vocab_size": 29, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": 32},
    "gemma": {**THEIRS, "model_type": "gemma", "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    "gemma2": {
        **THEIRS, "model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True,
        "query_pre_attn_scalar": 8, "sliding_window": 5,
    },
    "gpt_neox": {
        **THEIRS, "model_type": "gpt_neox", "num_attention_heads": 2, "num_key_value_heads": None, "head_dim": None,
        "rotary_pct": 0.25, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
    },
    "olmo2": {**THEIRS, "model_type": "olmo2", "num_attention_heads": 2, "head_dim": None},
    "mixtral": {**THEIRS, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "moe, shared expert": {
        **OURS, "intermediate_size": None,
        "ffn": {
            "kind": "moe", "num_local_experts": 3, "num_experts_per_tok": 2, "router_softmax": "before",
            "norm_topk_prob": False, "expert": {**DENSE, "intermediate_size": 8}, "shared_expert": DENSE,
        },
    },
    "low rank": {**OURS, "intermediate_size": None, "ffn": {**DENSE, "kind": "low_rank", "rank": 8}},
    "block dense": {**OURS, "intermediate_size": None, "ffn": {**DENSE, "kind": "block_dense", "rank": 8, "num_blocks": 4}},
    "block shuffle": {**OURS, "intermediate_size": None, "ffn": {**DENSE, "kind": "block_shuffle", "num_blocks": 2}},
    "bowtie": {  # carry-forward widths, arXiv 2606.18246
        **OURS, "num_hidden_layers": 5, "hidden_size": [16, 12, 8, 12, 16], "embedding_size": 16, "unembedding_size": 16,
        "transition": "carry_forward",
    },
    "parallel branches": {
        **OURS, "num_hidden_layers": 4, "norm": {**LAYER_NORM, "bias": False}, "rms_norm_eps": None,
        "branches": {"count": 2, "entry": "projection", "mixing": "sigmoid"},
    },
    "compress": {
        **OURS, "num_hidden_layers": 3, "hidden_size": [16, 16, 8], "embedding_size": 16, "unembedding_size": 8,
        "transition": "compress", "norm": LAYER_NORM, "rms_norm_eps": None,
    },
    "post-norm": {**OURS, "norm": LAYER_NORM, "rms_norm_eps": None, "norm_placement": "post_residual"},
}  # fmt: skip


def family(name: str) -> ModelSpec:
    """The spec of one of FAMILIES."""
    return spec_from({key: value for key, value in FAMILIES[name].items() if value is not None})


# --- rules: a larger target, or None where the family has nothing for the rule to grow --------------------------------


def wider_ffn(ffn: Any) -> Any:
    if isinstance(ffn, MoEFFN):
        return ffn.replace(expert=wider_ffn(ffn.expert))
    return ffn.replace(intermediate_size=ffn.intermediate_size + 8)


def mlp(spec: ModelSpec) -> ModelSpec:
    return all_layers(spec, None, ffn=lambda layer: wider_ffn(layer.ffn))


def mlp_of_one_layer(spec: ModelSpec) -> ModelSpec:
    return all_layers(spec, len(spec.stacks[0]) - 1, ffn=lambda layer: wider_ffn(layer.ffn))


def query_heads(spec: ModelSpec) -> ModelSpec:
    """One more in every group."""
    return all_layers(
        spec, None, num_attention_heads=lambda layer: layer.num_attention_heads + layer.num_key_value_heads
    )


def groups(spec: ModelSpec) -> ModelSpec:
    """A key/value head with its query heads."""
    return all_layers(
        spec,
        None,
        num_attention_heads=lambda each: (
            each.num_attention_heads + each.num_attention_heads // each.num_key_value_heads
        ),
        num_key_value_heads=lambda each: each.num_key_value_heads + 1,
    )


def uneven_heads(spec: ModelSpec) -> ModelSpec:
    """One more query head, in the first group of the first layer."""
    return all_layers(
        spec,
        0,
        num_attention_heads=lambda layer: layer.num_attention_heads + 1,
        head_to_group=lambda layer: (*layer.groups, 0),
    )


def shared_less(spec: ModelSpec) -> ModelSpec | None:
    """Each key/value head copied, for the same query heads."""
    if all(layer.num_key_value_heads == layer.num_attention_heads for layer in spec.layers):
        return None
    return all_layers(spec, None, num_key_value_heads=lambda layer: layer.num_attention_heads)


def value(spec: ModelSpec) -> ModelSpec:
    return all_layers(spec, None, v_head_dim=lambda layer: layer.v_head_dim + 3)


def key_partial(spec: ModelSpec) -> ModelSpec:
    """New key coordinates without rotation."""

    def position(layer: LayerSpec) -> Any:
        if isinstance(layer.position, NoPosition):
            return layer.position
        rotated = layer.position.rotated(layer.head_dim)
        return layer.position.replace(partial_rotary_factor=rotated / (layer.head_dim + 4))

    def qk_norm(layer: LayerSpec) -> Any:
        if layer.qk_norm is None or layer.qk_norm.over == "all":
            return layer.qk_norm
        return layer.qk_norm.replace(statistic_size=layer.head_dim)

    return all_layers(spec, None, head_dim=lambda layer: layer.head_dim + 4, position=position, qk_norm=qk_norm)


def rotary_only(spec: ModelSpec, size: Callable[[int], int], position: Callable[[Rope, int], Rope]) -> ModelSpec | None:
    if any(not isinstance(layer.position, Rope) for layer in spec.layers):
        return None
    return all_layers(
        spec,
        None,
        head_dim=lambda layer: size(layer.head_dim),
        position=lambda layer: position(layer.position, layer.head_dim),
    )


def key_frequency_size(spec: ModelSpec) -> ModelSpec | None:
    return rotary_only(
        spec,
        lambda size: size + 4,
        lambda rope, size: rope.replace(
            frequency_size=rope.rotated(size), partial_rotary_factor=(rope.rotated(size) + 4) / (size + 4)
        ),
    )


def key_theta(spec: ModelSpec) -> ModelSpec | None:
    return rotary_only(
        spec,
        lambda size: 2 * size,
        lambda rope, size: rope.replace(rope_theta=rope.rope_theta**2),
    )


def key_doubled(spec: ModelSpec) -> ModelSpec | None:
    return rotary_only(spec, lambda size: 2 * size, lambda rope, size: rope)


def key_unruled(spec: ModelSpec) -> ModelSpec | None:
    """No rule for frequencies."""
    return rotary_only(spec, lambda size: size + 2, lambda rope, size: rope)


def resized(spec: ModelSpec, size: Callable[[int], int], norm: Callable[[Any, int], Any]) -> ModelSpec:
    """Every width of the stream, and what becomes of a norm of a width."""
    projected = spec.branches is not None and spec.branches.entry == "projection"
    return spec.replace(
        embedding_size=spec.embedding_size if projected else size(spec.embedding_size),
        unembedding_size=size(spec.unembedding_size),
        final_norm=norm(spec.final_norm, spec.norm_width),
        layers=tuple(
            layer.replace(hidden_size=size(layer.hidden_size), norm=norm(layer.norm, layer.hidden_size))
            for layer in spec.layers
        ),
    )


def hidden_gain(spec: ModelSpec) -> ModelSpec:
    return resized(
        spec, lambda size: size + 8, lambda norm, size: norm and norm.replace(eps=norm.eps * size / (size + 8))
    )


def hidden_writer(spec: ModelSpec) -> ModelSpec:
    return resized(spec, lambda size: size * 3 // 2, lambda norm, size: norm)


def hidden_statistic(spec: ModelSpec) -> ModelSpec:
    return resized(spec, lambda size: size + 8, lambda norm, size: norm and norm.replace(statistic_size=size))


def one_narrow_layer(spec: ModelSpec) -> ModelSpec | None:
    """A layer alone, into coordinates that wider ones use, its statistic as it was."""
    narrowest = min(range(len(spec.layers)), key=lambda at: spec.layers[at].hidden_size)
    layer = spec.layers[narrowest]
    if layer.hidden_size == max(spec.stream_widths):
        return None
    return all_layers(spec, narrowest, hidden_size=12, norm=layer.norm.replace(statistic_size=layer.hidden_size))


def layers(spec: ModelSpec, places: tuple[int, ...]) -> ModelSpec:
    stacks = []
    for stack in spec.stacks:
        grown = list(stack)
        for place in places:
            grown.insert(place, grown[min(place, len(grown) - 1)])
        stacks.append(grown)
    return spec.replace(layers=tuple(layer for stack in stacks for layer in stack))


def layer_at_the_end(spec: ModelSpec) -> ModelSpec:
    return layers(spec, (len(spec.stacks[0]),))


def layers_front_and_middle(spec: ModelSpec) -> ModelSpec:
    return layers(spec, (0, 2))


def with_ffn(spec: ModelSpec, change: Callable[[Any], Any]) -> ModelSpec | None:
    changed = all_layers(spec, None, ffn=lambda layer: change(layer.ffn))
    return None if changed == spec else changed


def rank(spec: ModelSpec) -> ModelSpec | None:
    return with_ffn(
        spec, lambda ffn: ffn.replace(rank=ffn.rank + 4) if isinstance(ffn, LowRankFFN | BlockDenseFFN) else ffn
    )


def fewer_blocks(spec: ModelSpec) -> ModelSpec | None:
    return with_ffn(
        spec, lambda ffn: ffn.replace(num_blocks=ffn.num_blocks // 2) if hasattr(ffn, "num_blocks") else ffn
    )


def materialised(spec: ModelSpec) -> ModelSpec | None:
    def dense(ffn: Any) -> Any:
        structured = isinstance(ffn, LowRankFFN | BlockDenseFFN | BlockShuffleFFN)
        keys = ("gated", "hidden_act", "intermediate_size", "bias")
        return DenseFFN(kind="dense", **{key: getattr(ffn, key) for key in keys}) if structured else ffn

    return with_ffn(spec, dense)


def structured(spec: ModelSpec) -> ModelSpec | None:
    """Dense to low rank: impossible, but as the start of self-guided training."""

    def low_rank(ffn: Any) -> Any:
        if not isinstance(ffn, DenseFFN):
            return ffn
        return LowRankFFN(**{**ffn.model_dump(), "kind": "low_rank", "rank": 4})

    return with_ffn(spec, low_rank)


def routed(spec: ModelSpec, make: Callable[[Any], Any]) -> ModelSpec | None:
    return with_ffn(spec, lambda ffn: ffn if isinstance(ffn, MoEFFN) else make(ffn))


def experts_copied(spec: ModelSpec) -> ModelSpec | None:
    return routed(spec, lambda ffn: MoEFFN(kind="moe", expert=ffn, num_local_experts=4, num_experts_per_tok=2))


def experts_beside_it(spec: ModelSpec) -> ModelSpec | None:
    return routed(
        spec,
        lambda ffn: MoEFFN(
            kind="moe", expert=ffn, shared_expert=ffn, num_local_experts=3, num_experts_per_tok=2, router_softmax="before",
            norm_topk_prob=False,
        ),
    )  # fmt: skip


def experts_of_shards(spec: ModelSpec) -> ModelSpec | None:
    def shards(ffn: Any) -> Any:
        half = ffn.replace(intermediate_size=ffn.intermediate_size // 2)
        return MoEFFN(kind="moe", expert=half, num_local_experts=4, num_experts_per_tok=2)

    return routed(spec, shards)


def experts_unnormalised(spec: ModelSpec) -> ModelSpec | None:
    return routed(
        spec,
        lambda ffn: MoEFFN(
            kind="moe", expert=ffn, num_local_experts=4, num_experts_per_tok=2, router_softmax="before",
            norm_topk_prob=False,
        ),
    )  # fmt: skip


def another_expert(spec: ModelSpec) -> ModelSpec | None:
    return with_ffn(
        spec,
        lambda ffn: ffn.replace(num_local_experts=ffn.num_local_experts + 1) if isinstance(ffn, MoEFFN) else ffn,
    )


def vocabulary(spec: ModelSpec) -> ModelSpec:
    return spec.replace(vocab_size=spec.vocab_size + 5)


def positions(spec: ModelSpec) -> ModelSpec:
    return spec.replace(max_position_embeddings=spec.max_position_embeddings + 8)


def untied(spec: ModelSpec) -> ModelSpec | None:
    return spec.replace(tie_word_embeddings=False) if spec.tie_word_embeddings else None


def biases(spec: ModelSpec) -> ModelSpec | None:
    if all(layer.attention_bias for layer in spec.layers):
        return None
    return all_layers(spec.replace(lm_head_bias=True), None, attention_bias=True, attention_out_bias=True)


def constants(spec: ModelSpec) -> ModelSpec:
    return spec.replace(embedding_multiplier=2 * spec.embedding_multiplier, logits_scaling=3.0)


def everything(spec: ModelSpec) -> ModelSpec:
    grown = layer_at_the_end(value(mlp(hidden_gain(spec))))
    joint = any(layer.qk_norm is not None and layer.qk_norm.over == "all" for layer in spec.layers)
    return vocabulary(grown if joint else query_heads(grown))


Rule = Callable[[ModelSpec], ModelSpec | None]
RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        mlp, mlp_of_one_layer, query_heads, groups, uneven_heads, shared_less, value, key_partial, key_frequency_size,
        key_theta, key_doubled, key_unruled, hidden_gain, hidden_writer, hidden_statistic, one_narrow_layer, layer_at_the_end,
        layers_front_and_middle, rank, fewer_blocks, materialised, structured, experts_copied, experts_beside_it,
        experts_of_shards, experts_unnormalised, another_expert, vocabulary, positions, untied, biases, constants, everything,
    )
}  # fmt: skip
