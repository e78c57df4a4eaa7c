"""Costs: contract numbers, published rows, and integer equality with built modules and torch's counter on meta."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.utils.flop_counter import FlopCounterMode

from scantling.costing import cost, endpoint_waste, flops_per_token, param_counts, train_flops
from scantling.model import build_meta
from scantling.parts import ConvDiff, Gated, TransposedConv
from scantling.resolve import load_spec, spec_from
from scantling.rows import MEASURES, Row, Stack, StackFFN, StackLayer, rows
from scantling.spec import ModelSpec
from tests.strategies import specs

LLAMA = Path(__file__).parent / "data/hf/llama-3-8b.json"


def test_contract_uniform(contract: Path) -> None:
    found = cost(load_spec(contract / "spec-uniform.yaml"), context=1024)
    assert found.params["total"] == 758_912
    assert found.kv_cache_bytes_per_token == 1_024


def test_contract_bowtie(contract: Path) -> None:
    assert cost(load_spec(contract / "spec-bowtie-200m.yaml")).params["total"] == 237_637_504


def test_contract_low_rank(contract: Path) -> None:
    spec = load_spec(contract / "spec-low-rank.yaml")
    ffn = [row.params for row in rows(spec) if row.component == "ffn"]
    assert ffn == [2 * 256 * 1024] + [2 * (256 * 64 + 64 * 1024)] * 5


def test_contract_moe(contract: Path) -> None:
    params = cost(load_spec(contract / "spec-moe.yaml")).params
    assert params["total"] - params["active"] == 2 * 6 * 3 * 64 * 96


def test_contract_llama_3_8b() -> None:
    found = cost(load_spec(LLAMA), context=131072)
    assert found.params["total"] == 8_030_261_248
    assert found.weight_bytes == 16_060_522_496
    assert found.kv_cache_bytes_per_token == 131_072
    assert found.kv_cache_bytes == 17_179_869_184
    assert found.flops_per_token["decode"] == 83_728_793_600


# cost-optimal GQA, fact sheet 2.5 and 5: config, context, total, N, KV bytes per token, decode FLOPs without and with head
WORKED: list[tuple[dict[str, Any], int, int, int, int, int, int]] = [
    ({"L": 32, "d": 4096, "h": 32, "kv": 8, "hd": 128, "ff": 14336, "V": 128256}, 8192,
     8_030_261_248, 6_979_321_856, 131_072, 18_253_611_008, 19_304_284_160),
    ({"L": 80, "d": 8192, "h": 64, "kv": 8, "hd": 128, "ff": 28672, "V": 128256}, 131072,
     70_553_706_496, 68_451_041_280, 327_680, 480_499_466_240, 482_600_812_544),
    ({"L": 16, "d": 2048, "h": 32, "kv": 8, "hd": 64, "ff": 8192, "V": 128256, "tied": True}, 8192,
     1_235_814_400, 973_078_528, 32_768, -1, -1),
    ({"L": 126, "d": 16384, "h": 128, "kv": 8, "hd": 128, "ff": 53248, "V": 128256}, 8192,
     405_853_388_800, 401_646_551_040, 516_096, -1, -1),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "context", "total", "n", "kv", "decode", "with_head"), WORKED)
def test_published_rows(
    shape: dict[str, Any], context: int, total: int, n: int, kv: int, decode: int, with_head: int
) -> None:
    spec = spec_from(
        {
            "vocab_size": shape["V"], "hidden_size": shape["d"], "num_hidden_layers": shape["L"],
            "num_attention_heads": shape["h"], "num_key_value_heads": shape["kv"], "head_dim": shape["hd"],
            "intermediate_size": shape["ff"], "tie_word_embeddings": shape.get("tied", False),
        }
    )  # fmt: skip
    found = cost(spec, context)
    assert (found.params["total"], found.params["matmul_non_embedding"]) == (total, n)
    assert found.kv_cache_bytes_per_token == kv
    if decode > 0:
        assert found.flops_per_token["decode"] == with_head
        assert with_head - decode == 2 * shape["d"] * shape["V"]


def test_published_forward_flops_of_the_bowtie_releases() -> None:
    """Sheet 5.2: the authors' forward FLOPs per sequence of the uniform baselines (no waste there)."""
    records = json.loads((LLAMA.parent.parent / "variable_width/schedules.json").read_text())["records"]
    for record in records[:4]:
        inputs = record["inputs"]
        spec = spec_from(
            {
                "vocab_size": inputs["vocab_size"], "hidden_size": inputs["hidden_size"],
                "num_hidden_layers": inputs["num_layers"], "num_attention_heads": 16,
                "ffn": {"kind": "dense", "expansion": 4},
            }
        )  # fmt: skip
        length = inputs["max_position_embeddings"]
        assert cost(spec, length).flops_per_token["forward"] * length == record["forward_flops_per_sequence_baseline"]


