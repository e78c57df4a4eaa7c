"""The page in a real browser: it draws, follows its controls, keeps its state in its address, and asks nobody else."""

import base64
import json
import re
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from scantling.errors import InputError
from scantling.explore import Explorer
from scantling.planning import load_plan, plan
from scantling.reporting.plans import cost_shown, shape_words
from tests.explore.conftest import PLAN, get

pytestmark = pytest.mark.browser
TEXTS = """return [document.querySelector('#headline .shape').firstChild.textContent.trim(),
    ...[...document.querySelectorAll('#tiles .tile')].map(box => box.querySelector('dd').textContent)]"""
PLACES = """return ['tiles', 'loss', 'memory', 'stack', 'candidates'].map(name =>
    [...['x', 'y', 'width'].map(key => Math.round(document.getElementById(name).getBoundingClientRect()[key]))])"""


def until(found: Callable[[], Any], said: str) -> Any:
    """The first true value, within 20 seconds."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.05)
    raise AssertionError(said)


def settled(browser: Any, query: str | None = None) -> None:
    """Wait until the page shows the answer to its address, or to this query."""
    script = """const main = document.getElementById('answer'), shown = main.dataset.query;
        return main.getAttribute('aria-busy') === 'false' && !document.body.classList.contains('waiting')
            && shown === (arguments[0] ?? location.search.slice(1))"""
    until(lambda: browser.execute_script(script, query), f"the page does not show {query!r}")


def open_page(browser: Any, server: Explorer, query: str = "", width: int = 1400, height: int = 900) -> None:
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(server.url + (f"?{query}" if query else ""))
    settled(browser)


def press(browser: Any, key: str, arrow: str, times: int = 1) -> None:
    """Move a slider by its keyboard."""
    slider = browser.find_element("css selector", f'[data-slider="{key}"] input[type=range]')
    for _ in range(times):
        slider.send_keys(arrow)


def query_of(browser: Any) -> str:
    return urlsplit(browser.current_url).query


def shown_as(options: list[str]) -> list[str]:
    """The headline and the tiles that `plan` gives for these overrides."""
    best = plan(load_plan(PLAN, options)).to_json()["candidates"][0]
    tiles = (
        "loss",
        "parameters",
        "tokens",
        "training_flops",
        "lifetime_flops",
        "memory_bytes",
        "decode_seconds",
        "training_usd",
    )
    return [shape_words(best), *(cost_shown(key, (best["costs"] | {"loss": best["loss"]}).get(key)) for key in tiles)]


def test_it_shows_what_plan_answers(browser: Any, server: Explorer) -> None:
    open_page(browser, server)
    assert browser.execute_script(TEXTS) == shown_as([])
    best = plan(load_plan(PLAN)).candidates[0]
    assert len(browser.find_elements("css selector", "#stack .layer")) == best.num_hidden_layers
    traces = browser.execute_script("return ['loss', 'memory'].map(name => document.getElementById(name).data.length)")
    assert traces == [3, 3]


def test_a_slider_moves_the_answer_and_the_address(browser: Any, server: Explorer) -> None:
    open_page(browser, server)
    before = browser.execute_script(TEXTS)
    press(browser, "serving.context", "\ue014", 3)  # right: 8K, 16K, 32K, 64K
    until(lambda: query_of(browser) == "serving.context=65536", "the state is not in the address")
    settled(browser)
    after = browser.execute_script(TEXTS)
    assert after == shown_as(["serving.context=65536"]) and after != before
    press(browser, "amount", "\ue012", 4)  # left: a lower loss
    until(lambda: "target.loss=" in query_of(browser), "the state is not in the address")
    settled(browser)
    found = re.search(r"target\.loss=([\d.]+)", query_of(browser))
    assert found is not None and float(found[1]) < 2.2
    assert browser.execute_script(TEXTS) == shown_as(["serving.context=65536", f"target.loss={found[1]}"])
    browser.back()
    settled(browser, "serving.context=65536")
    assert browser.execute_script(TEXTS) == after
    browser.find_element("id", "reset").click()
    settled(browser, "")
    assert browser.execute_script(TEXTS) == before


def test_dragging_ends_with_the_latest_state(browser: Any, server: Explorer) -> None:
    open_page(browser, server)
    browser.execute_script(
        """const range = document.querySelector('[data-slider="serving.batch"] input[type=range]');
        for (let at = 0; at <= 10; at++) { range.value = at; range.dispatchEvent(new Event('input')); }
        range.dispatchEvent(new Event('change'));"""
    )
    until(lambda: query_of(browser) == "serving.batch=1024", "the state is not in the address")
    settled(browser)
    assert browser.execute_script(TEXTS) == shown_as(["serving.batch=1024"])


def test_an_address_loads_its_state(browser: Any, server: Explorer) -> None:
    query = "target.loss=2.31&minimize=usd&serving.context=32768&serving.tokens=5e12&hardware.device=a100-80&law=chinchilla-epoch"
    open_page(browser, server, query)
    fields = browser.execute_script(
        """return Object.fromEntries([...document.querySelectorAll('.control')].map(box =>
            [box.dataset.slider || box.dataset.choice, box.querySelector('input[type=text], select').value]))"""
    )
    assert fields["amount"] == "2.31" and fields["goal"] == "target.loss"
    for key, value in (item.split("=") for item in query.split("&")[1:]):
        assert fields[key] == value
    options = ["target={loss: 2.31}", *query.split("&")[1:-2], "hardware={device: a100-80}", "law=chinchilla-epoch"]
    first, best = browser.execute_script(TEXTS), plan(load_plan(PLAN, options)).candidates[0]
    assert first[1] == f"{best.loss:.4f}" and first[8] == cost_shown("usd", best.costs["usd"])
    press(browser, "serving.batch", "\ue014")
    until(lambda: "serving.batch=32" in query_of(browser), "the state is not in the address")
    press(browser, "serving.batch", "\ue012")
    settled(browser, query)
    assert browser.execute_script(TEXTS) == first


def test_a_typed_number_is_taken_exactly_and_a_wrong_one_is_said(browser: Any, server: Explorer) -> None:
    open_page(browser, server)
    field = browser.find_element("id", "field-serving-tokens")
    field.clear()
    field.send_keys("3.3T\ue007")
    until(lambda: query_of(browser) == "serving.tokens=3.3T", "the state is not in the address")
    settled(browser)
    assert browser.execute_script(TEXTS) == shown_as(["serving.tokens=3.3e12"])
    field.clear()
    field.send_keys("a lot\ue007")
    said = until(lambda: browser.find_element("id", "fault").text, "no fault is shown")
    assert "serving.tokens: expected a number such as" in said


def test_another_goal_keeps_the_place(browser: Any, server: Explorer) -> None:
    open_page(browser, server)
    loss = float(browser.execute_script(TEXTS)[1])
    browser.execute_script(
        """const list = document.querySelector('[data-choice=goal] select');
        list.value = 'budget.lifetime_flops'; list.dispatchEvent(new Event('change'));"""
    )
    until(lambda: "budget.lifetime_flops=" in query_of(browser), "the state is not in the address")
    settled(browser)
    assert float(browser.execute_script(TEXTS)[1]) == pytest.approx(loss, abs=3e-3)
    assert not browser.find_element("css selector", "[data-choice=minimize] select").is_enabled()


def test_the_exported_plan_gives_the_same_shape(
    browser: Any, server: Explorer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from scantling.cli import main

    query = "serving.context=16384&budget.training_flops=2e22"
    open_page(browser, server, query)
    link = browser.find_element("id", "yaml").get_attribute("href")
    status, _, text = get(server, link.removeprefix(server.url.rstrip("/")))
    assert status == 200
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(tmp_path / "plan.yaml"), "--json"])
    assert ended.value.code == 0
    best = json.loads(capsys.readouterr().out)["candidates"][0]
    shown = browser.find_element("css selector", "#stack dl").text
    assert shown.split()[-1] == best["hash"][:12]
    assert browser.execute_script(TEXTS)[1] == f"{best['loss']:.4f}"


def test_an_infeasible_state_says_why_and_keeps_the_last_answer_grey(browser: Any, server: Explorer) -> None:
    open_page(browser, server)
    before, places = browser.execute_script(TEXTS), browser.execute_script(PLACES)
    field = browser.find_element("id", "field-amount")
    field.clear()
    field.send_keys("1.7\ue007")
    until(lambda: query_of(browser) == "target.loss=1.7", "the state is not in the address")
    settled(browser)
    with pytest.raises(InputError) as caught:
        plan(load_plan(PLAN, ["target.loss=1.7"]))
    assert caught.value.faults[0].rpartition("target.loss: ")[2] in browser.find_element("id", "fault").text
    assert browser.execute_script(TEXTS) == before
    grey = browser.execute_script(
        "const style = getComputedStyle(document.querySelector('.good')); return style.filter"
    )
    assert "grayscale" in grey
    until(
        lambda: browser.execute_script("return +getComputedStyle(document.querySelector('.good')).opacity < .5"),
        "not grey",
    )
    assert browser.execute_script(PLACES) == places
    browser.back()
    settled(browser, "")
    assert not browser.find_element("id", "fault").is_displayed() and browser.execute_script(TEXTS) == before


def test_an_infeasible_address_shows_the_sentence_alone(browser: Any, server: Explorer) -> None:
    open_page(browser, server, "target.loss=1.7")
    assert "target.loss: " in browser.find_element("id", "fault").text
    assert "last answer" not in browser.find_element("id", "fault").text
    assert not browser.find_element("id", "tiles").is_displayed()
    browser.find_element("id", "reset").click()
    settled(browser, "")
    assert browser.find_element("id", "tiles").is_displayed() and browser.execute_script(TEXTS) == shown_as([])


def test_nothing_moves_when_answers_come(browser: Any, server: Explorer) -> None:
    watch = """window.shifts = 0; new PerformanceObserver(list => list.getEntries().forEach(entry =>
        { window.shifts += entry.value; })).observe({type: 'layout-shift', buffered: true});"""
    open_page(browser, server)
    browser.execute_script(watch)
    places = browser.execute_script(PLACES)
    for key, arrow in (
        ("serving.context", "\ue014"),
        ("amount", "\ue014"),
        ("serving.tokens", "\ue012"),
        ("serving.batch", "\ue014"),
    ):
        press(browser, key, arrow, 3)
        time.sleep(0.4)
        settled(browser)
    assert browser.execute_script(PLACES) == places
    assert browser.execute_script("return window.shifts") < 0.02


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1400, 900), (800, 900), (400, 800)])
def test_it_fits_and_asks_nobody_else(browser: Any, server: Explorer, width: int, height: int, scheme: str) -> None:
    scheme_is = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme_is)
    for log in ("performance", "browser"):
        browser.get_log(log)
    open_page(browser, server, width=width, height=height)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    ink = browser.execute_script("return getComputedStyle(document.querySelector('#loss .xtick text')).fill")
    brightness = sum(int(part) for part in re.findall(r"\d+", ink)[:3]) / 3
    assert brightness > 180 if scheme == "dark" else brightness < 80
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [item["params"]["request"]["url"] for item in messages if item["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith((server.url, "data:", "blob:")) for url in asked)
    image = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
    assert different_lines(base64.b64decode(image)) > height / 3


def different_lines(image: bytes) -> int:
    """How many lines of a PNG differ in their stored form; a blank one has two at most."""
    at, parts, width = 8, [], 0
    while at < len(image):
        size, kind = int.from_bytes(image[at : at + 4]), image[at + 4 : at + 8]
        if kind == b"IHDR":
            width = int.from_bytes(image[at + 8 : at + 12]) * {2: 3, 6: 4}[image[at + 17]] + 1
        elif kind == b"IDAT":
            parts.append(image[at + 8 : at + 8 + size])
        at += size + 12
    data = zlib.decompress(b"".join(parts))
    return len({data[start : start + width] for start in range(0, len(data), width)})


def test_every_control_has_a_name_and_can_be_reached(browser: Any, server: Explorer) -> None:
    open_page(browser, server)
    nameless = browser.execute_script(
        """return [...document.querySelectorAll('input, select, button, a')].filter(item =>
            !((item.labels && item.labels.length) || item.getAttribute('aria-label') || item.textContent.trim())).length"""
    )
    assert nameless == 0
    spoken = browser.execute_script(
        """return [...document.querySelectorAll('input[type=range]')].map(item => item.getAttribute('aria-valuetext'))"""
    )
    assert len(spoken) == 4 and all(spoken)
    order = browser.execute_script(
        "return [...document.querySelectorAll('[tabindex]')].filter(item => item.tabIndex > 0).length"
    )
    assert order == 0
