"""Questions that the tests of the planner ask, from mappings and from the examples."""

from pathlib import Path
from typing import Any

import pytest

from scantling.errors import InputError
from scantling.laws import Chinchilla
from scantling.planning import Plan, plan, plan_from
from scantling.planning.result import Candidate

EXAMPLES = Path(__file__).parents[2] / "examples"
GQA = EXAMPLES / "plan-gqa.yaml"
EPOCH = Chinchilla(A=482.01, B=2085.43, E=1.8172, alpha=0.3478, beta=0.3658)
SARDANA = Chinchilla(A=406.4, B=410.7, E=1.69, alpha=0.336, beta=0.283)


def inline(law: Chinchilla) -> dict[str, Any]:
    names = ("A", "B", "E", "alpha", "beta")
    return {"kind": "chinchilla", **{name: getattr(law, name) for name in names}}


def solve(**keys: Any) -> Plan:
    return plan(plan_from({"law": "chinchilla-epoch", **keys}))


def refusal(**keys: Any) -> str:
    with pytest.raises(InputError) as caught:
        solve(**keys)
    return str(caught.value)


def heads(candidate: Candidate) -> tuple[float, float]:
    return candidate.num_attention_heads, candidate.num_key_value_heads
