"""Prepared data: found again, gone on with after a kill, and what may go wrong while it is written or after."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from scantling.data import default_cache_dir, open_dataset, prepare, shards, sources, workers
from scantling.data import preparing as data
from scantling.data.corpus import DataConfig
from scantling.data.survey import SPLITS
from scantling.data.tokens import TokenArray
from scantling.errors import InputError, RunError
from tests.corpora import config, leftovers, prepared, tokens, write_jsonl


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty small documents; with the default fraction both splits get some."""
    root = tmp_path / "texts"
    root.mkdir()
    for i in range(40):
        (root / f"{i:02d}.txt").write_text(f"document {i}: " + "abc déf\n" * (i + 1))
    return root


@pytest.fixture
def many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a few documents."""
    monkeypatch.setattr(sources, "PIECE_BYTES", 1000)


def age(folder: Path) -> None:
    """Make every file look as if it had been at rest for a while."""
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (time.time() - 60,) * 2)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- found again ---------------------------------------------------------------------------------------------------


def test_second_call_reuses_the_folder_and_the_fingerprint_follows_the_content(folder: Path, cache: Path) -> None:
    first = prepare(config(folder), cache)
    written = (first.path / "train-00000.bin").stat().st_mtime_ns
    moved = folder.rename(folder.with_name("moved"))
    again = prepare(config(moved), cache)
    assert again.path == first.path and (again.path / "train-00000.bin").stat().st_mtime_ns == written
    others = {
        prepare(config(moved, validation_fraction=0.3), cache).fingerprint,
        prepare(config(moved, validation_fraction=0.3 + 1e-9), cache).fingerprint,
        prepare(config(moved, tokenizer="chars"), cache).fingerprint,
    }
    with (moved / "00.txt").open("a") as stream:
        stream.write("!")
    assert len(others | {prepare(config(moved), cache).fingerprint, first.fingerprint}) == 5


def test_texts_at_rest_are_not_read_again_and_changed_ones_are(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    survey = data.survey
    monkeypatch.setattr(data, "survey", lambda *args: read.append(1) or survey(*args))  # type: ignore[func-returns-value]
    prepare(config(folder), cache)
    prepare(config(folder), cache)
    assert len(read) == 2 and leftovers(cache)  # just written: the clock may not yet tell a change
    age(folder)
    first = prepare(config(folder), cache)
    assert len(read) == 3
    assert prepare(config(folder), cache).fingerprint == first.fingerprint and len(read) == 3
    (folder / "07.txt").write_text("dOcument")  # of other length
    assert prepare(config(folder), cache).fingerprint != first.fingerprint and len(read) == 4
    age(folder)
    (folder / "08.txt").unlink()
    prepare(config(folder), cache)
    assert len(read) == 5


def test_cache_dir_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCANTLING_CACHE", str(tmp_path / "here"))
    assert default_cache_dir() == tmp_path / "here" / "data-2"
    monkeypatch.delenv("SCANTLING_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "scantling" / "data-2"


# --- mixtures ------------------------------------------------------------------------------------------------------


def test_a_mixture_is_prepared_part_by_part(folder: Path, tmp_path: Path, cache: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", [f"{i} Ж\n" * (i + 2) for i in range(60)], key="body")
    parts = {
        "texts": {"source": str(folder), "weight": 0.75},
        "records": {"source": str(other), "weight": 0.25, "text_key": "body"},
    }
    mixture = DataConfig.model_validate({"mixture": parts})
    dataset = prepare(mixture, cache)
    alone = prepare(config(folder), cache), prepare(config(other, text_key="body"), cache)
    assert [source.fingerprint for source in dataset.sources] == [one.fingerprint for one in alone]
    assert dataset.tokens() == sum(one.tokens() for one in alone)
    assert dataset.shares() == {"texts": 0.75, "records": 0.25}
    assert len({dataset.fingerprint, alone[0].fingerprint, alone[1].fingerprint}) == 3
    inputs = dataset.sequences(seed=0, first=0, count=8, sequence_length=50).inputs
    mine = alone[0].sequences(seed=0, first=0, count=6, sequence_length=50).inputs
    assert set(map(tuple, mine)) < set(map(tuple, inputs))
    assert len(prepare(mixture, cache).sources) == 2
    chars = prepare(DataConfig.model_validate({"mixture": parts, "tokenizer": "chars"}), cache)
    assert {"Ж", "é", "d"} <= set(chars.tokenizer.characters)  # type: ignore[union-attr]
    bpe = prepare(DataConfig.model_validate({"mixture": parts, "tokenizer": {"kind": "bpe", "vocab_size": 270}}), cache)
    assert {s.path / "tokenizer.json" for s in bpe.sources} == set(cache.glob("*/tokenizer.json"))
    heavier = {**parts, "records": {**parts["records"], "weight": 0.5}}
    assert prepare(DataConfig.model_validate({"mixture": heavier}), cache).fingerprint != dataset.fingerprint


# --- side by side, and gone on with --------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["chars", {"kind": "bpe", "vocab_size": 280}])
def test_workers_change_nothing(folder: Path, tmp_path: Path, many_pieces: None, tokenizer: Any) -> None:
    told: list[tuple[str, int, int]] = []
    one = prepare(config(folder, tokenizer=tokenizer), tmp_path / "one", lambda *args: told.append(args), workers=1)
    two = prepare(config(folder, tokenizer=tokenizer), tmp_path / "two", workers=2)
    assert contents(one.path) == contents(two.path) and len(prepared(one).manifest.shards) > 5
    assert {what for what, _, _ in told} >= {"reading", "tokenising"}
    assert all(sorted(done for w, done, _ in told if w == what)[-1] == told[0][2] for what in ("reading", "tokenising"))


def test_a_killed_worker_is_an_error_in_words(folder: Path, cache: Path, many_pieces: None) -> None:
    with pytest.raises(RunError, match="a worker process was killed"):
        list(workers.in_order(os._exit, [9, 9], 2))


CHILD = """
import os, sys, time
from pathlib import Path
from scantling.data import preparing as data
from scantling.data import shards, sources
mode, source, cache = sys.argv[1], sys.argv[2], Path(sys.argv[3])
sources.PIECE_BYTES = 1000
write = shards._tokenise_piece
def slow(job):
    if mode == "hang" and job.number == 5:
        (cache / "there").touch()
        time.sleep(600)
    if mode == "meet":
        time.sleep(0.02)
    return write(job)
