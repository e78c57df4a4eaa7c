"""A state of the page: the keys of the plan that differ from the plan file, as the query of a URL and as `--set` options.

A state becomes a plan by the same code that applies `--set`, so that the page, the command and the exported file are one.
"""

import math
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args
from urllib.parse import parse_qsl, urlencode

from scantling.errors import InputError, suggest
from scantling.explore.base import Base
from scantling.planning import PlanConfig, plan_from
from scantling.planning.costs import CostName
from scantling.units import parse_count
from scantling.yamlio import dumps, from_mapping

BUDGETS = ("training_flops", "lifetime_flops", "device_hours", "usd", "training_days", "memory_bytes")
GOALS = (*(f"budget.{name}" for name in BUDGETS), "target.loss", "target.error")
MINIMIZED = (
    "training_flops",
    "lifetime_flops",
    "memory_bytes",
    "decode_bytes",
    "decode_seconds",
    "device_hours",
    "usd",
)
NONE = "none"  # no served tokens, no device
MAX_QUERY, MAX_VALUE = 2000, 60  # characters
MOST = 1e40  # of any amount
FIRST = "first-plan.yaml"  # written by the command of a page without a plan of the user's


def number_text(value: float, digits: int = 12) -> str:
    """`1e21`, `131072`: a number as a query, a plan and a person write it."""
    return re.sub(r"e\+?(-?)0*", r"e\1", f"{value:.{digits}g}")


def _amount(key: str, text: str) -> str:
    """A positive number with a unit, in the shortest form."""
    value = parse_count(text, key)
    if not 0 < value <= MOST:
        raise InputError(f"{key}: expected a number above 0 and at most {MOST:g}, got {text!r}")
    return number_text(value)


def _whole(most: int, key: str, text: str) -> str:
    value = parse_count(text, key)
    if value != math.floor(value) or not 1 <= value <= most:
        raise InputError(f"{key}: expected a whole number from 1 to {most:,}, got {text!r}")
    return f"{int(value)}"


def _chosen(known: tuple[str, ...], key: str, text: str) -> str:
    if text not in known:
        raise InputError(f"{key}: no {text!r} here{suggest(text, known) or '; choose one of the list'}")
    return text


def _readers(base: Base) -> dict[str, Callable[[str, str], str]]:
    """How each key of a state is read; nothing else is."""
    served: Callable[[str, str], str] = lambda key, text: NONE if text == NONE else _amount(key, text)  # noqa: E731
    return {
        **dict.fromkeys(GOALS, _amount),
        "minimize": partial(_chosen, get_args(CostName)),
        "serving.context": partial(_whole, 2**30),
        "serving.tokens": served,
        "serving.batch": partial(_whole, 2**20),
        "serving.devices": partial(_whole, 2**10),
        "hardware.device": partial(_chosen, (NONE, *base.devices)),
        "law": partial(_chosen, tuple(base.laws)),
        "space.real_valued": partial(_chosen, ("true", "false")),
    }


@dataclass(frozen=True)
class State:
    """What differs from the plan file.

    Attributes:
        values: (key, value) in a fixed order, so that equal states are equal.
    """

    values: tuple[tuple[str, str], ...] = ()

    @property
    def query(self) -> str:
        """The query of the state's URL."""
        return urlencode(self.values)

    @property
    def goal(self) -> tuple[str, float] | None:
        """The key and amount of the goal, where it differs."""
        return next(((key, float(value)) for key, value in self.values if key in GOALS), None)

    def __getitem__(self, key: str) -> str | None:
        return dict(self.values).get(key)


def read_state(query: str, base: Base) -> State:
    """The state that a query describes.

    Raises:
        InputError: the query is too long, repeats or misnames a key, or holds a value that the key does not take.
    """
    if len(query) > MAX_QUERY:
        raise InputError(f"expected an address of at most {MAX_QUERY:,} characters, got {len(query):,}")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=50)
    except ValueError as error:
        raise InputError(f"the address cannot be read: {error}") from None
    readers, given, faults = _readers(base), {}, []
    for key, text in pairs:
        if len(key) > MAX_VALUE or len(text) > MAX_VALUE:
            faults.append(f"expected keys and values of at most {MAX_VALUE} characters, got {max(len(key), len(text))}")
        elif key not in readers:
            faults.append(f"the page has no key {key!r}{suggest(key, readers)}")
        elif key in given:
            faults.append(f"{key}: given twice; keep one")
        else:
            try:
                given[key] = readers[key](key, text.strip())
            except InputError as error:
                faults += error.faults
    goals = [key for key in given if key in GOALS]
    if len(goals) > 1:
        faults.append(f"expected one goal, got {' and '.join(goals)}; keep one")
    if faults:
        raise InputError(*faults)
    return State(tuple((key, given[key]) for key in readers if key in given))