SCHEDULES = json.loads((LLAMA.parent.parent / "variable_width/schedules.json").read_text())
BOWTIES = {record["id"]: record for record in SCHEDULES["records"] if record["id"].startswith("release_")}


@pytest.mark.parametrize("name", BOWTIES)
def test_both_accountings_of_the_bowtie_releases(name: str) -> None:
    """The authors' count is the performed one less the endpoint waste (and norms, for parameters)."""
    record = BOWTIES[name]
    inputs, moe = record["inputs"], record["inputs"].get("moe")
    dense = {"kind": "dense", "gated": True, "expansion": 4}
    expert = {"kind": "dense", "gated": True}
    spec = spec_from(
        {
            "vocab_size": inputs["vocab_size"], "hidden_size": record["widths"], "num_hidden_layers": inputs["num_layers"],
            "num_attention_heads": 16, "embedding_size": inputs["hidden_size"], "unembedding_size": inputs["hidden_size"],
            "transition": "carry_forward",
            "ffn": dense if moe is None else {
                "kind": "moe", "num_local_experts": moe["num_experts"], "num_experts_per_tok": moe["num_experts_per_tok"],
                "expert": {**expert, "intermediate_size": record["intermediate_sizes"]},
            },
        }
    )  # fmt: skip
    length = inputs["max_position_embeddings"]
    found, waste = cost(spec, length), endpoint_waste(spec)
    norms = sum(row.params for row in found.rows if row.component == "norm")
    assert found.params["total"] == record["model_num_parameters"]
    tolerance = 0 if moe is None else 2e-4  # their solver leaves expert sizes unrounded
    matched = found.params["total"] - norms - waste["params"]
    assert matched == pytest.approx(record["matched_params_quantized"], rel=tolerance, abs=0.5)
    performed = (found.flops_per_token["forward"] - waste["flops"]) * length
    assert performed == pytest.approx(record["forward_flops_per_sequence_quantized"], rel=tolerance, abs=0.5)


@given(specs())
def test_counted_equals_built_as_integers(spec: ModelSpec) -> None:
    """Parameters, FLOPs of the forward pass, and twice as many of the backward pass."""
    model = build_meta(spec)
    found = cost(spec, context=8)
    assert sum(parameter.numel() for parameter in model.parameters()) == found.params["total"]
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.zeros(2, 8, dtype=torch.long, device="meta"))
        assert counter.get_total_flops() == found.flops_per_token["forward"] * 16
        # a gate on coordinates that are still zero has no gradient to pass down, and torch counts convolutions' backward oddly
        if not isinstance(spec.transition, Gated | ConvDiff | TransposedConv):
            logits.sum().backward()
            assert counter.get_total_flops() == found.flops_per_token["train"] * 16


