"""Prepared data: what comes in, what may go wrong, and the order in which it comes out."""

import errno
import hashlib
import json
import math
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
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from scantling import data
from scantling.corpus import PYTHON_STDLIB, TEXT_SUFFIXES, Document, Skipped, read_corpus
from scantling.data import DataConfig, Dataset, Manifest, SplitEntry, default_cache_dir, open_dataset, prepare
from scantling.errors import InputError, RunError
from scantling.tokens import ByteTokenizer, CharTokenizer, TokenArray, token_dtype

FIXED = settings(derandomize=True, deadline=None, max_examples=60, database=None)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty small documents; with the default fraction both splits get some."""
    root = tmp_path / "texts"
    (root / "deep").mkdir(parents=True)
    for i in range(40):
        (root / ("deep" if i % 2 else ".") / f"{i:02d}.txt").write_text(f"document {i}: " + "abc déf\n" * (i + 1))
    return root


@pytest.fixture(scope="session")
def stdlib(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return prepare(DataConfig(source=PYTHON_STDLIB), tmp_path_factory.mktemp("stdlib"))


def config(source: Path, **keys: Any) -> DataConfig:
    return DataConfig(source=str(source), **keys)


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("*")) if cache.exists() else []


def in_memory(train: int, validation: int = 2, vocab_size: int = 256) -> Dataset:
    """A dataset whose token i is i (modulo the vocabulary)."""
    dtype = token_dtype(vocab_size)
    sizes = {"train": train, "validation": validation}
    shards = {s: (np.arange(n, dtype=np.int64) % vocab_size).astype(dtype) for s, n in sizes.items()}
    splits = {
        s: SplitEntry(file=f"{s}.bin", tokens=n, documents=1, bytes=n, size_bytes=n * dtype.itemsize)
        for s, n in sizes.items()
    }
    manifest = Manifest.model_validate(
        dict(fingerprint="0" * 64, source=("x",), python="3", tokenizer="bytes", vocab_size=vocab_size)
        | dict(end_of_document=0, dtype=dtype.name, validation_fraction=0.5, splits=splits, documents=(), skipped=())
    )
    return Dataset(Path("memory"), manifest, ByteTokenizer(), shards)  # type: ignore[arg-type]


# --- what comes in -------------------------------------------------------------------------------------------------


def test_shards_hold_every_document_once_in_order(folder: Path, cache: Path) -> None:
    dataset = prepare(config(folder, validation_fraction=0.3), cache)
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.txt"))
    for split in data.SPLITS:
        expected = b""
        for name in names:
            raw = (folder / name).read_bytes()
            fraction = int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") / 2**64
            if (fraction < 0.3) == (split == "validation"):
                expected += raw + b"\0"
        entry = dataset.manifest.splits[split]
        assert np.fromfile(dataset.path / entry.file, "<u2").astype(np.uint8).tobytes() == expected
        assert (entry.tokens, entry.size_bytes) == (len(expected), 2 * len(expected))
        assert entry.bytes == len(expected) - entry.documents
        assert dataset.bytes_per_token(split) == entry.bytes / entry.tokens
    assert [d.name for d in dataset.manifest.documents] == [f"texts/{name}" for name in names]
    assert dataset.path.name == dataset.fingerprint and leftovers(cache) == [dataset.fingerprint]


def test_split_depends_on_the_text_alone(folder: Path) -> None:
    def splits() -> dict[str, str]:
        items = read_corpus(config(folder, validation_fraction=0.3))
        return {d.entry.sha256: d.entry.split for d in items if isinstance(d, Document)}

    before = splits()
    (folder / "00.txt").rename(folder / "zz.txt")
    (folder / "01.txt").write_text("another one")
    after = splits()
    assert after.items() >= before.items() and len(after) == len(before) + 1


def test_second_call_reuses_the_folder_and_the_fingerprint_follows_the_content(folder: Path, cache: Path) -> None:
    first = prepare(config(folder), cache)
    written = (first.path / "train.bin").stat().st_mtime_ns
    moved = folder.rename(folder.with_name("moved"))
    again = prepare(config(moved), cache)
    assert again.path == first.path and (again.path / "train.bin").stat().st_mtime_ns == written
    others = {
        prepare(config(moved, validation_fraction=0.3), cache).fingerprint,
        prepare(config(moved, validation_fraction=0.3 + 1e-9), cache).fingerprint,
        prepare(config(moved, tokenizer="chars"), cache).fingerprint,
    }
    with (moved / "00.txt").open("a") as stream:
        stream.write("!")
    assert len(others | {prepare(config(moved), cache).fingerprint, first.fingerprint}) == 5


def test_duplicates_and_empty_files_are_recorded_and_left_out(folder: Path, cache: Path) -> None:
    (folder / "copy.md").write_bytes((folder / "00.txt").read_bytes())
    (folder / "none.txt").touch()
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "picture.png").write_bytes(b"\xff\xd8")
    manifest = prepare(config(folder), cache).manifest
    assert {s.name: s.reason for s in manifest.skipped} == {
        "texts/copy.md": "same text as texts/00.txt",
        "texts/none.txt": "empty",
    }
    assert len(manifest.documents) == 40


def test_single_text_file_is_cut_at_the_end_of_a_line(tmp_path: Path, cache: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "one.log").write_text(text)
    dataset = prepare(config(tmp_path / "one.log", validation_fraction=0.1), cache)
    train, validation = (dataset.tokenizer.decode(dataset.shards[s])[:-1] for s in data.SPLITS)
    assert train + validation == text and train.endswith("\n")
    assert 0.9 * len(text) - len("line 99\n") <= len(train) <= 0.9 * len(text)


@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=2), f=st.floats(0.01, 0.99)
)
@FIXED
def test_single_document_cut_loses_nothing(text: str, f: float) -> None:
    from scantling.corpus import _cut, _document

    parts = list(_cut(_document("x", text, f), f))
    assert abs(len(parts[0].text) / len(text) - (1 - f)) <= f + 2 / len(text)
    assert [p.entry.split for p in parts] == ["train", "validation"]
    assert all(p.text for p in parts) and "".join(p.text for p in parts) == text


def test_jsonl_and_lists_of_sources(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps({"body": f"text {i} é\nmore"}) + "\n\n" for i in range(40)), encoding="utf-8")
    (tmp_path / "last.txt").write_text("last one")
    both = DataConfig(source=[str(path), str(tmp_path / "last.txt")], text_key="body")
    items = [item for item in read_corpus(both) if isinstance(item, Document)]
    assert [i.text for i in items] == [f"text {i} é\nmore" for i in range(40)] + ["last one"]
    assert [items[0].entry.name, items[1].entry.name] == ["records.jsonl:1", "records.jsonl:3"]
    assert prepare(both, cache).manifest.splits["train"].documents > 0


def test_python_stdlib_is_text_of_the_running_python(stdlib: Dataset) -> None:
    manifest = stdlib.manifest
    names = [d.name for d in manifest.documents]
    assert "python-stdlib/argparse.py" in names and "python-stdlib/json/decoder.py" in names
    assert names == sorted(names)
    assert not any("/test/" in n or "/tests/" in n or "site-packages" in n for n in names)
    assert len({d.sha256 for d in manifest.documents}) == len(names)
    assert all(manifest.splits[s].tokens > 100_000 for s in data.SPLITS)
    assert manifest.splits["train"].tokens > 5_000_000
    entry = next(d for d in manifest.documents if d.name == "python-stdlib/argparse.py")
    import argparse

    assert entry.sha256 == hashlib.sha256(Path(argparse.__file__).read_bytes()).hexdigest()
    text = stdlib.tokenizer.decode(np.asarray(stdlib.shards["train"][:200_000]))
    assert text.count("\0") > 3 and "�" not in text[:-1]


def test_stdlib_skips_what_is_not_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, raw in {"a.py": b"good", "bad.py": b"x\xff", "zero.py": b"\0", "test/b.py": b"test"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    items = list(read_corpus(DataConfig(source=PYTHON_STDLIB)))
    assert [i.name for i in items if isinstance(i, Skipped)] == ["python-stdlib/bad.py", "python-stdlib/zero.py"]
    assert "".join(i.text for i in items if isinstance(i, Document)) == "good"


def test_config_is_closed() -> None:
    for bad in [{"source": ""}, {"source": []}, {"source": ["a", ""]}, {"source": "a", "tokenizer": "bpe"}]:
        with pytest.raises(ValidationError):
            DataConfig.model_validate(bad)
    for fraction in (0, 1, -0.1, math.nan):
        with pytest.raises(ValidationError):
            DataConfig(source="a", validation_fraction=fraction)
    with pytest.raises(ValidationError, match="Extra inputs"):
        DataConfig.model_validate({"source": "a", "validation_fractoin": 0.1})


def test_cache_dir_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCANTLING_CACHE", str(tmp_path / "here"))
    assert default_cache_dir() == tmp_path / "here"
    monkeypatch.delenv("SCANTLING_CACHE")
    assert default_cache_dir() == Path.home() / ".cache" / "scantling"


# --- tokenizers ----------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(TEXT)
@FIXED
def test_round_trip(text: str) -> None:
    tokenizers = ByteTokenizer(), CharTokenizer("".join(sorted({"\0", *text})))
    for tokenizer in tokenizers:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and 0 not in ids and ids.dtype == np.uint16
    assert tokenizers[0].encode(text).astype(np.uint8).tobytes() == text.encode()
    assert len(tokenizers[1].encode(text)) == len(text)


def test_chars_table_is_stored_and_an_unknown_character_is_an_error(folder: Path, cache: Path) -> None:
    dataset = prepare(config(folder, tokenizer="chars"), cache)
    table = json.loads((dataset.path / "chars.json").read_text(encoding="utf-8"))
    distinct = sorted({c for p in folder.rglob("*.txt") for c in p.read_text(encoding="utf-8")})
    assert table == ["\0", *distinct] and dataset.vocab_size == len(distinct) + 1
    assert dataset.tokenizer.encode("é")[0] == table.index("é")
    with pytest.raises(InputError, match=r"character 'Ж' \(U\+0416\) at position 2 is not among the"):
        dataset.tokenizer.encode("abЖ")
    for tokenizer in (dataset.tokenizer, ByteTokenizer()):
        with pytest.raises(InputError, match="position 1; it stands for the end of a document"):
            tokenizer.encode("a\0")
        with pytest.raises(InputError, match=f"id {tokenizer.vocab_size} is outside the vocabulary"):
            tokenizer.decode(np.array([1, tokenizer.vocab_size]))


def test_large_vocabulary_takes_four_bytes(tmp_path: Path, cache: Path) -> None:
    characters = [chr(c) for c in range(1, 0x11000) if not 0xD800 <= c < 0xE000]
    (tmp_path / "wide.txt").write_bytes("".join(characters).encode())
    dataset = prepare(config(tmp_path / "wide.txt", tokenizer="chars"), cache)
    assert dataset.manifest.dtype == "uint32" and dataset.vocab_size == len(characters) + 1 > 2**16
    inputs, _ = next(dataset.validation_batches(8, 1))
    assert dataset.tokenizer.decode(inputs[0]) in "".join(characters)
    last, _ = dataset.batch(seed=0, step=0, batch_sequences=dataset.windows(16), sequence_length=16)
    assert 2**16 - 0x800 < last.max() < dataset.vocab_size


# --- wrong input ---------------------------------------------------------------------------------------------------


def test_missing_and_empty_sources(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    for name, words in {
        "gone": "gone does not exist",
        "empty.txt": "no text in it",
        "folder": TEXT_SUFFIXES[0],
    }.items():
        with pytest.raises(InputError, match=words):
            prepare(config(tmp_path / name), cache)
    (tmp_path / "folder" / "empty.txt").touch()
    with pytest.raises(InputError, match="no text in it"):
        prepare(config(tmp_path / "folder"), cache)
    assert leftovers(cache) == []


def test_not_utf8_names_file_and_offset(folder: Path, cache: Path) -> None:
    (folder / "05.txt").write_bytes("é".encode() * 3 + b"\xe9 latin")
    with pytest.raises(InputError, match=r"05\.txt: not UTF-8 at byte 6 \(0xe9\)"):
        prepare(config(folder), cache)
    (folder / "05.txt").write_bytes("é".encode() + b"a\0b")
    with pytest.raises(InputError, match=r"05\.txt: byte 0 at byte 3"):
        prepare(config(folder), cache)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "a"', r":2: not JSON at column 13: Expecting"),
        (b"[" * 100_000, r":2: not readable as JSON"),
        (b'["a"]', r":2: expected an object with the key 'text', got list"),
        (b'{"txet": "a"}', r":2: no key 'text'; did you mean 'txet'\?; data\.text_key"),
        (b'{"text": 3}', r":2: expected a string under 'text', got int"),
        (b'{"text": "a\\u0000"}', r":2: character 0"),
        (b'{"text": "a\\ud800"}', r":2: half a surrogate pair at character 1"),
        (b'{"text": "\xff"}', r":2: not UTF-8 at byte 33 \(0xff\)"),
    ],
)
def test_bad_jsonl_line(tmp_path: Path, cache: Path, line: bytes, words: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"text": "a good one"}\n' + line + b"\n")
    with pytest.raises(InputError, match=r"records\.jsonl" + words):
        prepare(config(path), cache)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_unreadable_file(folder: Path, cache: Path) -> None:
    (folder / "05.txt").chmod(0)
    with pytest.raises(InputError, match=r"05\.txt: cannot be read: Permission denied"):
        prepare(config(folder), cache)


def test_read_error_names_the_file(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "05.txt":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"05\.txt: cannot be read: Permission denied"):
        prepare(config(folder), cache)


@pytest.mark.parametrize(("fraction", "split"), [(1e-6, "validation"), (1 - 1e-6, "train")])
def test_nothing_left_for_a_split_says_which_fraction_works(
    folder: Path, cache: Path, fraction: float, split: str
) -> None:
    with pytest.raises(InputError, match=f"of 40 documents none falls into {split}") as caught:
        prepare(config(folder, validation_fraction=fraction), cache)
    remedy = float(str(caught.value).split("set it to at ")[1].split()[1].rstrip(","))
    manifest = prepare(config(folder, validation_fraction=remedy), cache).manifest
    assert manifest.splits[split].documents >= 1  # type: ignore[index]


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
        patch.setattr(data, "_append", fail_at(20, lambda: OSError(errno.ENOSPC, "No space left on device")))
        needed = sum(2 * (p.stat().st_size + 1) for p in folder.rglob("*.txt"))
        with pytest.raises(RunError, match=rf"disk full; up to {needed} bytes are needed, \d+ are free") as caught:
            prepare(config(folder), cache)
        assert str(cache) in str(caught.value) and caught.value.exit_code == 1
    assert leftovers(cache) == []
    assert prepare(config(folder), cache).tokens() > 0


@pytest.mark.parametrize("call", ["flush", "manifest"])
def test_full_disk_at_the_very_end(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Buffered bytes may meet the full disk as late as the flush; the manifest is flushed third."""
    flushed: list[str] = []

    def full(stream: BinaryIO) -> None:
        flushed.append(Path(stream.name).name)
        if call == "flush" or flushed[-1] == "manifest.json":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data, "_flush", full)
    with pytest.raises(RunError, match="disk full"):
        prepare(config(folder), cache)
    assert flushed == (["train.bin"] if call == "flush" else ["train.bin", "validation.bin", "manifest.json"])
    assert leftovers(cache) == []


