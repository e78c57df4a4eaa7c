"""Shapes: the models drawn and priced layer by layer, and the candidates of plans."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from scantling.costing import CONVENTIONS, Cost, cost
from scantling.reporting import figures
from scantling.reporting.markup import (
    NONE,
    Html,
    Section,
    bullets,
    data_table,
    details,
    paragraph,
    percent,
    plot,
    significant,
    span,
)
from scantling.reporting.sources import dig
from scantling.resolve import spec_from
from scantling.spec import ModelSpec
from scantling.units import dtype_bytes, format_bytes, format_count, format_flops


def shapes_section(shapes: Sequence[tuple[str, ModelSpec, Cost, str]]) -> Section:
    """Each model drawn to scale, its layers priced, and the totals side by side."""
    body = [
        paragraph(
            "Bars are as wide as each layer's hidden_size; heads are query/key-value.",
            "Labels stand where a layer differs from the one before.",
            kind="note",
        )
    ]
    for name, spec, price, dtype in shapes:
        size = f"{format_count(price.params['total'], 4)} parameters, spec {spec.hash[:12]}"
        body.append(f"<h3>{escape(name)} <small>{escape(size)}</small></h3>")
        body.append(
            f"<figure>{figures.stack_svg(spec, name)}<figcaption>{escape(name)}, input at the top</figcaption></figure>"
        )
        body.append(_layer_table(name, spec, price, dtype))
    totals: dict[str, Any] = {
        "parameters": lambda c: f"{c.params['total']:,}",
        "\u2003active": lambda c: f"{c.params['active']:,}",
        "\u2003non-embedding": lambda c: f"{c.params['non_embedding']:,}",
        "FLOPs per token, forward": lambda c: format_flops(c.flops_per_token["forward"], 4),
        "FLOPs per token, forward, causal average": lambda c: format_flops(c.flops_per_token["forward_causal"], 4),
        "FLOPs per token, train": lambda c: format_flops(c.flops_per_token["train"], 4),
        "FLOPs per token, decode": lambda c: format_flops(c.flops_per_token["decode"], 4),
        "KV cache per token": lambda c: format_bytes(c.kv_cache_bytes_per_token, 4),
        "KV cache": lambda c: format_bytes(c.kv_cache_bytes, 4),
        "weights": lambda c: format_bytes(c.weight_bytes, 4),
        "bytes read per decode step": lambda c: format_bytes(c.decode_bytes_per_token, 4),
    }
    lines = [("context, batch, dtype", *(f"{c.context:,}, {c.batch}, {dtype}" for _, _, c, dtype in shapes))]
    lines += [(label, *(shown(c) for _, _, c, _ in shapes)) for label, shown in totals.items()]
    body.append(data_table("Totals", "l" + "r" * len(shapes), ("", *(name for name, *_ in shapes)), lines))
    conventions = bullets(f"{key}: {text}" for key, text in CONVENTIONS.items())
    body.append(details("How each number is counted", conventions))
    return Section("shape", "The shape" if len(shapes) == 1 else "The shapes", "".join(body))


def _layer_table(name: str, spec: ModelSpec, price: Cost, dtype: str) -> str:
    """One row per layer, equal consecutive layers together; the two ends; totals."""
    plain = price.layers()
    keys = ("params", "forward_flops", "kv_cache_bytes_per_token", "weight_bytes")

    def sums(part: Iterable[Mapping[str, Any]]) -> list[int]:
        part = list(part)
        return [sum(int(row[key]) for row in part) for key in keys]

    whole = sums(plain)

    def line(label: str, about: str, values: Sequence[int]) -> tuple[str, ...]:
        return (
            label,
            *about.split("|"),
            f"{values[0]:,}",
            percent(values[0] / whole[0]),
            f"{values[1]:,}",
            f"{values[2]:,}" if values[2] else "",
            format_bytes(values[3]),
        )

    outer = {
        component: sums(row for row in plain if row["layer"] is None and row["component"] == component)
        for component in ("embedding", "norm", "head")
    }
    body = [line("embedding", f"{spec.embedding_size}||", outer["embedding"])]
    for layer, members in groupby(range(spec.num_hidden_layers), key=lambda index: spec.layers[index]):
        group = list(members)
        label = f"{group[0]}" if len(group) == 1 else f"each of {group[0]} to {group[-1]}"
        dims = (
            f"{layer.head_dim}"
            if layer.head_dim == layer.v_head_dim
            else f"{layer.head_dim}, values {layer.v_head_dim}"
        )
        heads = f"{layer.num_attention_heads}/{layer.num_key_value_heads}"
        about = f"{layer.hidden_size}|{heads} \u00d7 {dims}|{figures.describe_ffn(layer.ffn)}"
        body.append(line(label, about, sums(row for row in plain if row["layer"] == group[0])))
    body.append(line("final norm", f"{spec.layers[-1].hidden_size}||", outer["norm"]))
    body.append(
        line("head" + (" (tied)" if spec.tie_word_embeddings else ""), f"{spec.unembedding_size}||", outer["head"])
    )
    body.append(line("total", "||", whole))
    header = (
        "layer|hidden_size|heads \u00d7 head_dim|feed-forward|parameters|share|forward FLOPs/token|"
        "KV bytes/token|weights"
    )
    caption = f"{name}, layer by layer (full attention at context {price.context:,}; {dtype})"
    return data_table(caption, "lrllrrrrr", header, body, last="total")


def planned_shapes(plan: Mapping[str, Any], path: Path) -> list[tuple[str, ModelSpec, Cost, str]]:
    """The best candidate's model, priced as the plan serves it where the plan says how."""
    best = plan["candidates"][0]
    if not isinstance(best.get("spec"), dict):
        return []
    mapping = best["spec"]
    spec = (
        ModelSpec.model_validate(mapping) if "layers" in mapping else spec_from(mapping, f"{path}, candidates[0].spec")
    )
    serving = plan.get("serving") or {}
    dtype = serving.get("dtype") or "bf16"
    name = f"{path.stem}: chosen shape"
    return [(name, spec, cost(spec, serving.get("context"), serving.get("batch") or 1, dtype_bytes(dtype)), dtype)]


