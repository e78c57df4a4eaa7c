"""The drawings: curves, ticks and stacks, and that a browser draws the whole page and asks for nothing."""

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scantling.laws import LawFit, load_published
from scantling.reporting import figures
from scantling.resolve import load_spec
from scantling.study import collect
from tests.reporting.inputs import EVIL, own_text


def test_a_curve_passes_where_the_law_puts_the_runs(inputs: dict[str, Path]) -> None:
    table = collect(inputs["study"])
    path = table[(table.family == "uniform") & (table.tokens_per_parameter == 48)].sort_values("C")
    law = LawFit.from_json(json.loads(inputs["uniform"].read_text()))
    line = figures.curve(path, law)
    assert line is not None and line.low is not None and line.high is not None
    assert line.C[0] == pytest.approx(path.C.iloc[0]) and line.measured_to == pytest.approx(path.C.iloc[-1])
    assert line.C[-1] == pytest.approx(figures.EXTRAPOLATION * path.C.iloc[-1])
    assert line.loss[0] == pytest.approx(float(law.predict(path.N.iloc[0], path.D.iloc[0]).value))
    assert np.all(np.diff(line.loss) < 0) and np.all(line.low <= line.high)
    assert figures.curve(path.iloc[:1], law) is None
    bare = figures.curve(path, load_published("chinchilla-epoch"))
    assert bare is not None and bare.low is None


@pytest.mark.parametrize(("low", "high"), [(1e11, 3e14), (1e18, 1e22), (9.1e18, 9.9e18), (2.0, 900.0), (1e3, 1e30)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    ticks = figures.log_ticks(low, high)
    assert 2 <= len(ticks["tickvals"]) <= 6
    assert all(low <= value <= high for value in ticks["tickvals"])
    assert len(set(ticks["ticktext"])) == len(ticks["ticktext"])


def test_the_stack_is_drawn_to_scale(inputs: dict[str, Path]) -> None:
    spec = load_spec(inputs["bottleneck"])
    drawn = [
        float(width) for width in re.findall(r'class="layer"[^>]* width="([\d.]+)"', figures.stack_svg(spec, EVIL))
    ]
    assert len(drawn) == spec.num_hidden_layers
    assert [width / max(drawn) for width in drawn] == pytest.approx(
        [width / max(spec.widths) for width in spec.widths], abs=1e-3
    )
    assert "<script>" not in figures.stack_svg(spec, EVIL)


# --- in a browser ------------------------------------------------------------------------------------------------------

INK = "return getComputedStyle(document.querySelector('.xtick text')).fill"


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (400, 800)])
def test_a_browser_draws_it_and_asks_for_nothing(
    browser: Any, page: Path, width: int, height: int, scheme: str
) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    for log in ("performance", "browser"):
        browser.get_log(log)
    browser.get(page.as_uri())
    drawn = """return [...document.querySelectorAll('.plot')].map(box => [box.matches('.js-plotly-plot'),
        box.querySelectorAll('.main-svg .trace path').length, box.querySelector('.main-svg')?.getBoundingClientRect().width])"""
    until = time.monotonic() + 10
    plots = browser.execute_script(drawn)
    while not all(is_plot and paths for is_plot, paths, _ in plots) and time.monotonic() < until:
        time.sleep(0.1)
        plots = browser.execute_script(drawn)
    assert len(plots) == own_text(page).count('<div class="plot"') >= 8
    for kind in ("ladder", "saving", "profile", "front", "memory"):
        assert browser.execute_script("return document.querySelectorAll(`.plot[id^=${arguments[0]}]`).length", kind)
    for is_plot, paths, wide in plots:
        assert is_plot and paths > 0
        assert 200 < wide <= width
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    ink = _brightness(browser.execute_script(INK))
    assert ink > 180 if scheme == "dark" else ink < 80
    assert not browser.execute_script("return document.querySelectorAll('.modebar-btn[data-title*=Share]').length")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [item["params"]["request"]["url"] for item in messages if item["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith(("file:", "data:", "blob:")) for url in asked)


@pytest.mark.browser
def test_plots_follow_a_change_of_scheme(browser: Any, page: Path) -> None:
    def ink(scheme: str) -> float:
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        time.sleep(0.5)
        return _brightness(browser.execute_script(INK))

    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.get(page.as_uri())
    assert ink("light") < 80 and ink("dark") > 180 and ink("light") < 80


def _brightness(color: str) -> float:
    return math.fsum(float(part) for part in re.findall(r"\d+", color)[:3]) / 3
