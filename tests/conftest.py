"""What all tests share: few hypothesis examples by default, many with HYPOTHESIS_PROFILE=nightly; one data cache a session."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

settings.register_profile("default", max_examples=100, deadline=None, derandomize=True)
settings.register_profile(
    "quick", max_examples=25, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate]
)
settings.register_profile(
    "nightly", max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def contract() -> Path:
    return DATA / "contract"


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Corpora are prepared once a session, in a folder of its own."""
    before = os.environ.get("SCANTLING_CACHE")
    os.environ["SCANTLING_CACHE"] = before or str(tmp_path_factory.getbasetemp().parent / "scantling-cache")
    yield
    if before is None:
        del os.environ["SCANTLING_CACHE"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text for tiny runs."""
    from tests.runs import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus") / "short.jsonl")


@pytest.fixture
def same_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that are compared bit by bit do not each measure which kernel is faster."""
    from tests.runs import settle_attention

    settle_attention(monkeypatch)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium that keeps its logs, or a skip that says what is missing."""
    places = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, place in places.items() if place is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: the page was not looked at in a browser")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: no browser can be driven")
    options = webdriver.ChromeOptions()
    options.binary_location = places["chromium"]
    for word in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(places["chromedriver"]))
    try:
        yield driver
    finally:
        driver.quit()