# --- plans -------------------------------------------------------------------------------------------------------------


_COSTS = {
    "training_flops": ("training FLOPs", lambda value: format_flops(value, 4)),
    "lifetime_flops": ("training + serving FLOPs", lambda value: format_flops(value, 4)),
    "flops": ("FLOPs per context", lambda value: format_flops(value, 4)),
    "memory_bytes": ("memory", lambda value: format_bytes(value, 4)),
    "z": ("Z", lambda value: f"{value:,.1f}"),
}


def _cost_name(key: Any) -> str:
    return _COSTS[key][0] if key in _COSTS else str(key or "the objective")


def _shape(candidate: Mapping[str, Any]) -> str:
    """A candidate in a few words."""
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
    sizes = [candidate.get(key) for key in keys]
    if None in sizes:
        return "the first candidate"
    depth, width, heads, kv = (f"{size:g}" for size in sizes)
    return f"{depth} layers \u00d7 {width}, {heads}/{kv} heads"


def _interval(candidate: Mapping[str, Any]) -> str:
    ends = candidate.get("loss_low"), candidate.get("loss_high")
    return "" if None in ends else span(*ends, "{:.4f}".format)


def plan_sentence(plan: Mapping[str, Any]) -> str:
    """What a plan found, with its interval."""
    best = plan["candidates"][0]
    text = f"Of {plan.get('screened') or len(plan['candidates']):,} shapes the best is {_shape(best)}"
    if best.get("parameters") is not None:
        text += f", {format_count(best['parameters'], 4)} parameters"
    if best.get("tokens") is not None and math.isfinite(best["tokens"]):
        text += f" on {format_count(best['tokens'], 4)} tokens"
    if best.get("loss") is not None:
        text += f": predicted loss {best['loss']:.4f} nats per token"
        text += f" (95% interval of the law {ends})" if (ends := _interval(best)) else " (no interval)"
    if best.get("margin_percent") is not None:
        text += (
            f"; the next shape is {significant(best['margin_percent'], 2)}% worse in {_cost_name(plan.get('minimize'))}"
        )
    if best.get("extrapolated"):
        text += ". This extrapolates beyond what the law was fitted to"
    return text + "."