def test_interrupt_leaves_nothing(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_append", fail_at(20, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(config(folder), cache)
    assert leftovers(cache) == []


@pytest.mark.parametrize("how", ["changed", "vanished"])
def test_text_that_changes_between_the_passes(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    survey = data._survey

    def disturbed(config: DataConfig) -> Any:
        found = survey(config)
        last = max(p for p in folder.rglob("*.txt"))
        last.write_text("something else") if how == "changed" else last.unlink()
        return found

    monkeypatch.setattr(data, "_survey", disturbed)
    with pytest.raises(RunError, match=f"{how} while it was read"):
        prepare(config(folder), cache)
    assert leftovers(cache) == []


def test_cache_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        prepare(config(folder), tmp_path / "file" / "cache")
    with pytest.raises(InputError, match="cannot be written"):
        prepare(config(folder), tmp_path / "file")


CHILD = """
import sys, time
from pathlib import Path
from scantling import data
mode, source, cache = sys.argv[1], sys.argv[2], Path(sys.argv[3])
append = data._append
def slow(stream, ids):
    append(stream, ids)
    if mode == "hang":
        stream.flush()
        time.sleep(600)
    while mode == "meet" and len(list(cache.glob(".preparing-*"))) < 2 and not list(cache.glob("[!.]*")):
        time.sleep(0.005)
data._append = slow
print(data.prepare(data.DataConfig(source=source), cache).path)
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
def test_killed_while_writing(folder: Path, cache: Path) -> None:
    with start("hang", folder, cache) as child:
        try:
            wait_for(lambda: any(p.stat().st_size for p in cache.glob(".preparing-*/train.bin")))
        finally:
            child.kill()
        child.communicate()
        assert child.returncode == -signal.SIGKILL
    (stale,) = cache.glob(".preparing-*")
    dataset = prepare(config(folder), cache)  # its owner might still live, so the rest of it stays
    assert dataset.tokens() > 0 and leftovers(cache) == sorted([stale.name, dataset.fingerprint])
    for path in (*stale.iterdir(), stale):
        os.utime(path, (time.time() - 2 * data.STALE_SECONDS,) * 2)
    other = prepare(config(folder, validation_fraction=0.3), cache)
    assert leftovers(cache) == sorted([dataset.fingerprint, other.fingerprint])


def test_two_processes_at_once(folder: Path, cache: Path) -> None:
    children = [start("meet", folder, cache) for _ in range(2)]
    ended = [(*child.communicate(timeout=60), child.returncode) for child in children]
    alone = prepare(config(folder), cache.with_name("alone"))
    assert ended == [(f"{cache / alone.fingerprint}\n", "", 0)] * 2
    assert leftovers(cache) == [alone.fingerprint]
    for split in data.SPLITS:
        assert np.array_equal(open_dataset(cache / alone.fingerprint).shards[split], alone.shards[split])


def test_losing_the_race_opens_what_the_winner_wrote(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = data._write

    def overtaken(*args: Any) -> None:
        write(*args)
        with monkeypatch.context() as patch:
            patch.setattr(data, "_write", write)
            prepare(config(folder), cache)

    monkeypatch.setattr(data, "_write", overtaken)
    dataset = prepare(config(folder), cache)
    assert leftovers(cache) == [dataset.fingerprint]


# --- damage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["train.bin", "validation.bin"])
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


def test_damaged_manifest_and_table(folder: Path, cache: Path) -> None:
    dataset = prepare(config(folder, tokenizer="chars"), cache)
    table = dataset.path / "chars.json"
    for text in ("[", "[3]", '["b", "a"]', '["\\u0000", "a"]', None):
        table.unlink() if text is None else table.write_text(text)
        with pytest.raises(InputError, match=r"chars\.json: .*to rebuild it"):
            open_dataset(dataset.path)
    manifest = dataset.path / "manifest.json"
    for text in ("{", "{}", manifest.read_text().replace('"format": 1', '"format": 2'), None):
        manifest.unlink() if text is None else manifest.write_text(text)
        with pytest.raises(InputError, match=r"manifest\.json: .*to rebuild it"):
            open_dataset(dataset.path)


# --- the order in which it comes out -------------------------------------------------------------------------------

SIZES = dict(n=st.integers(2, 400), length=st.integers(1, 40), rows=st.integers(1, 17), seed=st.integers(0, 2**70))


@given(**SIZES)
@FIXED
def test_every_window_once_per_epoch_whatever_the_batch(n: int, length: int, rows: int, seed: int) -> None:
    dataset = in_memory(n, vocab_size=2**16)
    windows = (n - 1) // length
    if windows == 0:
        with pytest.raises(InputError, match=f"sequence_length {length} needs {length + 1} tokens.* has {n};"):
            dataset.batch(seed=seed, step=0, batch_sequences=rows, sequence_length=length)
        return
    steps = -(-3 * windows // rows)
    batches = [dataset.batch(seed=seed, step=s, batch_sequences=rows, sequence_length=length) for s in range(steps)]
    starts = np.concatenate([inputs[:, 0] for inputs, _ in batches])  # token i is i, so a row shows where it starts
    for epoch in range(3):
        assert sorted(starts[epoch * windows : (epoch + 1) * windows]) == [i * length for i in range(windows)]
    for inputs, labels in batches:  # content, against naive slices
        assert inputs.dtype == labels.dtype == np.int64 and inputs.shape == labels.shape == (rows, length)
        for x, y in zip(inputs, labels, strict=True):
            assert x.tolist() == dataset.shards["train"][x[0] : x[0] + length].tolist()
            assert y.tolist() == dataset.shards["train"][x[0] + 1 : x[0] + 1 + length].tolist()
    one_by_one = [
        int(dataset.batch(seed=seed, step=s, batch_sequences=1, sequence_length=length)[0][0, 0])
        for s in range(len(starts))
    ]
    assert one_by_one == starts.tolist()


@given(parts=st.integers(1, 6), rows=st.integers(1, 5), step=st.integers(0, 10**12), seed=st.integers(0, 5))
@FIXED
def test_micro_batches_cut_a_step_without_changing_it(parts: int, rows: int, step: int, seed: int) -> None:
    dataset = in_memory(101)
    whole = dataset.batch(seed=seed, step=step, batch_sequences=parts * rows, sequence_length=10)
    cut = [
        dataset.batch(seed=seed, step=step * parts + p, batch_sequences=rows, sequence_length=10) for p in range(parts)
    ]
    for side in (0, 1):
        assert np.array_equal(whole[side], np.concatenate([c[side] for c in cut]))


def test_epochs_and_seeds_differ_and_the_order_is_pinned() -> None:
    dataset = in_memory(1001, vocab_size=2**16)

    def starts(seed: int, step: int) -> list[int]:
        inputs, _ = dataset.batch(seed=seed, step=step, batch_sequences=10, sequence_length=100)
        return [int(start) for start in inputs[:, 0]]

    orders = {tuple(starts(seed, epoch)) for seed in (0, 1, 2**32) for epoch in range(3)}
    assert len(orders) == 9
    assert starts(0, 0) == PINNED  # a change here changes every number ever trained


PINNED = [600, 300, 800, 100, 400, 500, 900, 200, 700, 0]


def test_bad_numbers_are_refused() -> None:
    good: dict[str, Any] = dict(seed=0, step=0, batch_sequences=1, sequence_length=4)
    for name, value in [("seed", -1), ("step", -1), ("batch_sequences", 0), ("sequence_length", 0)]:
        with pytest.raises(InputError, match=f"{name}: expected at least {value + 1}, got {value}"):
            in_memory(10).batch(**(good | {name: value}))


def test_batches_come_from_the_memory_map_and_can_be_written_to(stdlib: Dataset) -> None:
    shard = np.memmap(stdlib.path / "train.bin", "<u2", "r")
    inputs, labels = stdlib.batch(seed=3, step=10**6, batch_sequences=4, sequence_length=256)
    text = shard.astype(np.uint8).tobytes()
    for row in range(4):
        assert inputs[row].astype(np.uint8).tobytes() + bytes([labels[row, -1]]) in text
    inputs += 1  # a copy of its own, contiguous, as torch.from_numpy wants it
    assert inputs.flags.c_contiguous and labels.flags.c_contiguous
    assert not stdlib.shards["train"].flags.writeable


@given(n=st.integers(2, 300), length=st.integers(1, 30), rows=st.integers(1, 9))
@FIXED
def test_validation_sweep_is_whole_and_in_order(n: int, length: int, rows: int) -> None:
    dataset = in_memory(2, n, vocab_size=2**16)
    windows = (n - 1) // length
    if windows == 0:
        with pytest.raises(InputError, match="the validation split"):
            dataset.validation_batches(length, rows)  # at the call, not at the first batch
        return
    batches = list(dataset.validation_batches(length, rows))
    assert np.concatenate([x for x, _ in batches]).ravel().tolist() == list(range(windows * length))
    assert np.concatenate([y for _, y in batches]).ravel().tolist() == list(range(1, windows * length + 1))
    assert [len(x) for x, _ in batches[:-1]] == [rows] * (len(batches) - 1)


@given(windows=st.integers(1, 50), budget=st.integers(1, 60), rows=st.integers(1, 9))
@FIXED
def test_validation_budget_is_spread_evenly(windows: int, budget: int, rows: int) -> None:
    dataset = in_memory(2, 10 * windows + 1, vocab_size=2**16)
    found = [x[:, 0] // 10 for x, _ in dataset.validation_batches(10, rows, max_tokens=10 * budget + 9)]
    order = np.concatenate(found)
    taken = min(windows, budget)
    assert len(order) == taken == len(set(order.tolist())) and order[0] == 0
    gaps = np.diff([*order, windows])
    assert gaps.min() >= windows // taken and gaps.max() <= -(-windows // taken)


def test_validation_budget_below_one_sequence() -> None:
    with pytest.raises(InputError, match="max_tokens 9 is less than one sequence of 10"):
        in_memory(2, 100).validation_batches(10, 1, max_tokens=9)


def test_epochs_of_a_budget() -> None:
    dataset = in_memory(1001, 2)
    assert dataset.epochs(1000, 100) == 1
    assert dataset.epochs(2500, 100) == 2.5
    assert dataset.epochs(900, 300) == 1  # the tail of 100 tokens is never seen
