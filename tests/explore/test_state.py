"""States: what a query may say, that it survives the trip to a URL and back, and that page, command and file are one plan."""

import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scantling.errors import InputError
from scantling.explore.answer import DRAFT, Answers, thinned
from scantling.explore.base import Base, read_base
from scantling.explore.controls import Slider, amounts, controls, loss_stops, page_data, stops_of
from scantling.explore.state import State, command, config_of, current, number_text, plan_yaml, read_state
from scantling.files import write_json
from scantling.laws import load_published
from scantling.planning import PlanConfig, load_plan, plan, plan_from
from scantling.yamlio import loads
from tests.explore.conftest import EXAMPLES, PLAN

LLAMA = EXAMPLES / "plan-llama.yaml"
BASES = {name: read_base(EXAMPLES / f"plan-{name}.yaml") for name in ("serving", "chinchilla", "llama", "gqa")} | {
    "default": read_base()
}
QUERIES = [
    "",
    "serving.context=32768",
    "target.loss=2.4&serving.batch=64",
    "budget.training_flops=3e22",
    "budget.lifetime_flops=1e23&serving.tokens=1e12",
    "budget.usd=2e6&hardware.device=a100-80&serving.tokens=5e12",
    "target.loss=2.5&minimize=memory_bytes&law=gqa-figure-2",
    "serving.tokens=none",
    "law=overtrain-c4&target.loss=2.9",
    "target.loss=2.3&minimize=usd&hardware.device=l4&serving.tokens=1e12&serving.devices=4",
]


def answer(read: Callable[[], PlanConfig]) -> Any:
    """A plan's answer, or why there is none."""
    try:
        return plan(read()).to_json()
    except InputError as error:
        return [fault.partition(": ")[2] for fault in error.faults]


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("name", ["serving", "chinchilla"])
def test_page_command_and_file_are_one_plan(name: str, query: str, tmp_path: Path) -> None:
    base = BASES[name]
    state = read_state(query, base)
    mine = answer(lambda: config_of(base, state))
    words = shlex.split(command(base, state))
    assert words[:3] == ["scantling", "plan", str(base.name)]
    options = [option for flag, option in itertools.pairwise(words) if flag == "--set"]
    assert len(words) == 3 + 2 * len(options)
    (tmp_path / "plan.yaml").write_text(plan_yaml(base, state))
    commanded = answer(lambda: load_plan(Path(base.name or ""), options))
    exported = answer(lambda: load_plan(tmp_path / "plan.yaml"))
    if isinstance(mine, dict):
        assert commanded == exported == mine
    else:
        assert [len(mine)] * 2 == [len(commanded), len(exported)]
        assert not isinstance(commanded, dict) and not isinstance(exported, dict)


def test_without_a_plan_the_command_writes_one_first(tmp_path: Path) -> None:
    """As a shell runs it, in an empty folder, and again where the file is."""
    base = BASES["default"]
    state = read_state("serving.context=16384", base)
    said = command(base, state).replace("scantling ", f"{sys.executable} -m scantling ") + " --json"
    for _ in range(2):
        done = subprocess.run(["sh", "-c", said], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout[done.stdout.index("{") :])["serving"]["context"] == 16384


def test_an_answer_is_the_one_of_the_plan_written_by_hand() -> None:
    by_hand = yaml.safe_load(PLAN.read_text())
    by_hand["serving"]["context"] = 65536
    del by_hand["target"], by_hand["minimize"]
    by_hand |= {"budget": {"training_flops": 1e22}, "law": "chinchilla-epoch"}
    state = read_state("serving.context=65536&budget.training_flops=1e22&law=chinchilla-epoch", BASES["serving"])
    assert answer(lambda: config_of(BASES["serving"], state)) == answer(lambda: plan_from(by_hand))


