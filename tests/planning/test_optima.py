"""The planner against published optima and closed forms."""

import json

import pytest

from scantling.errors import InputError
from scantling.planning import load_plan, plan
from scantling.resolve import resolve
from scantling.yamlio import loads
from tests.planning.asking import EPOCH, GQA, SARDANA, heads, inline, solve

# --- cost-optimal GQA (arXiv 2503.09579) -------------------------------------------------------------------------------

# heads: N*, L, d, M bytes, C total, Z at loss 2.7 and a context of 131072
WORKED = {
    (8, 1): (5.0125e8, 15.2719, 1954.8, 1.5149e9, 6.6873e14, 43774.8),
    (4, 1): (5.6963e8, 16.1133, 2062.5, 1.6799e9, 4.3279e14, 44452.4),
    (8, 2): (4.6712e8, 14.8692, 1903.3, 1.9321e9, 6.4562e14, 48202.9),
    (2, 1): (7.5063e8, 17.7671, 2274.2, 2.0974e9, 3.5306e14, 48285.7),
    (1, 1): (9.3556e8, 19.1710, 2453.9, 2.5144e9, 3.2957e14, 52036.7),
    (8, 4): (4.4213e8, 14.5136, 1857.7, 2.8322e9, 6.2655e14, 56453.8),
    (8, 8): (4.1394e8, 14.0342, 1796.4, 4.5951e9, 6.0230e14, 69453.8),
}


def test_gqa_worked_example() -> None:
    answer = json.loads(json.dumps(plan(load_plan(GQA)).to_json(), allow_nan=False))
    found = answer["candidates"]
    assert [(c["num_attention_heads"], c["num_key_value_heads"]) for c in found] == list(WORKED)
    for candidate, row in zip(found, WORKED.values(), strict=True):
        keys = ("n_star", "num_hidden_layers", "hidden_size", "memory_bytes", "flops", "z")
        for key, value in zip(keys, row, strict=True):
            # the sheet prints five or six digits of numbers it computed from rounded ones
            assert candidate[key] == pytest.approx(value, rel=3e-5), key
    best = found[0]
    assert [f"{best[key]:.4e}" for key in ("n_star", "memory_bytes", "flops")] == [
        "5.0125e+08",
        "1.5149e+09",
        "6.6873e+14",
    ]
    assert f"{best['z']:.1f}" == "43774.8"
    assert best["parameters"] == pytest.approx(best["n_star"], rel=1e-11)
    assert best["loss"] == pytest.approx(2.7, rel=1e-12)
    assert best["margin_percent"] == pytest.approx(100 * (44452.4 / 43774.8 - 1), abs=1e-3)


CELLS = [
    (3.0, 32768, (8, 1)),
    (3.0, 65536, (4, 1)),
    (2.9, 65536, (8, 1)),
    (2.8, 65536, (8, 1)),
    (3.0, 131072, (4, 1)),
    (2.9, 131072, (4, 1)),
    (2.8, 131072, (8, 1)),
    (2.7, 131072, (8, 1)),
    (2.6, 131072, (8, 1)),
]


@pytest.mark.parametrize(("loss", "context", "winner"), CELLS)
def test_gqa_published_winners(loss: float, context: int, winner: tuple[int, int]) -> None:
    """Nine of nine cells of table 4 whose winner is among the fitted configurations; two margins are under 0.3 %."""
    answer = plan(load_plan(GQA, [f"target.loss={loss}", f"serving.context={context}"]))
    assert heads(answer.candidates[0]) == winner
    margins = {(3.0, 65536): 0.23, (2.8, 131072): 0.11}
    if (loss, context) in margins:
        assert answer.candidates[0].margin_percent == pytest.approx(margins[loss, context], abs=0.005)
        assert any("within 0.5 % of the best z" in note for note in answer.notes)


def test_gqa_whole_numbers_are_buildable_and_near_the_real_ones() -> None:
    answer = plan(load_plan(GQA, ["space.shapes.real_valued=false"]))
    assert {heads(c) for c in answer.candidates} == set(WORKED)
    assert heads(answer.candidates[0]) == (8, 1)
    for candidate in answer.candidates:
        n_star, depth, width = WORKED[int(candidate.num_attention_heads), int(candidate.num_key_value_heads)][:3]
        assert candidate.loss <= 2.7
        assert candidate.parameters >= n_star * (1 - 1e-4)
        assert candidate.num_hidden_layers == pytest.approx(depth, abs=1.01)
        assert candidate.hidden_size == pytest.approx(width, abs=130)
        assert candidate.yaml is not None
        assert resolve(loads(candidate.yaml)).hash == candidate.hash
    assert heads(answer.real_optimum) == (8, 1)


