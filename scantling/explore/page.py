"""The page itself: everything it needs, read once when the server starts."""

import json
from html import escape
from importlib.resources import files
from string import Template

from plotly.offline import get_plotlyjs

import scantling
from scantling.explore.base import Base
from scantling.explore.controls import form, page_data


def assets(base: Base) -> dict[str, tuple[str, bytes]]:
    """(type, content) of every fixed address."""
    own, report = files("scantling.explore") / "assets", files("scantling.reporting") / "assets"
    text = {name: (own / f"explore.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    style, plots = ((report / name).read_text(encoding="utf-8") for name in ("report.css", "plots.js"))
    data = json.dumps(page_data(base), ensure_ascii=True).replace("<", "\\u003c")
    shell = Template(text["html"]).substitute(
        name=escape(base.name or "the plan of scantling init plan"),
        version=escape(scantling.__version__),
        form=form(base),
        data=data,
    )
    return {
        "/": ("text/html; charset=utf-8", shell.encode()),
        "/explore.css": ("text/css; charset=utf-8", (style + text["css"]).encode()),
        "/explore.js": ("text/javascript; charset=utf-8", (plots + text["js"]).encode()),
        "/plotly.js": ("text/javascript; charset=utf-8", get_plotlyjs().encode()),
    }
