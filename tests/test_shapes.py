"""Width profiles against the authors' released schedules (arXiv 2606.18246) and against exact matching."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scantling.costing import cost
from scantling.errors import InputError
from scantling.resolve import spec_from
from scantling.shapes import Accounting, WidthProfile, published_widths
from scantling.spec import ModelSpec

RECORDS = json.loads((Path(__file__).parent / "data/variable_width/schedules.json").read_text())
FLAGS = {"original_input_width": True, "original_output_width": True, "wide_unembedding": False}
SOLVED = [record for record in RECORDS["records"] if not record["inputs"].get("fixed_residual_width")]


def profile_of(inputs: dict[str, Any], **changes: Any) -> WidthProfile:
    keys = ("bottleneck_ratio", "expansion_factor", "reduction_factor", "delta", "delta_neg", "base_width")
    return WidthProfile(
        profile="arithmetic" if "delta" in inputs and "bottleneck_ratio" not in inputs else "geometric",
        turn_layer=inputs["max_layer"],
        symmetric=inputs["symmetric_widths"],
        duplicate_turn_layer=inputs["duplicate_max_layer"],
        quantize_to=inputs["quantize_to"],
        permute=inputs.get("permute_widths_seed"),
        match="published",
        **{key: inputs[key] for key in keys if key in inputs},
        **{key: inputs.get(key, default) for key, default in FLAGS.items()},
        **changes,
    )


def accounting_of(inputs: dict[str, Any]) -> Accounting:
    moe, width = inputs.get("moe"), inputs["hidden_size"]
    share = moe["num_experts"] * moe["moe_intermediate_size"] / width if moe else 4.0
    experts = moe["num_experts"] if moe else 0
    return Accounting(inputs["vocab_size"], width, inputs["num_layers"], ffn=3 * share, down=share, experts=experts)


@pytest.mark.parametrize("record", SOLVED, ids=lambda record: record["id"])
def test_released_schedules(record: dict[str, Any]) -> None:
    inputs, account = record["inputs"], accounting_of(record["inputs"])
    found = published_widths(profile_of(inputs), account, inputs["quantize_to"])
    assert found.widths == record["widths"]
    assert found.base == record["base_width"]
    assert found.base_continuous == pytest.approx(record["base_width_continuous"], rel=1e-9)
    slopes = [(found.slope.before, "expansion_factor", "delta"), (found.slope.after, "reduction_factor", "delta_neg")]
    for value, geometric, arithmetic in slopes:
        assert value == pytest.approx(record[geometric] or record[arithmetic], rel=1e-9)
    if "widths_without_base_rounding" in record:
        paper = published_widths(profile_of(inputs, round_base=False), account, inputs["quantize_to"])
        assert paper.widths == record["widths_without_base_rounding"]


@pytest.mark.parametrize("record", RECORDS["error_records"], ids=lambda record: record["id"])
def test_what_the_authors_refuse_is_refused(record: dict[str, Any]) -> None:
    inputs = record["inputs"]
    mapping = {
        "vocab_size": inputs["vocab_size"],
        "hidden_size": inputs["hidden_size"],
        "num_hidden_layers": inputs["num_layers"],
        "num_attention_heads": inputs["num_attention_heads"],
        "ffn": {"kind": "dense", "expansion": 4},
        "transition": "carry_forward",
        "width": {
            "match": "published",
            "turn_layer": inputs["max_layer"],
            "quantize_to": inputs["quantize_to"],
            **{key: inputs[key] for key in ("bottleneck_ratio", "delta", "base_width") if key in inputs},
        },
    }
    with pytest.raises(InputError):
        spec_from(mapping)


def model(match: str, width: int = 64, depth: int = 8, ratio: float | None = 0.3, **keys: Any) -> ModelSpec:
    mapping: dict[str, Any] = {
        "vocab_size": 512,
        "max_position_embeddings": 256,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": 2,
        "ffn": {"kind": "dense", "expansion": 4},
        **keys,
    }
    if ratio is not None:
        mapping |= {"width": {"bottleneck_ratio": ratio, "match": match}, "transition": "carry_forward"}
    return spec_from(mapping)


FFN_KINDS: list[dict[str, Any]] = [
    {"kind": "dense", "expansion": 4},
    {"kind": "low_rank", "expansion": 4, "rank": 16, "gated": False},
    {"kind": "block_shuffle", "expansion": 4, "num_blocks": 2},
    {"kind": "moe", "num_local_experts": 4, "num_experts_per_tok": 2, "expert": {"kind": "dense", "expansion": 1}},
]


@settings(max_examples=25)
@given(
    st.sampled_from(["allocated", "flops", "kv_bytes"]),
    st.integers(12, 40),
    st.integers(4, 16),
    st.floats(0.2, 0.9),
    st.sampled_from(FFN_KINDS),
    st.sampled_from([1, 2]),
)
def test_exact_matching_matches_what_is_allocated(
    match: str, units: int, depth: int, ratio: float, ffn: dict[str, Any], kv_heads: int
) -> None:
    """The matched quantity is within one quantisation step of one layer of the uniform baseline's."""
    measures = {
        "allocated": lambda c: c.params["total"],
        "flops": lambda c: c.flops_per_token["forward"],
        "kv_bytes": lambda c: c.kv_cache_bytes_per_token,
    }
    keys = {"ffn": ffn, "num_key_value_heads": kv_heads}
    width = 4 * units
    found, base = model(match, width, depth, ratio, **keys), model(match, width, depth, None, **keys)
    one_step = max(
        abs(
            measures[match](cost(model(match, width + 4, 1, None, **keys)))
            - measures[match](cost(model(match, width, 1, None, **keys)))
        ),
        1,
    )
    assert abs(measures[match](cost(found)) - measures[match](cost(base))) <= 2 * one_step
    assert found.widths[0] == found.widths[-1] == max(found.widths) or ratio > 0.85


