"""Modules: cached decoding equals the full forward, carry-forward equals its definition, initial weights, attention paths."""

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scantling.model import Cache, build, build_meta
from scantling.model.attention import attend, plain_attention
from scantling.model.stream import Resize, Stream
from scantling.parts import CarryForward, Gaussian, Zero
from scantling.resolve import load_spec, spec_from
from scantling.spec import ModelSpec
from tests.strategies import specs


@given(specs(), st.integers(0, 2**31), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_cached_decoding_equals_the_full_forward(spec: ModelSpec, seed: int, pieces: list[int]) -> None:
    assume(not isinstance(spec.transition, Gaussian))  # fresh noise at every pass
    model = build(spec, seed=seed, dtype=torch.float64)
    ids = torch.randint(0, spec.vocab_size, (2, sum(pieces)), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        full = model(ids)
        cache = Cache(spec, 2, sum(pieces), dtype=torch.float64)
        parts = [model(part, cache) for part in ids.split(pieces, dim=1)]
    assert (torch.cat(parts, 1) - full).abs().max() < 1e-10
    assert cache.length == sum(pieces)


@given(specs())
def test_a_token_never_sees_the_future(spec: ModelSpec) -> None:
    assume(not isinstance(spec.transition, Gaussian))
    model = build(spec, dtype=torch.float64)
    ids = torch.zeros(1, 6, dtype=torch.long)
    changed = ids.clone()
    changed[0, 4:] = spec.vocab_size - 1
    with torch.no_grad():
        # not bit for bit: routed tokens share matrix products, whose sums depend on how many tokens an expert gets
        assert (model(ids)[:, :4] - model(changed)[:, :4]).abs().max() < 1e-10


def reference_resize(x: torch.Tensor, width: int, history: list[torch.Tensor], carry: bool) -> torch.Tensor:
    """The definition: coordinate i from the most recent state whose width covers i (arXiv 2606.18246, section 2)."""
    have = x.shape[-1]
    if width <= have:
        return x[..., :width]
    missing = []
    for i in range(have, width):
        states = [state[..., i] for state in reversed(history) if state.shape[-1] > i] if carry else []
        missing.append(states[0] if states else torch.zeros_like(x[..., 0]))
    return torch.cat((x, torch.stack(missing, -1)), -1)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=8), st.booleans())
def test_the_stream_is_the_definition(widths: list[int], carry: bool) -> None:
    generator = torch.Generator().manual_seed(sum(widths))
    transition = CarryForward(kind="carry_forward") if carry else Zero(kind="zero")
    x = torch.randn(2, 3, widths[0], generator=generator)
    stream, y, history = Stream(), x, [x]
    for have, width in itertools.pairwise(widths):
        x, y = reference_resize(x, width, history, carry), Resize(transition, have, width)(y, stream)
        assert torch.equal(x, y)
        x = x + torch.randn(x.shape, generator=generator)  # what a layer adds
        y = x
        history.append(x)
    last = Resize(transition, widths[-1], 9, last=True)(y, stream)  # into the head, zero carries too
    assert torch.equal(reference_resize(x, 9, history, True), last)