@given(specs())
def test_parameters_by_component_equal_the_module(spec: ModelSpec) -> None:
    model, table = build_meta(spec), rows(spec)
    for index, layer in enumerate(model.layers):
        built = {
            "attention": sum(p.numel() for p in layer.self_attn.parameters()),
            "ffn": sum(p.numel() for p in layer.mlp.parameters()),
        }
        for component, count in built.items():
            assert [row.params for row in table if row.layer == index and row.component == component] == [count]


@given(specs())
def test_rows_sum_to_totals(spec: ModelSpec) -> None:
    found = cost(spec, 32, batch=3)
    layers = found.layers()
    assert sum(row["params"] for row in layers) == found.params["total"]
    assert sum(row["forward_flops"] for row in layers) == found.flops_per_token["forward"]
    assert sum(row["kv_cache_bytes_per_token"] for row in layers) == found.kv_cache_bytes_per_token
    windows = [min(32, layer.sliding_window or 32) for layer in spec.layers]
    assert (
        sum(row.kv_elements * windows[row.layer] for row in found.rows if row.kv_elements) * 2 * 3
        == found.kv_cache_bytes
    )
    assert sum(row["weight_bytes"] for row in layers) == found.weight_bytes
    assert found.params["embedding"] + found.params["non_embedding"] == found.params["total"]


def test_arrays_and_integers_share_one_formula() -> None:
    widths, heads, kv, depth = (np.array(x) for x in ([64, 128, 192], [4, 8, 6], [2, 1, 3], [3, 5, 7]))
    layer = StackLayer(widths, heads, kv, 32, 32, StackFFN(4 * widths), repeat=depth)
    table = rows(Stack(1000, widths, widths, 0, (layer,)))
    # the final norm is as wide as the last layer
    counts, flops = param_counts(table), flops_per_token(table, 256)
    for i in range(3):
        spec = spec_from(
            {
                "vocab_size": 1000, "hidden_size": int(widths[i]), "num_hidden_layers": int(depth[i]), "head_dim": 32,
                "num_attention_heads": int(heads[i]), "num_key_value_heads": int(kv[i]), "ffn": {"kind": "dense", "expansion": 4},
            }
        )  # fmt: skip
        exact = cost(spec, 256)
        assert {name: int(np.broadcast_to(value, 3)[i]) for name, value in counts.items()} == exact.params
        for name, value in flops.items():
            assert np.broadcast_to(value, 3)[i] == exact.flops_per_token[name], name


@settings(max_examples=30)
@given(specs())
def test_causal_is_the_mean_over_positions(spec: ModelSpec) -> None:
    mean = sum(cost(spec, t).flops_per_token["decode"] for t in range(1, 18)) / 17
    assert cost(spec, 17).flops_per_token["forward_causal"] == pytest.approx(mean, rel=1e-12)


def test_bigger_is_never_cheaper() -> None:
    base: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                            "num_key_value_heads": 2, "head_dim": 8, "v_head_dim": 8, "intermediate_size": 64}  # fmt: skip
    start = cost(spec_from(base), 16)
    for key, value in (("vocab_size", 65), ("hidden_size", 36), ("num_hidden_layers", 3), ("num_attention_heads", 6),
                       ("num_key_value_heads", 4), ("head_dim", 10), ("v_head_dim", 9), ("intermediate_size", 65)):  # fmt: skip
        grown = cost(spec_from({**base, key: value}), 16)
        assert grown.params["total"] > start.params["total"]
        assert grown.flops_per_token["forward"] > start.flops_per_token["forward"]
        assert grown.kv_cache_bytes >= start.kv_cache_bytes


def test_training_flops_do_not_overflow() -> None:
    assert train_flops(load_spec(LLAMA), 8192, 15e12) == pytest.approx(
        3 * cost(load_spec(LLAMA), 8192).flops_per_token["forward"] * 15e12
    )


def test_a_row_has_no_unsummed_measure() -> None:
    assert {field.name for field in fields(Row)} == {"layer", "component", "window", *MEASURES}
