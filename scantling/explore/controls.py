"""The controls of the page: sliders with their stops and lists with their choices, as HTML."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from scantling.explore.base import Base
from scantling.explore.state import BUDGETS, MINIMIZED, NONE, State, current, number_text
from scantling.reporting.plans import cost_name, cost_shown
from scantling.units import format_count

PREFERRED = (1, 1.25, 1.6, 2, 2.5, 3.2, 4, 5, 6.3, 8)  # ten stops a decade
RANGES = {
    "budget.training_flops": (15, 27),
    "budget.lifetime_flops": (15, 27),
    "budget.device_hours": (0, 9),
    "budget.usd": (1, 10),
    "budget.training_days": (-1, 4),
    "budget.memory_bytes": (8, 14),
    "serving.tokens": (6, 17),
}  # decades
ASKED = {
    "budget.training_flops": ("least loss for training FLOPs", "Training FLOPs"),
    "budget.lifetime_flops": ("least loss for lifetime FLOPs", "Lifetime FLOPs"),
    "budget.device_hours": ("least loss for device-hours", "Device-hours"),
    "budget.usd": ("least loss for money", "USD"),
    "budget.training_days": ("least loss for training days", "Days"),
    "budget.memory_bytes": ("least loss within memory", "Memory"),
    "target.loss": ("least cost that reaches a loss", "Loss"),
    "target.error": ("least cost that reaches an error", "Error"),
}  # what is asked for, and its amount
REDUCIBLE = (-1.7, 0.5)  # decades of loss above the law's irreducible loss
Stop = tuple[str, str]  # value, label


@dataclass(frozen=True)
class Slider:
    """A number that a slider moves and a field takes exactly.

    Attributes:
        stops: (value, label) in order.
    """

    key: str
    label: str
    stops: Sequence[Stop]
    hint: str = ""


@dataclass(frozen=True)
class Choice:
    """One of a list; `options` are (value, label)."""

    key: str
    label: str
    options: Sequence[Stop]
    hint: str = ""


def label_of(key: str, value: str) -> str:
    """A value of a slider as a reader wants it."""
    if value in ("", NONE):
        return "none" if value else "as in the plan"
    number = float(value)
    section, name = key.split(".")
    if section == "budget":
        return cost_shown(name, number)
    if key == "serving.tokens":
        return f"{format_count(number)} tokens"
    if key == "serving.context":
        return f"{number / 1024:g}K tokens" if number >= 1024 and number % 1024 == 0 else f"{number:,.0f} tokens"
    if key == "serving.batch":
        return f"{number:,.0f} sequence{'s' if number > 1 else ''}"
    return f"{number:g} nats per token" if key == "target.loss" else f"{number:g}"


def stops_of(base: Base, key: str) -> list[Stop]:
    """The stops of a slider, the plan's own value among them."""
    if key in RANGES:
        low, high = RANGES[key]
        numbers = [digit * 10.0**power for power in range(low, high) for digit in PREFERRED] + [10.0**high]
    elif key == "target.error":
        numbers = [step / 100 for step in range(1, 100)]
    else:
        numbers = [2.0**power for power in (range(8, 23) if key == "serving.context" else range(13))]
    own = current(base, State()).get(key)
    values = {number_text(number): number for number in numbers}
    if own not in (None, "", NONE):
        values[str(own)] = float(str(own))
    ordered = sorted(values, key=lambda value: values[value])
    first = [(NONE, "none")] if key == "serving.tokens" else []
    return first + [(value, label_of(key, value)) for value in ordered]


def loss_stops(base: Base) -> dict[str, list[Stop]]:
    """The stops of the target loss, for each law: at equal ratios above its irreducible loss."""
    low, high = REDUCIBLE
    steps = [10 ** (low + step * (high - low) / 110) for step in range(111)]
    own = current(base, State()).get("target.loss")
    found = {}
    for law, least in {"": base.least, **base.laws}.items():
        values = {round(least + step, 3) for step in steps} | ({float(own)} if own and law == "" else set())
        found[law] = [(f"{value:g}", label_of("target.loss", f"{value:g}")) for value in sorted(values)]
    return found


def goals(base: Base) -> Choice:
    """What is asked for."""
    own = base.goal[0]
    keys = [key for key in ASKED if key not in ("target.error", "budget.memory_bytes") or key == own]
    return Choice("goal", "Goal", [(key, ASKED[key][0]) for key in keys])


