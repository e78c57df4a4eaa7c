"""Families, shapes and ratios as searched axes: priced exactly, ranked by evidence, and refused without it."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scantling.compare import compare_families
from scantling.config import load_study
from scantling.costing import cost, train_flops
from scantling.laws import LawFit, fit, load_published, saving
from scantling.planning import load_plan, plan
from scantling.planning.curves import Curve
from scantling.planning.evidence import Gain, load_evidence, published_evidence
from scantling.planning.outcome import pose
from scantling.planning.shapes import families, whole_shapes
from scantling.planning.space import Space
from scantling.planning.variants import half_widths, moments
from scantling.resolve import spec_from
from scantling.shapes import WidthProfile, continuous, ratio_slope
from scantling.study import cells
from tests.planning.asking import EPOCH, EXAMPLES, inline, refusal, solve

MOE = {
    "kind": "moe",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "expert": {"kind": "dense", "expansion": 0.75},
    "shared_expert": {"kind": "low_rank", "expansion": 1.5, "parameter_ratio": 0.5},
}
BOWTIE = published_evidence()["bowtie"]["families"]["bowtie"]
FAMILIES = {
    **published_evidence()["structured-ffn"]["families"],
    "moe": {"ffn": MOE},
    "moe_first_dense": {"ffn": MOE, "per_layer_config": {0: {"ffn": {"kind": "dense", "expansion": 3}}}},
    "rank_64": {"ffn": {"kind": "low_rank", "rank": 64, "gated": False}},
    "mqa": {"num_key_value_heads": 1},
}


# --- prices ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_priced_as_their_specs(name: str) -> None:
    """Arrays of shapes of every structure, and the specs built from them: the same integers."""
    space = Space.model_validate(
        {
            "vocab_size": 5003,
            "hidden_size": [256, 512, 896, 1280],
            "num_hidden_layers": [2, 7, 24],
            "head_dim": 64,
            "num_attention_heads": [4, 8],
            "ffn": {"expansion": 3.5, "multiple_of": 32},
            "families": {name: FAMILIES[name]},
        }
    )
    shapes = whole_shapes(space, families(space, None), (1, 1))
    assert len(shapes) == 4 * 3 * 2
    found = cost(shapes.stack(space, space.variants[0]), 4097, 3, 2)  # type: ignore[arg-type]
    for index in range(0, len(shapes), 5):
        exact = cost(spec_from(shapes.mapping(index, space, 4097)), 4097, 3, 2)
        for count, value in exact.params.items():
            assert np.broadcast_to(found.params[count], len(shapes))[index] == value, count
        for kind, flops in exact.flops_per_token.items():
            assert np.broadcast_to(found.flops_per_token[kind], len(shapes))[index] == flops, kind
        assert found.decode_bytes_per_token[index] == exact.decode_bytes_per_token  # type: ignore[index]
        assert found.kv_cache_bytes[index] == exact.kv_cache_bytes  # type: ignore[index]


def test_a_width_profile_is_priced_by_its_moments() -> None:
    """Half-stacks have the profile's mean and mean square; the built spec is within the rounding of its widths."""
    profile = WidthProfile.model_validate(BOWTIE["width"])
    for depth in (5, 16, 40):
        high, low = half_widths(profile, np.array(float(depth)))
        mean, square = moments(profile, depth)
        assert (high + low) / 2 == pytest.approx(mean, rel=1e-12)
        assert (high**2 + low**2) / 2 == pytest.approx(square, rel=1e-12) == pytest.approx(1, rel=1e-9)
        # the profile itself, at the steepness whose mean square is 1
        best = min(
            (continuous(profile, depth, ratio_slope(profile, depth, x), 1.0) for x in np.linspace(0.3, 0.999, 4000)),
            key=lambda widths: abs(np.mean((0.3 * np.array(widths) / min(widths)) ** 2) - 1),
        )
        assert mean == pytest.approx(np.mean(0.3 * np.array(best) / min(best)), rel=2e-3)
    space = Space.model_validate(
        {"hidden_size": [1024, 2048], "num_hidden_layers": [16, 24], "head_dim": 64, "families": {"bowtie": BOWTIE}}
    )
    shapes = whole_shapes(space, families(space, None), (1, 1))
    found = cost(shapes.stack(space, space.variants[0]), 4096)  # type: ignore[arg-type]
    for index in range(len(shapes)):
        exact = cost(spec_from(shapes.mapping(index, space, 4096)), 4096)
        for got, value in (
            (found.params["total"], exact.params["total"]),
            (found.flops_per_token["train"], exact.flops_per_token["train"]),
            (found.kv_cache_bytes, exact.kv_cache_bytes),
        ):
            assert got[index] == pytest.approx(value, rel=0.02)  # type: ignore[index]


