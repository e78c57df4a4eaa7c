"""What a plan comes to on the page: fronts, certainty, sensitivity, what binds, and the runs to do next."""

import html
import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from scantling.files import write_json
from scantling.planning import load_plan
from scantling.planning import plan as solve
from scantling.reporting import figures, plans, report
from tests.reporting.inputs import own_text, synthetic_plan

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def llama() -> dict[str, Any]:
    """A real answer: money minimised under several limits, with draws."""
    return solve(load_plan(ROOT / "examples/plan-llama.yaml")).to_json()


def drawn(text: str) -> dict[str, Any]:
    found = re.findall(r'<script type="application/json" id="([\w-]+)-data">(.*?)</script>', text, re.DOTALL)
    return {key: json.loads(data) for key, data in found}


def rows_of(table: str) -> list[list[str]]:
    lines = re.findall(r"<tr>(.*?)</tr>", table)
    return [
        [html.unescape(re.sub(r"<[^>]+>", " ", cell)) for cell in re.findall(r"<t[hd].*?</t[hd]>", line)]
        for line in lines
    ]


def test_both_fronts_hold_the_planners_points_and_star_the_chosen(llama: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "plan.json", llama)
    found = drawn(own_text(report([tmp_path / "plan.json"], tmp_path / "report.html")))
    best = llama["candidates"][0]
    losses, memory = found["front-0"]["data"], found["memory-0"]["data"]
    assert losses[0]["x"] == sorted(point["cost"] for point in llama["front"])
    assert (losses[2]["x"], losses[2]["y"]) == ([best["costs"]["usd"]], [best["loss"]])
    assert len(losses[1]["x"]) == len(memory[1]["x"]) == len(llama["candidates"]) - 1
    assert memory[0]["x"] == pytest.approx([point["memory_bytes"] / 2**30 for point in llama["memory_front"]])
    assert memory[0]["y"] == [point["flops"] for point in llama["memory_front"]]
    assert memory[2]["x"] == [best["memory_bytes"] / 2**30] and memory[2]["y"] == [best["lifetime_flops"]]


def test_nothing_that_will_do_beats_the_memory_front(llama: dict[str, Any]) -> None:
    points = [(point["memory_bytes"], point["flops"]) for point in llama["memory_front"]]
    for item in llama["candidates"]:
        mine = item["memory_bytes"], item["lifetime_flops"]
        assert any(a <= mine[0] * (1 + 1e-9) and b <= mine[1] * (1 + 1e-9) for a, b in points)


def test_the_flops_of_the_memory_front_are_named_as_the_planner_counts_them() -> None:
    one_context = solve(load_plan(ROOT / "examples/plan-gqa.yaml")).to_json()
    figure, caption = plans.memory_front(one_context)
    assert figure is not None and "FLOPs of one context" in caption
    best = one_context["candidates"][0]
    assert figure.data[2].y == (best["flops"],)
    points = {
        (point["num_attention_heads"], point["num_key_value_heads"]): point["flops"]
        for point in one_context["memory_front"]
    }
    assert best["flops"] == pytest.approx(points[best["num_attention_heads"], best["num_key_value_heads"]])


def test_certainty_stands_beside_each_candidate(llama: dict[str, Any]) -> None:
    header, *lines = rows_of(plans.candidate_table(llama))
    place = [name.strip() for name in header].index("best in, regret")
    for item, line in zip(llama["candidates"], lines, strict=True):
        share, regret = line[place].split("%")
        assert float(share) == pytest.approx(100 * item["probability_best"], abs=0.51)
        assert regret.strip().endswith("USD")
    assert f"in {100 * llama['candidates'][0]['probability_best']:.0f}% of the law's draws" in plans.plan_sentence(
        llama
    )


def test_a_law_without_draws_says_why_there_is_no_probability(tmp_path: Path) -> None:
    plan = synthetic_plan() | {"no_probability": "the law has no draws"}
    for item in plan["candidates"]:
        item |= {"probability_best": None, "expected_regret": None, "probability_reached": None}
    write_json(tmp_path / "plan.json", plan)
    text = html.unescape(own_text(report([tmp_path / "plan.json"], tmp_path / "report.html")))
    assert "No candidate has a probability of being best: the law has no draws." in text
    assert "best in, regret" not in text and "of the law's draws" not in text


def test_sensitivity_says_what_would_be_chosen_and_what_the_choice_would_cost() -> None:
    header, same, worse, impossible = rows_of(plans.sensitivity_table(synthetic_plan()))
    assert len(header) == 4
    assert [cell.strip() for cell in same[1:]] == ["1,024", "the same", "0%"]
    assert [cell.strip() for cell in worse[1:]] == ["2B", "14 layers × 896, 12/2 heads", "3.2%"]
    assert impossible[3].strip() == "it becomes impossible"
    assert plans.sensitivity_table({**synthetic_plan(), "sensitivity": []}) == ""


def test_next_runs_are_listed_with_their_worth(page: Path) -> None:
    text = html.unescape(own_text(page))
    assert "from 0.012 to 0.0045, over 150 draws of the law with 1% noise" in text
    assert "2 runs of 600 TFLOP together" in text
    assert "name: plan-next" in text and "name: plan-ladder" in text
    nothing = plans.next_runs({**synthetic_plan(), "next": synthetic_plan()["next"] | {"runs": [], "study": None}})
    assert "No runs of this budget" in nothing and "<table" not in nothing
    assert plans.next_runs({**synthetic_plan(), "next": None}) == ""


@pytest.mark.parametrize(("binding", "said"), [("loss", "the target loss"), ("memory_bytes", "the limit on memory")])
def test_what_binds_is_said(binding: str, said: str) -> None:
    plan = synthetic_plan()
    plan["candidates"][0]["binding"] = binding
    assert said in plans.what_binds(plan)


def test_ticks_do_not_crowd() -> None:
    for low, high in [(7.8e7, 2.2e8), (19.0, 42.0), (8e4, 1.1e5), (1.2e9, 7e9)]:
        places = [math.log10(value) for value in figures.log_ticks(low, high)["tickvals"]]
        apart = [b - a for a, b in pairwise(places)]
        assert len(places) > 1 and min(apart) > math.log10(high / low) / 9