def test_no_waste_skips_what_is_never_used() -> None:
    """The sliced first attention is the same function; parameters fall by the authors' waste term 3 (d_1 - h) d_1."""
    whole = model("none", 32, 4, None, hidden_size=32)
    assert whole.layers[0].attention_input_size is None
    keys = {
        "vocab_size": 64,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "hidden_size": 32,
        "transition": "carry_forward",
    }
    ffn = {"kind": "dense", "expansion": 4}
    wide = spec_from({**keys, "ffn": ffn, "width": {"bottleneck_ratio": 0.3, "match": "published"}})
    lean = spec_from({**keys, "ffn": ffn, "width": {"bottleneck_ratio": 0.3, "match": "published", "no_waste": True}})
    assert lean.widths == wide.widths
    first, last = wide.widths[0], wide.widths[-1]
    saved = cost(wide).params["total"] - cost(lean).params["total"]
    assert saved == 3 * (first - 32) * first + 4 * last * (last - 32)


def test_a_fixed_residual_stream() -> None:
    record = next(record for record in RECORDS["records"] if record["inputs"].get("fixed_residual_width"))
    inputs = record["inputs"]
    spec = spec_from(
        {
            "vocab_size": inputs["vocab_size"],
            "hidden_size": inputs["hidden_size"],
            "num_hidden_layers": inputs["num_layers"],
            "num_attention_heads": inputs["num_attention_heads"],
            "ffn": {"kind": "dense", "expansion": 4},
            "width": {
                "match": "published",
                "fixed_residual_width": True,
                "bottleneck_ratio": inputs["bottleneck_ratio"],
                "turn_layer": inputs["max_layer"],
                "quantize_to": inputs["quantize_to"],
            },
        }
    )
    assert set(spec.widths) == {inputs["hidden_size"]}
    assert [layer.head_dim for layer in spec.layers] == record["head_dims"]
    assert [layer.ffn.intermediate_size for layer in spec.layers] == record["intermediate_sizes"]
    assert cost(spec).params["total"] == record["model_num_parameters"]


def test_stages_are_the_compressed_stacks_of_the_paper() -> None:
    """12 x 768 in stages of 2: 768, 384, 192, 96, 48, 24, and a head that reads 12 (arXiv 2404.14462); B2's exact count."""
    keys = {
        "vocab_size": 50304, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "position": "none",
        "max_position_embeddings": 1024, "learned_positions": True, "transition": "compress",
        "norm": {"kind": "layer_norm", "bias": False},
        "ffn": {"kind": "dense", "gated": False, "hidden_act": "gelu", "expansion": 4},
    }  # fmt: skip
    spec = spec_from({**keys, "width": {"profile": "stages", "blocks_per_stage": 2}})
    assert spec.widths == (768, 768, 384, 384, 192, 192, 96, 96, 48, 48, 24, 24) and spec.unembedding_size == 12
    assert cost(spec).params["total"] == 59_293_248
    for blocks, count in ((3, 70_436_544), (4, 81_806_592), (6, 102_545_664)):
        assert (
            cost(spec_from({**keys, "width": {"profile": "stages", "blocks_per_stage": blocks}})).params["total"]
            == count
        )
    with pytest.raises(InputError, match="5 blocks per stage do not divide 12 layers"):
        spec_from({**keys, "width": {"profile": "stages", "blocks_per_stage": 5}})


@pytest.mark.parametrize(
    ("kind", "keys", "ratio", "chosen"),
    [
        ("low_rank", {}, 0.625, {"rank": 384}),
        ("low_rank", {}, 0.3125, {"rank": 192}),
        ("block_dense", {"num_blocks": 2}, 0.625, {"rank": 512}),
        ("block_dense", {"num_blocks": 2}, 0.3125, {"rank": 256}),
        ("block_shuffle", {}, 0.625, {"num_blocks": 2}),
        ("block_shuffle", {}, 0.3125, {"num_blocks": 4}),
    ],
)
def test_ranks_and_blocks_from_a_share(kind: str, keys: dict[str, Any], ratio: float, chosen: dict[str, int]) -> None:
    """The published settings of the 768-wide model (arXiv 2406.16450, sheet 1.5)."""
    ffn = {"kind": kind, "gated": False, "expansion": 4, "parameter_ratio": ratio, **keys}
    layer = model("none", 768, 1, None, ffn=ffn).layers[0]
    assert {name: getattr(layer.ffn, name) for name in chosen} == chosen


def test_a_share_no_block_count_gives() -> None:
    with pytest.raises(InputError, match="parameter_ratio: block counts that divide"):
        model("none", 62, 1, None, ffn={"kind": "block_shuffle", "expansion": 4, "parameter_ratio": 0.1})
