"""Shapes: the models drawn and priced layer by layer."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from scantling.costing import CONVENTIONS, Cost, cost
from scantling.reporting import figures
from scantling.reporting.markup import (
    Section,
    bullets,
    data_table,
    details,
    paragraph,
    percent,
)
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
        body.append(layer_table(name, spec, price, dtype))
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


def layer_table(name: str, spec: ModelSpec, price: Cost, dtype: str) -> str:
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