# --- evidence ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", published_evidence())
def test_shipped_savings_are_refitted_from_the_shipped_rows(name: str) -> None:
    plain = published_evidence()[name]
    rows = pd.DataFrame(plain["rows"])
    for candidate, printed in plain["savings"].items():
        found = saving(rows, baseline=plain["baseline"], candidate=candidate)
        assert found.low is not None and found.high is not None
        assert found.value == pytest.approx(printed["value"], abs=2e-4), candidate
        for got, shipped in ((found.low, "low"), (found.high, "high")):  # quantiles of simulated noise
            assert got == pytest.approx(printed[shipped], abs=1e-2), (candidate, shipped)
    assert set(plain["families"]) == {plain["baseline"], *plain["savings"]}


def test_a_family_is_worth_the_baseline_at_scaled_size_and_tokens() -> None:
    """The tokens of a structured candidate from its spec, its dense twin's spec and the closed form of the law."""
    answer = solve(
        law=inline(EPOCH),
        evidence="structured-ffn",
        target={"loss": 2.7},
        space={"hidden_size": 1024, "num_hidden_layers": 16, "head_dim": 64, "families": ["dense", "low_rank_63"]},
    )
    dense, low_rank = (next(c for c in answer.candidates if c.family == name) for name in ("dense", "low_rank_63"))
    assert dense.spec is not None and low_rank.spec is not None and dense.params is not None
    ratio = train_flops(spec_from(low_rank.spec), 2048, 1) / train_flops(spec_from(dense.spec), 2048, 1)
    value = published_evidence()["structured-ffn"]["savings"]["low_rank_63"]["value"]
    factor = math.sqrt(ratio / (1 - value))
    n = dense.params["total"]
    assert dense.tokens == pytest.approx(float(EPOCH.tokens_for_loss(n, 2.7)), rel=1e-12)
    both = float(EPOCH.tokens_for_loss(factor * n, 2.7)) / factor
    on_path = float(EPOCH.loss(factor * n, factor * math.sqrt(19.9 * 20.1) * n))  # what k means at the measured D/N
    left = on_path - EPOCH.E - EPOCH.B * (math.sqrt(19.9 * 20.1) * n) ** -EPOCH.beta
    alone = float(EPOCH.tokens_for_loss((EPOCH.A / left) ** (1 / EPOCH.alpha), 2.7))
    assert low_rank.tokens == pytest.approx(max(both, alone), rel=1e-9)
    assert alone > 1.02 * both  # at more tokens per parameter than measured, a deficit in size weighs more
    assert dense.loss == pytest.approx(2.7) and low_rank.loss == pytest.approx(2.7)
    assert [layer.ffn.kind for layer in spec_from(low_rank.spec).layers] == ["dense", *["low_rank"] * 15]
    assert low_rank.loss_low is not None and low_rank.loss_high is not None  # from the evidence: the law has no draws
    assert low_rank.loss_low < 2.7 < low_rank.loss_high
    assert any("count the uncertainty of the evidence about families alone" in note for note in answer.notes)
    assert any("M = " in sentence and "measured for this family" in sentence for sentence in low_rank.extrapolation)


