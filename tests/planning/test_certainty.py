"""How sure a plan is: probabilities against every draw solved by itself, sensitivity, and the runs to do next."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scantling.config import load_study
from scantling.laws import load_published
from scantling.planning import Plan, load_plan, plan
from scantling.planning.next_runs import Question, grow, next_runs
from scantling.planning.outcome import pose
from scantling.planning.shapes import families, whole_shapes
from scantling.study import cells
from tests.planning.asking import EXAMPLES, GQA, heads, refusal, solve

HUBER = "chinchilla-epoch-huber"
SMALL: dict[str, Any] = {"hidden_size": [1024, 1536, 2048, 2560, 3072], "num_hidden_layers": 16, "head_dim": 64}


def test_probabilities_are_the_share_of_draws_solved_one_by_one(tmp_path: Path) -> None:
    """A plan for each of the law's draws, as inline coefficients: how often each shape wins, and by how much."""
    asked: dict[str, Any] = {"budget": {"training_flops": 2e21}, "space": SMALL}
    law = load_published(HUBER)
    assert law.draws is not None
    thinned = law.draws[:20]
    path = tmp_path / "law.json"
    path.write_text(json.dumps(dataclasses.replace(law, draws=thinned).to_json()))
    answer = solve(law=str(path), **asked)
    wins: Counter[float] = Counter()
    regrets: dict[float, list[float]] = {c.hidden_size: [] for c in answer.candidates}
    for row in thinned:
        inline = {"kind": "chinchilla", **dict(zip(law.params, map(float, row), strict=True))}
        ranked = solve(law=inline, **asked).candidates
        wins[ranked[0].hidden_size] += 1
        for item in ranked:
            regrets[item.hidden_size].append(item.objective - ranked[0].objective)
    for candidate in answer.candidates:
        assert candidate.probability_best == pytest.approx(wins[candidate.hidden_size] / len(thinned))
        assert candidate.expected_regret == pytest.approx(np.mean(regrets[candidate.hidden_size]), rel=1e-9, abs=1e-12)
        assert candidate.probability_reached == 1
    assert sum(c.probability_best or 0 for c in answer.candidates) == pytest.approx(1)


def test_without_draws_there_is_no_probability_and_it_is_said() -> None:
    answer = plan(load_plan(GQA))
    assert all(c.probability_best is None for c in answer.candidates)
    assert answer.no_probability == "the law is given by its coefficients alone, without their uncertainty"
    assert "next: needs draws of the law, to know what is not known" in refusal(
        budget={"training_flops": 1e20}, next={"training_flops": 1e18}
    )