def test_gradients_reach_carried_coordinates() -> None:
    spec = spec_from(
        {
            "vocab_size": 11, "hidden_size": [16, 8, 16], "num_hidden_layers": 3, "num_attention_heads": 2,
            "ffn": {"kind": "dense", "expansion": 2}, "transition": "carry_forward",
        }
    )  # fmt: skip
    model = build(spec, dtype=torch.float64)
    with torch.no_grad():  # cut the middle layer off: what it did not touch must still arrive
        model.layers[1].self_attn.o_proj.weight.zero_()
        model.layers[1].mlp.down_proj.weight.zero_()
    model.loss(torch.arange(10)[None], torch.arange(1, 11)[None]).backward()
    assert model.embed_tokens.weight.grad is not None
    assert (model.embed_tokens.weight.grad[:10, 8:].abs().sum(0) > 0).all()


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 9), st.integers(1, 5), st.integers(1, 5))
def test_both_attention_paths_agree(groups: int, share: int, length: int, head_dim: int, v_head_dim: int) -> None:
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(2, groups * share, length, head_dim, dtype=torch.float64, generator=generator)
    k = torch.randn(2, groups, length, head_dim, dtype=torch.float64, generator=generator)
    v = torch.randn(2, groups, length, v_head_dim, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        fused = attend(q, k, v, 0.3)
    assert (fused - plain_attention(q, k, v, 0.3)).abs().max() < 1e-12


def test_grouped_heads_equal_repeated_heads() -> None:
    keys = {
        "vocab_size": 13,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "head_dim": 4,
        "intermediate_size": 8,
    }
    grouped = build(spec_from({**keys, "num_key_value_heads": 2}), dtype=torch.float64)
    full = build(spec_from(keys), dtype=torch.float64)
    state = grouped.state_dict()
    for name in ("layers.0.self_attn.k_proj.weight", "layers.0.self_attn.v_proj.weight"):
        state[name] = state[name].view(2, 4, 16).repeat_interleave(2, 0).reshape(16, 16)
    full.load_state_dict(state)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert (grouped(ids) - full(ids)).abs().max() < 1e-12


def test_initial_weights_are_a_function_of_spec_and_seed(contract) -> None:  # type: ignore[no-untyped-def]
    spec = load_spec(contract / "spec-uniform.yaml")
    one, two, other = build(spec, 1), build(spec, 1), build(spec, 2)
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not name.endswith("proj.weight") or not torch.equal(a, c)


@settings(max_examples=30)
@given(specs())
def test_every_weight_is_set(spec: ModelSpec) -> None:
    for name, parameter in build(spec).named_parameters():
        assert torch.isfinite(parameter).all() and parameter.abs().max() < 20, name


def test_initial_spreads() -> None:
    keys = {
        "vocab_size": 300,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
    }
    for init, embedding, matrix, writer in (
        ({"kind": "fan_in"}, 1 / 8, 1 / 8, 1 / 16),
        ({"kind": "normal", "std": 0.02}, 0.02, 0.02, 0.02),
        ({"kind": "normal", "std": 0.02, "depth_scaled": True}, 0.02, 0.02, 0.01),
        ({"kind": "mup"}, 0.1, 0.1 / 8**0.5, 0.05 / 8**0.5),
    ):
        model = build(spec_from({**keys, "initialization": init}))
        layer = model.layers[0]
        assert model.embed_tokens.weight.std().item() == pytest.approx(embedding, rel=0.05)
        assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(matrix, rel=0.05)
        assert layer.self_attn.o_proj.weight.std().item() == pytest.approx(writer, rel=0.05)
        assert (layer.input_layernorm.weight == 1).all()


def test_a_first_loss_is_near_that_of_guessing(contract) -> None:  # type: ignore[no-untyped-def]
    model = build(load_spec(contract / "spec-uniform.yaml"))
    ids = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))
    assert model.loss(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(5.545, abs=0.8)


def test_meta_costs_no_memory() -> None:
    model = build_meta(load_spec("tests/data/hf/llama-3-8b.json"))
    assert sum(p.numel() for p in model.parameters()) == 8_030_261_248
    assert all(p.is_meta for p in model.parameters())


def test_a_first_layer_that_skips_empty_coordinates_is_the_same_function() -> None:
    keys = {
        "vocab_size": 17, "hidden_size": [24, 8], "embedding_size": 16, "unembedding_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "ffn": {"kind": "dense", "expansion": 2}, "transition": "carry_forward",
    }  # fmt: skip
    whole = build(spec_from(keys), dtype=torch.float64)
    lean = build(spec_from({**keys, "per_layer_config": {0: {"attention_input_size": 16}}}), dtype=torch.float64)
    state = whole.state_dict()
    for name in ("q_proj", "k_proj", "v_proj"):
        state[f"layers.0.self_attn.{name}.weight"] = state[f"layers.0.self_attn.{name}.weight"][:, :16]
    lean.load_state_dict(state)
    ids = torch.arange(17)[None]
    with torch.no_grad():
        assert (whole(ids) - lean(ids)).abs().max() < 1e-13


@given(specs())
def test_inference_equals_training_mode(spec: ModelSpec) -> None:
    """Without gradients carry-forward works in place on one wide stream; the logits are those of the copying path."""
    assume(not isinstance(spec.transition, Gaussian))
    model = build(spec, dtype=torch.float64)
    ids = torch.randint(0, spec.vocab_size, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        in_place = model(ids)
    assert (in_place - model(ids)).abs().max() < 1e-12
