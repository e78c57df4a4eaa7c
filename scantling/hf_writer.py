"""A spec as a stock Hugging Face `config.json`, where one of its classes is the same function.

A candidate is written for a class from the first layer alone and read back by the reader (`hf_config.py`). It stands for the
spec if the two specs are equal; if not, their differences are what the class cannot say.
"""

from typing import Any

from scantling.errors import InputError
from scantling.hf_classes import BIASED, GPT2_NAMES, MODEL_TYPES
from scantling.parts import DenseFFN, LayerNorm, MoEFFN, NormalInit, NTKScaling, Rope
from scantling.resolve import spec_from
from scantling.spec import LayerSpec, ModelSpec
from scantling.yamlio import KeyPath, dotted, show

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
}
WHOLE_HEADS = ("llama", "gemma2", "gpt_neox")  # whose classes insist on a hidden_size in multiples of the heads
OURS_TO_GPT2 = {ours: theirs for theirs, ours in GPT2_NAMES.items()}
FAULTS_SHOWN = 4


def to_hf_config(spec: ModelSpec, model_type: str | None = None) -> dict[str, Any]:
    """The `config.json` of a class that computes the same function.

    Args:
        model_type: the class; None is the first that can say it.

    Raises:
        InputError: no class, or not this one, can; says which keys of which layers differ from the nearest.
    """
    if model_type is not None and model_type not in MODEL_TYPES:
        raise InputError(f"model_type: expected one of {', '.join(MODEL_TYPES)}, got {show(model_type)}")
    wanted = same_function(spec)
    found: dict[str, list[str]] = {}
    unreadable: set[str] = set()
    for kind in MODEL_TYPES if model_type is None else (model_type,):
        config = _candidate(spec, kind)
        try:
            found[kind] = _differences(same_function(spec_from(config, kind)), wanted, kind)
        except InputError as error:
            unreadable.add(kind)
            found[kind] = list(error.faults)
        heads = spec.layers[0].num_attention_heads
        if kind in WHOLE_HEADS and spec.widths[0] % heads:
            found[kind].append(f"hidden_size {spec.widths[0]} is not a multiple of {heads} heads")
        if not found[kind]:
            return config
    nearest = min(found, key=lambda kind: (kind in unreadable, len(found[kind])))
    faults = found[nearest]
    more = f"; and {len(faults) - FAULTS_SHOWN} more" if len(faults) > FAULTS_SHOWN else ""
    which = (
        f"{nearest} cannot express this model"
        if model_type
        else "no supported Hugging Face class can express this model"
    )
    raise InputError(f"{which}: {'; '.join(faults[:FAULTS_SHOWN])}{more}")


def same_function(spec: ModelSpec) -> ModelSpec:
    """The spec with what does not change its function in one form: initialization, auxiliary losses, defaults spelled out."""
    changes: dict[str, Any] = {"initialization": {"kind": "fan_in"}, "layers": tuple(map(_same_layer, spec.layers))}
    if len({*spec.stream_widths}) == 1:
        changes["transition"] = None
    if spec.final_norm is not None and spec.final_norm.statistic_size == spec.norm_width:
        changes["final_norm"] = spec.final_norm.replace(statistic_size=None)
    return spec.replace(**changes)


def _same_layer(layer: LayerSpec) -> LayerSpec:
    changes: dict[str, Any] = {}
    for key, implied in (
        ("attention_multiplier", float(layer.head_dim) ** -0.5),
        ("attention_out_bias", layer.attention_bias),
        ("attention_input_size", layer.hidden_size),
        ("ffn_output_size", layer.hidden_size),
    ):
        if getattr(layer, key) == implied:
            changes[key] = None
    heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
    if heads % kv_heads == 0 and layer.groups == layer.replace(head_to_group=None).groups:
        changes["head_to_group"] = None
    if layer.norm.statistic_size == layer.hidden_size:
        changes["norm"] = layer.norm.replace(statistic_size=None)
    if layer.qk_norm is not None and layer.qk_norm.statistic_size == layer.head_dim:
        changes["qk_norm"] = layer.qk_norm.replace(statistic_size=None)
    if isinstance(layer.position, Rope):
        changes["position"] = _same_rope(layer.position, layer.head_dim)
    if isinstance(layer.ffn, MoEFFN):
        normed = layer.ffn.router_softmax == "before" and layer.ffn.norm_topk_prob
        after = {"router_softmax": "after", "norm_topk_prob": True} if normed else {}
        changes["ffn"] = layer.ffn.replace(router_aux_loss_coef=0.0, router_z_loss_coef=0.0, **after)
    return layer.replace(**changes)


def _same_rope(rope: Rope, head_dim: int) -> Rope:
    """Fixed NTK scaling is another rope_theta."""
    size = rope.frequency_size or rope.rotated(head_dim)
    changes: dict[str, Any] = {"frequency_size": None} if size == rope.rotated(head_dim) else {}
    if isinstance(rope.scaling, NTKScaling):
        changes |= {"rope_theta": rope.rope_theta * rope.scaling.factor ** (size / (size - 2)), "scaling": None}
    return rope.replace(**changes)


# --- a candidate for one class -----------------------------------------------------------------------------------------