shards._tokenise_piece = slow
told = []
dataset = data.prepare(data.DataConfig(source=source, tokenizer="chars"), cache, lambda *a: told.append(a), workers=1)
print(dataset.path)
"""


def start(mode: str, source: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, mode, str(source), str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_and_started_again(
    folder: Path, cache: Path, many_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start("hang", folder, cache) as child:
        try:
            wait_for((cache / "there").exists)
        finally:
            child.kill()
        child.communicate()
        assert child.returncode == -signal.SIGKILL
    (cache / "there").unlink()
    (left,) = cache.glob(".preparing-*")
    assert len(list(left.glob("shard-*.json"))) == 5
    (left / "train-00003.bin").write_bytes(b"cut")  # of the wrong size: not kept
    (left / "train-00004.bin.77.tmp").write_bytes(b"half")
    made: list[int] = []
    write = shards._tokenise_piece
    monkeypatch.setattr(shards, "_tokenise_piece", lambda job: made.append(job.number) or write(job))
    dataset = prepare(config(folder, tokenizer="chars"), cache)
    assert made[:3] == [3, 5, 6] and len(made) == len(prepared(dataset).manifest.shards) - 4
    whole = prepare(config(folder, tokenizer="chars"), cache.with_name("whole"))
    assert contents(dataset.path) == contents(whole.path)
    (survey,) = cache.glob(".survey-*")  # of the killed one
    assert leftovers(cache) == sorted([dataset.fingerprint, survey.name])


SLOW = """
import os, time
from pathlib import Path
def wait(n):
    (Path(__file__).parent / str(os.getpid())).touch()
    time.sleep(600)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import slow
