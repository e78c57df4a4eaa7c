"""Costs, training memory and time on a device: tables and JSON."""

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from scantling.costing import Cost
from scantling.memory import CONVENTIONS as MEMORY_CONVENTIONS
from scantling.memory import Memory
from scantling.rows import Row
from scantling.show.tables import console, empty_table
from scantling.spec import ModelSpec
from scantling.units import format_bytes


def cost_json(spec: ModelSpec, cost: Cost) -> dict[str, Any]:
    """The cost of one model as the command line's JSON."""
    return {
        "context": cost.context,
        "batch": cost.batch,
        "params": cost.params,
        "flops_per_token": cost.flops_per_token,
        "kv_cache_bytes_per_token": cost.kv_cache_bytes_per_token,
        "kv_cache_bytes": cost.kv_cache_bytes,
        "weight_bytes": cost.weight_bytes,
        "decode_bytes_per_token": cost.decode_bytes_per_token,
        "layers": cost.layers(),
    }


def memory_json(memory: Memory, sequences: int, checkpointing: bool) -> dict[str, Any]:
    """Training memory as the command line's JSON."""
    names = ("weights", "gradients", "optimizer", "activations", "logits", "total", "peak")
    convention = {
        **MEMORY_CONVENTIONS,
        "sequences": sequences,
        "recompute": "checkpointing" if checkpointing else "none",
        "kernels": "fused",
        "bytes": "weights and gradients 4, AdamW state 8 per parameter; activations 4 with fp32, else 2 "
        "(a model wholly in 16 bits; autocast over float32 weights also copies every matrix)",
    }
    return {**{name: getattr(memory, name) for name in names}, "convention": convention}


def cost_tables(
    costs: Sequence[tuple[str, ModelSpec, Cost]],
    memories: Sequence[Memory],
    times: Sequence[dict[str, Any]],
    sequences: int = 1,
    checkpointing: bool = False,
) -> None:
    """Per-layer table of a single model, then totals of all side by side, with differences to the first.

    Args:
        costs: name, spec and cost of each model.
        memories: training memory of each, for `sequences` sequences.
        times: `seconds`, `bound` and `usd_per_million_tokens` of each on a device; empty mappings without one.
    """
    if len(costs) == 1:
        console.print(_layer_table(costs[0][1], costs[0][2]))
        console.print()
    first = costs[0][2]
    title = f"context {first.context:,}, batch {first.batch}, {first.bytes_per_value} bytes per value"
    table = empty_table(title, "", *(Path(name).stem for name, _, _ in costs))

    def line(label: str, values: Sequence[Any], text: Callable[[Any], str], notes: Sequence[str] = ()) -> None:
        shown = [text(value) for value in values]
        if notes:
            shown = [f"{item} {note}" for item, note in zip(shown, notes, strict=True)]
        table.add_row(
            label,
            shown[0],
            *(f"{item} {_difference(value, values[0])}" for item, value in zip(shown[1:], values[1:], strict=True)),
        )

    params = {
        "parameters": "total", "  active": "active", "  embedding and head": "embedding", "  non-embedding": "non_embedding"
    }  # fmt: skip
    flops = {
        "FLOPs/token, forward, full attention": "forward",
        "FLOPs/token, forward, causal average": "forward_causal",
        "FLOPs/token, train (3 x forward, full)": "train",
        "FLOPs/token, prefill": "prefill",
        "FLOPs/token, decode at full context": "decode",
    }
    for label, key in params.items():
        if key != "active" or any(c.params["active"] != c.params["total"] for _, _, c in costs):
            line(label, [c.params[key] for _, _, c in costs], "{:,}".format)
    for label, key in flops.items():
        text = "{:,.0f}".format if key == "prefill" else "{:,}".format
        line(label, [c.flops_per_token[key] for _, _, c in costs], text)
    line("KV cache per token", [c.kv_cache_bytes_per_token for _, _, c in costs], format_bytes)
    line("KV cache", [c.kv_cache_bytes for _, _, c in costs], format_bytes)
    line("weights", [c.weight_bytes for _, _, c in costs], format_bytes)
    line("bytes read per decoded token", [c.decode_bytes_per_token for _, _, c in costs], format_bytes)
    how = f"{sequences} sequence{'s' * (sequences > 1)}{', checkpointing' if checkpointing else ''}"
    line(f"training memory, AdamW, {how}", [memory.total for memory in memories], format_bytes)
    line("  activations and logits", [memory.kept for memory in memories], format_bytes)
    if times and times[0]:
        _device_lines(line, times)
    console.print(table)


def _device_lines(line: Callable[..., None], times: Sequence[dict[str, Any]]) -> None:
    """Seconds with the bound that binds, and money where the device has a price."""
    device, shares = times[0]["device"], times[0]["utilisation"]
    at = f"on {device}, mfu {shares['mfu']:g}, mbu {shares['mbu']:g}"
    for label, key, step in (
        (f"prefill {at}", "prefill", "prefill"),
        ("  one decoding step", "decode_token", "decode"),
        ("  training, per token", "train_token", "train"),
    ):
        notes = [f"({time['bound'][step]})" for time in times]
        line(label, [time["seconds"][key] for time in times], _seconds, notes)
    for step in ("prefill", "decode", "train"):
        prices = [time["usd_per_million_tokens"][step] for time in times]
        if prices[0] is not None:
            line(f"  USD per million tokens, {step} (indicative)", prices, "{:.3g}".format)


def _difference(value: float, reference: float) -> str:
    """`(+12.3 %)` relative to the first model."""
    return f"({100 * (value / reference - 1):+.1f} %)" if reference else ""


def _seconds(value: float) -> str:
    """Short times in units of a second's thousandths."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def _layer_table(spec: ModelSpec, cost: Cost) -> Table:
    table = empty_table(
        "per layer and component", "layers", "component", "parameters", "forward FLOPs/token", "KV bytes/token"
    )
    body = [(index, [row for row in cost.rows if row.layer == index]) for index in range(spec.num_hidden_layers)]

    def measures(row: Row) -> tuple[Any, ...]:
        return (row.component, row.params, row.matmul_flops, row.score_flops, row.kv_elements)

    def line(label: str, row: Row, times: int = 1) -> None:
        flops = row.matmul_flops + row.score_flops * cost.context
        kv = row.kv_elements * cost.bytes_per_value
        table.add_row(
            label, row.component, f"{row.params * times:,}", f"{flops * times:,}", f"{kv * times:,}" if kv else ""
        )

    outer = [row for row in cost.rows if row.layer is None]
    line("", outer[0])
    for _, group in groupby(body, key=lambda item: [measures(row) for row in item[1]]):
        members = list(group)
        first, last = members[0][0], members[-1][0]
        name = f"{first}" if first == last else f"each of {first}-{last}"
        for number, row in enumerate(members[0][1]):
            line(f"{name}, width {spec.layers[first].hidden_size}" if number == 0 else "", row)
    for row in outer[1:]:
        line("", row)
    return table
