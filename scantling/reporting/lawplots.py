"""Plots of one law: the rows beside it, its residuals, and the profile of the objective over each parameter."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from scantling.laws import LawFit
from scantling.laws.forms import Floats
from scantling.laws.rows import levels
from scantling.reporting.figures import GREY, PALETTE, figure_of, log_axis, styles
from scantling.units import format_count

LIMIT = 3.841  # 95% point of chi-square with one degree of freedom
MOST_CURVES = 10  # sizes (or groups) beyond which the law is not drawn as curves
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


def fit_figure(law: LawFit) -> go.Figure:
    """The rows fitted against compute (or the law's first column), and the law's curve for each of a few sizes."""
    drawn = _Drawn.of(law)
    figure = figure_of(380)
    for name, index, color in drawn.curves():
        order = index[np.argsort(drawn.x[index], kind="stable")]
        figure.add_scatter(x=drawn.x[order], y=drawn.predicted[order], mode="lines", hoverinfo="skip",
                           line={"color": color, "width": 1.6}, name=name, showlegend=False)  # fmt: skip
    _add_rows(figure, drawn, drawn.measured)
    figure.update_xaxes(**log_axis(drawn.x.tolist()), title=drawn.axis)
    figure.update_yaxes(
        **log_axis(drawn.measured.tolist()), title="best size N" if law.predicts == "N" else "loss, nats per token"
    )
    return figure


def residual_figure(law: LawFit) -> go.Figure:
    """measured / law - 1 in per cent, the law's own 95% interval at each row, and where 95% of single runs should lie."""
    drawn = _Drawn.of(law)
    figure = figure_of(300)
    if drawn.low is not None and drawn.high is not None:
        ends = [100 * (end / drawn.predicted - 1) for end in (drawn.low, drawn.high)]
        figure.add_scatter(
            x=np.repeat(drawn.x, 3), mode="lines", hoverinfo="skip", showlegend=False,
            y=np.stack([ends[0], ends[1], np.full(len(drawn.x), np.nan)], axis=1).ravel(),
            line={"color": "rgba(128,128,128,0.45)", "width": 3},
        )  # fmt: skip
    residuals, band = 100 * (drawn.measured / drawn.predicted - 1), 196 * (law.residual_sd or 0.0)
    _add_rows(figure, drawn, residuals)
    figure.add_hline(y=0, line={"color": GREY, "width": 1})
    for sign in (-1, 1) if band else ():
        figure.add_hline(y=sign * band, line={"color": GREY, "dash": "dash", "width": 1})
    low, high = min(-band, float(residuals.min())), max(band, float(residuals.max()))
    figure.update_xaxes(**log_axis(drawn.x.tolist()), title=drawn.axis)
    margin = 0.08 * (high - low) + 1e-9
    figure.update_yaxes(title="residual, %", range=[low - margin, high + margin])
    return figure


@dataclass(frozen=True, eq=False)
class _Drawn:
    """What the two figures share: (n,) abscissa, measured and predicted values, what tells curves apart, colours, texts."""

    x: Floats
    axis: str
    measured: Floats
    predicted: Floats
    low: Floats | None
    high: Floats | None
    split: Floats | None
    shade: Floats | None
    shade_title: str
    group: tuple[str, ...]
    text: list[str]

    @classmethod
    def of(cls, law: LawFit) -> "_Drawn":
        rows = law.rows
        assert rows is not None
        columns = {name: np.array(values) for name, values in rows.columns.items()}
        if "C" not in columns and {"N", "D"} <= set(columns):
            x, axis = 6 * columns["N"] * columns["D"], "training compute C, FLOPs"
        else:
            first = "C" if "C" in columns else law.formula.columns[0]
            x, axis = columns[first], "training compute C, FLOPs" if first == "C" else first
        low = high = None
        if law.draws is not None and law.predicts == "loss":
            draws = {name: law.draws[:, i : i + 1] for i, name in enumerate(law.params)}
            groups = {name: list(values) for name, values in rows.groups.items()}
            low, high = np.quantile(law.formula.predict(draws, columns, groups), [0.025, 0.975], axis=0)
        shaded = next((name for name in ("N", "M", "D") if name in columns and np.ptp(columns[name]) > 0), None)
        group = tuple(" ".join(words) for words in zip(*rows.groups.values(), strict=True)) if rows.groups else ()
        measured, predicted = np.array(rows.measured), np.array(rows.predicted)
        text = []
        for i in range(len(measured)):
            said = [*(f"{name} {format_count(float(v[i]), 4)}" for name, v in columns.items()), *(group[i : i + 1])]
            shown = format_count if law.predicts == "N" else "{:.4f}".format
            said += [f"measured {shown(float(measured[i]))}", f"law {shown(float(predicted[i]))}"]
            if low is not None and high is not None:
                said.append(f"its 95% interval {low[i]:.4f} to {high[i]:.4f}")
            text.append("<br>".join(said))
        split = None if shaded is None or len(columns) < 2 else columns[shaded]
        shade = None if shaded is None or group else np.log10(columns[shaded])
        title = {"N": "N", "M": "D/N", "D": "D"}.get(shaded or "", "")
        return cls(x, axis, measured, predicted, low, high, split, shade, title, group, text)

    def curves(self) -> Iterator[tuple[str, npt.NDArray[np.intp], str]]:
        """Rows that lie on one curve of the law: one size, or one group; none where there are too many."""
        if self.group and len(set(self.group)) <= MOST_CURVES:
            looks, groups = styles(list(dict.fromkeys(self.group))), np.array(self.group)
            codes = np.zeros(len(groups), dtype=np.intp) if self.split is None else levels(self.split, 1.05)
            for name in looks if codes.max() < MOST_CURVES else ():
                for code in range(int(codes.max()) + 1):
                    yield name, np.flatnonzero((groups == name) & (codes == code)), looks[name].color
        elif self.shade is not None:
            codes = levels(10**self.shade, 1.05)
            if codes.max() < MOST_CURVES:
                for code in range(int(codes.max()) + 1):
                    yield "", np.flatnonzero(codes == code), "rgba(128,128,128,0.8)"
        elif not self.group:
            yield "", np.arange(len(self.x)), "rgba(128,128,128,0.8)"


def _add_rows(figure: go.Figure, drawn: _Drawn, y: Floats) -> None:
    hover = {"hovertemplate": "%{text}<extra></extra>", "mode": "markers"}
    if drawn.group:
        looks = styles(list(dict.fromkeys(drawn.group)))
        for name, look in looks.items():
            index = np.flatnonzero(np.array(drawn.group) == name)
            figure.add_scatter(x=drawn.x[index], y=y[index], text=[drawn.text[i] for i in index], name=name, **hover,
                               marker={"color": look.color, "symbol": look.symbol, "size": 7})  # fmt: skip
        figure.update_layout(showlegend=True, legend={"orientation": "h", "y": 1.12})
        return
    marker: dict[str, Any] = {"size": 7, "color": PALETTE[0], "opacity": 0.9}
    if drawn.shade is not None:
        low, high = float(drawn.shade.min()), float(drawn.shade.max())
        ticks = np.linspace(low, high, 4)
        marker |= {
            "color": drawn.shade, "colorscale": "Viridis", "cmin": low, "cmax": high, "showscale": True,
            "colorbar": {"title": {"text": drawn.shade_title}, "thickness": 10, "outlinewidth": 0, "tickvals": ticks,
                         "ticktext": [format_count(float(f"{10**t:.2g}")) for t in ticks]},
        }  # fmt: skip
    figure.add_scatter(x=drawn.x, y=y, text=drawn.text, marker=marker, **hover)


def slug(name: str) -> str:
    """A name as an HTML key."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() or "law"
