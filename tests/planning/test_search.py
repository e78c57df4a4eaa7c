"""Screened prices are exact prices, nothing in the space beats the winner, and more is never worse."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest

from scantling.costing import cost, flops_per_token, train_flops
from scantling.planning import load_plan, plan
from scantling.planning.price import Priced, price
from scantling.planning.shapes import families, whole_shapes
from scantling.planning.space import Space
from scantling.resolve import resolve, spec_from
from scantling.yamlio import loads
from tests.planning.asking import EPOCH, GQA, inline, solve

# --- screened prices are exact prices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["full", "causal", "6nd", "paper-figure-2"])
@pytest.mark.parametrize("tied", [False, True])
def test_screened_prices_equal_the_specs(convention: Any, tied: bool) -> None:
    """Random shapes priced as arrays and as built specs: the same integers."""
    rng = np.random.default_rng(5)
    space = Space.model_validate(
        {
            "vocab_size": 50257,
            "tie_word_embeddings": tied,
            "hidden_size": [int(64 * k) for k in rng.integers(1, 90, 12)],
            "num_hidden_layers": [int(k) for k in rng.integers(1, 90, 5)],
            "head_dim": [64, 96],
            "num_attention_heads": [4, 12],
            "num_key_value_heads": [1, 2, 4],
            "ffn": {"gated": not tied, "expansion": 3.5, "multiple_of": 8},
        }
    )
    shapes = whole_shapes(space, families(space, None), (1, 1))
    assert space.hidden_size is not None and space.num_hidden_layers is not None
    assert len(shapes) == len(space.hidden_size) * len(space.num_hidden_layers) * 2 * 6
    use: dict[str, Any] = {"sequence_length": 1000, "context": 4097, "batch": 3, "bytes_per_value": 2}
    names = [field.name for field in dataclasses.fields(Priced)]
    screened = price(shapes.rows(space), convention, "total", **use)
    for index in rng.integers(0, len(shapes), 12):
        spec = spec_from(shapes.mapping(int(index), space, 4097))
        exact = cost(spec, 4097, batch=3, bytes_per_value=2)
        again = price(exact.rows, convention, "total", **use)
        for name in names:
            assert getattr(screened, name)[index] == getattr(again, name), name
        assert again.parameters == exact.params["total"]
        assert again.kv_cache_bytes == exact.kv_cache_bytes
        if convention == "full":
            assert again.training_flops_per_token == train_flops(spec, 1000, 1)
            assert again.serving_flops_per_token == exact.flops_per_token["decode"]
            assert again.weight_bytes == exact.weight_bytes
        if convention == "causal":
            assert again.training_flops_per_token == flops_per_token(exact.rows, 1000)["train_causal"]


def test_candidates_are_the_specs_they_name() -> None:
    answer = solve(
        budget={"training_flops": 1e20}, serving={"context": 8192, "batch": 4}, space={"tie_word_embeddings": True}
    )
    for candidate in answer.candidates:
        assert candidate.spec is not None and candidate.yaml is not None
        spec = resolve(loads(candidate.yaml))
        assert spec.hash == candidate.hash == spec_from(candidate.spec).hash
        exact = cost(spec, 8192, batch=4)
        assert candidate.params == exact.params
        assert candidate.parameters == exact.params["total"]
        assert candidate.memory_bytes == exact.weight_bytes + exact.kv_cache_bytes
        assert candidate.training_flops == pytest.approx(1e20, rel=1e-12)
        assert candidate.training_flops == pytest.approx(train_flops(spec, 2048, candidate.tokens), rel=1e-12)
        assert candidate.binding == "training_flops"
        assert (candidate.hidden_size, candidate.num_hidden_layers) == (spec.widths[0], spec.num_hidden_layers)
    assert [c.objective for c in answer.candidates] == sorted(c.objective for c in answer.candidates)


def test_no_shape_of_a_small_space_beats_the_winner() -> None:
    """Brute force over specs built one by one, with the law's closed form."""
    space = {"hidden_size": [512, 768, 1024, 1280], "num_hidden_layers": [6, 12, 18], "num_key_value_heads": [2, 4]}
    space["head_dim"] = [64]
    answer = solve(law=inline(EPOCH), target={"loss": 2.9}, serving={"tokens": 1e11}, space=space, candidates=100)
    totals = []
    for width in (512, 768, 1024, 1280):
        for depth in (6, 12, 18):
            for kv in (2, 4):
                inner = 32 * round(width * 8 / 3 / 32)
                sizes = {
                    "hidden_size": width,
                    "num_hidden_layers": depth,
                    "num_attention_heads": width // 64,
                    "head_dim": 64,
                }
                spec = spec_from({"vocab_size": 32000, **sizes, "num_key_value_heads": kv, "intermediate_size": inner})
                priced = cost(spec, 2048)
                tokens = float(EPOCH.tokens_for_loss(priced.params["total"], 2.9))
                if math.isfinite(tokens):
                    totals.append(train_flops(spec, 2048, tokens) + priced.flops_per_token["decode"] * 1e11)
    assert answer.minimize == "lifetime_flops"
    assert answer.screened == 24
    assert [c.objective for c in answer.candidates] == pytest.approx(sorted(totals), rel=1e-12)


# --- directions --------------------------------------------------------------------------------------------------------


def test_more_budget_is_never_worse() -> None:
    losses = [solve(budget={"training_flops": c}).candidates[0].loss for c in np.geomspace(1e17, 1e24, 15).tolist()]
    assert all(after < before for before, after in itertools.pairwise(losses))
    memory = [
        solve(budget={"training_flops": 1e21, "memory_bytes": m}).candidates[0]
        for m in ("500MB", "1GB", "3GB", "6GB", "60GB")
    ]
    assert all(after.loss <= before.loss for before, after in itertools.pairwise(memory))
    assert [c.binding for c in memory] == ["memory_bytes"] * 3 + ["training_flops"] * 2
    assert all(c.memory_bytes <= limit for c, limit in zip(memory, (5e8, 1e9, 3e9, 6e9, 6e10), strict=True))


def test_served_tokens_move_the_optimum_to_smaller_models_and_more_tokens() -> None:
    served = [
        solve(target={"loss": 2.3}, minimize="lifetime_flops", serving={"tokens": tokens}).candidates[0]
        for tokens in (1e6, 1e11, 1e12, 1e13)
    ]
    for before, after in itertools.pairwise(served):
        assert after.parameters < before.parameters
        assert after.tokens > before.tokens
        assert after.training_flops > before.training_flops


def test_front_trades_loss_for_cost() -> None:
    for answer in (solve(budget={"training_flops": 1e20}), solve(target={"loss": 2.5}), plan(load_plan(GQA))):
        points = sorted(answer.front, key=lambda point: point.cost)
        assert len(points) == 15
        assert all(b.loss < a.loss for a, b in itertools.pairwise(points))
        assert any(p.loss == pytest.approx(answer.candidates[0].loss, rel=1e-12) for p in points)


def test_fixed_tokens_per_parameter_hold() -> None:
    fixed = {"tokens_per_parameter": 20}
    answer = solve(budget={"training_flops": 1e20}, training=fixed)
    assert all(c.tokens_per_parameter == pytest.approx(20) for c in answer.candidates)
    assert all(c.training_flops <= 1e20 for c in answer.candidates)
    small = [
        solve(minimize="memory_bytes", target={"loss": 2.6}, training={"tokens_per_parameter": m}).candidates[0]
        for m in (20, 200)
    ]
    assert all(c.loss <= 2.6 for c in small)
    assert small[1].memory_bytes < small[0].memory_bytes