def test_gqa_extrapolation_is_flagged_by_head_configuration() -> None:
    best = plan(load_plan(GQA)).candidates
    assert [c.extrapolated for c in best] == [False, True, False, True, True, False, False]
    assert best[3].extrapolation[0].startswith("N = 7.506e+08 is 1.366 times above the fitted range")
    stated = plan(load_plan(GQA, ["law.ranges={N: [1e7, 5e8]}"])).candidates[0]
    assert stated.extrapolation == ("N = 5.013e+08 is 1.003 times above the fitted range 1e+07 to 5e+08",)


def test_gqa_target_at_the_entropy_is_refused() -> None:
    with pytest.raises(InputError, match=r"plan-gqa.yaml:6: target.loss: the law never goes down to E = 2.7 nats"):
        plan(load_plan(GQA, ["law.E=2.7"]))


# --- closed forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1e18, 1e21, 3e24])
def test_compute_optimum_equals_the_closed_form(budget: float) -> None:
    """N* = G (C/6)^a (arXiv 2203.15556, eq. 4), by the planner's own one-dimensional search."""
    real = {"real_valued": True}
    answer = solve(law=inline(EPOCH), budget={"training_flops": budget}, cost_convention="6nd", space=real)
    expected = EPOCH.optimum(budget)
    assert answer.law_optimum is not None
    for found in (answer.law_optimum, answer.candidates[0]):
        assert found.parameters == pytest.approx(float(expected.N), rel=1e-6)
        assert found.tokens == pytest.approx(float(expected.D), rel=1e-6)
        assert found.loss == pytest.approx(float(expected.loss), rel=1e-12)
    if budget == 1e21:
        assert answer.law_optimum.parameters == pytest.approx(2.7785e9, rel=2e-5)
        assert answer.law_optimum.loss == pytest.approx(2.305529, abs=1e-6)


@pytest.mark.parametrize("loss", [3.0, 2.3])
def test_cheapest_training_for_a_loss_equals_the_closed_form(loss: float) -> None:
    found = solve(law=inline(EPOCH), target={"loss": loss}).law_optimum
    assert found is not None
    expected = float(EPOCH.compute_for_loss(loss))
    assert found.training_flops == pytest.approx(expected, rel=1e-9)
    assert found.parameters == pytest.approx(float(EPOCH.optimum(expected).N), rel=1e-6)
    assert found.saving_flops == 0


def test_inference_aware_optimum_of_the_published_example() -> None:
    """The quality of a compute-optimal 13B, 2e12 served tokens (arXiv 2401.00448, figure 1)."""
    g = (SARDANA.alpha * SARDANA.A / (SARDANA.beta * SARDANA.B)) ** (1 / (SARDANA.alpha + SARDANA.beta))
    compute = 6 * (13e9 / g) ** ((SARDANA.alpha + SARDANA.beta) / SARDANA.beta)
    loss = float(SARDANA.optimum(compute).loss)
    law, target, serving = inline(SARDANA), {"loss": loss}, {"tokens": 2e12}
    answer = solve(law=law, target=target, serving=serving, cost_convention="6nd", space={"real_valued": True})
    found = answer.law_optimum
    assert found is not None
    expected = SARDANA.inference_optimum(loss, 2e12)
    assert found.parameters == pytest.approx(expected.N, rel=1e-6)
    assert found.tokens == pytest.approx(expected.D, rel=1e-6)
    assert answer.candidates[0].parameters == pytest.approx(expected.N, rel=1e-6)
    assert answer.candidates[0].lifetime_flops == pytest.approx(expected.total_flops, rel=1e-12)
    assert found.parameters == pytest.approx(6.97e9, rel=1e-3)
    assert found.tokens == pytest.approx(1.248e12, rel=1e-3)
    assert found.compute_optimal_parameters == pytest.approx(13e9, rel=1e-9)
    assert found.saving_flops == pytest.approx(1.69e22, rel=2e-3)
    assert found.saving_percent == pytest.approx(17.45, abs=5e-3)


def test_lifetime_budget_and_lifetime_target_are_inverse() -> None:
    """The best loss of a lifetime budget needs exactly that budget."""
    spent = solve(budget={"lifetime_flops": 5e22}, serving={"tokens": 1e12}).law_optimum
    assert spent is not None
    back = solve(target={"loss": spent.loss}, serving={"tokens": 1e12}).law_optimum
    assert back is not None
    assert back.lifetime_flops == pytest.approx(5e22, rel=1e-9)
    assert back.parameters == pytest.approx(spent.parameters, rel=1e-6)
