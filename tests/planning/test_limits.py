"""Every named cost against the formulas of one spec, limits by brute force, and refusals that name what would do."""

import math
import re
from typing import Any

import pytest

from scantling.costing import cost, train_flops
from scantling.errors import InputError
from scantling.hardware import decode_time, load_hardware, prefill_time
from scantling.laws import load_published
from scantling.planning import load_plan, plan, screen, shapes
from scantling.resolve import spec_from
from tests.planning.asking import EPOCH, GQA, inline, refusal, solve

H100 = load_hardware()["h100-sxm"]
SPACE: dict[str, Any] = {
    "hidden_size": [1024, 1536, 2048],
    "num_hidden_layers": [12, 16, 24],
    "head_dim": [64],
    "num_key_value_heads": [2, 4, 8],
}
SERVED = {"tokens": 1e13, "context": {8192: 3, 32768: 1}, "batch": 4, "devices": 2}
TRAINED = {"sequence_length": 4096, "devices": 8}
ASK: dict[str, Any] = {
    "law": inline(EPOCH),
    "target": {"loss": 2.5},
    "minimize": "usd",
    "hardware": {"device": "h100-sxm", "usd_per_hour": 2.0},
    "serving": SERVED,
    "training": TRAINED,
    "space": SPACE,
    "candidates": 100,
}


def brute_force() -> list[dict[str, float]]:
    """Every shape of the space, priced from its own spec, one at a time."""
    found = []
    for width in SPACE["hidden_size"]:
        for depth in SPACE["num_hidden_layers"]:
            for kv in SPACE["num_key_value_heads"]:
                sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": width // 64}
                inner = 32 * round(width * 8 / 3 / 32)
                spec = spec_from(
                    {
                        "vocab_size": 32000,
                        **sizes,
                        "num_key_value_heads": kv,
                        "head_dim": 64,
                        "intermediate_size": inner,
                    }
                )
                tokens = float(EPOCH.tokens_for_loss(cost(spec).params["total"], 2.5))
                if math.isinf(tokens):
                    continue
                at = {length: cost(spec, length, batch=4) for length in (8192, 32768)}
                step = {length: float(decode_time(priced, H100).seconds) for length, priced in at.items()}
                hours = 1e13 / 4 * (0.75 * step[8192] + 0.25 * step[32768]) / 3600
                training = train_flops(spec, 4096, tokens)
                training_hours = training / (H100.peak("bf16") * 0.4) / 3600
                found.append(
                    {
                        "width": width,
                        "depth": depth,
                        "kv": kv,
                        "training_flops": training,
                        "lifetime_flops": training
                        + 1e13 * sum(w * at[t].flops_per_token["decode"] for t, w in ((8192, 0.75), (32768, 0.25))),
                        "memory_bytes": at[32768].weight_bytes + at[32768].kv_cache_bytes,
                        "decode_bytes": sum(
                            w * at[t].decode_bytes_per_token / 4 for t, w in ((8192, 0.75), (32768, 0.25))
                        ),
                        "decode_seconds": step[32768] / 2,
                        "first_token_seconds": float(prefill_time(cost(spec, 32768), H100).seconds) / 2,
                        "training_days": training_hours / 24 / 8,
                        "training_device_hours": training_hours,
                        "serving_device_hours": hours,
                        "usd": 2.0 * (hours + training_hours),
                        "tokens": tokens,
                    }
                )
    return found


def test_every_cost_equals_its_formula_on_one_spec() -> None:
    answer = solve(**ASK)
    expected = sorted(brute_force(), key=lambda item: item["usd"])
    assert len(answer.candidates) == len(expected)
    by_shape = {(e["width"], e["depth"], e["kv"]): e for e in expected}
    for candidate in answer.candidates:
        shape = candidate.hidden_size, candidate.num_hidden_layers, candidate.num_key_value_heads
        for name, value in by_shape[shape].items():
            if name in candidate.costs:
                assert candidate.costs[name] == pytest.approx(value, rel=1e-12), name
        assert candidate.objective == pytest.approx(by_shape[shape]["usd"], rel=1e-12)
    assert [c.objective for c in answer.candidates] == pytest.approx([e["usd"] for e in expected], rel=1e-12)


@pytest.mark.parametrize(
    "limits",
    [
        {"memory_bytes": 8e9},
        {"decode_seconds": 1.2e-3},
        {"first_token_seconds": 0.15},
        {"training_days": 8},
        {"tokens": 1e11, "memory_bytes": 2e10},
        {"decode_bytes": 1.5e9, "training_flops": 3e20},
    ],
)
@pytest.mark.parametrize("minimize", ["usd", "memory_bytes", {"usd": 1.0, "memory_bytes": 1e-4}])
def test_limits_by_brute_force(limits: dict[str, float], minimize: Any) -> None:
    weights = minimize if isinstance(minimize, dict) else {minimize: 1.0}
    if minimize == "memory_bytes" and not {"training_days", "tokens", "training_flops"} & set(limits):
        assert "has no optimum while tokens are free" in refusal(**{**ASK, "minimize": minimize, "constraints": limits})
        return
    every = brute_force()
    allowed = [e for e in every if all(e[name] <= most for name, most in limits.items())]
    assert 0 < len(allowed) < len(every)  # the limits cut something off, and not all
    answer = solve(**{**ASK, "minimize": minimize, "constraints": limits})
    expected = sorted(sum(weight * e[name] for name, weight in weights.items()) for e in allowed)
    assert [c.objective for c in answer.candidates] == pytest.approx(expected, rel=1e-12)


