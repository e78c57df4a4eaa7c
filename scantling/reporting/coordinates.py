"""The page of a coordinate check: activations against width, one line per step."""

import math
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from scantling.reporting.figures import PALETTE, SYMBOLS, figure_of
from scantling.reporting.markup import Section, bullets, data_table, paragraph, plot, significant
from scantling.reporting.page import assemble


def coordinates_page(found: dict[str, Any]) -> str:
    """The HTML of one check.

    Args:
        found: `CoordinateCheck.to_json()`.
    """
    lines = (
        (item["name"], significant(item["start"], 2), significant(item["end"], 2), _answer(item["end"], found))
        for item in found["steepest"]
    )
    header = ("quantity", "slope before training", f"slope after {found['steps']} steps", "depends on width")
    caption = "Slope of log mean |activation| against log width; of each kind the steepest layer"
    findings = paragraph(found["verdict"], kind="lead") + data_table(caption, "lrrl", header, lines)
    missing = found["warnings"]
    panels = "".join(
        plot(
            _against_width(found, item["kind"], item["layer"]),
            f"coordinates-{item['kind']}",
            f"{item['name']}: mean |activation| against the width of the widest layer, one line per step",
        )
        for item in found["steepest"]
    )
    sections = [
        Section("findings", "Findings", findings),
        Section("missing", "What muP still needs", bullets(missing)),
        Section("activations", "Activations by width", f'<div class="panels" data-panels="2">{panels}</div>'),
    ]
    return assemble(
        [section for section in sections if section.body], f"Coordinate check of {found['name']}", found["name"]
    )


def _answer(slope: float, found: dict[str, Any]) -> str:
    return "grows" if slope >= found["threshold"] else "does not grow"


def _against_width(found: dict[str, Any], kind: str, layer: int | None) -> go.Figure:
    """Log-log lines of one quantity, the geometric mean of the seeds."""
    figure = figure_of(300)
    rows = [row for row in found["table"] if (row["kind"], row["layer"]) == (kind, layer)]
    widths = list(found["widths"].values())
    for step in range(found["steps"] + 1):
        means = [
            math.exp(fmean(math.log(row["mean_abs"]) for row in rows if (row["width"], row["step"]) == (width, step)))
            for width in widths
        ]
        look = {"color": PALETTE[step % len(PALETTE)]}
        figure.add_scatter(
            x=widths,
            y=means,
            name=f"step {step}",
            mode="lines+markers",
            line=look,
            marker={**look, "symbol": SYMBOLS[step % len(SYMBOLS)], "size": 7},
            hovertemplate=f"step {step}<br>width %{{x}}<br>mean |activation| %{{y:.3g}}<extra></extra>",
        )
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": -0.3})
    figure.update_xaxes(type="log", tickvals=widths, title="width")
    figure.update_yaxes(type="log", title="mean |activation|", nticks=4)
    return figure
