"""What a person sees in the terminal, and the JSON of verbs whose answer is not already a plain object."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scantling.costing import Cost
from scantling.memory import CONVENTIONS as MEMORY_CONVENTIONS
from scantling.memory import Memory
from scantling.rows import Row
from scantling.spec import ModelSpec
from scantling.units import format_bytes, format_count, format_flops

if TYPE_CHECKING:  # pandas and scipy take longer to load than a cost takes to print
    import pandas as pd

    from scantling.compare import Comparison
    from scantling.laws import Estimate, LawFit
    from scantling.planning import Plan

console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


def _table(title: str, *columns: str, caption: str | None = None) -> Table:
    table = Table(
        title=title, title_justify="left", caption=caption, caption_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return table


# --- cost --------------------------------------------------------------------------------------------------------------


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
        "(a model wholly in 16 bits; torch.autocast keeps about 1.4 times as much)",
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
    table = _table(title, "", *(Path(name).stem for name, _, _ in costs))

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
    table = _table(
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


# --- runs --------------------------------------------------------------------------------------------------------------


def run_table(runs: pd.DataFrame, dry_run: bool) -> None:
    """The cells of a study, planned or finished."""
    if dry_run:
        table = _table(
            "planned runs", "run", "parameters", "non-embedding", "tokens", "FLOPs", "peak lr", "minutes", "state"
        )
        for row in runs.to_dict("records"):
            table.add_row(
                row["run"], *(format_count(row[key], 4) for key in ("params", "non_embedding", "tokens")),
                format_flops(row["flops"]), f"{row['learning_rate']:.2e}", f"{row['minutes']:.1f}", row["state"],
            )  # fmt: skip
        console.print(table)
        left = runs[~runs.state.isin(["done", "diverged"])]
        console.print(
            f"{len(runs)} runs, {len(left)} to do: {format_flops(float(left.flops.sum()))}, "
            f"{left.minutes.sum():.1f} process-minutes (divide by the runs side by side)"
        )
        return
    table = _table("finished runs", "run", "N", "D", "D/N", "FLOPs", "validation loss", "status")
    for row in runs.to_dict("records"):
        loss = "-" if row["loss"] is None or row["loss"] != row["loss"] else f"{row['loss']:.4f}"
        table.add_row(
            row["run"],
            format_count(row["N"], 4),
            format_count(row["D"], 4),
            f"{row['M']:.3g}",
            format_flops(row["C"]),
            loss,
            row["status"],
        )
    console.print(table)


# --- laws --------------------------------------------------------------------------------------------------------------


def law_json(law: LawFit) -> dict[str, Any]:
    """A law as the command line's JSON: the file form, with intervals and hold-out errors by name."""
    plain = law.to_json()
    plain.pop("draws")
    return {
        **plain,
        "intervals": law.intervals(),
        "objective": law.objective_value,
        "objective_kind": law.objective,
        "hold_out": [vars(item) for item in law.holdouts],
    }


def law(law: LawFit, name: str = "law") -> None:
    """Parameters with intervals, what supports them, and what weakens them."""
    intervals = law.intervals()
    columns = ["parameter", "value", "95 % interval"]
    columns += ["95 % profile"] if law.profiles else []
    columns += ["without any one run"] if law.left_out else []
    table = _table(escape(f"{name}: {law.predicts} = {law.formula.text}"), *columns)
    for key, value in law.params.items():
        interval = intervals[key]
        held = "held" if key in law.fixed else f"= {law.ties[key]}" if key in law.ties else ""
        held = "at its bound" if key in law.at_bound and interval is None else held
        cells = [held or ("-" if interval is None else _ends(*interval))]
        cells += [_ends(*law.profiles[key]) if key in law.profiles else ""] if law.profiles else []
        cells += [_ends(*law.left_out[key]) if key in law.left_out and not held else ""] if law.left_out else []
        table.add_row(escape(key), f"{value:.6g}", *map(escape, cells))
    console.print(table)
    facts = [f"{law.n} rows" + (f" of {law.n_runs} runs" if law.n_runs != law.n else "")] if law.n else []
    if law.objective_value is not None:
        facts.append(f"objective ({law.objective}) {law.objective_value:.9g}")
    if law.residual_sd is not None:
        facts.append(f"residual sd {law.residual_sd:.2%}")
    if law.certificate is not None:
        found = law.certificate
        facts.append(
            f"{found.agreeing} of {found.starts} starts reach this minimum, relative gradient {found.gradient:.0e}"
        )
        if len(found.basins) > 1:
            facts.append(
                f"{len(found.basins)} minima, the next {found.basins[1][0] / found.basins[0][0] - 1:.2%} higher"
            )
    console.print("; ".join(facts) or law.source)
    console.print(f"intervals: {law.bootstrap}")
    for error, chained in law.downstream.items():
        console.print(f"{error} = {chained.epsilon:.4g} - {chained.k:.4g} exp(-{chained.gamma:.4g} loss)")
    for item in law.holdouts:
        ratio = "" if item.compute_ratio is None else f", {item.compute_ratio:.2g} x the fit's compute"
        console.print(
            f"held out the {item.rule}: mean error {item.are:.2%}, bias {item.bias:+.2%} "
            f"({item.n_held} rows{ratio}; last-loss baseline {item.baseline_are:.2%})"
        )
    if law.extrapolation:
        _extrapolation_table(law)
    if law.sensitivity:
        _sensitivity_table(law)
    for warning in law.warnings:
        console.print(escape(f"warning: {warning}"))


