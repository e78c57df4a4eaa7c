"""The drawings of a report: plotly figures of ladders, savings and Pareto fronts, and a model's stack as SVG.

Figures carry no colours of text, grid or paper: the page sets those, light or dark. Families differ in colour
(Okabe-Ito, safe for colour-blind readers) and in marker shape.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from scantling.laws import LawFit, Saving
from scantling.laws.forms import Floats
from scantling.parts import FFN
from scantling.spec import ModelSpec
from scantling.units import format_count, format_flops

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star")
GREY = "#808080"
EXTRAPOLATION = 4.0  # curves go on, dashed, to this many times the largest measured compute of their path


@dataclass(frozen=True)
class Style:
    """How a family looks wherever it appears."""

    color: str
    symbol: str


@dataclass(frozen=True, eq=False)
class Curve:
    """A law along one path of runs: the loss at each compute, with its 95% band where the law has draws."""

    C: Floats
    loss: Floats
    low: Floats | None
    high: Floats | None
    measured_to: float


def styles(names: Sequence[str]) -> dict[str, Style]:
    """A colour and a marker for each family, in order."""
    return {name: Style(PALETTE[i % len(PALETTE)], SYMBOLS[i % len(SYMBOLS)]) for i, name in enumerate(names)}


def curve(points: pd.DataFrame, law: LawFit) -> Curve | None:
    """The law along the path that `points` (columns N, D, C) lie on; None when they hold fewer than two budgets.

    Between the measured budgets, and `EXTRAPOLATION` times beyond, log N and log D are linear in log C.
    """
    path = np.log(
        points[["C", "N", "D"]].drop_duplicates().groupby("C").mean().reset_index()[["C", "N", "D"]].to_numpy(float)
    )
    if len(path) < 2:
        return None
    inside = np.linspace(path[0, 0], path[-1, 0], 60)
    beyond = np.linspace(path[-1, 0], path[-1, 0] + math.log(EXTRAPOLATION), 15)[1:]
    c = np.concatenate([inside, beyond])
    n, d = (_along(c, path[:, 0], path[:, k]) for k in (1, 2))
    found = law.predict(np.exp(n), np.exp(d))
    return Curve(np.exp(c), found.value, found.low, found.high, float(np.exp(path[-1, 0])))


def _along(x: Floats, known_x: Floats, known_y: Floats) -> Floats:
    """Linear interpolation that goes on above the last point with the slope between the first and the last."""
    slope = (known_y[-1] - known_y[0]) / (known_x[-1] - known_x[0])
    return np.where(x > known_x[-1], known_y[-1] + slope * (x - known_x[-1]), np.interp(x, known_x, known_y))


def ladder(
    points: pd.DataFrame,
    laws: Mapping[str, LawFit],
    looks: Mapping[str, Style],
    losses: tuple[float, float],
    worst: float,
) -> go.Figure:
    """Loss against training FLOPs of one path, each family with its law and band; residuals in percent below.

    Args:
        points: finished runs: family, run, N, D, C, loss, seed, spec_hash.
        laws: the law of each family that has one.
        looks: the style of each family.
        losses: range shown, the same in every panel.
        worst: largest relative residual of any panel.
    """
    figure = figure_of(440)
    low_c, high_c = float(points.C.min()), float(points.C.max())
    for name, rows in points.groupby("family", sort=False):
        family = str(name)
        look = looks[family]
        law = laws.get(family)
        line = curve(rows, law) if law is not None else None
        if line is not None:
            high_c = max(high_c, float(line.C[-1]))
            _add_curve(figure, line, look)
        hover = [_hover(row) for row in rows.to_dict("records")]
        marker = {"color": look.color, "symbol": look.symbol, "size": 9, "line": {"width": 1, "color": "#ffffff"}}
        common = {
            "mode": "markers",
            "marker": marker,
            "text": hover,
            "hovertemplate": "%{text}<extra></extra>",
            "name": escape(family),
        }
        figure.add_scatter(x=rows.C.to_list(), y=rows.loss.to_list(), **common)
        if law is not None:
            fitted = law.predict(rows.N.to_numpy(float), rows.D.to_numpy(float)).value
            residual = 100 * (rows.loss.to_numpy(float) / fitted - 1)
            figure.add_scatter(x=rows.C.to_list(), y=residual.tolist(), yaxis="y2", **common)
    ends = (low_c / 1.3, high_c * 1.15)
    figure.update_xaxes(
        type="log",
        range=[math.log10(end) for end in ends],
        title="training FLOPs performed",
        anchor="y2" if laws else "y",
    )
    figure.update_xaxes(**log_ticks(*ends))
    figure.update_layout(
        yaxis={
            "title": "validation loss (nats/token)",
            "domain": [0.36, 1.0] if laws else [0, 1],
            "tickformat": ".1f" if losses[1] - losses[0] > 0.5 else ".2f",
            "range": list(losses),
        }
    )
    if laws:
        reach = 115 * worst
        residuals = {
            "title": "residual (%)",
            "domain": [0.0, 0.26],
            "range": [-reach, reach],
            "zeroline": True,
            "nticks": 5,
        }
        figure.update_layout(yaxis2={**_AXIS, **residuals})
    return figure


def _add_curve(figure: go.Figure, line: Curve, look: Style) -> None:
    """Solid inside the measured compute, dashed and with a paler band beyond it."""
    inside = line.measured_to * (1 + 1e-9) >= line.C
    beyond = line.measured_to * (1 - 1e-9) <= line.C
    for part, opacity, dash in ((inside, 0.22, "solid"), (beyond, 0.10, "dash")):
        x = line.C[part].tolist()
        if line.low is not None and line.high is not None:
            ring_x, ring_y = x + x[::-1], line.high[part].tolist() + line.low[part].tolist()[::-1]
            fill = {"fill": "toself", "fillcolor": _faded(look.color, opacity), "line": {"width": 0}}
            figure.add_scatter(x=ring_x, y=ring_y, mode="lines", hoverinfo="skip", **fill)
        figure.add_scatter(
            x=x,
            y=line.loss[part].tolist(),
            mode="lines",
            line={"color": look.color, "width": 2, "dash": dash},
            hoverinfo="skip",
        )


def _hover(row: Mapping[Any, Any]) -> str:
    return (
        f"<b>{escape(str(row['run']))}</b><br>N {format_count(row['N'], 4)} · D {format_count(row['D'], 4)} tokens<br>"
        f"C {format_flops(row['C'])}<br>loss {row['loss']:.4f}<br>"
        f"spec {escape(str(row['spec_hash'])[:12])} · seed {escape(str(row['seed']))}"
    )


def savings(found: Sequence[Saving], looks: Mapping[str, Style]) -> go.Figure:
    """One line per candidate and path: the estimate, its 95% interval, and the model-free check."""
    lines: list[tuple[str, str, float, float | None, float | None, float | None]] = []
    for item in found:
        title = f"{escape(item.candidate)}"
        middle = f"{title}<br>" + (f"M = {item.multiplier:.3g} (stated)" if item.multiplier is not None else "one path")
        lines.append((item.candidate, middle, item.value, item.low, item.high, item.measured))
        if len(item.by_multiplier) > 1:
            lines += [
                (item.candidate, f"{title}<br>M = {one.multiplier:.3g}", one.value, one.low, one.high, None)
                for one in item.by_multiplier
            ]
    figure = figure_of(110 + 54 * len(lines))
    ends = [
        end
        for _, _, value, low, high, check in lines
        for end in (value, low, high, check, 0.0)
        if end is not None and math.isfinite(end)
    ]
    left, right = max(-1.5, min(ends)), max(ends)
    pad = 0.08 * max(right - left, 0.02)
    window = [100 * (left - pad), 100 * (right + pad)]
    for number, (name, label, value, low, high, check) in enumerate(lines):
        look = looks.get(name, Style(PALETTE[1], "diamond"))
        at = len(lines) - 1 - number
        if high is not None:
            known = low is not None and math.isfinite(low)
            start = 100 * low if low is not None and known else window[0]
            text = (
                f"95% interval {100 * low:.1f}% to {100 * high:.1f}%" if low is not None and known else "no lower end"
            )
            figure.add_scatter(
                x=[start, 100 * high], y=[at, at], mode="lines", line={"color": look.color, "width": 5}, opacity=0.55,
                text=[text] * 2, hovertemplate="%{text}<extra></extra>",
            )  # fmt: skip
        marker = {"color": look.color, "symbol": look.symbol, "size": 13, "line": {"width": 1.5, "color": "#ffffff"}}
        label_ = label.replace("<br>", ", ")
        figure.add_scatter(
            x=[100 * value],
            y=[at],
            mode="markers",
            marker=marker,
            hovertemplate=f"{label_}: {100 * value:.1f}%<extra></extra>",
        )
        if check is not None:
            open_ = {"color": GREY, "symbol": "x-thin", "size": 11, "line": {"width": 2.5, "color": GREY}}
            figure.add_scatter(
                x=[100 * check], y=[at + 0.28], mode="markers", marker=open_,
                hovertemplate=f"interpolating the measured losses: {100 * check:.1f}%<extra></extra>",
            )  # fmt: skip
    figure.update_xaxes(title="saving of training FLOPs at equal loss (%)", range=window, zeroline=True)
    rows = [len(lines) - 1 - i for i in range(len(lines))]
    figure.update_yaxes(
        tickvals=rows, ticktext=[line[1] for line in lines], range=[-0.6, len(lines) - 0.4], showgrid=False, ticks=""
    )
    return figure


def front(
    line: Sequence[tuple[float, float, str]],
    candidates: Sequence[tuple[float, float, str]],
    x: str,
    y: str = "predicted loss (nats/token)",
    height: int = 400,
    log: bool = False,
) -> go.Figure:
    """A Pareto front as a line, the ranked candidates as markers, the first one starred.

    Args:
        line: (x, y, label) of each point of the front.
        candidates: the same of each candidate, best first.
        x, y: what is on the axes; x is logarithmic.
        height: in pixels.
        log: whether y is logarithmic too.
    """
    figure = figure_of(height)
    hover = f"%{{text}}<br>{escape(y)} %{{y:.5g}}<br>{escape(x)} %{{x:.4g}}<extra></extra>"
    ordered = sorted(line)
    groups = (
        (ordered, "lines+markers", {"color": GREY, "symbol": "circle", "size": 6}),
        (candidates[1:], "markers", {"color": PALETTE[0], "symbol": "circle-open", "size": 9, "line": {"width": 2}}),
        (candidates[:1], "markers", {"color": PALETTE[1], "symbol": "star", "size": 17}),
    )
    for points, mode, marker in groups:
        figure.add_scatter(
            x=[point[0] for point in points], y=[point[1] for point in points], text=[escape(point[2]) for point in points],
            mode=mode, marker=marker, line={"color": GREY, "width": 1.5}, hovertemplate=hover,
        )  # fmt: skip
    every = (*line, *candidates)
    figure.update_xaxes(title=escape(x), **log_axis([point[0] for point in every]))
    figure.update_yaxes(title=escape(y), **(log_axis([point[1] for point in every]) if log else {}))
    return figure


def log_axis(values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis a fifth wider than its values, and no narrower than half an octave."""
    low, high = min(values), max(values)
    pad = max(1.2 if high > 1.5 * low else 1.05, (math.sqrt(2) * low / high) ** 0.5)
    ends = (low / pad, high * pad)
    return {"type": "log", "range": [math.log10(end) for end in ends], **log_ticks(*ends)}


