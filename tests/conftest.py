"""What all tests share: few hypothesis examples by default, many with HYPOTHESIS_PROFILE=nightly; one data cache a session."""

import os
from collections.abc import Iterator
from pathlib import Path

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
