"""Plans: what was asked, what was chosen and how surely, the fronts, what would change the choice, and what to run next."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from scantling.reporting import figures
from scantling.reporting.markup import (
    NONE,
    Html,
    Section,
    bullets,
    code_block,
    data_table,
    details,
    known,
    paragraph,
    percent,
    plot,
    significant,
    span,
)
from scantling.reporting.sources import dig
from scantling.units import format_bytes, format_count, format_flops, format_seconds

Candidate = Mapping[str, Any]
Shown = Callable[[Any], str]
GIB = 2**30


def _flops(value: float) -> str:
    return format_flops(value, 4)


def _bytes(value: float) -> str:
    return format_bytes(value, 4)


def _seconds(value: float) -> str:
    return f"{1e3 * value:.3g} ms" if value < 1 else format_seconds(value)


def _usd(value: float) -> str:
    return f"{format_count(value, 4)} USD"


def _hours(value: float) -> str:
    return f"{format_count(value, 4)} hours"


COSTS: dict[str, tuple[str, Shown]] = {
    "training_flops": ("training FLOPs", _flops),
    "lifetime_flops": ("training + serving FLOPs", _flops),
    "flops": ("FLOPs per context", _flops),
    "memory_bytes": ("memory", _bytes),
    "z": ("Z", lambda value: f"{value:,.1f}"),
    "serving_flops": ("serving FLOPs", _flops),
    "weight_bytes": ("weights", _bytes),
    "kv_cache_bytes": ("KV cache", _bytes),
    "decode_bytes": ("bytes moved per token", _bytes),
    "decode_seconds": ("time per token", _seconds),
    "first_token_seconds": ("time to first token", _seconds),
    "training_days": ("training days", lambda value: f"{value:.4g} days"),
    "training_device_hours": ("device-hours of training", _hours),
    "serving_device_hours": ("device-hours of serving", _hours),
    "device_hours": ("device-hours", _hours),
    "training_usd": ("money for training", _usd),
    "serving_usd": ("money for serving", _usd),
    "usd": ("money", _usd),
    "parameters": ("parameters", lambda value: format_count(value, 4)),
    "tokens": ("training tokens", lambda value: format_count(value, 4)),
    "loss": ("predicted loss", "{:.4f}".format),
}
ALWAYS = (
    "training_flops",
    "lifetime_flops",
    "flops",
    "memory_bytes",
    "z",
)  # columns of the candidates where they say anything


def cost_name(key: Any) -> str:
    """A cost as a reader knows it."""
    return COSTS[key][0] if key in COSTS else str(key or "the objective")


def cost_shown(key: str, value: float | None) -> str:
    """An amount of a cost with its unit; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NONE
    return COSTS[key][1](value) if key in COSTS else significant(value)


def amount(key: Any, value: float | None) -> str:
    """A difference of an objective, such as a regret; a dash where there is none."""
    return significant(value, 2) if key == "loss" or key not in COSTS else cost_shown(key, value)


def margin(value: float) -> str:
    """How much worse the next shape is, in percent."""
    return "less than 0.001%" if 0 < value < 1e-3 else f"{significant(value, 2)}%"


def shape_words(candidate: Candidate) -> str:
    """A candidate in a few words."""
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
    sizes = [candidate.get(key) for key in keys]
    if None in sizes:
        return "the first candidate"
    depth, width, heads, kv = (f"{size:.6g}" for size in sizes)
    family = f", {candidate['family']}" if candidate.get("family") else ""
    return f"{depth} layers \u00d7 {width}, {heads}/{kv} heads{family}"


def loss_interval(candidate: Candidate) -> str:
    """The ends of the 95% interval of the loss, or nothing."""
    ends = candidate.get("loss_low"), candidate.get("loss_high")
    return "" if None in ends else span(*ends, "{:.4f}".format)


