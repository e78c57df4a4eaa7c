"""Specs: short forms into explicit layers, contract files, faults with their lines, identity."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings

from scantling.errors import InputError
from scantling.resolve import load_spec, spec_from, to_mapping, to_yaml
from scantling.spec import LayerSpec, ModelSpec
from scantling.yamlio import loads
from tests.strategies import specs

TINY = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def test_contract_uniform(contract: Path) -> None:
    spec = load_spec(contract / "spec-uniform.yaml")
    assert spec.num_hidden_layers == 4
    assert {(layer.num_key_value_heads, layer.head_dim, layer.v_head_dim) for layer in spec.layers} == {(2, 32, 32)}


def test_contract_per_layer(contract: Path) -> None:
    layers = load_spec(contract / "spec-per-layer.yaml").layers
    assert (layers[0].num_attention_heads, layers[0].num_key_value_heads) == (8, 4)
    two = layers[2]
    assert (two.num_attention_heads, two.num_key_value_heads, two.head_dim, two.v_head_dim) == (2, 1, 16, 24)


def test_contract_bowtie(contract: Path) -> None:
    spec = load_spec(contract / "spec-bowtie-200m.yaml")
    assert spec.widths == (1152, 960, 832, 704, 608, 512, 448, 352, 320, 256, 224, 192, 288, 480, 736, 1152)
    assert (spec.embedding_size, spec.unembedding_size) == (640, 640)


def test_contract_five_faults_all_at_once(contract: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_spec(contract / "spec-five-faults.yaml")
    places = {(line.split(":")[1], line.split(":")[2].strip()) for line in caught.value.faults}
    assert places == {
        ("2", "hidden_size"),
        ("5", "num_key_value_heads[1]"),
        ("6", "intermediate_size"),
        ("7", "tie_word_embedings"),
        ("8", "position"),
    }
    assert "did you mean 'tie_word_embeddings'?" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": 3}, "hidden_size 8 is not a multiple of 3 heads; give head_dim"),
        ({"num_key_value_heads": 3}, "2 query heads cannot share 3 key/value heads"),
        ({"head_dim": 3}, "rotary positions need an even head_dim, got 3"),
        ({"hidden_size": [8, 16]}, "width changes from 8 to 16 at layers.1.; say how, for example transition"),
        ({"hidden_size": True}, "expected a whole number, got true"),
        ({"hidden_size": 8.5}, "expected a whole number, got 8.5"),
        ({"vocab_size": 0}, "greater than 0"),
        ({"num_hidden_layers": 0}, "above 0"),
        ({"num_hidden_layers": 10**9}, "at most 4096"),
        ({"per_layer_config": {5: {"head_dim": 2}}}, "expected a layer index from 0 to 1, got 5"),
        ({"per_layer_config": {0: {"head_dmi": 2}}}, "did you mean 'head_dim'"),
        ({"ffn": {"kind": "lowrank", "rank": 2}}, "unknown kind, expected one of 'dense', 'low_rank'"),
        ({"ffn": {"kind": "low_rank", "expansion": 4}}, "ffn.rank: required key is missing"),
        ({"ffn": {"kind": "dense", "expansion": 4, "intermediate_size": 3}}, "give expansion or intermediate_size, not both"),
        ({"ffn": {"kind": "block_shuffle", "num_blocks": 3, "expansion": 4}}, "num_blocks 3 must divide hidden_size 8"),
        ({"ffn": {"kind": "moe", "num_local_experts": 2, "num_experts_per_tok": 3, "expert": {"kind": "dense", "expansion": 1}}},
         "at most num_local_experts = 2"),
        ({"width": {"profile": "geometric"}}, "needs bottleneck_ratio, or expansion_factor"),
        ({"width": {"bottleneck_ratio": 1.2}}, "less than or equal to 1"),
        ({"width": {"bottleneck_ratio": 0.5, "delta": 0.1}}, "not the other family's keys"),
        ({"width": {"bottleneck_ratio": 0.5, "turn_layer": 9}}, "turn_layer 9 does not fit into 2 layers"),
        ({"rms_norm_eps": -1}, "greater than 0"),
        ({"transition": "carry"}, "expected one of 'carry_forward', 'zero'"),
    ],
)  # fmt: skip
def test_impossible_sizes_are_refused_in_words(change: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        spec_from({**TINY, **change})


def test_missing_keys_are_named() -> None:
    for key in TINY:
        with pytest.raises(InputError, match=key):
            spec_from({name: value for name, value in TINY.items() if name != key})


def test_llama_config_json_is_a_spec() -> None:
    spec = load_spec(Path(__file__).parent / "data/hf/llama-3-8b.json")
    layer = spec.layers[31]
    assert (spec.num_hidden_layers, layer.head_dim, layer.num_key_value_heads, layer.ffn.kind) == (32, 128, 8, "dense")
    assert layer.position.rope_theta == 500000.0 and layer.norm.eps == spec.final_norm.eps == 1e-5


def test_a_config_json_of_another_function_is_refused(tmp_path: Path) -> None:
    config = json.loads((Path(__file__).parent / "data/hf/llama-3-8b.json").read_text())
    for change in ({"model_type": "mamba"}, {"rope_scaling": {"rope_type": "dynamic", "factor": 4}}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(InputError, match="expected one of|not supported"):
            load_spec(tmp_path / "config.json")


@settings(max_examples=60)
@given(specs())
def test_yaml_round_trip_keeps_the_identity(spec: ModelSpec) -> None:
    again = spec_from(loads(to_yaml(spec)).value)
    assert again == spec and again.hash == spec.hash and to_mapping(again) == to_mapping(spec)
    assert ModelSpec.model_validate(spec.dump()) == spec


def test_the_hash_is_of_the_function_not_of_the_spelling() -> None:
    plain = spec_from(TINY)
    spelled = spec_from(
        {**TINY, "hidden_size": [8, 8], "head_dim": 4, "rope_theta": 10000.0, "ffn": {"kind": "dense", "expansion": 2}}
    )
    assert plain.hash == spelled.hash
    assert spec_from({**TINY, "rope_theta": 500.0}).hash != plain.hash


def test_replace_validates() -> None:
    layer = spec_from(TINY).layers[0]
    assert isinstance(layer.replace(num_attention_heads=4), LayerSpec)
    with pytest.raises(ValueError, match="cannot share"):
        layer.replace(num_attention_heads=3)


def test_the_mup_scale_follows_the_head() -> None:
    spec = spec_from(
        {**TINY, "hidden_size": [8, 16], "transition": "carry_forward", "attention_multiplier": "1/head_dim"}
    )
    assert [layer.scale for layer in spec.layers] == [1 / 4, 1 / 8]