def comparison(folder: Path, true: float) -> Path:
    """What `fit --compare` writes of two families, the second with a known saving."""
    budgets = np.geomspace(1e17, 1e20, 8)
    rng = np.random.default_rng(3)
    rows = []
    for family, need in (("uniform", 1.0), ("lean", 1 - true)):
        for i, c in enumerate(budgets):
            n, loss = math.sqrt(c / 120), 1.8 + 1.7 * (c / need / 1e19) ** -0.13
            rows.append({"family": family, "run": f"r{i}", "N": n, "D": 20 * n, "C": c,
                         "loss": loss * math.exp(0.001 * rng.standard_normal()), "tokens_per_parameter": 20})  # fmt: skip
    settings = {
        "loss": "loss",
        "params": "N",
        "tokens": "D",
        "law": "frontier",
        "resamples": 50,
        "seed": 0,
        "columns": {"C": "C"},
    }
    path = folder / "comparison.json"
    path.write_text(json.dumps(compare_families(pd.DataFrame(rows), "family", "uniform", settings).to_json()))
    return path


def test_an_own_comparison_plugs_in(tmp_path: Path) -> None:
    """A family that needs 20 % fewer FLOPs: the cheapest training for a loss is 20 % cheaper."""
    path = comparison(tmp_path, 0.2)
    evidence = load_evidence(path.name, tmp_path)
    assert -math.expm1(evidence.gains["lean"].log_need) == pytest.approx(0.2, abs=0.03)
    lean = {"ffn": {"kind": "low_rank", "parameter_ratio": 0.5}}
    answer = solve(
        law="chinchilla-epoch-huber",
        evidence=str(path),
        target={"loss": 2.6},
        cost_convention="6nd",
        parameters="non_embedding",
        space={"families": {"uniform": {}, "lean": lean}, "real_valued": True},
    )
    best = {c.family: c for c in answer.candidates}
    assert answer.candidates[0].family == "lean"
    need = math.exp(evidence.gains["lean"].log_need)
    saved = best["lean"].training_flops / best["uniform"].training_flops
    assert need * (1 - 1e-9) <= saved < 1.03 * need  # less than measured off the path of 20 tokens per parameter
    assert best["lean"].probability_best is not None and best["lean"].probability_best > 0.9
    assert any("Assumed: a saving measured there holds" in note for note in answer.notes)
    assert load_study_cells(answer.study, tmp_path) > 0


def load_study_cells(text: str | None, folder: Path) -> int:
    assert text is not None
    path = folder / "study.yaml"
    path.write_text(text)
    study = load_study(path)
    assert "uniform" in study.families or len(study.families) == 1
    return len(cells(study))


def test_the_baseline_alone_changes_nothing() -> None:
    asked: dict[str, Any] = {"budget": {"training_flops": 1e20}, "candidates": 5}
    without, beside = (
        solve(**asked),
        solve(**asked, evidence="bowtie", space={"families": ["uniform"]}),
    )
    assert [c.hash for c in without.candidates] == [c.hash for c in beside.candidates]
    assert [c.loss for c in without.candidates] == [c.loss for c in beside.candidates]


def test_the_bowtie_is_chosen_on_its_evidence_and_built_exactly(tmp_path: Path) -> None:
    answer = solve(budget={"training_flops": 1e20}, evidence="bowtie", space={"head_dim": 64}, candidates=6)
    best = answer.candidates[0]
    assert best.family == "bowtie" and best.spec is not None
    spec = spec_from(best.spec)
    assert len(set(spec.widths)) > 2
    assert best.params == cost(spec).params
    assert best.training_flops == pytest.approx(1e20, rel=1e-12)
    assert best.training_flops == pytest.approx(train_flops(spec, 2048, best.tokens), rel=1e-12)
    assert {c.family for c in answer.candidates} == {"uniform", "bowtie"}
    assert any(point.family == "bowtie" for point in answer.front)
    assert load_study_cells(answer.study, tmp_path) > 0
    found = plan(
        load_plan(EXAMPLES / "plan-serving.yaml", ["evidence=bowtie", "next.training_flops=1e20", "candidates=4"])
    ).next
    assert found is not None
    assert found.runs and {run.family for run in found.runs} <= {"uniform", "bowtie"}
    assert load_study_cells(found.study, tmp_path) == len(found.runs)