def plan_sentence(plan: Mapping[str, Any]) -> str:
    """What a plan found, with its interval and how sure the choice is."""
    best = plan["candidates"][0]
    text = f"Of {plan.get('screened') or len(plan['candidates']):,} shapes the best is {shape_words(best)}"
    if best.get("parameters") is not None:
        text += f", {format_count(best['parameters'], 4)} parameters"
    if best.get("tokens") is not None and math.isfinite(best["tokens"]):
        text += f" on {format_count(best['tokens'], 4)} tokens"
    if best.get("loss") is not None:
        text += f": predicted loss {best['loss']:.4f} nats per token"
        text += f" (95% interval of the law {ends})" if (ends := loss_interval(best)) else " (no interval)"
    if best.get("margin_percent") is not None:
        text += f"; the next shape is {margin(best['margin_percent'])} worse in {cost_name(plan.get('minimize'))}"
    if (share := best.get("probability_best")) is not None:
        text += f"; it is the best of the candidates in {percent(share, 0)} of the law's draws"
    if best.get("extrapolated"):
        text += ". This extrapolates beyond what the law was fitted to"
    return text + "."


def plan_section(plans: Sequence[tuple[Path, dict[str, Any]]]) -> Section:
    """Each plan: what was asked, the fronts, the candidates, what would change the choice, and the runs to do next."""
    body = []
    for number, (path, plan) in enumerate(plans):
        level = 3
        if len(plans) > 1:
            body.append(f"<h3>{escape(path.stem)}</h3>")
            level = 4
        body += [_asked(plan), _fronts(plan, number), candidate_table(plan), _doubts(plan)]
        for title, part in (
            ("What would change the choice", sensitivity_table(plan)),
            ("Which runs next", next_runs(plan)),
        ):
            body += [f"<h{level}>{title}</h{level}>", part] if part else []
        if text := plan.get("study"):
            body.append(
                details("A study that puts the choice to the test", code_block(text.splitlines(), "study YAML"))
            )
    return Section("plan", "Cost-optimal shapes", "".join(body))


def _asked(plan: Mapping[str, Any]) -> str:
    counted, law = plan.get("cost_convention", NONE), plan.get("law", NONE)
    asked = f"Minimised: {cost_name(plan.get('minimize'))}; costs counted as {counted}; law {law}."
    text = paragraph(
        asked, f"Parameters N are {plan['parameters']}." if plan.get("parameters") else "", what_binds(plan)
    )
    if saved := dig(plan, "law_optimum", "saving_percent"):
        free = f"The law alone ({dig(plan, 'law_optimum', 'convention')}) puts the best size at"
        size = f"{format_count(plan['law_optimum']['parameters'], 4)} parameters, which saves {significant(saved, 3)}%"
        text += paragraph(free, size, "of the FLOPs of training and serving against the model cheapest to train.")
    return text


def what_binds(plan: Mapping[str, Any]) -> str:
    """The limit that keeps the best candidate from being better, in a sentence."""
    binding = plan["candidates"][0].get("binding")
    if not binding:
        return ""
    limit = "the target loss" if binding == "loss" else f"the limit on {cost_name(binding)}"
    return f"What binds the best candidate is {limit}."


# --- fronts ------------------------------------------------------------------------------------------------------------


def value_of(plan: Mapping[str, Any], candidate: Candidate, key: str) -> float | None:
    """A candidate's amount of a cost; of a weighted sum, its objective."""
    value = candidate.get(key) or (candidate.get("costs") or {}).get(key)
    return value if value or key != plan.get("minimize") else candidate.get("objective")


def _fronts(plan: Mapping[str, Any], number: int) -> str:
    drawn = [
        plot(figure, f"{key}-{number}", caption)
        for key, figure, caption in (("front", *loss_front(plan)), ("memory", *memory_front(plan)))
        if figure is not None
    ]
    return f'<div class="panels" data-panels="{len(drawn)}">{"".join(drawn)}</div>' if drawn else ""


