"""What a plan says: notes, refusals that name what would do, and their lines."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import scantling
from scantling.errors import InputError
from scantling.planning import load_plan, plan
from tests.planning.asking import EXAMPLES, heads, refusal, solve

# --- what is said ------------------------------------------------------------------------------------------------------


def test_notes_name_conventions_and_what_was_held() -> None:
    answer = solve(budget={"training_flops": 1e19}, space={"num_attention_heads": 8, "num_key_value_heads": [1, 8]})
    text = "\n".join(answer.notes)
    assert "N is `total` parameters" in text
    assert "Costs (full): training 3 x forward" in text
    assert "Held fixed, because the law has no evidence about them: hidden_size / num_hidden_layers: 128" in text
    assert "Several values of num_key_value_heads are ranked by cost alone" in text
    assert "No interval of the loss: the source gives an interval for each parameter" in text
    assert {heads(c) for c in answer.candidates} == {(8, 1), (8, 8)}
    assert len(answer.candidates) == 10


def test_intervals_come_from_the_laws_draws() -> None:
    answer = solve(law="chinchilla-epoch-huber", budget={"training_flops": 1e21})
    for candidate in answer.candidates:
        assert candidate.loss_low is not None and candidate.loss_high is not None
        assert candidate.loss_low < candidate.loss < candidate.loss_high
    assert answer.law_optimum is not None and answer.law_optimum.intervals is not None
    low, high = answer.law_optimum.intervals["N"]
    assert low < answer.law_optimum.parameters < high


def test_extrapolation_says_by_how_much() -> None:
    answer = solve(budget={"training_flops": 1e26})
    assert answer.candidates[0].extrapolated
    assert any("times above the fitted range" in note for note in answer.notes)
    assert not solve(budget={"training_flops": 1e20}).candidates[0].extrapolated


def test_the_edge_of_the_space_is_pointed_out() -> None:
    answer = solve(budget={"training_flops": 1e21}, space={"hidden_size": {"min": 256, "max": 1024, "step": 128}})
    assert any("the largest hidden_size of the space (1024)" in note for note in answer.notes)


def test_a_fitted_laws_count_is_its_n(tmp_path: Path) -> None:
    from scantling.laws import load_published

    plain = load_published("chinchilla-epoch").to_json()
    plain["conventions"]["N"] = "non_embedding parameters"
    (tmp_path / "law.json").write_text(json.dumps(plain))
    (tmp_path / "plan.yaml").write_text("law: law.json\nbudget: {training_flops: 1e19}\n")
    best = plan(load_plan(tmp_path / "plan.yaml")).candidates[0]
    assert best.params is not None
    assert best.parameters == best.params["non_embedding"] < best.params["total"]


LOSS, FLOPS = {"loss": 2.2}, {"training_flops": 1e20}
REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"target": {"loss": 1.5}},
        "target.loss: the law never goes down to E = 1.81686 nats per token, got the target 1.5; raise it",
    ),
    ({"target": LOSS, "budget": FLOPS}, "expected a target (loss) or a budget, both are given; keep one"),
    ({}, "expected a target (loss) or a budget, neither is given; keep one"),
    (
        {"budget": {"training_flops": 1, "lifetime_flops": 1}},
        "budget: expected training_flops or lifetime_flops, both are given; keep one",
    ),
    (
        {"law": "chinchila-epoch", "target": LOSS},
        "law: 'chinchila-epoch' is neither a law's .json file nor a published law; did you mean 'chinchilla-epoch'?",
    ),
    ({"law": {"kind": "kaplan"}, "target": LOSS}, "law: unknown kind, expected one of"),
    (
        {"budget": {"training_flops": 1e9}},
        "budget.training_flops: the cheapest shape of the space needs 5.9241e+10 FLOPs for one sequence of training",
    ),
    (
        {"budget": {"lifetime_flops": 1e20}, "serving": {"tokens": 1e15}},
        "the cheapest shape of the space needs 9.642e+21 FLOPs for one sequence of training after serving, got 1e+20",
    ),
    ({"budget": {"lifetime_flops": 1e20}}, "lifetime_flops needs serving.tokens"),
    (
        {"budget": {**FLOPS, "memory_bytes": "1MB"}},
        "budget.memory_bytes: the smallest shape that meets the rest takes 1.7835e+07 bytes, got 1e+06; raise it",
    ),
    (
        {"budget": {"memory_bytes": "1GB"}},
        "training.tokens_per_parameter: a budget of memory alone has no optimum while tokens are free",
    ),
    (
        {"target": LOSS, "minimize": "z"},
        "training.tokens_per_parameter: minimize: z has no optimum while tokens are free",
    ),
    (
        {"target": LOSS, "space": {"hidden_size": [512, 1024]}},
        "no shape of the space reaches 2.2: the best comes to 2.4838 with unlimited tokens; raise the target above",
    ),
    ({"target": LOSS, "minimize": "z", "cost_convention": "full"}, "any other unit changes the winner"),
    ({"budget": FLOPS, "minimize": "z"}, "minimize: z does not go with a budget; with a budget, minimize: loss"),
    (
        {"target": LOSS, "space": {"num_attention_heads": 8, "num_key_value_heads": 3}},
        "space.num_key_value_heads: no head configuration is left; key/value heads must divide query heads",
    ),
    ({"target": LOSS, "space": {"hidden_size": 100}}, "space: expected 1 to 50,000,000 shapes, got 0; heads must"),
    (
        {"target": LOSS, "space": {"width": {}}},
        "space.width: a width profile is a family, because its effect on the loss",
    ),
    ({"target": {"los": 2.2}}, "target.los: unknown key"),
    (
        {"target": LOSS, "space": {"aspect": [2, 1]}},
        "space.aspect: expected a ratio such as 128, or [lowest, highest], got [2, 1]",
    ),
]


@pytest.mark.parametrize(("keys", "sentence"), REFUSED)
def test_refusals_say_what_would_do(keys: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(**keys)


def test_the_change_a_refusal_names_is_enough() -> None:
    assert solve(budget={"training_flops": 5.9241e10}).candidates
    assert solve(budget={"training_flops": 1e20, "memory_bytes": 1.7835e7}).candidates
    assert solve(target={"loss": 2.484}, space={"hidden_size": [512, 1024]}).candidates


def test_faults_point_at_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("law: chinchilla-epoch\ntarget:\n  loss: 1.2\nspace:\n  shapes:\n    head_dim: 3\n")
    with pytest.raises(InputError, match=r"plan.yaml:6: space.head_dim: rotary positions need an even head_dim, got 3"):
        load_plan(file)
    with pytest.raises(InputError, match=r"plan.yaml:3: target.loss: the law never goes down to E"):
        plan(load_plan(file, ["space={}"]))
    with pytest.raises(InputError, match=r"plan.yaml:1: law: .*absent.json: cannot be read"):
        file.write_text("law: absent.json\ntarget: {loss: 2.5}\n")
        plan(load_plan(file))


TEMPLATE = Path(scantling.__file__).parent / "templates" / "plan.yaml"


@pytest.mark.parametrize("example", [*sorted(EXAMPLES.glob("plan-*.yaml")), TEMPLATE], ids=lambda path: path.name)
def test_examples_plan(example: Path) -> None:
    answer = plan(load_plan(example))
    assert answer.candidates
    assert answer.to_json()["schema"] == "scantling.plan/1"


def test_planning_does_not_load_torch() -> None:
    code = (
        "import sys; from scantling.planning import load_plan, plan; plan(load_plan(sys.argv[1])); "
        "print(*(name for name in ('torch', 'pandas', 'scipy') if name in sys.modules))"
    )
    loaded = {}
    for example in ("plan-gqa.yaml", "plan-serving.yaml"):
        command = [sys.executable, "-c", code, str(EXAMPLES / example)]
        loaded[example] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert loaded["plan-gqa.yaml"] == []
    assert "torch" not in loaded["plan-serving.yaml"]