# --- laws of other columns -------------------------------------------------------------------------------------------------


def law_file(folder: Path, law: str, params: dict[str, float], **keys: Any) -> str:
    made = LawFit(law=law, params=params, source="made for a test", conventions={"N": "total"}, ranges={}, **keys)
    path = folder / "law.json"
    path.write_text(json.dumps(made.to_json()))
    return str(path)


WIDTH_DEPTH = {"A": 60.0, "B": 1.2, "K": 900.0, "E": 1.7, "alpha": 0.75, "beta": 0.8, "gamma": 0.33}


def test_a_law_of_width_and_depth_chooses_the_aspect(tmp_path: Path) -> None:
    """Every shape of a small space by its own spec; and the real-valued optimum stands still to first order."""
    law = law_file(tmp_path, "width-depth", WIDTH_DEPTH)
    widths, depths = [512, 768, 1024, 1280, 1536], [4, 8, 12, 16, 24]
    space = {"hidden_size": widths, "num_hidden_layers": depths, "head_dim": 64}
    answer = solve(law=law, target={"loss": 2.6}, space=space, candidates=100)
    expected = []
    for width in widths:
        for depth in depths:
            left = 2.6 - 1.7 - 60 * width**-0.75 - 1.2 * depth**-0.8
            if left > 0:
                sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": width // 64}
                inner = 32 * round(width * 8 / 3 / 32)
                spec = spec_from({"vocab_size": 32000, **sizes, "intermediate_size": inner})
                expected.append(train_flops(spec, 2048, (900 / left) ** (1 / 0.33)))
    assert [c.objective for c in answer.candidates] == pytest.approx(sorted(expected), rel=1e-12)
    real = solve(law=law, target={"loss": 2.6}, space={"head_dim": 64, "real_valued": True}).candidates[0]
    assert 16 < real.hidden_size / real.num_hidden_layers < 256
    for factor in (0.97, 1.03):  # any other aspect is worse
        aspect = real.hidden_size / real.num_hidden_layers * factor
        held = solve(law=law, target={"loss": 2.6}, space={"head_dim": 64, "real_valued": True, "aspect": aspect})
        assert held.candidates[0].objective > real.objective
    assert not any("ranked by cost alone" in note for note in answer.notes)
    assert any("The law knows width, depth and D." in note for note in answer.notes)
    assert solve(law=law, budget={"training_flops": 1e19}, space={"head_dim": 64}).screened > 1000


def test_a_law_of_head_counts_chooses_heads_at_one_size() -> None:
    """L(n_h) = a n_h^b + c of the 470M model (arXiv 2503.09579, appendix I): the fewest heads that reach the target."""
    asked: dict[str, Any] = {
        "law": "heads-470m-1k",
        "target": {"loss": 2.85},
        "minimize": "memory_bytes",
        "training": {"tokens_per_parameter": 20},
    }
    space = {"hidden_size": 1280, "num_hidden_layers": 24, "head_dim": 64, "num_attention_heads": [8, 16, 20, 32, 64]}
    answer = solve(**asked, space=space)
    fewest = min(h for h in space["num_attention_heads"] if 0.579 * h**-0.124 + 2.473 <= 2.85)  # type: ignore[attr-defined]
    assert answer.candidates[0].num_attention_heads == fewest == 32
    assert "says nothing of how the loss falls with size" in refusal(**asked)
    assert "says nothing of training tokens" in refusal(**{**asked, "training": {}}, space=space)


