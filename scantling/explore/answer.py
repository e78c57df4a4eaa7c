"""What the page shows for a state: the planner's answer in words, tiles, drawings and tables, or why there is none."""

import json
import math
import threading
from collections import OrderedDict
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from scantling.errors import InputError
from scantling.explore.base import Base
from scantling.explore.controls import amounts, label_of
from scantling.explore.state import State, command, config_of, current
from scantling.planning import Plan, PlanConfig, plan
from scantling.reporting import plans as words
from scantling.reporting.figures import stack_svg
from scantling.reporting.markup import bullets, paragraph, percent, significant
from scantling.reporting.shapes import layer_table, planned_shapes
from scantling.units import format_count

KEPT = 200  # answers
DRAFT = 5000  # combinations of listed sizes that a draft screens
LISTED = 4  # shorter lists stay whole
PLOT_HEIGHT = 320  # pixels
_SOURCE = Path("the plan")


class Answers:
    """The answers of one page: each state is solved once, one at a time, and the last `KEPT` are kept."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self._kept: OrderedDict[tuple[State, bool], Plan | InputError] = OrderedDict()
        self._solving = threading.Lock()

    def plan(self, state: State) -> Plan:
        """The planner's answer.

        Raises:
            InputError: the plan of this state contradicts itself, or nothing meets it.
        """
        return self._solved(state, config_of(self.base, state), part=False)

    def _solved(self, state: State, config: PlanConfig, part: bool) -> Plan:
        with self._solving:
            found = self._kept.get((state, part))
            if found is None:
                try:
                    found = plan(config)
                except InputError as error:
                    found = error
                self._kept[state, part] = found
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
        if isinstance(found, InputError):
            raise InputError(*found.faults)
        return found

    def page(self, state: State, draft: bool = False) -> dict[str, Any]:
        """What the page shows, in JSON types: parts of HTML by name, figures, and what the fields need.

        Args:
            state: of the page.
            draft: whether a part of a large space will do, while a slider moves.
        """
        shared: dict[str, Any] = {
            "command": command(self.base, state),
            "shown": {key: _label(key, value) for key, value in current(self.base, state).items()},
            "draft": False,
        }
        try:
            config = config_of(self.base, state)
            asked = thinned(config) if draft and (state, False) not in self._kept else config
            shared["draft"] = asked is not config
            found = self._solved(state, asked, part=shared["draft"])
        except InputError as error:
            return shared | {"faults": [fault.removeprefix(f"{self.base.source}: ") for fault in error.faults]}
        answer = found.to_json()
        losses, memory = words.loss_front(answer, PLOT_HEIGHT), words.memory_front(answer, PLOT_HEIGHT)
        return shared | {
            "amounts": amounts(found.candidates[0]),
            "parts": {
                "headline": _headline(answer, shared["draft"]),
                "tiles": _tiles(answer),
                "stack": _stack(answer),
                "candidates": words.candidate_table(answer),
                "sensitivity": words.sensitivity_table(answer),
                "next": words.next_runs(answer),
                "notes": bullets(answer["notes"]),
                "layers": _layers(answer),
                "loss-caption": escape(losses[1]),
                "memory-caption": escape(memory[1]),
            },
            "figures": {"loss": _figure(losses[0]), "memory": _figure(memory[0])},
        }


def thinned(config: PlanConfig) -> PlanConfig:
    """The plan with at most about `DRAFT` combinations of the sizes its space lists; the same one where it lists fewer."""
    lists = {name: value for name, value in config.space if isinstance(value, tuple) and len(value) > LISTED}
    whole = math.prod(len(value) for value in lists.values())
    if whole <= DRAFT:
        return config
    step = math.ceil((whole / DRAFT) ** (1 / len(lists)))
    fewer = {name: value[::step] if len(value) > LISTED * step else value for name, value in lists.items()}
    return config.model_copy(update={"space": config.space.model_copy(update=fewer)})


def _label(key: str, value: str) -> str:
    numeric = key.startswith(("budget.", "target.")) or key in ("serving.context", "serving.tokens", "serving.batch")
    return label_of(key, value) if numeric else value


def _figure(figure: go.Figure | None) -> Any:
    return None if figure is None else json.loads(figure.to_json())


def _headline(answer: dict[str, Any], draft: bool) -> str:
    """The chosen shape, and how firmly it is chosen."""
    best = answer["candidates"][0]
    said = []
    if best["margin_percent"] is not None:
        said.append(
            f"the next shape is {words.margin(best['margin_percent'])} worse in {words.cost_name(answer['minimize'])}"
        )
    if best["probability_best"] is not None:
        said.append(f"it is the best in {percent(best['probability_best'], 0)} of the law's draws")
    counted = f"{answer['screened']:,} shapes" if answer["screened"] else "real-valued shapes"
    text = (
        f"{'A draft: the best' if draft else 'Best'} of {counted}"
        + (f"; {'; '.join(said)}" if said else "")
        + f". {words.what_binds(answer)}"
    )
    flag = ' <span class="flag">extrapolates</span>' if best["extrapolated"] else ""
    return f'<p class="shape">{escape(words.shape_words(best))}{flag}</p>{paragraph(text)}'


def _tiles(answer: dict[str, Any]) -> str:
    """Eight numbers with their names; a dash and what is missing where the plan does not say enough."""
    best = answer["candidates"][0]
    costs = best["costs"]

    def cost(key: str) -> str:
        return words.cost_shown(key, costs.get(key))

    interval = words.loss_interval(best)
    served = answer["serving"]["tokens"]
    devices = "choose a device"
    money = "choose a device with a price" if "decode_seconds" in costs else devices
    total = "usd" if "usd" in costs else "training_usd"
    tiles = (
        ("predicted loss", words.cost_shown("loss", best["loss"]), f"95% {interval}" if interval else "no interval"),
        ("parameters", format_count(best["parameters"], 4), f"counted as {answer['parameters'].replace('_', ' ')}"),
        (
            "training tokens",
            format_count(best["tokens"], 4),
            f"{significant(best['tokens_per_parameter'])} per parameter",
        ),
        ("training", cost("training_flops"), cost("training_days") if "training_days" in costs else "no device"),
        (
            "training + serving",
            cost("lifetime_flops"),
            f"{format_count(served)} tokens served" if served else "no tokens served",
        ),
        ("memory", cost("memory_bytes"), f"weights {cost('weight_bytes')}, cache {cost('kv_cache_bytes')}"),
        (
            "time per token",
            cost("decode_seconds"),
            f"first token {cost('first_token_seconds')}" if "decode_seconds" in costs else devices,
        ),
        (
            "money" if total == "usd" else "money for training",
            cost(total),
            money if "training_usd" not in costs else f"training {cost('training_usd')}" if total == "usd" else "",
        ),
    )
    return "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd class="about">{escape(about)}</dd></div>'
        for name, value, about in tiles
    )


def _stack(answer: dict[str, Any]) -> str:
    """The chosen shape drawn layer by layer, and its sizes."""
    best, drawn = answer["candidates"][0], planned_shapes(answer, _SOURCE)
    names = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
    )
    sizes = [(name, f"{best[name]:.6g}") for name in names]
    if best["params"]:
        sizes.append(("non-embedding parameters", format_count(best["params"]["non_embedding"], 4)))
        sizes.append(("spec", best["hash"][:12]))
    listed = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in sizes)
    if drawn:
        figure = stack_svg(drawn[0][1], "the chosen shape")
    else:
        figure = paragraph("Real-valued sizes have no layers to draw; choose whole sizes to see them.", kind="note")
    return f"{figure}<dl>{listed}</dl>"


def _layers(answer: dict[str, Any]) -> str:
    drawn = planned_shapes(answer, _SOURCE)
    return layer_table(*drawn[0]) if drawn else ""