# --- from a state to a plan --------------------------------------------------------------------------------------------


def overrides(base: Base, state: State) -> tuple[str, ...]:
    """The `--set` options that turn the plan file into the plan of a state."""
    found = _goal(base, state)
    for key, value in state.values:
        match key, value:
            case "serving.tokens", "none":
                found.append("serving.tokens=null")
            case "hardware.device", "none":
                found.append("hardware=null")
            case "hardware.device", _:
                hardware = base.config.hardware
                found.append(f"hardware.device={value}" if hardware else f"hardware={{device: {value}}}")
                if hardware and hardware.usd_per_hour and value != hardware.device:
                    found.append("hardware.usd_per_hour=null")  # it was the other device's
            case "space.real_valued", _ if "shapes" in (base.mapping.get("space") or {}):
                found.append(f"space.shapes.real_valued={value}")
            case _ if key not in GOALS:
                found.append(f"{key}={value}")
    return tuple(found)


def _goal(base: Base, state: State) -> list[str]:
    """What makes room for another goal: a budget and a target exclude each other, and a budget minimises the loss."""
    if state.goal is None:
        return []
    key, value = state.goal[0], dict(state.values)[state.goal[0]]
    kind, name = key.split(".")
    budget = base.mapping.get("budget") or {}
    held = {"memory_bytes": budget["memory_bytes"]} if "memory_bytes" in budget else {}
    found = []
    if kind == "budget":
        held.pop(name, None)
        rest = "".join(f", {other}: {most}" for other, most in held.items())
        found.append(f"budget={{{name}: {value}{rest}}}")
        found += ["target=null"] if base.config.target else []
        found += ["minimize=null"] if base.config.weights else []
    else:
        task = base.config.target.task if base.config.target and name == "error" else None
        found.append(f"target={{{name}: {value}{f', task: {task}' if task else ''}}}")
        if base.config.budget:
            found += ["budget=null", *(["minimize=null"] if base.config.minimize and not state["minimize"] else [])]
            limits = base.mapping.get("constraints") or {}
            found += [f"constraints.memory_bytes={most}" for most in held.values() if "memory_bytes" not in limits]
    return found


def config_of(base: Base, state: State) -> PlanConfig:
    """The plan of a state.

    Raises:
        InputError: its keys contradict each other.
    """
    return plan_from(_mapping(base, state), base.source)


def _mapping(base: Base, state: State) -> dict[str, Any]:
    return from_mapping(dict(base.mapping), base.source, overrides(base, state)).value


def plan_yaml(base: Base, state: State) -> str:
    """The plan of a state as a file that `scantling plan` answers as the page does, wherever it lies."""
    mapping = {key: value for key, value in _mapping(base, state).items() if value is not None}
    folder = Path(base.source).parent
    for key in ("law", "evidence"):
        if isinstance(named := mapping.get(key), str) and Path(named).suffix:
            mapping[key] = str((folder / named).resolve())
    hardware = mapping.get("hardware")
    if isinstance(hardware, dict) and hardware.get("table"):
        mapping["hardware"] = {**hardware, "table": str((folder / hardware["table"]).resolve())}
    return "# Written by scantling explore. The same again: scantling plan THIS.yaml\n" + dumps(mapping)


def command(base: Base, state: State) -> str:
    """The command that answers as the page does; without a plan of the user's it writes the one the page began with first."""
    words = ["scantling", "plan", base.name or FIRST]
    for override in overrides(base, state):
        words += ["--set", override]
    first = "" if base.name else f"[ -e {FIRST} ] || scantling init plan --out {FIRST}; "
    return first + shlex.join(words)


def current(base: Base, state: State) -> Mapping[str, str]:
    """The value of every key of the page in a state, as text; empty where the plan says nothing."""
    config, (goal, amount) = base.config, base.goal
    own = {
        goal: number_text(amount),
        "minimize": config.minimize if isinstance(config.minimize, str) and config.target else "",
        "serving.context": f"{config.context}" if len(config.contexts) == 1 else "",
        "serving.tokens": number_text(config.serving.tokens) if config.serving.tokens else NONE,
        "serving.batch": f"{config.serving.batch}",
        "serving.devices": f"{config.serving.devices}",
        "hardware.device": config.hardware.device if config.hardware else NONE,
        "law": "",
        "space.real_valued": "true" if config.space.real_valued else "false",
    }
    if state.goal is not None:
        del own[goal]
    return own | dict(state.values)
