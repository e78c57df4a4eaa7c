"""Parallel stacks computed together: the loop's outputs, gradients and cached decoding, or the loop itself."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scantling.model import Cache, Decoder, build
from scantling.model import grouped as grouped_module
from scantling.model.grouped import groupable
from scantling.parts import Gaussian
from scantling.resolve import spec_from
from scantling.spec import ModelSpec
from tests.strategies import mappings


def branched(mapping: dict[str, Any]) -> bool:
    return "branches" in mapping


def with_dense_layers(mapping: dict[str, Any]) -> ModelSpec:
    """Random specs have few stacks of dense layers only; this keeps all else of what was drawn."""
    count = mapping["branches"]["count"]
    depth = mapping["num_hidden_layers"] // count
    for index, layer in mapping["per_layer_config"].items():
        ffn = layer["ffn"] if layer["ffn"]["kind"] != "moe" else layer["ffn"]["expert"]
        kept = {key: ffn[key] for key in ("gated", "hidden_act", "bias", "intermediate_size")}
        mapping["per_layer_config"][index] = {**layer, "ffn": {"kind": "dense", **kept}}
    assert depth >= 1
    return spec_from(mapping)


def specs() -> st.SearchStrategy[ModelSpec]:
    return mappings().filter(branched).map(with_dense_layers).filter(lambda s: not isinstance(s.transition, Gaussian))


def both(spec: ModelSpec, seed: int) -> tuple[Decoder, Decoder, torch.Tensor]:
    looped, grouped = (build(spec, seed=seed, dtype=torch.float64) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # stacks, gains and biases that differ, so that none can take another's place
        for one, other in zip(looped.parameters(), grouped.parameters(), strict=True):
            one.add_(0.1 * torch.randn(one.shape, generator=generator, dtype=one.dtype))
            other.copy_(one)
    looped.grouped_branches, grouped.grouped_branches = False, True
    return looped, grouped, torch.randint(0, spec.vocab_size, (2, 7), generator=generator)


@given(specs(), st.integers(0, 2**31))
@settings(suppress_health_check=[HealthCheck.filter_too_much])
def test_grouped_stacks_are_the_loop(spec: ModelSpec, seed: int) -> None:
    assert groupable(spec)
    looped, grouped, ids = both(spec, seed)
    losses = [model.loss(ids, ids.roll(-1, 1)) for model in (looped, grouped)]
    assert (looped(ids) - grouped(ids)).abs().max() < 1e-10
    for loss in losses:
        loss.backward()
    for (name, one), other in zip(looped.named_parameters(), grouped.parameters(), strict=True):
        if one.grad is None:
            assert other.grad is None, name
        else:
            assert other.grad is not None, name
            assert (one.grad - other.grad).abs().max() < 1e-10 * max(1.0, one.grad.abs().max().item()), name


@given(specs(), st.integers(0, 2**31), st.lists(st.integers(1, 4), min_size=1, max_size=4))
@settings(suppress_health_check=[HealthCheck.filter_too_much])
def test_grouped_cached_decoding(spec: ModelSpec, seed: int, pieces: list[int]) -> None:
    looped, grouped, _ = both(spec, seed)
    ids = torch.randint(0, spec.vocab_size, (2, sum(pieces)), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        cache = Cache(spec, 2, sum(pieces), dtype=torch.float64)
        parts = torch.cat([grouped(part, cache) for part in ids.split(pieces, dim=1)], 1)
        assert (parts - looped(ids)).abs().max() < 1e-10
        assert torch.equal(looped(ids, single_branch=True), grouped(ids, single_branch=True))


MODEL: dict[str, Any] = {
    "vocab_size": 31, "max_position_embeddings": 32, "num_hidden_layers": 6, "hidden_size": [16, 24, 16] * 2,
    "num_attention_heads": 2, "ffn": {"kind": "dense", "expansion": 2}, "transition": "carry_forward",
    "branches": {"count": 2, "entry": "projection", "mixing": "softmax"}, "embedding_size": 16,
}  # fmt: skip
EXPLICIT = {
    "widths change": {},
    "three stacks": {"branches": {"count": 3}, "hidden_size": [16, 24] * 3},
    "learned maps": {"transition": {"kind": "linear", "bias": True}},
    "noise": {"transition": "gaussian"},
    "routed": {
        "ffn": {
            "kind": "moe", "num_local_experts": 3, "num_experts_per_tok": 2,
            "expert": {"kind": "dense", "intermediate_size": 8},
        }
    },
    "structured": {"ffn": {"kind": "low_rank", "intermediate_size": 32, "rank": 4}},
}  # fmt: skip
FALL_BACK = ("noise", "routed", "structured")


@pytest.mark.parametrize("case", EXPLICIT)
def test_explicit_cases(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_from({**MODEL, **EXPLICIT[case]})
    calls = []
    real = grouped_module.grouped_stacks
    monkeypatch.setattr("scantling.model.decoder.grouped_stacks", lambda *args: calls.append(1) or real(*args))
    looped, grouped, ids = both(spec, 3)
    torch.manual_seed(0)
    expected = looped(ids)
    torch.manual_seed(0)
    found = grouped(ids)
    assert bool(calls) == (case not in FALL_BACK)
    assert torch.equal(found, expected) if case in FALL_BACK else (found - expected).abs().max() < 1e-10


def test_names_stay() -> None:
    looped, grouped, _ = both(spec_from(MODEL), 0)
    grouped.load_state_dict(looped.state_dict())
    assert not [name for name in grouped.state_dict() if "grouped" in name]


def test_grouping_never_touches_a_plain_model() -> None:
    plain = {key: value for key, value in MODEL.items() if key != "branches"}
    looped, grouped, ids = both(spec_from(plain), 0)
    assert torch.equal(looped(ids), grouped(ids))
