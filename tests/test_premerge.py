"""Merged linears: the structured result, chosen by token count, with thresholds that are measured once and remembered."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import scantling.measured
from scantling.errors import RunError
from scantling.model import Cache, Decoder, build, premerge
from scantling.model.ffn import FeedForward, linear
from scantling.model.premerge import PremergedLinear, Thresholds, merged_weight, prepare_for_decoding
from scantling.parts import BlockDenseFFN, BlockShuffleFFN, Gaussian, LowRankFFN
from scantling.resolve import spec_from
from scantling.spec import ModelSpec
from tests.strategies import specs

KINDS: list[Callable[..., Any]] = [
    lambda **rest: LowRankFFN(kind="low_rank", rank=8, **rest),
    lambda **rest: BlockShuffleFFN(kind="block_shuffle", num_blocks=4, **rest),
    lambda **rest: BlockDenseFFN(kind="block_dense", rank=8, num_blocks=4, **rest),
]
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


def filled(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return module.to(dtype)


def small_model(kind: str = "low_rank", **changes: Any) -> ModelSpec:
    extra = {"low_rank": {"rank": 4}, "block_shuffle": {"num_blocks": 4}, "block_dense": {"rank": 8, "num_blocks": 4}}
    ffn = {"kind": kind, "intermediate_size": 32, **extra[kind]}
    return spec_from(
        {"vocab_size": 31, "max_position_embeddings": 32, "hidden_size": 16, "num_hidden_layers": 2,
         "num_attention_heads": 2, "ffn": {**ffn, **changes}}
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(16, 48), (48, 16), (16, 16)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_one_linear(kind: Callable[..., Any], sizes: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
    structured = filled(linear(kind(intermediate_size=48, bias=bias), *sizes), dtype)
    merged = PremergedLinear(structured, merged_weight(structured), 10)
    x = torch.randn(2, 5, sizes[0], dtype=dtype)
    expected = structured(x)
    assert (merged(x) - expected).norm() < TOLERANCES[dtype] * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_whole_feed_forward(kind: Callable[..., Any], gated: bool, bias: bool, dtype: torch.dtype) -> None:
    module = filled(FeedForward(kind(intermediate_size=32, bias=bias, gated=gated), 16, 16), dtype)
    x, expected = torch.randn(3, 16, dtype=dtype), None
    expected = module(x)
    for name, child in list(module.named_children()):
        setattr(module, name, PremergedLinear(child, merged_weight(child), 3))
    assert (module(x) - expected).norm() < TOLERANCES[dtype] * expected.norm()


def test_half_precision_is_multiplied_in_float32() -> None:
    structured = filled(linear(KINDS[0](intermediate_size=48), 16, 48), torch.bfloat16)
    exact = structured.up.weight.float() @ structured.down.weight.float()
    merged = merged_weight(structured)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.bfloat16())
    assert structured.up.weight.dtype == torch.bfloat16


@given(specs(), st.integers(0, 2**31), st.integers(0, 20))
def test_a_prepared_model_computes_the_same(spec: ModelSpec, seed: int, threshold: int) -> None:
    assume(not isinstance(spec.transition, Gaussian))
    model = build(spec, seed=seed, dtype=torch.float64).eval()
    prepared = prepare_for_decoding(model, threshold)
    ids = torch.randint(0, spec.vocab_size, (2, 6), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected, cache = model(ids), Cache(spec, 2, 6, dtype=torch.float64)
        parts = torch.cat([prepared(part, cache) for part in ids.split([4, 1, 1], dim=1)], 1)
    assert (parts - expected).abs().max() < 1e-10 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("kind", ["low_rank", "block_shuffle", "block_dense"])
def test_the_training_model_is_untouched(kind: str) -> None:
    model = build(small_model(kind))
    names, modules, before = list(model.state_dict()), list(model.modules()), model(torch.zeros(1, 3, dtype=torch.long))
    prepared = prepare_for_decoding(model, 4)
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert model.training
    assert not prepared.training
    assert torch.equal(model(torch.zeros(1, 3, dtype=torch.long)), before)
    assert {id(p) for p in prepared.parameters()} == {id(p) for p in model.parameters()}
    build(small_model(kind), seed=1).load_state_dict(model.state_dict())


def merged_linears(model: Decoder) -> list[PremergedLinear]:
    return [module for module in model.modules() if isinstance(module, PremergedLinear)]


def test_the_token_count_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare_for_decoding(build(small_model()), 4)
    linears = merged_linears(prepared)
    assert len(linears) == 4
    used: list[int] = []
    for one in linears:
        one.structured.register_forward_hook(lambda module, args, out: used.append(args[0].numel()))
    for shape, structured in [((1, 1), 0), ((2, 2), 0), ((1, 5), 4), ((5, 1), 4)]:
        used.clear()
        prepared(torch.zeros(shape, dtype=torch.long))
        assert len(used) == structured


def test_nothing_is_kept_where_the_structured_form_wins() -> None:
    assert not merged_linears(prepare_for_decoding(build(small_model()), 0))


def test_thresholds_are_measured_once_per_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def fake(structured: premerge.Structured, merged: torch.Tensor) -> tuple[int, dict[int, float]]:
        asked.append(tuple(merged.shape))
        return 8, {1: 0.5, 2: 0.6, 4: 0.7, 8: 0.8, 16: 1.2}

    monkeypatch.setattr(premerge, "measured", fake)
    model = build(small_model())
    for _ in range(2):
        prepared = prepare_for_decoding(model, processor="A processor", cache_dir=tmp_path)
        assert [one.most_tokens for one in merged_linears(prepared)] == [8] * 4
    assert sorted(asked) == [(16, 32), (64, 16)]  # two shapes, whatever the number of layers
    stored = json.loads((tmp_path / premerge.FILE).read_text())
    assert len(stored) == 2
    assert all("A processor" in key and "threads" in key and "float32" in key for key in stored)
    monkeypatch.setenv("SCANTLING_CACHE", str(tmp_path))
    prepare_for_decoding(model, processor="A processor")
    assert len(asked) == 2
    prepare_for_decoding(model.double(), processor="A processor")
    assert len(asked) == 4


@pytest.mark.parametrize(
    "damage", ["", "{", "[1]", "\0", '{"KEY": 3}', '{"KEY": {"most_tokens": "8"}}', '{"KEY": {"most_tokens": -1}}']
)
def test_a_damaged_file_is_measured_again(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(premerge, "measured", lambda structured, merged: (2, {1: 0.5, 2: 0.6, 4: 1.0}))
    structured = filled(linear(KINDS[0](intermediate_size=48), 16, 48))
    thresholds = Thresholds(tmp_path / premerge.FILE, "P")
    key = thresholds.key(structured)
    thresholds.path.write_text(damage.replace("KEY", key))
    assert thresholds.most_tokens(structured, merged_weight(structured)) == 2
    assert json.loads(thresholds.path.read_text())[key]["most_tokens"] == 2


def test_a_place_that_cannot_be_written_costs_a_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, value: object) -> None:
        raise RunError(f"{path}: cannot be written")

    monkeypatch.setattr(premerge, "measured", lambda structured, merged: (2, {1: 0.5}))
    monkeypatch.setattr(scantling.measured, "write_json", refuse)
    structured = filled(linear(KINDS[0](intermediate_size=48), 16, 48))
    assert Thresholds(tmp_path / premerge.FILE).most_tokens(structured, merged_weight(structured)) == 2


def test_the_threshold_is_the_last_count_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    structured = filled(linear(KINDS[1](intermediate_size=48), 16, 48))
    ratios = iter([0.5, 0.7, 0.9, 0.97, 0.1])
    monkeypatch.setattr(premerge, "time_ratio", lambda first, second, device: next(ratios))
    assert premerge.measured(structured, merged_weight(structured)) == (4, {1: 0.5, 2: 0.7, 4: 0.9, 8: 0.97})
    monkeypatch.setattr(premerge, "time_ratio", lambda first, second, device: 1.0)
    assert premerge.measured(structured, merged_weight(structured)) == (0, {1: 1.0})


@pytest.mark.parametrize("kind", KINDS)
def test_the_real_measurement(kind: Callable[..., Any], tmp_path: Path) -> None:
    structured = filled(linear(kind(intermediate_size=48), 16, 48), torch.float32)
    most, ratios = premerge.measured(structured, merged_weight(structured))
    assert most in (0, *premerge.TOKEN_COUNTS)
    assert set(ratios) <= set(premerge.TOKEN_COUNTS)
    assert all(ratio > 0 for ratio in ratios.values())