def controls(base: Base) -> list[Slider | Choice]:
    """All of them but the goal and its amount, in the order of the page."""
    config = base.config
    own = config.minimize if config.target and isinstance(config.minimize, str) else MINIMIZED[0]
    spread = ", ".join(f"{share:.0%} at {length:,}" for length, share in config.contexts.items())
    found: list[Slider | Choice] = [
        Choice(
            "minimize", "Minimise", [("", ""), *((name, cost_name(name)) for name in dict.fromkeys((*MINIMIZED, own)))]
        ),
        Slider(
            "serving.context",
            "Context",
            stops_of(base, "serving.context"),
            f"in the plan {spread}" if len(config.contexts) > 1 else "",
        ),
        Slider("serving.tokens", "Served tokens", stops_of(base, "serving.tokens"), "over the model's life"),
        Slider("serving.batch", "Batch", stops_of(base, "serving.batch")),
        Choice("hardware.device", "Device", [(NONE, "none: no seconds, no money"), *_devices(base)]),
        Choice("serving.devices", "Devices that share one model", _counts(config.serving.devices)),
        Choice("law", "Law of loss", [("", f"{base.law} (plan)"), *((name, name) for name in base.laws)]),
    ]
    if config.space.real_valued:
        options = [("true", "real-valued, as in the plan"), ("false", "whole, such as can be built")]
        found.append(Choice("space.real_valued", "Sizes", options))
    return found


def _devices(base: Base) -> list[Stop]:
    prices = {key: f"{device.price.usd_per_hour:g} USD/h" for key, device in base.devices.items() if device.price}
    return [(key, f"{key}: {prices.get(key, 'no price')}") for key in base.devices]


def _counts(own: int) -> list[Stop]:
    return [(f"{count}", f"{count}") for count in sorted({1, 2, 4, 8, 16, 32, 64, own})]


def page_data(base: Base) -> dict[str, Any]:
    """What the page's script needs: the plan's own values, the stops of every slider, and words that follow the goal."""
    stops = {f"budget.{name}": stops_of(base, f"budget.{name}") for name in BUDGETS}
    stops |= {item.key: list(item.stops) for item in controls(base) if isinstance(item, Slider)}
    stops["target.error"] = stops_of(base, "target.error")
    rule = "FLOPs, of serving too if any" if base.config.minimize is None else base.config.objective
    return {
        "own": current(base, State()),
        "goal": base.goal[0],
        "stops": stops,
        "loss": loss_stops(base),
        "names": {key: name for key, (_, name) in ASKED.items()},
        "minimize": {"budget": "the loss", "target": rule if base.config.target else "FLOPs, of serving too if any"},
    }


# --- as HTML -----------------------------------------------------------------------------------------------------------


def form(base: Base) -> str:
    """The fields, with the plan's own values."""
    own, goal = current(base, State()), base.goal
    amount = Slider("amount", "Amount", [], "")
    rest = "".join(
        _slider(item, own[item.key]) if isinstance(item, Slider) else _choice(item, own[item.key])
        for item in controls(base)
    )
    return _choice(goals(base), goal[0]) + _slider(amount, own[goal[0]]) + rest


def _slider(item: Slider, value: str) -> str:
    """A range over the places of the stops, beside a field for any value; the script fills in the ends of `amount`."""
    name = f"field-{item.key.replace('.', '-')}"
    most, places = max(0, len(item.stops) - 1), {stop: place for place, (stop, _) in enumerate(item.stops)}
    label = escape(item.label)
    hint = f'<span class="hint">{escape(item.hint)}</span>' if item.hint else ""
    return (
        f'<div class="control" data-slider="{escape(item.key)}"><label for="{name}">{label}</label>'
        f'<output for="{name}"></output>'
        f'<input type="range" min="0" max="{most}" step="1" value="{places.get(value, 0)}" aria-label="{label}, slider">'
        f'<input type="text" id="{name}" value="{escape(value)}" autocomplete="off" spellcheck="false" maxlength="60">'
        f"{hint}</div>"
    )


def _choice(item: Choice, value: str) -> str:
    name = f"field-{item.key.replace('.', '-')}"
    options = "".join(
        f'<option value="{escape(key)}"{" selected" if key == value else ""}>{escape(label)}</option>'
        for key, label in item.options
    )
    return (
        f'<div class="control" data-choice="{escape(item.key)}"><label for="{name}">{escape(item.label)}</label>'
        f'<select id="{name}">{options}</select></div>'
    )


def amounts(best: Any) -> dict[str, str]:
    """For each goal the amount at which the best candidate would be found again, so that switching goals keeps the place."""
    found = {
        f"budget.{name}": number_text(best.costs[name], 3) for name in BUDGETS if best.costs.get(name, math.nan) > 0
    }
    found["target.loss"] = f"{math.ceil(best.loss * 1e4 - 1e-6) / 1e4:g}"
    if best.errors:
        found["target.error"] = f"{next(iter(best.errors.values())):.4g}"
    return found