@pytest.fixture(scope="module")
def head_law(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published head configurations with draws: 1 % of scatter in every A, shared by none."""
    law = load_published("gqa-figure-2")
    rng = np.random.default_rng(1)
    scatter = np.array([0.01 if name.startswith("A[") else 0.0 for name in law.params])
    draws = np.array(list(law.params.values())) * np.exp(scatter * rng.standard_normal((300, len(law.params))))
    path = tmp_path_factory.mktemp("law") / "heads.json"
    path.write_text(json.dumps(dataclasses.replace(law, draws=draws, bootstrap="made for a test").to_json()))
    return path


def test_a_fitted_head_law_gives_intervals_and_probabilities(head_law: Path) -> None:
    keys: dict[str, Any] = {
        "law": str(head_law),
        "minimize": "z",
        "target": {"loss": 2.7},
        "serving": {"context": 131072},
        "space": {"head_dim": 64, "real_valued": True},
    }
    answer, given = solve(**keys), plan(load_plan(GQA))
    assert [heads(c) for c in answer.candidates] == [heads(c) for c in given.candidates]
    first, second = answer.candidates[:2]
    assert first.loss_low is not None and first.loss_high is not None
    assert first.loss_low < 2.7 < first.loss_high
    assert first.probability_best is not None and second.probability_best is not None
    assert 0 < second.probability_best < first.probability_best < 1  # 1.5 % apart in Z, scattered by twice that
    assert sum(c.probability_best or 0 for c in answer.candidates) == pytest.approx(1)
    found = solve(**keys, next={"training_flops": 1e21, "noise": 2e-4}).next
    assert found is not None
    assert found.expected_regret_after < 0.8 * found.expected_regret
    assert {(8, 1), (4, 1)} & {(r.num_attention_heads, r.num_key_value_heads) for r in found.runs}


def test_sensitivity_is_the_plan_solved_again() -> None:
    answer = plan(load_plan(GQA))
    found = {(item.key, item.factor): item for item in answer.sensitivity}
    for factor in (0.5, 2.0):
        again = plan(load_plan(GQA, [f"serving.context={int(131072 * factor)}"])).candidates[0]
        item = found["serving.context", factor]
        assert (item.num_attention_heads, item.num_key_value_heads) == heads(again)
        assert item.same_heads == (heads(again) == heads(answer.candidates[0]))
    served = plan(load_plan(EXAMPLES / "plan-serving.yaml"))
    more = next(item for item in served.sensitivity if item.key == "serving.tokens" and item.factor == 2)
    again = plan(load_plan(EXAMPLES / "plan-serving.yaml", ["serving.tokens=4e12"])).candidates
    assert more.hidden_size == again[0].hidden_size
    mine = next(c for c in again if c.hidden_size == served.candidates[0].hidden_size)
    assert more.regret_percent == pytest.approx(100 * (mine.objective / again[0].objective - 1), abs=1e-9)


def test_the_memory_front_is_not_beaten() -> None:
    asked: dict[str, Any] = {"target": {"loss": 2.6}, "serving": {"tokens": 1e12, "batch": 64}}
    answer = solve(**asked, space=SMALL, candidates=100)
    points = answer.memory_front
    every = [(c.memory_bytes, c.lifetime_flops) for c in answer.candidates]
    for point in points:
        assert (point.memory_bytes, pytest.approx(point.flops, rel=1e-12)) in every
        assert not any(m < point.memory_bytes and f < point.flops * (1 - 1e-9) for m, f in every)
    assert min(m for m, _ in every) == points[0].memory_bytes


# --- studies and the runs to do next -----------------------------------------------------------------------------------


def asked_next(budget: float) -> Plan:
    asked = {"training_flops": budget, "noise": 0.001}
    return solve(law=HUBER, target={"loss": 2.2}, serving={"tokens": 2e12}, next=asked)


def test_the_next_runs_fit_the_budget_and_more_of_it_is_not_worse() -> None:
    regrets = []
    for budget in (1e19, 1e20, 1e21):
        found = asked_next(budget).next
        assert found is not None
        assert found.training_flops == pytest.approx(sum(run.training_flops for run in found.runs))
        assert found.training_flops <= budget
        assert found.expected_regret_after <= found.expected_regret
        assert all(run.parameters >= 57334197 for run in found.runs)  # the smallest that the law was fitted to
        regrets.append(found.expected_regret_after)
    assert regrets[2] <= regrets[0]
    with pytest.raises(Exception, match=r"next.training_flops: the smallest run takes"):
        asked_next(1e12)


def test_studies_run_as_they_are(tmp_path: Path) -> None:
    answer = plan(load_plan(EXAMPLES / "plan-serving.yaml", ["next.training_flops=1e20"]))
    assert answer.study is not None and answer.next is not None and answer.next.study is not None
    for text in (answer.study, answer.next.study, plan(load_plan(GQA)).study or ""):
        path = tmp_path / "study.yaml"
        path.write_text(text)
        found = cells(load_study(path))
        assert found
        if text is answer.next.study:
            assert sorted(run.train_flops for run in found) == pytest.approx(
                sorted(run.training_flops for run in answer.next.runs), rel=1e-3
            )


def test_the_value_of_runs_by_hand() -> None:
    """Two choices whose difference is normal: a run of signal c and noise s explains c^2 / (c^2 + s^2) of its variance."""
    rng = np.random.default_rng(2)
    half = rng.standard_normal(500)
    difference = np.concatenate([half, -half])
    difference *= 3.0 / difference.std(ddof=1)  # of standard deviation 3
    scores = np.stack([np.zeros(1000), difference], axis=1)
    logs = np.stack([np.zeros(1000), 0.02 * difference / 3])[:, None, :, None]
    question = Question(scores, logs, np.array([[1.0], [5.0]]), noise=0.01)
    before = 3 / math.sqrt(2 * math.pi)
    explained = 0.02**2 / (0.02**2 + 0.01**2)
    assert question.regret([]) == pytest.approx(before, rel=0.02)
    assert question.regret([(0, 0)]) == pytest.approx(
        question.regret([]), rel=1e-9
    )  # it shows the same whatever is true
    assert question.regret([(1, 0)]) == pytest.approx(before * (1 - math.sqrt(explained)), rel=0.03)
    assert grow(question, 10.0, True) == grow(question, 10.0, False) == [(1, 0)]
    assert grow(question, 4.0, True) == []


@pytest.mark.parametrize("budget", [1e19, 1e20, 1e21])
def test_the_next_runs_do_not_hang_on_a_seed(budget: float) -> None:
    """Other points of integration choose the same runs on the shipped example."""
    problem = pose(load_plan(EXAMPLES / "plan-serving.yaml", [f"next.training_flops={budget}"]))
    kinds = families(problem.config.space, problem.law.heads)
    pool = whole_shapes(problem.config.space, kinds, (512, 4096))
    quote = problem.price(pool)
    best = plan(problem.config).candidates
    chosen = {repr(next_runs(problem, kinds, best, pool, quote, seed).runs) for seed in range(4)}  # type: ignore[union-attr]
    assert len(chosen) == 1


def test_the_next_runs_do_not_hang_on_the_draws(tmp_path: Path) -> None:
    """Either half of the law's bootstrap draws chooses the same runs on the shipped example."""
    law = load_published(HUBER)
    assert law.draws is not None
    chosen = []
    for half in range(2):
        path = tmp_path / "law.json"
        path.write_text(json.dumps(dataclasses.replace(law, draws=law.draws[half::2]).to_json()))
        found = plan(load_plan(EXAMPLES / "plan-serving.yaml", ["next.training_flops=1e20", f"law={path}"])).next
        assert found is not None
        chosen.append([(run.num_hidden_layers, run.hidden_size, run.tokens_per_parameter) for run in found.runs])
    assert chosen[0] == chosen[1] != []
