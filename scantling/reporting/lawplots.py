"""Plots of what a fit leaves open: the profile of the objective over each parameter."""

import math
import re

import plotly.graph_objects as go

from scantling.laws import LawFit
from scantling.reporting.figures import GREY, figure_of, styles

LIMIT = 3.841  # 95% point of chi-square with one degree of freedom
SHOWN = 12.0  # statistic at the top of the plot


def profile_figure(law: LawFit) -> go.Figure:
    """The profile of each parameter against its value relative to the estimate (logarithmic for prefactors)."""
    figure = figure_of(340)
    names = list(law.profile_curves)
    looks = styles(names)
    for name in names:
        values, statistic = law.profile_curves[name]
        middle = law.params[name]
        pairs = [
            (v / middle, s) for v, s in zip(values, statistic, strict=True) if s <= 3 * SHOWN and v > 0 and middle > 0
        ]
        if len(pairs) < 3 or not all(math.isfinite(x) and math.isfinite(y) for x, y in pairs):
            continue
        figure.add_scatter(
            x=[x for x, _ in pairs],
            y=[y for _, y in pairs],
            mode="lines+markers",
            name=name,
            marker={"color": looks[name].color, "symbol": looks[name].symbol, "size": 6},
            line={"color": looks[name].color},
        )
    figure.add_hline(y=LIMIT, line={"color": GREY, "dash": "dash"})
    figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.12})
    figure.update_xaxes(type="log", title="value / estimate")
    figure.update_yaxes(title="excess of the objective", range=[0, SHOWN])
    return figure


def slug(name: str) -> str:
    """A name as an HTML key."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() or "law"
