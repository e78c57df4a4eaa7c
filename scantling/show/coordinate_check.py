"""The coordinate check: how activations grow with width."""

from typing import Any

from rich.markup import escape

from scantling.show.tables import console, empty_table


def coordinates(found: dict[str, Any]) -> None:
    """The steepest layers of a coordinate check (`CoordinateCheck.to_json`), the verdict and what is missing."""
    steps, widths = found["steps"], list(found["widths"].values())
    columns = ("before training", f"after {steps} steps", f"grows from width^{found['threshold']:g}")
    table = empty_table(f"mean |activation| as a power of width, {widths[0]} to {widths[-1]}", "", *columns)
    for item in found["steepest"]:
        power = f"width^{item['start']:.2f}", f"width^{item['end']:.2f}"
        table.add_row(item["name"], *power, "grows" if item["end"] >= found["threshold"] else "")
    console.print(table)
    console.print(found["verdict"])
    for warning in found["warnings"]:
        console.print(escape(f"warning: {warning}"))