from scantling.data.workers import in_order
list(in_order(slow.wait, [1, 2], 2))
"""
    (tmp_path / "slow.py").write_text(SLOW)
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        try:
            wait_for(lambda: len([p for p in tmp_path.iterdir() if p.name.isdigit()]) == 2)
        finally:
            parent.kill()
    for child in [int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()]:
        wait_for(lambda child=child: not running(child))  # type: ignore[misc]


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_two_processes_at_once(folder: Path, cache: Path, many_pieces: None) -> None:
    children = [start("meet", folder, cache) for _ in range(2)]
    ended = [(*child.communicate(timeout=60), child.returncode) for child in children]
    alone = prepare(config(folder, tokenizer="chars"), cache.with_name("alone"))
    assert ended == [(f"{cache / alone.fingerprint}\n", "", 0)] * 2
    assert leftovers(cache) == [alone.fingerprint]
    assert contents(cache / alone.fingerprint) == contents(alone.path)


def test_what_was_left_long_ago_is_removed(folder: Path, cache: Path) -> None:
    stale, young = cache / ".preparing-aa", cache / ".preparing-bb"
    for path in (stale, young):
        path.mkdir(parents=True)
    os.utime(stale, (time.time() - 2 * data.STALE_SECONDS,) * 2)
    dataset = prepare(config(folder), cache)
    assert leftovers(cache) == sorted([young.name, dataset.fingerprint])


# --- faults while writing ------------------------------------------------------------------------------------------


def fail_at(n: int, error: Callable[[], BaseException]) -> Callable[[BinaryIO, TokenArray], None]:
    calls = 0

    def append(stream: BinaryIO, ids: TokenArray) -> None:
        nonlocal calls
        calls += 1
        if calls == n:
            stream.flush()
            raise error()
        stream.write(ids.tobytes())

    return append


def test_full_disk(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_append", fail_at(2, lambda: OSError(errno.ENOSPC, "No space left on device")))
        needed = sum(2 * (p.stat().st_size + 1) for p in folder.rglob("*.txt"))
        with pytest.raises(RunError, match=rf"disk full; up to {needed} bytes are needed, \d+ are free") as caught:
            prepare(config(folder), cache)
        assert str(cache) in str(caught.value) and caught.value.exit_code == 1
    assert leftovers(cache) == []
    assert prepare(config(folder), cache).tokens() > 0


def test_full_disk_half_way_keeps_what_is_whole(
    folder: Path, cache: Path, many_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_append", fail_at(12, lambda: OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(RunError, match="finished shards are kept"):
            prepare(config(folder), cache)
    (left,) = cache.glob(".preparing-*")
    assert list(left.glob("shard-*.json")) and not list(left.glob("*.tmp"))
    dataset = prepare(config(folder), cache)
    assert contents(dataset.path) == contents(prepare(config(folder), cache.with_name("whole")).path)


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_full_disk_at_the_very_end(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Buffered bytes may meet the full disk as late as a flush: of two shards, the list, the entry, the manifest."""
    flushed: list[str] = []

    def full(stream: BinaryIO) -> None:
        flushed.append(Path(stream.name).name)
        if len(flushed) == call:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_flush", full)
        with pytest.raises(RunError, match="disk full"):
            prepare(config(folder), cache)
    assert not [name for name in leftovers(cache) if not name.startswith(".preparing-")]
    dataset = prepare(config(folder), cache)
    assert leftovers(cache) == [dataset.fingerprint]


def test_interrupt_leaves_nothing(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_append", fail_at(2, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(config(folder), cache)
    assert leftovers(cache) == []


@pytest.mark.parametrize("how", ["changed", "vanished"])
def test_text_that_changes_between_the_passes(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    survey = data.survey

    def disturbed(*args: Any) -> Any:
        found = survey(*args)
        last = max(p for p in folder.rglob("*.txt"))
        last.write_text("something else") if how == "changed" else last.unlink()
        return found

    monkeypatch.setattr(data, "survey", disturbed)
    with pytest.raises(RunError, match=rf"39\.txt: {how} while it was read; start again when the source is at rest"):
        prepare(config(folder), cache)
    assert leftovers(cache) == []


@pytest.mark.parametrize("lines", [30, 50])
def test_records_that_come_or_go_between_the_passes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, lines: int
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(40)])
    survey = data.survey

    def disturbed(*args: Any) -> Any:
        found = survey(*args)
        write_jsonl(path, [f"text {i}" for i in range(lines)])
        return found

    monkeypatch.setattr(data, "survey", disturbed)
    with pytest.raises(RunError, match=r"a\.jsonl:41: changed" if lines == 50 else r"a\.jsonl: 10 documents vanished"):
        prepare(config(path), cache)