def test_a_law_of_the_feed_forward_ratio_chooses_it(tmp_path: Path) -> None:
    """A N^-a falls, K ratio^k rises: with a steep k the small ratio wins, with a flat one the large."""
    base = {"E": 1.7, "A": 400.0, "alpha": 0.34, "B": 2000.0, "beta": 0.37, "K": 0.01}
    law = "E + A*N^-alpha + B*D^-beta + K*ffn_ratio^kappa"
    asked: dict[str, Any] = {"budget": {"training_flops": 1e19}, "space": {"ffn": {"expansion": [2, 4, 8]}}}
    winners = []
    for kappa in (2.0, -2.0):
        answer = solve(law=law_file(tmp_path, law, {**base, "kappa": kappa}), **asked)
        best = answer.candidates[0]
        winners.append(round(best.intermediate_size / best.hidden_size))
        n, d = best.parameters, best.tokens
        ratio = min((2, 4, 8), key=lambda r: abs(r - best.intermediate_size / best.hidden_size))
        expected = 1.7 + 400 * n**-0.34 + 2000 * d**-0.37 + 0.01 * ratio**kappa
        assert best.loss == pytest.approx(expected, rel=1e-12)
    assert winners == [2, 8]
    assert "several cannot be ranked; give one, or a law with the column ffn_ratio" in refusal(**asked)


def test_a_law_fitted_per_family_chooses_among_them(tmp_path: Path) -> None:
    """Rows of two families with one E; the experts' law counts active parameters."""
    rng = np.random.default_rng(4)
    rows = []
    for name, size in (("dense", 400.0), ("moe", 300.0)):
        for n in np.geomspace(1e7, 1e9, 6):
            for m in (10, 40, 160):
                loss = 1.7 + size * n**-0.34 + 2000 * (m * n) ** -0.37
                rows.append(
                    {"family": name, "N": n, "D": m * n, "loss": loss * math.exp(0.001 * rng.standard_normal())}
                )
    made = fit(pd.DataFrame(rows), law="two-architectures", resamples=60, conventions={"N": "active parameters"})
    path = tmp_path / "law.json"
    path.write_text(json.dumps(made.to_json()))
    both = {"dense": {}, "moe": {"ffn": {k: v for k, v in MOE.items() if k != "shared_expert"}}}
    asked: dict[str, Any] = {"law": str(path), "budget": {"training_flops": 1e20}, "candidates": 6}
    answer = solve(**asked, space={"families": both})
    best = answer.candidates[0]
    assert best.family == "moe" and best.params is not None
    assert best.parameters == best.params["active"] < best.params["total"]
    p = made.params
    expected = p["E"] + p["A[moe]"] * best.parameters ** -p["alpha"] + p["B[moe]"] * best.tokens ** -p["beta"]
    assert best.loss == pytest.approx(expected, rel=1e-12)
    assert best.probability_best is not None and {c.family for c in answer.candidates} == {"dense", "moe"}
    assert "tells dense, moe apart; say what they are" in refusal(**asked)
    assert "no evidence about 'mo'; did you mean 'moe'?" in refusal(**asked, space={"families": {"mo": {}}})


@given(
    st.floats(0.1, 3.0), st.floats(0.05, 0.9), st.floats(0.05, 0.9), st.floats(1.0, 500.0), st.sampled_from([1.0, 0.11])
)
def test_tokens_invert_the_loss(floor: float, first: float, second: float, size: float, outer: float) -> None:
    """One power of D by its closed form, several by bisection, alone and within a power (Kaplan)."""
    for terms in (((size, first),), ((size, first), (2 * size, second))):
        curve = Curve(np.array([floor]), tuple((np.array([a]), p) for a, p in terms), outer)
        for d in (1e6, 3e11):
            loss = float(curve.loss(d)[0])
            assert float(curve.loss(curve.tokens(loss))[0]) == pytest.approx(loss, rel=1e-9)
        assert math.isinf(float(curve.tokens(floor**outer * (1 - 1e-9))[0]))