def test_the_binding_limit_is_named_with_its_price() -> None:
    free, held = solve(**ASK), solve(**{**ASK, "constraints": {"tokens": 5e10}})
    best = held.candidates[0]
    assert free.candidates[0].binding == "loss"
    assert best.binding == "tokens"
    gain = 100 * (best.objective / free.candidates[0].objective - 1)
    assert f"Without constraints.tokens the best usd would be {gain:.3g} % better." in held.notes


@pytest.mark.parametrize("budget", [{"usd": 2e5}, {"training_days": 30}, {"device_hours": 1e6}])
def test_budgets_in_money_and_time_are_spent(budget: dict[str, float]) -> None:
    name, amount = next(iter(budget.items()))
    keys = {key: ASK[key] for key in ("hardware", "training", "space")}
    answer = solve(**keys, budget=budget, serving={**SERVED, "tokens": 1e10})
    for candidate in answer.candidates:
        assert candidate.costs[name] == pytest.approx(amount, rel=1e-12)
        assert candidate.binding == name


def test_data_limits_the_tokens_and_repetition_is_said() -> None:
    answer = solve(budget={"training_flops": 1e21}, constraints={"unique_tokens": 1e9})
    best = answer.candidates[0]
    assert best.tokens == pytest.approx(4e9, rel=1e-12)  # four epochs
    assert best.training_flops < 1e21
    assert best.binding == "tokens"
    assert any("repeats the data 4 times" in note for note in answer.notes)


def test_heads_split_over_devices_and_sizes_divide() -> None:
    space = {"num_attention_heads": [8, 12, 16], "num_key_value_heads": [1, 2, 4, 8]}
    keys: dict[str, Any] = {"budget": {"training_flops": 1e20}, "space": space, "candidates": 60}
    answer = solve(**keys, serving={"devices": 4}, constraints={"multiple_of": {"hidden_size": 256}})
    found = {(c.num_attention_heads, c.num_key_value_heads) for c in answer.candidates}
    assert found == {(8, 4), (8, 8), (12, 4), (16, 4), (16, 8)}
    assert all(c.hidden_size % 256 == 0 for c in answer.candidates)
    least = solve(**keys, constraints={"min_key_value_heads": 8})
    assert {c.num_key_value_heads for c in least.candidates} == {8}


def test_a_target_error_is_the_loss_that_gives_it() -> None:
    law = load_published("overtrain-c4")
    target = {"error": 0.62}
    answer = solve(law="overtrain-c4", target=target)
    best = answer.candidates[0]
    assert best.errors is not None
    assert best.errors["err_avg17"] == pytest.approx(0.62, rel=1e-12)
    assert float(law.downstream["err_avg17"].error(best.loss)) == pytest.approx(0.62, rel=1e-12)
    assert "target.task: expected one of err_avg17, err_avg46, got nothing" in refusal(
        law="overtrain-c4-refit", target=target
    )
    assert "has no law from loss to error" in refusal(target=target)
    assert "choose an error between" in refusal(law="overtrain-c4", target={"error": 0.1})


def test_headline_savings_at_128k() -> None:
    """Heads 8,1 against Llama-3 GQA (16 x 2048, 32,8) at loss 2.615: -50.8 % memory, -57.8 % FLOPs (2503.09579, 5.2)."""
    found = {}
    for law in ("gqa-figure-2", None):
        overrides = ["target.loss=2.615", *([f"law={law}"] if law else [])]
        best = plan(load_plan(GQA, overrides)).candidates[0]
        found[law] = best
        assert (best.num_attention_heads, best.num_key_value_heads) == (8, 1)
        depth, width, context = 16, 2048, 131072
        n = 8 * depth * width**2 + 2 * depth * width * 64 * (32 + 8)
        memory = 2 * (n + 2 * context * depth * 64 * 8)
        flops = context * (2 * n + 4 * context * depth * 64 * 32)
        assert 100 * (best.memory_bytes / memory - 1) == pytest.approx(-50.8, abs=4)
        assert 100 * (best.flops / flops - 1) == pytest.approx(-57.8, abs=4)
    assert found["gqa-figure-2"].z == pytest.approx(found[None].z, rel=2e-3)  # fitted E 1.95 against the rounded sheet


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[str, Any] = {
        "budget": {"training_flops": 1e20},
        "space": {"aspect": [40, 200], "num_key_value_heads": [1, 2]},
    }
    whole = solve(**keys)
    monkeypatch.setattr(shapes, "CHUNK", 97)
    monkeypatch.setattr(screen, "SAMPLE", 500)
    parts = solve(**keys)
    assert parts.screened == whole.screened > 1000
    assert [c.hash for c in parts.candidates] == [c.hash for c in whole.candidates]
    assert any("every 3th shape" in note or "th shape and the best" in note for note in parts.notes)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"constraints": {"decode_seconds": 1e-5}}, "decode_seconds needs hardware: {device: ...}"),
    ({"hardware": {"device": "h100-sx"}}, "did you mean 'h100-sxm'?"),
    ({"hardware": {"device": "trainium2"}, "minimize": "training_usd"}, "has no price in the table; give usd_per_hour"),
    ({"minimize": "usd"}, "usd needs serving.tokens"),
    ({"minimize": {"memory_byte": 1}}, "minimize"),
    ({"constraints": {"memory_bytes": "device"}}, "constraints.memory_bytes: device needs hardware"),
    ({"serving": {"context": {"8192": 1}}}, "expected a whole number above 0 or {context: share}"),
    ({"target": {}}, "target: expected a loss or an error, got neither"),
    (
        {"space": {"num_key_value_heads": [1, 2]}, "serving": {"devices": 8}},
        "no head configuration is left; key/value heads must divide query heads; serving.devices asks for multiples of 8",
    ),
    (
        {"constraints": {"tokens": 1e10, "memory_bytes": 1e8}},
        "no shape keeps all limits, whichever one is lifted",
    ),
]


