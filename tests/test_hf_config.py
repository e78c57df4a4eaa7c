"""Stock Hugging Face `config.json` files: the true architecture, the exact parameter count, refusals in words."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from scantling.costing import cost
from scantling.errors import InputError
from scantling.hf_config import DEFAULTS, MODEL_TYPES
from scantling.parts import LinearScaling, Llama3Scaling, Rope, YarnScaling
from scantling.resolve import load_spec, spec_from
from scantling.spec import LayerSpec, ModelSpec

FOLDER = Path(__file__).parent / "data/hf"

# Parameters: the public model's count, and equal to `sum(p.numel() for p in model.parameters())` of
# `AutoModelForCausalLM.from_config(config)` on the meta device with transformers 5.23.0 and torch 2.13.0.
# Key/value bytes: 2 (K and V) x layers x kv heads x head_dim x 2 bytes.
MODELS = {
    "llama-3-8b": (8_030_261_248, 131_072),
    "llama-3.1-8b": (8_030_261_248, 131_072),
    "mistral-7b-v0.1": (7_241_732_096, 131_072),
    "qwen2.5-7b": (7_615_616_512, 57_344),
    "qwen3-8b": (8_190_735_360, 147_456),
    "gemma-2-9b": (9_241_705_984, 344_064),
    "gpt2": (124_439_808, 36_864),
    "pythia-1.4b": (1_414_647_808, 196_608),
    "gpt-neox-20b": (20_554_567_680, 1_081_344),
    "mixtral-8x7b-v0.1": (46_702_792_704, 131_072),
    "olmo-2-7b": (7_298_617_344, 524_288),
}


def stock(name: str, **changes: Any) -> ModelSpec:
    """A stock configuration, some keys changed, fewer layers where that is enough."""
    return spec_from({**json.loads((FOLDER / f"{name}.json").read_text()), **changes})


def rope(layer: LayerSpec) -> Rope:
    assert isinstance(layer.position, Rope)
    return layer.position


def test_every_file_is_in_the_table_and_every_type_has_a_file() -> None:
    files = {path.stem: json.loads(path.read_text())["model_type"] for path in FOLDER.iterdir()}
    assert set(files) == set(MODELS)
    assert set(files.values()) == set(MODEL_TYPES)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_cache(name: str) -> None:
    params, kv_bytes = MODELS[name]
    price = cost(load_spec(FOLDER / f"{name}.json"), context=4096)
    assert price.params["total"] == params
    assert price.kv_cache_bytes_per_token == kv_bytes
    assert price.params["active"] == (12_879_925_248 if name.startswith("mixtral") else params)


def test_llama() -> None:
    spec = stock("llama-3.1-8b")
    layer = spec.layers[0]
    assert rope(layer).rope_theta == 500000
    assert rope(layer).scaling == Llama3Scaling(kind="llama3", factor=8, original_max_position_embeddings=8192)
    assert layer.norm.eps == 1e-5 and not layer.attention_bias and not layer.ffn.bias and not spec.tie_word_embeddings
    biased = stock("llama-3-8b", attention_bias=True, mlp_bias=True).layers[0]
    assert biased.attention_bias and biased.out_bias and biased.ffn.bias


def test_mistral() -> None:
    layer = stock("mistral-7b-v0.1").layers[5]
    assert (layer.sliding_window, layer.num_key_value_heads, layer.head_dim) == (4096, 8, 128)
    assert stock("mistral-7b-v0.1", sliding_window=None).layers[0].sliding_window is None
    assert stock("mistral-7b-v0.1", head_dim=96).layers[0].head_dim == 96
    assert cost(stock("mistral-7b-v0.1"), context=32768).kv_cache_bytes == 131_072 * 4096


def test_qwen2() -> None:
    layer = stock("qwen2.5-7b").layers[0]
    assert (layer.attention_bias, layer.out_bias, layer.ffn.bias, layer.sliding_window) == (True, False, False, None)
    sliding = stock("qwen2.5-7b", num_hidden_layers=4, use_sliding_window=True, sliding_window=64, max_window_layers=3)
    assert [layer.sliding_window for layer in sliding.layers] == [None, None, None, 64]
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    listed = stock("qwen2.5-7b", num_hidden_layers=4, use_sliding_window=True, sliding_window=64, layer_types=types)
    assert [layer.sliding_window for layer in listed.layers] == [64, None, None, 64]


def test_qwen3() -> None:
    layer = stock("qwen3-8b").layers[0]
    assert layer.qk_norm is not None and (layer.qk_norm.over, layer.qk_norm.eps) == ("head", 1e-6)
    config = json.loads((FOLDER / "qwen3-8b.json").read_text())
    del config["head_dim"]
    assert spec_from({**config, "hidden_size": 1024}).layers[0].head_dim == 128


def test_gemma2() -> None:
    spec = stock("gemma-2-9b")
    first, second = spec.layers[:2]
    assert (first.sliding_window, second.sliding_window) == (4096, None)
    assert (first.norm_placement, first.ffn.hidden_act, first.head_dim) == ("sandwich", "gelu_pytorch_tanh", 256)
    assert (first.attn_logit_softcapping, spec.final_logit_softcapping) == (50, 30)
    assert first.scale == 1 / 16 and spec.embedding_multiplier == math.sqrt(3584) and spec.tie_word_embeddings
    other = stock("gemma-2-9b", query_pre_attn_scalar=144, final_logit_softcapping=None)
    assert other.layers[0].scale == 1 / 12 and other.final_logit_softcapping is None


def test_gpt2() -> None:
    spec = stock("gpt2")
    layer = spec.layers[0]
    assert spec.learned_positions and spec.tie_word_embeddings and layer.position.kind == "none"
    assert (layer.norm.kind, layer.norm.eps, layer.out_bias) == ("layer_norm", 1e-5, True)
    assert layer.ffn.model_dump() == {
        "kind": "dense",
        "gated": False,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 3072,
        "bias": True,
    }
    assert spec.initialization.model_dump() == {"kind": "normal", "std": 0.02, "depth_scaled": True}
    assert stock("gpt2", n_inner=1000).layers[0].ffn.intermediate_size == 1000
    assert stock("gpt2", scale_attn_weights=False).layers[0].scale == 1
    divided = stock("gpt2", scale_attn_by_inverse_layer_idx=True).layers
    assert (divided[0].scale, divided[3].scale) == (1 / 8, 1 / 32)


def test_gpt_neox() -> None:
    layer = stock("pythia-1.4b").layers[0]
    assert layer.use_parallel_residual and rope(layer).rotated(layer.head_dim) == 32
    assert (layer.norm.kind, layer.ffn.hidden_act, layer.ffn.bias, layer.out_bias) == ("layer_norm", "gelu", True, True)
    assert stock("gpt-neox-20b").layers[0].ffn.hidden_act == "gelu_pytorch_tanh"  # gelu_fast
    other = stock("pythia-1.4b", rotary_emb_base=500, use_parallel_residual=False, attention_bias=False).layers[0]
    assert (rope(other).rope_theta, other.use_parallel_residual, other.out_bias) == (500, False, False)


def test_mixtral() -> None:
    layer = stock("mixtral-8x7b-v0.1").layers[0]
    assert layer.ffn.model_dump(exclude={"expert", "shared_expert", "router_z_loss_coef"}) == {
        "kind": "moe",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_softmax": "after",
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.02,
    }
    assert layer.ffn.expert.intermediate_size == 14336 and layer.ffn.shared_expert is None
    assert (rope(layer).rope_theta, layer.sliding_window) == (1e6, None)


def test_olmo2() -> None:
    layer = stock("olmo-2-7b").layers[0]
    assert layer.qk_norm is not None and (layer.qk_norm.over, layer.norm_placement) == ("all", "post_branch")


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_a_class_without_settings_has_its_defaults(kind: str) -> None:
    spec = spec_from({"model_type": kind})
    names = {"vocab_size": spec.vocab_size, "num_hidden_layers": spec.num_hidden_layers, "hidden_size": spec.widths[0]}
    assert names == {name: DEFAULTS[kind][name] for name in names}


# --- rotary positions in every spelling --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope_theta": 5e5}, Rope(kind="rope", rope_theta=5e5)),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}}, Rope(kind="rope", rope_theta=5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, Rope(kind="rope", rope_theta=5e5)),
        (
            {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
            Rope(kind="rope", rope_theta=7, scaling=LinearScaling(kind="linear", factor=4)),
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 7.0, "factor": 4.0, "original_max_position_embeddings": 32}},
            Rope(kind="rope", rope_theta=7, scaling=YarnScaling(kind="yarn", factor=4, original_max_position_embeddings=32)),
        ),
        (
            {"max_position_embeddings": 64, "rope_scaling": {"type": "yarn", "factor": 2, "mscale": 1, "mscale_all_dim": 1}},
            Rope(
                kind="rope",
                scaling=YarnScaling(kind="yarn", factor=2, original_max_position_embeddings=64, attention_factor=1),
            ),
        ),
    ],
)  # fmt: skip
def test_rope_in_every_spelling(keys: dict[str, Any], expected: Rope) -> None:
    assert spec_from({"model_type": "llama", "num_hidden_layers": 1, **keys}).layers[0].position == expected


# --- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "mamba"}, "model_type: expected one of llama, mistral, .*olmo2, got 'mamba'; describe other"),
        ({"architectures": ["LlamaForCausalLM"]}, "model_type: expected one of"),
        ({"model_type": ["llama"]}, "model_type: expected one of"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "expected a language model"),
        ({"model_type": "llama", "hidden_act": "mish"}, "hidden_act: expected one of silu, .*got 'mish'"),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: .*got 'dynamic'"),
        (
            {"model_type": "llama", "rope_scaling": {"type": "linear"}},
            "position.scaling.factor: required key is missing",
        ),
        ({"model_type": "llama", "rope_scaling": "linear"}, "rope_scaling: expected one mapping for all layers"),
        ({"model_type": "llama", "rope_parameters": {"full_attention": {}}}, "expected one mapping for all layers"),
        ({"model_type": "llama", "rope_parameters": {"partial_rotary_factor": 0.5}}, "llama rotates whole heads"),
        (
            {"model_type": "qwen3", "rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}},
            "truncate: expected true",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention"]},
            r"layer_types: expected one kind per layer \(32\)",
        ),
        (
            {"model_type": "gemma2", "num_hidden_layers": 1, "layer_types": ["chunked"]},
            r"layer_types\[0\]: expected full_",
        ),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "attention here is causal"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 0}, "query_pre_attn_scalar: expected a number above 0"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "no encoder to attend to"),
        ({"model_type": "gpt2", "activation_function": "mish"}, "activation_function: expected one of"),
        ({"model_type": "gemma2", "hidden_size": "wide"}, "hidden_size: expected a whole number, got 'wide'"),
        ({"model_type": "gpt2", "n_layer": 10**9, "scale_attn_by_inverse_layer_idx": True}, "at most 4096 layers"),
    ],
)
def test_what_has_no_equal_here_is_refused_in_words(config: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        spec_from(config)


def test_all_refusals_at_once_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "gpt2",\n "activation_function": "mish",\n "add_cross_attention": true}')
    with pytest.raises(InputError) as caught:
        load_spec(path)
    assert [fault.split(": ")[0] for fault in caught.value.faults] == [f"{path}:2", f"{path}:3"]


def test_a_wrong_size_points_at_the_line_of_the_class_key(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "gpt2",\n "n_layer": 2,\n "n_embd": -768}')
    with pytest.raises(InputError) as caught:
        load_spec(path)
    assert all(fault.startswith(f"{path}:3: ") for fault in caught.value.faults)


@pytest.mark.parametrize("kind", MODEL_TYPES)
@pytest.mark.parametrize("value", [None, "x", -1, 0, 1.5, [], {}, True, [1, 2]])
def test_hostile_values_end_in_a_spec_or_in_words(kind: str, value: object) -> None:
    keys = {
        "num_key_value_heads",
        "head_dim",
        "layer_types",
        "rope_scaling",
        "rope_parameters",
        "n_inner",
        *DEFAULTS[kind],
    }
    for key in sorted(keys):
        try:
            spec_from({"model_type": kind, "num_hidden_layers": 2, key: value})
        except InputError:
            continue


def test_our_own_keys_beside_the_class_keys_change_the_model() -> None:
    path = FOLDER / "llama-3-8b.json"
    spec = load_spec(
        path, ["ffn.kind=low_rank", "ffn.rank=64", "num_hidden_layers=2", "per_layer_config.1.num_key_value_heads=1"]
    )
    assert {layer.ffn.kind for layer in spec.layers} == {"low_rank"}
    assert [layer.num_key_value_heads for layer in spec.layers] == [8, 1]
    assert spec.layers[0].ffn.intermediate_size == 14336
    wide = load_spec(
        FOLDER / "gpt2.json",
        ["num_hidden_layers=2", "hidden_size=[768,384]", "transition=compress", "unembedding_size=768"],
    )
    assert [layer.ffn.intermediate_size for layer in wide.layers] == [3072, 1536]
    unbiased = load_spec(
        FOLDER / "qwen2.5-7b.json", ["num_hidden_layers=1", "attention_bias=false", "sliding_window=64"]
    )
    assert (unbiased.layers[0].attention_bias, unbiased.layers[0].sliding_window) == (False, None)
    with pytest.raises(InputError, match="--set num_layers: num_layers: unknown key; did you mean 'num_hidden_layers'"):
        load_spec(path, ["num_layers=2"])