def _candidate(spec: ModelSpec, kind: str) -> dict[str, Any]:
    """The config of this class nearest to the spec: every key it has, from the first layer."""
    layer = spec.layers[0]
    dense = layer.ffn.expert if isinstance(layer.ffn, MoEFFN) else layer.ffn
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": spec.vocab_size,
        "hidden_size": layer.hidden_size,
        "intermediate_size": dense.intermediate_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_attention_heads": layer.num_attention_heads,
        "max_position_embeddings": spec.max_position_embeddings,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "initializer_range": spec.initialization.std if isinstance(spec.initialization, NormalInit) else 0.02,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    config["hidden_activation" if kind == "gemma2" else "hidden_act"] = dense.hidden_act
    config["layer_norm_eps" if isinstance(layer.norm, LayerNorm) else "rms_norm_eps"] = layer.norm.eps
    if kind == "gpt2":
        return _gpt2(config, spec)
    config |= _rope(layer.position if isinstance(layer.position, Rope) else Rope(kind="rope"), layer.head_dim, kind)
    if kind == "gpt_neox":
        return config | {
            "use_parallel_residual": layer.use_parallel_residual,
            "attention_bias": layer.attention_bias,
        }
    config |= {"num_key_value_heads": layer.num_key_value_heads, "head_dim": layer.head_dim}
    if kind in BIASED:
        config["attention_bias"] = layer.attention_bias
    windows = [each.sliding_window for each in spec.layers]
    match kind:
        case "llama":
            config["mlp_bias"] = isinstance(dense, DenseFFN) and dense.bias
        case "mistral" | "mixtral":
            config["sliding_window"] = windows[0]
        case "qwen2" | "qwen3":
            config |= {"use_sliding_window": any(windows), **_windows(windows)}
        case "gemma2":
            config |= {**_windows(windows), "query_pre_attn_scalar": round(layer.scale**-2)}
            config |= {"attn_logit_softcapping": layer.attn_logit_softcapping}
            config |= {"final_logit_softcapping": spec.final_logit_softcapping}
    if kind == "mixtral" and isinstance(layer.ffn, MoEFFN):
        for key in ("num_local_experts", "num_experts_per_tok", "router_aux_loss_coef"):
            config[key] = getattr(layer.ffn, key)
    return config


def _gpt2(config: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
    scales = [layer.attention_multiplier for layer in spec.layers]
    layer = spec.layers[0]
    config["scale_attn_weights"] = layer.scale == float(layer.head_dim) ** -0.5
    config["scale_attn_by_inverse_layer_idx"] = len(scales) > 1 and scales[0] != scales[1]
    return {OURS_TO_GPT2.get(key, key): value for key, value in config.items()}


def _windows(windows: list[int | None]) -> dict[str, Any]:
    """`layer_types`, and for readers that do not know it the first sliding layer."""
    types = ["full_attention" if window is None else "sliding_attention" for window in windows]
    size = next((window for window in windows if window is not None), None)
    first = types.index("sliding_attention") if size is not None else len(types)
    return {"sliding_window": size, "layer_types": types, "max_window_layers": first}


def _rope(rope: Rope, head_dim: int, kind: str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, the spelling that every version of transformers reads."""
    plain = _same_rope(rope, head_dim)
    config: dict[str, Any] = {"rotary_emb_base" if kind == "gpt_neox" else "rope_theta": plain.rope_theta}
    if kind == "gpt_neox":
        config["rotary_pct"] = plain.partial_rotary_factor
    if plain.scaling is not None:
        given = plain.scaling.model_dump(exclude_none=True)
        config["rope_scaling"] = {"rope_type": given.pop("kind"), **given}
    return config


# --- what a class cannot say -------------------------------------------------------------------------------------------


def _differences(its: ModelSpec, mine: ModelSpec, kind: str) -> list[str]:
    """A sentence per key that differs, layers with the same difference together."""
    theirs, ours = its.model_dump(mode="json"), mine.model_dump(mode="json")
    layers = enumerate(zip(theirs.pop("layers"), ours.pop("layers"), strict=True))
    found: dict[str, list[int]] = {sentence: [] for sentence in _compared(theirs, ours, (), kind)}
    for at, pair in layers:
        for sentence in _compared(*pair, (), kind):
            found.setdefault(sentence, []).append(at)
    count = {1: "layer {0[0]}", 2: "layers {0[0]} and {0[1]}"}
    return [
        f"{count.get(len(where), '{1} layers from layer {0[0]} on').format(where, len(where))}: {sentence}"
        if where
        else sentence
        for sentence, where in found.items()
    ]


def _compared(theirs: Any, ours: Any, path: KeyPath, kind: str) -> list[str]:
    if isinstance(theirs, dict) and isinstance(ours, dict) and theirs.get("kind") == ours.get("kind"):
        keys = [*ours, *(key for key in theirs if key not in ours)]
        return [each for key in keys for each in _compared(theirs.get(key), ours.get(key), (*path, key), kind)]
    if theirs == ours:
        return []
    mine, its = ("none" if value is None else show(value) for value in (ours, theirs))
    return [f"{dotted(path)} is {mine} here, {its} in {kind}"]