@pytest.mark.parametrize(("keys", "sentence"), REFUSED)
def test_refusals(keys: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(**{"target": {"loss": 2.3}, **keys})


def test_the_nearest_change_is_enough() -> None:
    keys: dict[str, Any] = {**ASK, "constraints": {"decode_seconds": 1e-4}}
    said = refusal(**keys)
    found = re.search(
        r"constraints.decode_seconds: the smallest shape that meets the rest takes ([\d.e-]+) seconds", said
    )
    assert found
    least = float(found[1])
    assert solve(**{**ASK, "constraints": {"decode_seconds": least}}).candidates
    assert "raise it to that" in refusal(**{**ASK, "constraints": {"decode_seconds": least * (1 - 1e-3)}})
    short = refusal(**{**ASK, "constraints": {"tokens": 2e10}})
    loss = re.search(r"or target.loss to ([\d.]+)", short)
    assert loss
    assert solve(**{**ASK, "target": {"loss": float(loss[1])}, "constraints": {"tokens": 2e10}}).candidates


def test_limits_that_contradict_each_other_are_raised_together() -> None:
    """The change that is named, of several limits at once, is enough; less of any of them is not."""
    keys: dict[str, Any] = {**ASK, "constraints": {"memory_bytes": 1e9, "training_days": 0.3}}
    said = refusal(**keys)
    assert "no shape keeps all limits, whichever one is lifted; the nearest change raises" in said
    named = dict(re.findall(r"constraints\.(\w+) to ([\d.e+]+)", said))
    assert set(named) == {"memory_bytes", "training_days"}
    raised = {name: float(value) for name, value in named.items()}
    assert solve(**{**keys, "constraints": raised}).candidates
    for name, value in raised.items():
        assert "constraints." in refusal(**{**keys, "constraints": {**raised, name: value * 0.99}})


@pytest.mark.parametrize("limit", ["memory_bytes", "parameters"])
def test_real_valued_refusals_name_a_number_that_does(limit: str) -> None:
    said = ""
    try:
        plan(load_plan(GQA, [f"constraints.{limit}=1e6"]))
    except InputError as error:
        said = str(error)
    found = re.search(r"the smallest shape that meets the rest takes ([\d.e+]+) ", said)
    assert found
    for factor, does in ((1.0, True), (0.99, False)):
        asked = load_plan(GQA, [f"constraints.{limit}={float(found[1]) * factor}"])
        if does:
            assert plan(asked).candidates
        else:
            with pytest.raises(InputError):
                plan(asked)


def test_a_limit_that_hardly_leaves_room_is_met() -> None:
    """A slit of depths between the target and the memory: the search finds it."""
    free = plan(load_plan(GQA)).candidates[0]
    held = plan(load_plan(GQA, [f"constraints.memory_bytes={free.memory_bytes * (1 + 1e-6)!r}"]))
    assert [(c.num_attention_heads, c.num_key_value_heads) for c in held.candidates] == [(8, 1)]
    assert held.candidates[0].z == pytest.approx(free.z, rel=1e-9)


def test_a_small_target_still_has_a_shape_that_can_be_built() -> None:
    """The real-valued optimum is narrower than eight key/value heads of 128 are."""
    answer = solve(target={"loss": 4.6}, space={"num_key_value_heads": 8})
    assert answer.candidates[0].hidden_size == 1024
    assert answer.real_optimum.hidden_size < 1024 / 3


def test_an_ideal_split_over_devices_says_what_it_leaves_out() -> None:
    answer = solve(**ASK)
    best = answer.candidates[0]
    said = next(note for note in answer.notes if "divide by 2 devices ideally" in note)
    assert f"{2 * best.num_hidden_layers} of {best.hidden_size * 4 * 2 / 1e3:.4g} kB per decoded step" in said
    alone = solve(**{**ASK, "serving": {**SERVED, "devices": 1}})
    assert not any("all-reduces" in note for note in alone.notes)