def _ends(low: float | None, high: float | None) -> str:
    return f"{'no limit' if low is None else f'{low:.5g}'} to {'no limit' if high is None else f'{high:.5g}'}"


def _extrapolation_table(law: LawFit) -> None:
    table = _table(
        "fitted to the cheap rows, predicting the dear ones",
        *("held out", "rows", "mean error", "bias", "of the reducible loss", "equal exponents", "lowest loss so far"),
    )
    for item in law.extrapolation:
        table.add_row(
            item.rule, f"{item.n_held}", f"{item.are:.2%}", f"{item.bias:+.2%}", _share(item.reducible_are),
            _share(item.tied_are), f"{item.baseline_are:.2%}",
        )  # fmt: skip
    console.print(table)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _sensitivity_table(law: LawFit) -> None:
    names = [key for key in law.params if key not in law.fixed and "[" not in key][:6]
    ahead = any(item.ahead is not None for item in law.sensitivity)
    best = any(item.optimum is not None for item in law.sensitivity)
    columns = ["fitted otherwise", "rows", *names]
    columns += ["at 10 x the compute"] if ahead else []
    columns += ["optimal D/N"] if best else []
    table = _table("sensitivity", *columns)
    for item in law.sensitivity:
        if item.refused is not None:
            table.add_row(item.change, f"{item.n}", "refused", *[""] * (len(columns) - 3))
            continue
        cells = [f"{item.params[key]:.4g}" for key in names]
        cells += ["-" if item.ahead is None else f"{item.ahead:.4f}"] if ahead else []
        cells += ["-" if item.optimum is None else f"{item.optimum:.3g}"] if best else []
        table.add_row(item.change, f"{item.n}", *cells)
    console.print(table)


def comparison(found: Comparison) -> None:
    """Each family's law, then the findings."""
    for name, item in found.families.items():
        law(item, name)
        console.print()
    for sentence in found.findings:
        console.print(sentence)


def _estimate(item: Estimate) -> dict[str, float | None]:
    return {"value": item.value, "low": item.low, "high": item.high}


def prediction_json(law: LawFit, params: float, tokens: float, level: float) -> dict[str, Any]:
    """L(N, D) with interval, and the task errors chained to it; their interval is that of the loss alone."""
    found = law.predict(params, tokens, level)
    low = None if found.low is None else float(found.low)
    high = None if found.high is None else float(found.high)
    errors = {
        name: {key: None if x is None else float(chained.error(x)) for key, x in
               (("value", float(found.value)), ("low", low), ("high", high))}
        for name, chained in law.downstream.items()
    }  # fmt: skip
    return {
        "value": float(found.value), "low": low, "high": high, "level": level, "params": params, "tokens": tokens,
        "flops": 6 * params * tokens, "errors": errors, "conventions": dict(law.conventions), "notes": list(found.notes),
        "source": law.source,
    }  # fmt: skip


def value_json(law: LawFit, columns: dict[str, float], groups: dict[str, str], level: float) -> dict[str, Any]:
    """The law at values of its own columns, with interval."""
    found = law.predict_at(columns, groups, level)
    low = None if found.low is None else float(found.low)
    high = None if found.high is None else float(found.high)
    return {
        "value": float(found.value), "low": low, "high": high, "level": level, "at": columns | groups,
        "predicts": law.predicts, "conventions": dict(law.conventions), "notes": list(found.notes), "source": law.source,
    }  # fmt: skip


def optimum_json(law: LawFit, compute: float, level: float) -> dict[str, Any]:
    """The compute-optimal split with intervals."""
    found = law.optimum(compute, level)
    loss = _estimate(found.loss)
    return {
        **loss, "level": level, "flops": compute, "optimal_params": _estimate(found.N), "optimal_tokens": _estimate(found.D),
        "tokens_per_parameter": _estimate(found.M), "conventions": dict(law.conventions), "notes": list(found.notes),
        "source": law.source,
    }  # fmt: skip