def test_cache_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        prepare(config(folder), tmp_path / "file" / "cache")
    with pytest.raises(InputError, match="cannot be written"):
        prepare(config(folder), tmp_path / "file")


# --- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["train-00000.bin", "validation-00000.bin"])
@pytest.mark.parametrize("how", ["truncated", "grown", "vanished"])
def test_damaged_shard(folder: Path, cache: Path, file: str, how: str) -> None:
    dataset = prepare(config(folder), cache)
    path = dataset.path / file
    raw = path.read_bytes()
    if how == "vanished":
        path.unlink()
    else:
        path.write_bytes(raw[:-2] if how == "truncated" else raw + b"\0\0")
    got = {"truncated": str(len(raw) - 2), "grown": str(len(raw) + 2), "vanished": "none"}[how]
    with pytest.raises(InputError) as caught:
        prepare(config(folder), cache)
    assert f"{path}: expected {len(raw)} bytes, got {got}" in str(caught.value)
    assert f"delete {dataset.path} to rebuild it" in str(caught.value)


@pytest.mark.parametrize("how", ["cut short", "written over", "vanished"])
def test_a_shard_that_changes_while_it_is_used(folder: Path, cache: Path, how: str) -> None:
    dataset = prepare(config(folder), cache)
    path = dataset.path / "train-00000.bin"
    asked: dict[str, Any] = dict(seed=0, first=0, count=2, sequence_length=50)
    dataset.sequences(**asked)
    size = path.stat().st_size
    if how == "cut short":
        os.truncate(path, 10)  # reading the rest of the map would kill the process
        words = f"changed while it was being trained on \\(expected {size} bytes, got 10\\)"
    elif how == "vanished":
        path.unlink()
        words = "vanished while it was being trained on"
    else:
        os.utime(path, (0, 0))
        words = "written to since"
    with pytest.raises(RunError, match=words):
        dataset.sequences(**asked)


def test_damaged_manifest_and_tables(folder: Path, cache: Path) -> None:
    dataset = prepare(config(folder, tokenizer="chars"), cache)
    table = dataset.path / "chars.json"
    for text in ("[", "[3]", '["b", "a"]', '["\\u0000", "a"]', None):
        table.unlink() if text is None else table.write_text(text)
        with pytest.raises(InputError, match=r"chars\.json: .*to rebuild it"):
            open_dataset(dataset.path)
    bpe = prepare(config(folder, tokenizer={"kind": "bpe", "vocab_size": 270}), cache)
    table = bpe.path / "tokenizer.json"
    whole = json.loads(table.read_text(encoding="utf-8"))
    extra = {**whole["added_tokens"][0], "content": "<more>", "id": 300}
    for text in ("[", "{}", json.dumps({**whole, "added_tokens": [*whole["added_tokens"], extra]}), None):
        table.unlink() if text is None else table.write_text(text)
        with pytest.raises(InputError, match=r"tokenizer\.json: .*to rebuild it"):
            open_dataset(bpe.path)
    manifest = dataset.path / "manifest.json"
    for text in ("{", "{}", manifest.read_text().replace('"layout": 2', '"layout": 1'), None):
        manifest.unlink() if text is None else manifest.write_text(text)
        with pytest.raises(InputError, match=r"manifest\.json: .*to rebuild it"):
            open_dataset(dataset.path)


def test_what_is_remembered_of_files_may_be_damaged(folder: Path, cache: Path) -> None:
    age(folder)
    first = prepare(config(folder), cache)
    for file in (cache / "known").iterdir():
        file.write_text("[")
    assert prepare(config(folder), cache).fingerprint == first.fingerprint
    for split in SPLITS:
        assert np.array_equal(tokens(prepare(config(folder), cache), split), tokens(first, split))