def log_ticks(low: float, high: float) -> dict[str, Any]:
    """At most six round ticks for a logarithmic axis, written as powers of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    fine = tuple(k / 10 for k in range(10, 100))
    choices: list[tuple[float, ...]] = [
        fine,
        fine[::2],
        fine[::5],
        (1, 2, 3, 4, 5, 6, 7, 8, 9),
        (1, 2, 3, 5, 7),
        (1, 2, 5),
        (1, 3),
        (1,),
    ]
    values: list[float] = []
    for steps in choices:
        values = [step * 10.0**k for k in range(first, last + 1) for step in steps if low <= step * 10.0**k <= high]
        if len(values) <= 6:
            break
    values = _apart(values, math.log10(high / low) / 8)
    return {"tickmode": "array", "tickvals": values, "ticktext": [_power(value) for value in values]}


def _apart(values: Sequence[float], least: float) -> list[float]:
    """At most six of the values, the roundest of those that lie closer than `least` decades."""

    def roundness(value: float) -> int:
        digits = f"{value:.1e}".split("e")[0]
        return next((rank for rank, kinds in enumerate((("1.0",), ("2.0", "5.0"))) if digits in kinds), 2)

    kept: list[float] = []
    for value in sorted(values, key=roundness):
        if all(abs(math.log10(value / other)) >= least for other in kept):
            kept.append(value)
    kept = sorted(kept if len(kept) > 1 else values)
    return kept[:: 1 + (len(kept) - 1) // 6]


def _power(value: float) -> str:
    """`2e14 -> '2·10<sup>14</sup>'`."""
    mantissa, exponent = f"{value:.1e}".split("e")
    if -3 <= int(exponent) <= 3:
        return f"{value:g}"
    ten = f"10<sup>{int(exponent)}</sup>"
    return ten if float(mantissa) == 1 else f"{float(mantissa):g}·{ten}"


_AXIS: dict[str, Any] = {
    "automargin": True,
    "zeroline": False,
    "showline": True,
    "ticks": "outside",
    "ticklen": 4,
    "title": {"standoff": 12},
    "tickangle": 0,
}


def figure_of(height: int) -> go.Figure:
    """An empty figure in the style of the page."""
    figure = go.Figure(layout={"template": "none", "height": height, "showlegend": False, "hovermode": "closest"})
    figure.update_layout(margin={"l": 8, "r": 14, "t": 12, "b": 8}, xaxis=_AXIS, yaxis=_AXIS)
    return figure


def _faded(color: str, opacity: float) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


# --- the stack, as SVG -------------------------------------------------------------------------------------------------

_SHAPES = {
    "circle": '<circle cx="8" cy="8" r="5.5"/>',
    "diamond": '<path d="M8 1.5 14.5 8 8 14.5 1.5 8Z"/>',
    "square": '<rect x="3" y="3" width="10" height="10"/>',
    "triangle-up": '<path d="M8 2 14.5 13.5H1.5Z"/>',
    "cross": '<path d="M6 2h4v4h4v4h-4v4H6v-4H2V6h4Z"/>',
    "star": '<path d="m8 1 2 5h5l-4 3.3L12.500 15 8 11.500 3.500 15 5 9.300 1 6h5Z"/>',
}


def marker_svg(look: Style) -> str:
    """A family's marker for the legend of the page."""
    return (
        f'<svg class="marker" viewBox="0 0 16 16" aria-hidden="true" fill="{look.color}">{_SHAPES[look.symbol]}</svg>'
    )