def prediction(name: str, answer: dict[str, Any]) -> None:
    """One prediction in words."""
    interval = (
        ""
        if answer["low"] is None
        else f" ({answer['level']:.0%} interval {answer['low']:.4f} to {answer['high']:.4f})"
    )
    if answer.get("predicts", "loss") != "loss":
        ends = "" if answer["low"] is None else f" ({format_count(answer['low'])} to {format_count(answer['high'])})"
        console.print(f"{name}: {answer['predicts']} {format_count(answer['value'], 4)}{ends}")
    else:
        console.print(f"{name}: loss {answer['value']:.4f} nats/token{interval}")
    for error, item in answer.get("errors", {}).items():
        spread = (
            "" if item["low"] is None else f" ({item['low']:.4f} to {item['high']:.4f} from the interval of the loss)"
        )
        console.print(f"  {error}: {item['value']:.4f}{spread}")
    if "optimal_params" in answer:
        for label, key in (
            ("parameters", "optimal_params"),
            ("tokens", "optimal_tokens"),
            ("tokens per parameter", "tokens_per_parameter"),
        ):
            item = answer[key]
            spread = "" if item["low"] is None else f" ({format_count(item['low'])} to {format_count(item['high'])})"
            console.print(f"  {label}: {format_count(item['value'], 4)}{spread}")
    for note in answer["notes"]:
        console.print(escape(f"note: {note}"))


# --- plans -------------------------------------------------------------------------------------------------------------


def plan(found: Plan) -> None:
    """Ranked candidates, the best one in words, and the notes."""
    columns = (
        "shape",
        "heads",
        "parameters",
        "tokens",
        "loss",
        "training",
        "serving",
        "memory",
        found.minimize,
        "margin",
        *(["best"] if found.no_probability is None else []),
    )
    screened = (
        f"{len(found.candidates)} best of {found.screened:,} shapes"
        if found.screened
        else f"{len(found.candidates)} shapes"
    )
    table = _table(f"{screened}, least {found.minimize} first", "", *columns)
    for rank, item in enumerate(found.candidates, 1):
        interval = (
            "" if item.loss_low is None or item.loss_high is None else f" ({item.loss_low:.3f}-{item.loss_high:.3f})"
        )
        table.add_row(
            f"{rank}",
            f"{item.num_hidden_layers:.6g} x {item.hidden_size:.6g}",
            f"{item.num_attention_heads:g}/{item.num_key_value_heads:g} x {item.head_dim:g}",
            format_count(item.parameters, 4),
            format_count(item.tokens, 4),
            f"{item.loss:.4f}{interval}{' *' if item.extrapolated else ''}",
            format_flops(item.training_flops),
            format_flops(item.serving_flops) if item.serving_flops else "-",
            format_bytes(item.memory_bytes),
            f"{item.objective:.6g}",
            "-" if item.margin_percent is None else f"{item.margin_percent:.2f} %",
            *([] if item.probability_best is None else [f"{100 * item.probability_best:.0f} %"]),
        )
    console.print(table)
    best = found.candidates[0]
    console.print(f"binding: {best.binding}")
    _plan_costs(found)
    if any(item.extrapolated for item in found.candidates):
        console.print("* outside the range the law was fitted to")
    for note in found.notes:
        console.print(f"note: {note}")
    if best.yaml is not None:
        console.print(f"\n# the best shape, hash {best.hash}\n{best.yaml}", end="")


def _plan_costs(found: Plan) -> None:
    """The best candidate's costs, how the choice moves with the plan's numbers, and the runs to do next."""
    best, units = found.candidates[0], {"flops": format_flops, "bytes": format_bytes}
    said = [
        f"{name} {units.get(name.rpartition('_')[2], lambda value: f'{value:.5g}')(value)}"
        for name, value in {**best.costs, **(best.errors or {})}.items()
    ]
    console.print(f"the best: {', '.join(said)}")
    for turn in found.sensitivity:
        shape = f"{turn.num_hidden_layers:.6g} x {turn.hidden_size:.6g}"
        shape += f", heads {turn.num_attention_heads:g}/{turn.num_key_value_heads:g}"
        worse = "impossible" if turn.regret_percent is None else f"{turn.regret_percent:.2g} % worse"
        console.print(f"at {turn.factor:g} x {turn.key}: {shape}; this choice is {worse}")
    if (runs := found.next) is not None and not runs.runs:
        console.print("next: no runs of this budget are expected to change the choice for the better; keep it")
    elif runs is not None:
        now, after = (f"{value:.4g}" for value in (runs.expected_regret, runs.expected_regret_after))
        spent = f"{len(runs.runs)} runs of {format_flops(runs.training_flops)} together"
        console.print(
            f"next: {spent} lower the expected regret from {now} to {after} ({found.minimize}); --out writes them"
        )


# --- coordinate check ----------------------------------------------------------------------------------------------------


def coordinates(found: dict[str, Any]) -> None:
    """The steepest layers of a coordinate check (`CoordinateCheck.to_json`), the verdict and what is missing."""
    steps, widths = found["steps"], list(found["widths"].values())
    columns = ("before training", f"after {steps} steps", f"grows from width^{found['threshold']:g}")
    table = _table(f"mean |activation| as a power of width, {widths[0]} to {widths[-1]}", "", *columns)
    for item in found["steepest"]:
        power = f"width^{item['start']:.2f}", f"width^{item['end']:.2f}"
        table.add_row(item["name"], *power, "grows" if item["end"] >= found["threshold"] else "")
    console.print(table)
    console.print(found["verdict"])
    for warning in found["warnings"]:
        console.print(escape(f"warning: {warning}"))
