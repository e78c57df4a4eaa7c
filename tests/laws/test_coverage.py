"""Nightly: 90% intervals of the quick laws over 400 synthetic repetitions; benchmarks/results/laws_coverage.md has all laws."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        place = importlib.util.spec_from_file_location("laws_coverage", BENCHMARKS / "laws_coverage.py")
        assert place is not None and place.loader is not None
        module = importlib.util.module_from_spec(place)
        place.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.slow
@pytest.mark.parametrize("law", ["overtraining", "head-count", "chinchilla, equal exponents", "chinchilla"])
def test_intervals_cover(coverage: ModuleType, law: str) -> None:
    found = coverage.study(law, 400)
    assert found["goal 85 to 95%"] == "hit", found["coverage of 90% intervals"]
    assert found["without interval"] == 0


def test_a_few_repetitions_run(coverage: ModuleType) -> None:
    found = coverage.study("overtraining", 3)
    assert found["rows"] == 36 and "ahead" in found["coverage of 90% intervals"]
