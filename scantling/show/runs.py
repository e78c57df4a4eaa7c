"""The runs of a study, planned or finished."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scantling.show.tables import console, empty_table
from scantling.units import format_count, format_flops

if TYPE_CHECKING:  # pandas takes longer to load than a cost takes to print
    import pandas as pd


def run_table(runs: pd.DataFrame, dry_run: bool) -> None:
    """The cells of a study, planned or finished."""
    if dry_run:
        table = empty_table(
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
    table = empty_table("finished runs", "run", "N", "D", "D/N", "FLOPs", "validation loss", "status")
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