def loss_front(plan: Mapping[str, Any], height: int = 400) -> tuple[go.Figure | None, str]:
    """Loss against cost, and its caption; no figure where the plan has fewer than two points."""
    candidates = plan["candidates"]
    axis = plan.get("front_cost") or next((key for key in ALWAYS if candidates[0].get(key)), None)
    if axis is None or axis == "loss":
        return None, ""
    values = [value_of(plan, c, axis) for c in candidates]
    marks = [
        (value, c["loss"], f"{k + 1}. {shape_words(c)}")
        for k, (c, value) in enumerate(zip(candidates, values, strict=True))
        if value and c.get("loss")
    ]
    line = [(p["cost"], p["loss"], shape_words(p)) for p in plan.get("front") or () if p.get("cost") and p.get("loss")]
    name, scale = cost_name(axis), 1
    if axis.endswith("bytes"):
        name, scale = f"{name} (GiB)", GIB
    elif axis in COSTS and not axis.endswith("flops"):
        unit = {"usd": " (USD)", "onds": " (s)"}
        name += next((text for end, text in unit.items() if axis.endswith(end)), "")
    caption = f"Best loss against {cost_name(axis)}: the front as a line, candidates as circles, the chosen starred"
    return _front(line, marks, scale, name, "predicted loss (nats/token)", height, False), caption


def memory_front(plan: Mapping[str, Any], height: int = 400) -> tuple[go.Figure | None, str]:
    """Memory against FLOPs, and its caption; no figure where the plan does not say."""
    points = plan.get("memory_front") or ()
    if not points:
        return None, ""
    key = plan.get("memory_front_cost", "lifetime_flops")
    marks = [
        (c["memory_bytes"], c[key], f"{k + 1}. {shape_words(c)}")
        for k, c in enumerate(plan["candidates"])
        if c.get("memory_bytes") and c.get(key)
    ]
    line = [(p["memory_bytes"], p["flops"], shape_words(p)) for p in points]
    what = "FLOPs of one context" if key == "flops" else cost_name(key)
    caption = f"Memory while serving against {what}: the shapes that no other beats in both, and the candidates"
    return _front(line, marks, GIB, "memory: weights and KV cache (GiB)", what, height, True), caption


Points = Sequence[tuple[float, float, str]]


def _front(line: Points, marks: Points, scale: float, x: str, y: str, height: int, log: bool) -> go.Figure | None:
    if len(line) + len(marks) < 2:
        return None
    scaled: list[Points] = [[(a / scale, b, label) for a, b, label in points] for points in (line, marks)]
    return figures.front(scaled[0], scaled[1], x, y, height, log)


# --- tables ------------------------------------------------------------------------------------------------------------


def candidate_table(plan: Mapping[str, Any]) -> str:
    """The candidates, best first: sizes, loss, costs, and how sure each is."""
    candidates = plan["candidates"]
    aim = plan.get("minimize")
    costs = [key for key in ALWAYS if any(c.get(key) for c in candidates)]
    if not any(c.get("z") for c in candidates):
        costs = [key for key in costs if key != "flops"]
    if all(c.get("lifetime_flops") == c.get("training_flops") for c in candidates):
        costs = [key for key in costs if key != "lifetime_flops"]
    if aim and aim != "loss" and aim not in costs and any(value_of(plan, c, aim) for c in candidates):
        costs = [aim, *costs]
    sure = any(c.get("probability_best") is not None for c in candidates)

    body = []
    for number, c in enumerate(candidates):
        interval = f"<br><small>{ends}</small>" if (ends := loss_interval(c)) else ""
        body.append(
            [
                Html(f"{number + 1}{' <b>chosen</b>' if number == 0 else ''}"),
                shape_words(c).replace(" layers", ""),
                *(cost_shown(key, c.get(key)) for key in ("parameters", "tokens")),
                Html(f"<b>{cost_shown('loss', c.get('loss'))}</b>{interval}"),
                *(cost_shown(key, value_of(plan, c, key)) for key in costs),
                known(c.get("margin_percent"), margin),
                *_certainty(c, aim, sure),
                str(c.get("binding") or NONE),
                "yes" if c.get("extrapolated") else "no",
            ]
        )
    header = ["rank", "layers \u00d7 width", "N", "tokens", "loss, 95% interval", *(cost_name(key) for key in costs)]
    header += ["margin to the next", *(["best in, regret"] if sure else []), "bound by", "beyond range"]
    align = "llrrr" + "r" * len(costs) + "r" + ("r" if sure else "") + "ll"
    return data_table("Candidates, best first", align, header, body)