def describe_ffn(ffn: FFN) -> str:
    """A feed-forward in a few words: `SwiGLU`-like detail is in the spec; here kind and sizes."""
    if ffn.kind == "moe":
        return f"{ffn.num_experts_per_tok} of {ffn.num_local_experts} experts, {describe_ffn(ffn.expert)}"
    text = f"{ffn.kind.replace('_', '-')} {ffn.intermediate_size}"
    if ffn.kind in ("low_rank", "block_dense"):
        text += f", rank {ffn.rank}"
    if ffn.kind in ("block_shuffle", "block_dense"):
        text += f", {ffn.num_blocks} blocks"
    return text


def stack_svg(spec: ModelSpec, name: str) -> str:
    """The model layer by layer, input at the top: a bar as wide as each layer's hidden_size, labelled where layers change."""
    depth, widest = spec.num_hidden_layers, max(*spec.widths, spec.embedding_size, spec.unembedding_size)
    step = min(19.0, max(4.0, 440.0 / depth))
    bar, left, span, end = step * 0.66, 70.0, 176.0, 19.0
    height = 2 * end + step * depth + 8
    middle = left + span / 2
    sizes = [spec.embedding_size, *spec.widths, spec.unembedding_size]
    tops = [4.0, *(end + 4 + step * i for i in range(depth)), end + 4 + step * depth + (end - bar - 4)]
    outline = [(middle + span * size / widest / 2, top + bar / 2) for size, top in zip(sizes, tops, strict=True)]
    ring = outline + [(2 * middle - x, y) for x, y in reversed(outline)]
    parts = [f'<polygon class="hull" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in ring)}"/>']
    shown, longest = -math.inf, 0
    for number, (size, top) in enumerate(zip(sizes, tops, strict=True)):
        outer = number in (0, len(sizes) - 1)
        width = span * size / widest
        kind = "end" if outer else "layer"
        parts.append(
            f'<rect class="{kind}" x="{middle - width / 2:.1f}" y="{top:.1f}" width="{width:.1f}" height="{bar:.1f}" rx="1.5"/>'
        )
        index, y = number - 1, top + bar / 2 + 3.6
        if outer:
            label, text = ("embedding" if number == 0 else "head"), f"{size}"
        else:
            layer = spec.layers[index]
            if top - shown < 11.5 or (index and layer == spec.layers[index - 1] and step < 11.5):
                continue
            shown = top
            label = f"layer {index}"
            same = index and layer == spec.layers[index - 1]
            heads = f"{layer.num_attention_heads}/{layer.num_key_value_heads} heads"
            text = "" if same else f"{size} · {heads} · {describe_ffn(layer.ffn)}"
        parts.append(f'<text x="{left - 8}" y="{y:.1f}" text-anchor="end">{label}</text>')
        longest = max(longest, len(text))
        if text:
            parts.append(f'<text x="{left + span + 8}" y="{y:.1f}">{escape(text)}</text>')
    narrow, broad = min(spec.widths), max(spec.widths)
    shape = f"all {broad} wide" if narrow == broad else f"widths {', '.join(map(str, spec.widths))}"
    title = escape(f"{name}: {depth} layers, {shape}", quote=True)
    wide = max(440.0, left + span + 14 + 5.9 * longest)
    box = f'style="max-width:{1.2 * wide:.0f}px" viewBox="0 0 {wide:.0f} {height:.0f}"'
    return f'<svg class="stack" role="img" aria-label="{title}" {box}>{"".join(parts)}</svg>'