@st.composite
def states(draw: st.DrawFn) -> tuple[Base, State]:
    """A plan and any setting of its controls."""
    base = BASES[draw(st.sampled_from(list(BASES)))]
    values: dict[str, str] = {}
    for item in controls(base):
        offered = item.stops if isinstance(item, Slider) else item.options
        if draw(st.booleans()) and (value := draw(st.sampled_from([value for value, _ in offered]))):
            values[item.key] = value
    goal = draw(
        st.sampled_from(["", *(key for key in page_data(base)["stops"] if key.startswith("budget.")), "target.loss"])
    )
    if goal:
        stops = loss_stops(base)[""] if goal == "target.loss" else stops_of(base, goal)
        values[goal] = draw(st.sampled_from(stops))[0]
    query = "&".join(f"{key}={value}" for key, value in values.items())
    return base, read_state(query, base)


@given(states())
def test_a_state_survives_its_url_and_becomes_a_plan_or_a_sentence(found: tuple[Base, State]) -> None:
    base, state = found
    assert read_state(state.query, base) == state
    assert dict(current(base, state)).items() >= dict(state.values).items()
    try:
        config = config_of(base, state)
    except InputError as error:
        assert all(error.faults)
        return
    if context := state["serving.context"]:
        assert config.context == int(context)
    if state.goal is not None:
        section, name = state.goal[0].split(".")
        assert getattr(getattr(config, section), name) == pytest.approx(state.goal[1])
        assert (config.target is None) != (config.budget is None)
    assert (config.hardware.device if config.hardware else "none") == current(base, state)["hardware.device"]


