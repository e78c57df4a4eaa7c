"""Fitted laws, comparisons of families and predictions: tables, sentences and JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape

from scantling.show.tables import console, empty_table
from scantling.units import format_count

if TYPE_CHECKING:  # pandas and scipy take longer to load than a cost takes to print
    from scantling.compare import Comparison
    from scantling.laws import Estimate, LawFit, Prediction


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
    table = empty_table(escape(f"{name}: {law.predicts} = {law.formula.text}"), *columns)
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
    table = empty_table(
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
    table = empty_table("sensitivity", *columns)
    for item in law.sensitivity:
        if item.refused is not None:
            table.add_row(item.change, f"{item.n}", "refused", *[""] * (len(columns) - 3))
            continue
        cells = [f"{item.params[key]:.4g}" for key in names]
        shown = (
            "-"
            if item.ahead is None
            else f"{item.ahead:.4f}"
            if law.predicts == "loss"
            else format_count(item.ahead, 4)
        )
        cells += [shown] if ahead else []
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
    """L(N, D) with interval, and the task errors chained to it with theirs."""
    found = law.predict(params, tokens, level)
    low = None if found.low is None else float(found.low)
    high = None if found.high is None else float(found.high)
    chained = {name: law.predict_error(name, params, tokens, level) for name in law.downstream}
    notes = list(dict.fromkeys([*found.notes, *(note for one in chained.values() for note in one.notes)]))
    errors = {name: _ends_of(one) for name, one in chained.items()}
    return {
        "value": float(found.value), "low": low, "high": high, "level": level, "params": params, "tokens": tokens,
        "flops": 6 * params * tokens, "errors": errors, "conventions": dict(law.conventions), "notes": notes,
        "source": law.source,
    }  # fmt: skip


def errors_json(law: LawFit, loss: float, level: float) -> dict[str, Any]:
    """The task errors at a measured loss, with intervals."""
    found = {name: law.error_at_loss(name, loss, level) for name in law.downstream}
    return {
        "value": loss, "low": None, "high": None, "level": level, "at": {"loss": loss},
        "errors": {name: _ends_of(one) for name, one in found.items()}, "conventions": dict(law.conventions),
        "notes": [note for one in found.values() for note in one.notes], "source": law.source,
    }  # fmt: skip


def _ends_of(found: Prediction) -> dict[str, float | None]:
    return {
        "value": float(found.value),
        "low": None if found.low is None else float(found.low),
        "high": None if found.high is None else float(found.high),
    }


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
        spread = "" if item["low"] is None else f" ({item['low']:.4f} to {item['high']:.4f})"
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