def _certainty(candidate: Candidate, aim: Any, sure: bool) -> list[str]:
    """Share of the draws in which it is the best, and the regret expected of choosing it."""
    if not sure:
        return []
    regret = amount(aim, candidate.get("expected_regret"))
    return [Html(f"{percent(candidate.get('probability_best'), 0)}<br><small>{escape(regret)}</small>")]


def _doubts(plan: Mapping[str, Any]) -> str:
    """What weakens the answer, and the plan's own notes."""
    best, notes = plan["candidates"][0], [str(note) for note in plan.get("notes") or ()]
    spoken = " ".join(notes)
    weak = [*(best.get("extrapolation") or ()), *filter(None, [best.get("no_interval")])]
    if reason := plan.get("no_probability"):
        weak.append(f"No candidate has a probability of being best: {reason}")
    if (reached := best.get("probability_reached")) is not None and reached < 0.95:
        weak.append(f"In {percent(1 - reached, 0)} of the law's draws the chosen shape misses the target or the limits")
    return bullets((f"{text}." for text in weak if text not in spoken), kind="warnings") + bullets(notes)


def sensitivity_table(plan: Mapping[str, Any]) -> str:
    """The choice with each number of the plan at half and at double; nothing where the plan does not say."""
    best = plan["candidates"][0]
    lines = []
    for turn in plan.get("sensitivity") or ():
        same = shape_words(turn) == shape_words(best)
        worse = turn.get("regret_percent")
        lines.append(
            (
                Html(f"<code>{escape(turn['key'])}</code> \u00d7 {turn['factor']:g}"),
                significant(turn["value"], 7) if turn["value"] < 1e7 else format_count(turn["value"], 4),
                "the same" if same else shape_words(turn),
                "it becomes impossible" if worse is None else "0%" if worse < 5e-3 else f"{significant(worse, 2)}%",
            )
        )
    if not lines:
        return ""
    header = ("if", "it becomes", "the best shape is", "the chosen one is worse by")
    return data_table("The choice if one number of the plan were other", "lrlr", header, lines)


def next_runs(plan: Mapping[str, Any]) -> str:
    """The runs to do next, with what they are expected to be worth; nothing where the plan does not ask."""
    found = plan.get("next")
    if not found:
        return ""
    aim = plan.get("minimize") or ""
    before, after = (amount(aim, found[key]) for key in ("expected_regret", "expected_regret_after"))
    if not found["runs"]:
        return paragraph(
            f"No runs of this budget are expected to change the choice for the better; its expected regret is {before}."
        )
    text = paragraph(
        f"{len(found['runs'])} runs of {format_flops(found['training_flops'])} together are expected to lower the regret of",
        f"the choice from {before} to {after}, over {found['draws']} draws of the law with",
        f"{significant(100 * found['noise'], 2)}% noise in a run's loss.",
    )
    lines = (
        (
            shape_words(run),
            *(format_count(run[key], 4) for key in ("parameters", "tokens")),
            significant(run["tokens_per_parameter"], 4),
            format_flops(run["training_flops"]),
        )
        for run in found["runs"]
    )
    text += data_table("The runs", "lrrrr", "shape|N|tokens|tokens per parameter|training FLOPs", lines)
    if found.get("study"):
        text += details("The study of these runs, as YAML", code_block(found["study"].splitlines(), "study YAML"))
    return text
