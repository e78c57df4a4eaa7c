"""Stock Hugging Face `config.json` files: the true architecture and parameter count, refusals in words, and back again."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scantling.costing import cost
from scantling.errors import InputError
from scantling.hf_classes import BIASED, DEFAULTS, MODEL_TYPES
from scantling.hf_writer import same_function, to_hf_config
from scantling.model.rotary import frequencies
from scantling.parts import LinearScaling, Llama3Scaling, NTKScaling, Rope, YarnScaling
from scantling.resolve import load_spec, spec_from
from scantling.spec import LayerSpec, ModelSpec
from tests.strategies import specs

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
    "gemma-2b": (2_506_172_416, 18_432),
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


def test_gemma() -> None:
    spec = stock("gemma-2b")
    layer = spec.layers[0]
    assert (layer.norm_placement, layer.num_key_value_heads, layer.head_dim, layer.scale) == ("pre", 1, 256, 1 / 16)
    assert layer.ffn.hidden_act == "gelu_pytorch_tanh"  # "gelu" in the first releases means this
    assert spec.embedding_multiplier == math.sqrt(2048) and spec.tie_word_embeddings
    assert spec.final_logit_softcapping is None and layer.sliding_window is None


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
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "attention here is causal"),
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


def test_gpt_neox_has_its_own_name_for_rope_theta() -> None:
    """As its class reads a config: `rope_theta` beside `rotary_emb_base` is nothing."""
    assert rope(stock("pythia-1.4b", rope_theta=7.0).layers[0]).rope_theta == 10000
    given = {"rope_parameters": {"rope_theta": 7.0, "partial_rotary_factor": 0.5}}
    assert rope(stock("pythia-1.4b", **given).layers[0]) == Rope(kind="rope", rope_theta=7, partial_rotary_factor=0.5)


# --- and back: a spec as a config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_stock_model_is_written_as_the_class_it_was(name: str) -> None:
    spec, kind = stock(name), json.loads((FOLDER / f"{name}.json").read_text())["model_type"]
    found = to_hf_config(spec)
    assert found["model_type"] == kind and spec_from(found) == spec
    assert to_hf_config(spec, kind) == found


ROPE_SCALINGS: list[dict[str, Any] | None] = [
    None,
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_slow": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5},
    {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16, "high_freq_factor": 3.0},
]


WINDOWS = ["full_attention", "sliding_attention"]


@st.composite
def uniform_configs(draw: st.DrawFn) -> dict[str, Any]:
    """A config.json of any supported class, most of its keys drawn."""
    kind = draw(st.sampled_from(MODEL_TYPES))
    groups, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, depth, head_dim = groups * group, draw(st.integers(1, 4)), 2 * draw(st.integers(2, 8))
    choice = {
        "hidden_size": st.just(heads * head_dim) if kind in ("gpt2", "gpt_neox") else st.just(heads * 2 * head_dim),
        "intermediate_size": st.integers(1, 99),
        "vocab_size": st.integers(2, 99),
        "max_position_embeddings": st.integers(1, 99),
        "tie_word_embeddings": st.booleans(),
        "initializer_range": st.sampled_from([0.02, 0.1]),
        "hidden_act": st.sampled_from(["silu", "relu", "gelu", "gelu_new"]),
        "rms_norm_eps": st.sampled_from([1e-6, 1e-5, 1e-3]),
        "layer_norm_eps": st.sampled_from([1e-6, 1e-5, 1e-3]),
        "rope_theta": st.sampled_from([10000.0, 5e5]),
        "rope_scaling": st.sampled_from(ROPE_SCALINGS),
        "sliding_window": st.sampled_from([None, 1, 7]),
        "use_sliding_window": st.booleans(),
        "max_window_layers": st.integers(0, 5),
        "layer_types": st.none() | st.lists(st.sampled_from(WINDOWS), min_size=depth, max_size=depth),
        "attention_bias": st.booleans(),
        "mlp_bias": st.booleans(),
        "head_dim": st.just(head_dim),
        "num_key_value_heads": st.just(groups),
        "query_pre_attn_scalar": st.integers(1, 300),
        "attn_logit_softcapping": st.sampled_from([None, 50.0, 7.5]),
        "final_logit_softcapping": st.sampled_from([None, 30.0, 7.5]),
        "scale_attn_weights": st.booleans(),
        "scale_attn_by_inverse_layer_idx": st.booleans(),
        "rotary_pct": st.sampled_from([0.5, 1.0]),
        "rotary_emb_base": st.sampled_from([10000.0, 500.0]),
        "use_parallel_residual": st.booleans(),
        "num_local_experts": st.integers(2, 5),
        "num_experts_per_tok": st.integers(1, 2),
        "router_aux_loss_coef": st.sampled_from([0.0, 0.02]),
    }  # fmt: skip
    known = {*DEFAULTS[kind], "rope_scaling", "head_dim", "scale_attn_by_inverse_layer_idx"}
    known |= {"attention_bias"} if kind in BIASED else set()
    known |= {"mlp_bias"} if kind == "llama" else set()
    known |= {"layer_types"} if kind in ("qwen2", "qwen3", "gemma2") else set()
    known -= {"head_dim", "num_key_value_heads"} if kind in ("gpt2", "gpt_neox") else set()
    sizes = {"model_type": kind, "num_hidden_layers": depth, "num_attention_heads": heads}
    return sizes | {key: draw(values) for key, values in choice.items() if key in known}


@given(config=uniform_configs())
def test_every_uniform_model_is_written_and_read_back_equal(config: dict[str, Any]) -> None:
    spec, kind = spec_from(config), config["model_type"]
    written = to_hf_config(spec, kind)
    assert spec_from(written) == spec
    other = to_hf_config(spec)  # another class may say the same first: a mistral without a window is a llama
    assert same_function(spec_from(other)) == same_function(spec)


@given(spec=specs())
def test_any_model_is_written_truly_or_refused_in_words(spec: ModelSpec) -> None:
    try:
        written = to_hf_config(spec)
    except InputError as error:
        assert str(error).startswith("no supported Hugging Face class can express this model: ")
        assert " here, " in str(error) or "expected" in str(error)
    else:
        assert same_function(spec_from(written)) == same_function(spec)


LAYER: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"hidden_size": [32, 16, 32], "transition": "carry_forward"},
            'transition is {"kind": "carry_forward"} here, none in llama; layer 1: hidden_size is 16 here, 32 in llama',
        ),
        ({"num_key_value_heads": [4, 2, 2]}, "layers 1 and 2: num_key_value_heads is 2 here, 4 in llama"),
        ({"ffn": {"kind": "low_rank", "rank": 4}}, "3 layers from layer 0 on: ffn is "),
        (
            {"norm": {"kind": "rms_norm", "statistic_size": 16}},
            "final_norm.statistic_size is 16 here, none in llama; 3 layers from layer 0 on: norm.statistic_size is 16 here",
        ),
        ({"position": {"kind": "rope", "frequency_size": 16}}, "position.frequency_size is 16 here, none in llama"),
        ({"head_to_group": [0, 0, 0, 1], "num_key_value_heads": 2}, "head_to_group is [0, 0, 0, 1] here"),
        ({"v_head_dim": 4}, "3 layers from layer 0 on: v_head_dim is 4 here, 8 in llama"),
        ({"lm_head_bias": True, "qk_norm": {"over": "head"}}, "lm_head_bias is true here, false in qwen3"),
        ({"final_norm": "none"}, 'final_norm is none here, {"kind": "rms_norm"'),
        ({"sliding_window": [None, 5, 7]}, "sliding_window"),
    ],
)  # fmt: skip
def test_what_no_class_can_say_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        to_hf_config(spec_from({**LAYER, **changes}))


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "llama"),
        ({"sliding_window": 9}, "mistral"),
        ({"hidden_size": 30, "head_dim": 8}, "mistral"),  # the class llama insists on whole heads
        ({"attention_bias": True, "attention_out_bias": False}, "qwen2"),
        ({"attention_bias": True, "mlp_bias": True}, "llama"),
        ({"qk_norm": {"over": "head"}, "sliding_window": [None, 9, None]}, "qwen3"),
        ({"qk_norm": {"over": "all"}, "norm_placement": "post_branch"}, "olmo2"),
        ({"attention_multiplier": 8**-0.5, "transition": "zero", "initialization": {"kind": "mup"}}, "llama"),
        ({"norm": {"kind": "rms_norm", "statistic_size": 32}, "head_to_group": [0, 0, 1, 1], "num_key_value_heads": 2}, "llama"),
        ({"position": {"kind": "rope", "scaling": {"kind": "ntk", "factor": 4.0}}}, "llama"),
        (
            {
                "ffn": {
                    "kind": "moe",
                    "num_local_experts": 4,
                    "num_experts_per_tok": 2,
                    "router_softmax": "before",
                    "expert": {"kind": "dense", "intermediate_size": 8},
                }
            },
            "mixtral",
        ),
    ],
)  # fmt: skip
def test_the_class_is_found(changes: dict[str, Any], kind: str) -> None:
    spec = spec_from({**LAYER, **changes})
    found = to_hf_config(spec)
    assert found["model_type"] == kind
    assert same_function(spec_from(found)) == same_function(spec)


def test_fixed_ntk_scaling_is_another_theta() -> None:
    scaled = Rope(kind="rope", scaling=NTKScaling(kind="ntk", factor=4.0))
    plain = Rope(
        kind="rope", rope_theta=to_hf_config(spec_from({**LAYER, "position": scaled.model_dump()}))["rope_theta"]
    )
    torch.testing.assert_close(frequencies(plain, 8)[0], frequencies(scaled, 8)[0], rtol=1e-13, atol=0)


def test_a_class_that_was_asked_for_says_what_it_cannot_say() -> None:
    with pytest.raises(InputError, match="llama cannot express this model: .*sliding_window is 9 here"):
        to_hf_config(spec_from({**LAYER, "sliding_window": 9}), "llama")
    with pytest.raises(
        InputError, match="llama cannot express this model: hidden_size 30 is not a multiple of 4 heads"
    ):
        to_hf_config(spec_from({**LAYER, "hidden_size": 30, "head_dim": 8}), "llama")
    with pytest.raises(InputError, match="model_type: expected one of llama, .*got 'bert'"):
        to_hf_config(spec_from(LAYER), "bert")