@given(st.floats(1e-9, 1e38))
def test_numbers_are_written_as_plans_read_them(value: float) -> None:
    assert loads(f"a: {number_text(value)}").value["a"] == pytest.approx(value, rel=1e-11)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("serving.contxt=1", "did you mean 'serving.context'?"),
        ("serving.context=abc", "expected a number such as"),
        ("serving.context=1.5", "expected a whole number"),
        ("serving.context=0", "from 1 to"),
        ("serving.context=1e300", "from 1 to"),
        ("serving.batch=-4", "from 1 to"),
        ("serving.batch=nan", "expected a number"),
        ("target.loss=inf", "expected a number"),
        ("target.loss=-1", "above 0"),
        ("target.loss=", "expected a number"),
        ("budget.usd=1e99", "at most"),
        ("target.loss=2.2&target.loss=2.3", "given twice"),
        ("target.loss=2.2&budget.usd=5", "expected one goal"),
        ("law=/etc/passwd", "no '/etc/passwd' here"),
        ("law=../law.json", "here"),
        ("hardware.device=../../x", "here"),
        ("hardware.table=/etc/passwd", "the page has no key"),
        ("minimize=__import__('os')", "here"),
        ("serving.context=" + "9" * 61, "at most 60 characters"),
        ("&".join(f"k{i}=1" for i in range(60)), "cannot be read"),
        ("x=" + "a" * 3000, "at most 2,000 characters"),
        ("serving.context=%ff", "cannot be read"),
    ],
)
def test_what_a_query_may_not_say_is_said(query: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_state(query, BASES["serving"])
    assert said in str(caught.value)


def test_all_faults_of_a_query_at_once() -> None:
    with pytest.raises(InputError) as caught:
        read_state("a=1&serving.batch=x&law=y", BASES["serving"])
    assert len(caught.value.faults) == 3


def test_another_device_brings_its_own_price_and_leaves_no_old_one() -> None:
    base = read_base(LLAMA, ["hardware.usd_per_hour=1.5"])
    assert config_of(base, read_state("serving.batch=4", base)).hardware.usd_per_hour == 1.5  # type: ignore[union-attr]
    assert config_of(base, read_state("hardware.device=h100-sxm", base)).hardware.usd_per_hour == 1.5  # type: ignore[union-attr]
    other = config_of(base, read_state("hardware.device=a100-80", base))
    assert other.site is not None and other.site.usd_per_hour == 1.79


def test_a_budget_of_memory_stays_when_the_goal_changes() -> None:
    base = read_base(EXAMPLES / "plan-chinchilla.yaml", ["budget.memory_bytes=24GB"])
    other = config_of(base, read_state("budget.lifetime_flops=1e22&serving.tokens=1e12", base))
    assert other.budget is not None and (other.budget.lifetime_flops, other.budget.memory_bytes) == (1e22, 24e9)
    target = config_of(base, read_state("target.loss=2.3", base))
    assert target.budget is None and target.constraints.memory_bytes == 24e9


def test_an_exported_plan_finds_its_law_from_anywhere(tmp_path: Path) -> None:
    law, home, away = load_published("chinchilla-epoch-huber"), tmp_path / "home", tmp_path / "away"
    write_json(home / "law.json", law.to_json())
    (home / "plan.yaml").write_text("budget: {training_flops: 1e20}\nlaw: law.json\n")
    base = read_base(home / "plan.yaml")
    state = read_state("budget.training_flops=2e20", base)
    away.mkdir()
    (away / "plan.yaml").write_text(plan_yaml(base, state))
    mine, there = (
        answer(lambda: config_of(base, state)),
        answer(lambda: load_plan(away / "plan.yaml")),
    )
    assert there["candidates"] == mine["candidates"]
    assert read_state("law=chinchilla-epoch", base)["law"] == "chinchilla-epoch"


def test_a_distribution_of_contexts_stays_until_the_slider_moves() -> None:
    base = read_base(PLAN, ["serving.context={8192: 0.8, 131072: 0.2}"])
    assert config_of(base, State()).contexts == {8192: 0.8, 131072: 0.2}
    assert current(base, State())["serving.context"] == ""
    assert config_of(base, read_state("serving.context=4096", base)).contexts == {4096: 1.0}


def test_every_slider_stops_at_the_plans_own_value() -> None:
    for base in BASES.values():
        own, data = current(base, State()), page_data(base)
        stops = data["stops"] | {"target.loss": data["loss"][""]}
        for key in ("serving.context", "serving.tokens", "serving.batch", base.goal[0]):
            values = [value for value, _ in stops[key]]
            assert own[key] in values and len(values) == len(set(values))
            numbers = [float(value) for value in values if value != "none"]
            assert numbers == sorted(numbers)


def test_loss_stops_lie_above_what_each_law_can_reach() -> None:
    found = loss_stops(BASES["serving"])
    assert {"chinchilla-epoch", "gqa-figure-2", "overtrain-c4"} < set(found)
    for law, stops in found.items():
        values = [float(value) for value, _ in stops]
        least = {
            name: value for name, value in load_published(law or BASES["serving"].law).params.items() if name[0] == "E"
        }
        assert min(least.values()) < values[0] < min(least.values()) + 0.05
        assert values == sorted(set(values)) and values[-1] > 4


def test_switching_goals_keeps_the_place() -> None:
    base = BASES["serving"]
    best = plan(config_of(base, State())).candidates[0]
    there = amounts(best)
    assert (
        float(there["target.loss"]) == pytest.approx(best.loss, abs=1e-4) and float(there["target.loss"]) >= best.loss
    )
    again = plan(config_of(base, read_state(f"budget.lifetime_flops={there['budget.lifetime_flops']}", base)))
    assert again.candidates[0].loss == pytest.approx(best.loss, abs=2e-3)


def test_a_draft_is_a_part_of_a_large_space_and_nothing_of_a_small_one() -> None:
    wide = [
        "space.aspect=null",
        "space.hidden_size={min: 64, max: 16384, step: 64}",
        "space.num_hidden_layers={min: 1, max: 128, step: 1}",
    ]
    base = read_base(EXAMPLES / "plan-chinchilla.yaml", wide)
    answers, config = Answers(base), config_of(base, State())
    least = thinned(config)
    assert set(least.space.hidden_size or ()) < set(config.space.hidden_size or ())
    assert len(least.space.hidden_size or ()) * len(least.space.num_hidden_layers or ()) <= 2 * DRAFT
    draft, whole = answers.page(State(), draft=True), answers.page(State())
    assert (draft["draft"], whole["draft"]) == (True, False)
    assert "A draft" in draft["parts"]["headline"] and "A draft" not in whole["parts"]["headline"]
    assert f"{plan(config).screened:,} shapes" in whole["parts"]["headline"]
    assert answers.page(State(), draft=True) == whole  # the whole answer is there by now
    small = config_of(BASES["serving"], State())
    assert thinned(small) is small
