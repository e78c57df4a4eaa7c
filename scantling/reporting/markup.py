"""Pieces of HTML: text that is escaped unless it is markup, tables, figures, commands; and numbers as a reader wants them."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go

from scantling.units import format_count

MINUS, NONE = "\u2212", "\u2013"


class Html(str):
    """Text that is markup already; any other string is escaped when it is put on the page."""


@dataclass(frozen=True)
class Section:
    """One numbered part of the page."""

    key: str
    title: str
    body: str


def _text(value: object) -> str:
    return value if isinstance(value, Html) else escape(str(value))


def paragraph(*sentences: object, kind: str = "") -> str:
    """The sentences that are not empty, or nothing."""
    text = " ".join(_text(sentence) for sentence in sentences if sentence)
    return f"<p{f' class={kind!r}' if kind else ''}>{text}</p>" if text else ""


def bullets(items: Iterable[object], kind: str = "") -> str:
    """A list, or nothing when there are no items."""
    lines = "".join(f"<li>{_text(item)}</li>" for item in items)
    return f"<ul{f' class={kind!r}' if kind else ''}>{lines}</ul>" if lines else ""


def data_table(
    caption: str, align: str, header: str | Sequence[object], body: Iterable[Sequence[object]], last: str = ""
) -> str:
    """A table that scrolls inside its box. `align`: l or r per column; `header`: cells, or their texts with | between."""
    header = header.split("|") if isinstance(header, str) else header
    side = ["num" if letter == "r" else "" for letter in align]

    def kind(cell: object, aligned: str) -> str:
        return f"{aligned} wrap".strip() if len(str(cell)) > 34 and not isinstance(cell, Html) else aligned

    head = "".join(
        f'<th scope="col" class="{aligned}">{_text(cell)}</th>' for cell, aligned in zip(header, side, strict=True)
    )
    lines = []
    cells_of = list(body)
    for number, row in enumerate(cells_of):
        first, *rest = zip(row, side, strict=True)
        line = f'<th scope="row" class="{kind(*first)}">{_text(first[0])}</th>'
        line += "".join(f'<td class="{kind(cell, aligned)}">{_text(cell)}</td>' for cell, aligned in rest)
        lines.append(f'<tr class="{last if number == len(cells_of) - 1 else ""}">{line}</tr>')
    label = escape(caption, quote=True)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table>'
        f"<caption><span>{escape(caption)}</span></caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    ).replace(' class=""', "")


def plot(figure: go.Figure, key: str, caption: str) -> str:
    """A figure: its data beside an empty box that the page's script draws into."""
    data = figure.to_json().replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    label, height = escape(caption, quote=True), figure.layout.height
    return (
        f'<figure><div class="plot" id="{key}" role="img" aria-label="{label}" style="height:{height}px"></div>'
        f'<script type="application/json" id="{key}-data">{data}</script><figcaption>{escape(caption)}</figcaption></figure>'
    )


def details(summary: str, body: str) -> str:
    """What opens when it is asked for."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def code_block(lines: Iterable[str], label: str) -> str:
    """Commands to copy, one per line."""
    text = "\n".join(escape(line) for line in lines)
    return f'<pre class="scroll" tabindex="0" aria-label="{escape(label, quote=True)}"><code>{text}</code></pre>'


def significant(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits, its minus sign and exponent typeset."""
    return _typeset(value, f",.{digits}g")


def percent(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """A share in percent."""
    return _typeset(value, f"{'+' if sign else ''}.{digits}%")


def _typeset(value: float | None, form: str) -> str:
    if value is None or math.isnan(value):
        return NONE
    return format(value, form).replace("inf%", "inf").replace("inf", "\u221e").replace("-", MINUS)


def short_hash(value: str) -> Html:
    """The beginning of a hash; pointing at it shows all of it."""
    return Html(f'<code title="{escape(value, quote=True)}">{escape(value[:12])}</code>')


def known(value: Any, shown: Callable[[Any], str] = str) -> str:
    """A value as it is shown, or a dash where there is none."""
    return NONE if value is None else shown(value)


def span(low: float | None, high: float | None, shown: Callable[[Any], str] = significant) -> str:
    """An interval in words."""
    return NONE if low is None and high is None else f"{shown(low)} to {shown(high)}"


def spread(values: Iterable[Any], shown: Callable[[Any], str] = format_count) -> str:
    """The range of what is known, as one value where both ends read the same."""
    there = [value for value in values if value is not None]
    if not there:
        return NONE
    low, high = shown(min(there)), shown(max(there))
    return low if low == high else f"{low} to {high}"