@pytest.mark.parametrize("law", ["chinchilla", "overtraining", "kaplan"])
def test_curves_agree_with_the_laws_own_prediction(law: str, tmp_path: Path) -> None:
    params = {
        "chinchilla": {"A": 400.0, "B": 2000.0, "E": 1.7, "alpha": 0.34, "beta": 0.37},
        "overtraining": {"a": 141.0, "b": 190.0, "E": 1.51, "eta": 0.121},
        "kaplan": {"Nc": 8.8e13, "Dc": 5.4e13, "alpha_N": 0.076, "alpha_D": 0.095},
    }[law]
    answer = solve(law=law_file(tmp_path, law, params), budget={"training_flops": 1e20})
    best = answer.candidates[0]
    made = LawFit(law=law, params=params, source="", conventions={}, ranges={})
    assert best.loss == pytest.approx(float(made.predict(best.parameters, best.tokens).value), rel=1e-12)


# --- sentences -----------------------------------------------------------------------------------------------------------------


TARGET = {"loss": 2.6}
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"space": {"families": {"lr": {"ffn": {"kind": "low_rank", "rank": 8}}}}},
        "nothing is known of this family's loss",
    ),
    ({"space": {"families": ["bowtie"]}}, "a list of names needs shipped evidence that defines them"),
    ({"evidence": "bowtie", "space": {"families": ["bowti"]}}, "bowtie does not know 'bowti'; did you mean 'bowtie'?"),
    ({"evidence": "bow"}, "evidence: 'bow' is neither a comparison's .json file nor shipped evidence"),
    (
        {"evidence": "bowtie", "space": {"families": {"other": {}}}},
        "no evidence about 'other'; expected one of",
    ),
    (
        {"evidence": "bowtie", "law": "gqa-figure-2", "minimize": "z"},
        "scales the N and D of a law of both (chinchilla, overtraining); gqa-figure-2 is another law",
    ),
    (
        {"space": {"families": {"a": {"hidden_size": 3}}}},
        "a.hidden_size: a plan's family takes ffn, per_layer_config, width",
    ),
    (
        {"space": {"families": {"a": {"ffn": {"kind": "low_rank"}}}}},
        "low_rank takes parameter_ratio (a share of the dense",
    ),
    ({"space": {"families": {"a": {"ffn": {"intermediate_size": 9}}}}}, "sizes follow the width, so give expansion"),
    (
        {"space": {"families": {"a": {"width": {"profile": "geometric"}}}}},
        "a.width: a geometric profile needs bottleneck_r",
    ),
    (
        {"space": {"families": {"a": {"width": {"profile": "stages", "blocks_per_stage": 2}}}}},
        "prices geometric profiles",
    ),
    (
        {"space": {"families": {"a": {"ffn": {**MOE, "num_experts_per_tok": 9}}}}},
        "a.ffn.num_experts_per_tok: expected at most 8 experts",
    ),
]


@pytest.mark.parametrize(("keys", "sentence"), REFUSED)
def test_refusals_of_axes_without_evidence(keys: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(**{"target": TARGET, **keys})


def test_gains_are_drawn_around_their_interval() -> None:
    gain = Gain(math.log(0.8), 0.1)
    needs = [math.exp(gain.drawn(x).log_need) for x in (-1.959964, 0.0, 1.959964)]
    assert needs == pytest.approx([0.8 * math.exp(-0.1959964), 0.8, 0.8 * math.exp(0.1959964)])
    problem = pose(load_plan(EXAMPLES / "plan-serving.yaml", ["evidence=bowtie"]))
    drawn = problem.law.drawn(50)
    assert len({law.gains[1].log_need for law in drawn}) == len(drawn) == 50  # type: ignore[union-attr]
    assert dataclasses.replace(gain, spread=0.0).drawn(3.0).log_need == gain.log_need
    assert load_published("chinchilla-epoch-huber").draws is not None
