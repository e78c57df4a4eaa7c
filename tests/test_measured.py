"""What is measured once and remembered: whoever asks gets one answer, and no state of the file is an obstacle."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from scantling import measured
from scantling.errors import RunError
from scantling.measured import remembered


def whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def counted(value: int, calls: list[int]) -> int:
    calls.append(value)
    return value


def test_the_first_answer_stays(tmp_path: Path) -> None:
    path, calls = tmp_path / "made" / "measured.json", list[int]()
    assert remembered(path, "a", lambda: counted(1, calls), whole) == 1
    assert remembered(path, "b", lambda: counted(2, calls), whole) == 2
    assert remembered(path, "a", lambda: counted(3, calls), whole) == 1
    assert calls == [1, 2]
    assert json.loads(path.read_text()) == {"a": 1, "b": 2}
    assert [found.name for found in path.parent.iterdir()] == [path.name]  # neither lock nor temporary file stays


def test_those_who_ask_at_once_get_one_answer_and_lose_none(tmp_path: Path) -> None:
    path, calls, together = tmp_path / "measured.json", list[int](), Barrier(8)

    def ask(number: int) -> int:
        together.wait()
        return remembered(path, f"{number % 2}", lambda: counted(number, calls), whole)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert len(calls) == 2  # one measurement a question
    assert {(number % 2, answer) for number, answer in enumerate(answers)} == {(n % 2, n) for n in calls}
    assert json.loads(path.read_text()) == {f"{number % 2}": number for number in calls}


@pytest.mark.parametrize("damage", ["", "{", "[1]", "\0", '{"a": "1"}', '{"a": true}', '{"a": null}'])
def test_a_damaged_file_is_measured_again(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text(damage)
    assert remembered(path, "a", lambda: 5, whole) == 5
    assert json.loads(path.read_text()) == {"a": 5}


def test_an_unusable_value_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text('{"a": "1", "b": 2}')
    assert remembered(path, "a", lambda: 5, whole) == 5
    assert json.loads(path.read_text()) == {"a": 5, "b": 2}


def test_a_place_that_cannot_be_written_costs_one_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    (tmp_path / "file").write_text("")
    assert remembered(tmp_path / "file" / "measured.json", "a", lambda: counted(1, calls), whole) == 1

    def refuse(path: Path, value: object) -> None:
        raise RunError(f"{path}: the disk is full")

    monkeypatch.setattr(measured, "write_json", refuse)
    assert remembered(tmp_path / "measured.json", "a", lambda: counted(2, calls), whole) == 2
    assert calls == [1, 2]


def test_a_file_beside_which_no_lock_can_be_made_is_read(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_text('{"a": 1}')
    path.with_suffix(".lock").mkdir()
    assert remembered(path, "a", lambda: 2, whole) == 1


def test_a_failing_measurement_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> int:
        raise RunError("no such device")

    with pytest.raises(RunError, match="no such device"):
        remembered(tmp_path / "measured.json", "a", fail, whole)
    assert not list(tmp_path.iterdir())