def plan_section(plans: Sequence[tuple[Path, dict[str, Any]]]) -> Section:
    """Each plan: what was asked, the Pareto front, the candidates and what weakens them."""
    body = []
    for number, (path, plan) in enumerate(plans):
        candidates = plan["candidates"]
        if len(plans) > 1:
            body.append(f"<h3>{escape(path.stem)}</h3>")
        counted, law = plan.get("cost_convention", NONE), plan.get("law", NONE)
        asked = f"Minimised: {_cost_name(plan.get('minimize'))}; costs counted as {counted}; law {law}."
        body.append(paragraph(asked, f"Parameters N are {plan['parameters']}." if plan.get("parameters") else ""))
        if saved := dig(plan, "law_optimum", "saving_percent"):
            free = f"The law alone ({dig(plan, 'law_optimum', 'convention')}) puts the best size at"
            size = (
                f"{format_count(plan['law_optimum']['parameters'], 4)} parameters, which saves {significant(saved, 3)}%"
            )
            body.append(
                paragraph(free, size, "of the FLOPs of training and serving against the model cheapest to train.")
            )
        axis = plan.get("front_cost") or next((key for key in _COSTS if candidates[0].get(key)), None)
        marks = [
            (c[axis], c["loss"], f"{k + 1}. {_shape(c)}")
            for k, c in enumerate(candidates)
            if axis and c.get(axis) and c.get("loss")
        ]
        line = [(p["cost"], p["loss"], _shape(p)) for p in plan.get("front") or () if p.get("cost") and p.get("loss")]
        if len(marks) + len(line) > 1:
            caption = (
                f"Best loss against {_cost_name(axis)}: the front as a line, candidates as circles, the chosen starred"
            )
            body.append(plot(figures.front(line, marks, _cost_name(axis)), f"front-{number}", caption))
        body.append(_candidate_table(candidates))
        notes = " ".join(map(str, plan.get("notes") or ()))
        weak = [*(candidates[0].get("extrapolation") or ()), *filter(None, [candidates[0].get("no_interval")])]
        body.append(bullets((f"{text}." for text in weak if text not in notes), kind="warnings"))
        body.append(bullets(plan.get("notes") or ()))
    return Section("plan", "Cost-optimal shapes", "".join(body))


def _candidate_table(candidates: Sequence[Mapping[str, Any]]) -> str:
    costs = [key for key in _COSTS if any(c.get(key) for c in candidates)]
    if not any(c.get("z") for c in candidates):
        costs = [key for key in costs if key != "flops"]
    if all(c.get("lifetime_flops") == c.get("training_flops") for c in candidates):
        costs = [key for key in costs if key != "lifetime_flops"]

    def shown(value: float | None, how: Any) -> str:
        return NONE if value is None or not math.isfinite(value) else how(value)

    body = []
    for number, c in enumerate(candidates):
        interval = f"<br><small>{ends}</small>" if (ends := _interval(c)) else ""
        body.append(
            [
                Html(f"{number + 1}{' <b>chosen</b>' if number == 0 else ''}"),
                _shape(c).replace(" layers", ""),
                *(shown(c.get(key), format_count) for key in ("parameters", "tokens")),
                Html(f"<b>{shown(c.get('loss'), '{:.4f}'.format)}</b>{interval}"),
                *(shown(c.get(key), _COSTS[key][1]) for key in costs),
                shown(c.get("margin_percent"), lambda margin: f"{significant(margin, 2)}%"),
                str(c.get("binding") or NONE),
                "yes" if c.get("extrapolated") else "no",
            ]
        )
    header = ["rank", "layers \u00d7 width", "N", "tokens", "loss, 95% interval", *(_COSTS[key][0] for key in costs)]
    header += ["margin to the next", "bound by", "extrapolates"]
    return data_table("Candidates, best first", "llrrr" + "r" * len(costs) + "rll", header, body)
