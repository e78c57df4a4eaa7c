"""When to grow: the schedule, what it saves, and the keys for the run's file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from scantling.show.tables import console, empty_table
from scantling.units import format_count, format_flops

if TYPE_CHECKING:
    from scantling.laws.evidence import Estimate
    from scantling.planning.timing import Timing


def _label(name: str, names: list[str]) -> str:
    """The file's name without its folder, where that tells it from the others."""
    return Path(name).name if sum(Path(each).name == Path(name).name for each in names) == 1 else name


def timing(found: Timing) -> None:
    """The schedule as a table, the switches with intervals, the saving, what is assumed, and what to paste."""
    target = found.shapes[-1].name
    aim = f"to the loss of {format_count(found.tokens)} tokens of {target}: {_loss(found.target_loss)}"
    columns = (
        "train",
        "parameters",
        "FLOPs per token",
        "from loss",
        "to loss",
        "as if after",
        "tokens",
        "FLOPs",
    )
    table = empty_table(escape(aim), *columns)
    for leg in found.legs:
        shape = found.shapes[leg.shape]
        table.add_row(
            escape(_label(shape.name, [each.name for each in found.shapes])),
            format_count(shape.parameters, 4),
            format_flops(shape.flops_per_token, 4),
            f"{leg.from_loss:.4f}" if math.isfinite(leg.from_loss) else "scratch",
            f"{leg.to_loss:.4f}",
            format_count(leg.already, 4) if leg.already else "",
            format_count(leg.tokens, 4),
            format_flops(leg.flops, 4),
        )
    if found.legs:
        console.print(table)
    else:
        console.print(escape(aim))
    for switch in found.switches:
        console.print(
            escape(
                f"grow {switch.source} -> {switch.target} at loss {_loss(switch.loss)}, {_share(switch.share)} of the run's "
                f"tokens: {_count(switch.tokens_before)} of {switch.source} are worth {_count(switch.tokens_worth)} of "
                f"{switch.target}"
            )
        )
    if found.saved is not None:
        spent = " (the checkpoint's own not counted)" if found.reuse else ""
        console.print(
            escape(
                f"saves {_share(found.saved)} of the {format_flops(found.from_scratch_flops)} that {target} takes from "
                f"scratch{spent}; spent on {target} instead, loss {found.loss_at_same_flops:.4f}"
            )
        )
    if found.six_nd is not None:
        losses = ", ".join(f"{loss:.4f}" for loss in found.six_nd.losses)
        where = f"growing at loss {losses}" if losses else "growing at once"
        console.print(f"at 6 N FLOPs per token: {found.six_nd.saved:.1%} saved, {where}")
    if found.stacking is not None:
        console.print(
            f"published for stacking layers (arXiv 2405.15319): after {format_count(found.stacking.tokens)} tokens, "
            f"{found.stacking.share:.1%} of the run; factor {found.stacking.factor:.3g}"
        )
    for note in found.notes:
        console.print(escape(f"note: {note}"))
    if found.run_config is not None:
        console.print(f"\n# for the run's file\n{escape(found.run_config)}", end="")


def _interval(estimate: Estimate, low: str, high: str) -> str:
    return "" if estimate.low is None or estimate.high is None else f" ({low} to {high})"


def _loss(found: Estimate) -> str:
    return f"{found.value:.4f}{_interval(found, f'{found.low or 0:.4f}', f'{found.high or 0:.4f}')}"


def _share(found: Estimate) -> str:
    return f"{found.value:.1%}{_interval(found, f'{found.low or 0:.1%}', f'{found.high or 0:.1%}')}"


def _count(found: Estimate) -> str:
    return f"{format_count(found.value)}{_interval(found, format_count(found.low or 0), format_count(found.high or 0))}"
