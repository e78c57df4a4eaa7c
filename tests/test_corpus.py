"""Texts: every form they come in, what is left out, and what may be wrong with them."""

import argparse
import errno
import gzip
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from pydantic import ValidationError

from scantling.data import Dataset, prepare, sources
from scantling.data.corpus import PYTHON_STDLIB, DataConfig
from scantling.data.readers import Empty, Text
from scantling.data.sources import TEXT_SUFFIXES
from scantling.data.survey import SPLITS, cut
from scantling.errors import InputError
from tests.corpora import config, leftovers, prepared, read, tokens, write_jsonl

FIXED = settings(derandomize=True, deadline=None, max_examples=60, database=None)
TEXTS = [f"text {i} é\nmore " * (1 + i % 7) for i in range(200)]


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
    return prepare(DataConfig(source=PYTHON_STDLIB))


# --- what comes in -------------------------------------------------------------------------------------------------


def test_shards_hold_every_document_once_in_order(folder: Path, cache: Path) -> None:
    dataset = prepare(config(folder, validation_fraction=0.3), cache)
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.txt"))
    manifest = prepared(dataset).manifest
    for split in SPLITS:
        expected = b""
        for name in names:
            raw = (folder / name).read_bytes()
            fraction = int.from_bytes(hashlib.sha256(raw).digest()[:8], "big") / 2**64
            if (fraction < 0.3) == (split == "validation"):
                expected += raw + b"\0"
        entry = manifest.splits[split]
        assert np.fromfile(dataset.path / f"{split}-00000.bin", "<u2").astype(np.uint8).tobytes() == expected
        assert entry.tokens == dataset.tokens(split) == len(expected)
        assert entry.bytes == len(expected) - entry.documents
        assert dataset.bytes_per_token(split) == entry.bytes / entry.tokens
    listed = list(prepared(dataset).documents())
    assert [d["name"] for d in listed] == [f"texts/{name}" for name in names]
    assert sum(d["tokens"] for d in listed) == dataset.tokens("train") + dataset.tokens("validation")
    assert dataset.path.name == dataset.fingerprint and leftovers(cache) == [dataset.fingerprint]


def test_the_fingerprint_is_the_one_of_old(folder: Path, cache: Path) -> None:
    dataset = prepare(config(folder), cache)
    listed = [[d["sha256"], d["split"]] for d in prepared(dataset).documents()]
    identity = {"format": 1, "tokenizer": "bytes", "validation_fraction": 0.05, "documents": listed}
    assert dataset.fingerprint == hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def test_split_depends_on_the_text_alone(folder: Path, cache: Path) -> None:
    def splits() -> dict[str, str]:
        dataset = prepare(config(folder, validation_fraction=0.3), cache)
        return {d["sha256"]: d["split"] for d in prepared(dataset).documents()}

    before = splits()
    (folder / "00.txt").rename(folder / "zz.txt")
    (folder / "01.txt").write_text("another one")
    after = splits()
    assert after.items() >= before.items() and len(after) == len(before) + 1


def test_duplicates_and_empty_files_are_recorded_and_left_out(folder: Path, cache: Path) -> None:
    (folder / "copy.md").write_bytes((folder / "00.txt").read_bytes())
    (folder / "none.txt").touch()
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "picture.png").write_bytes(b"\xff\xd8")
    found = prepared(prepare(config(folder), cache))
    assert {d["name"]: d["skipped"] for d in found.documents() if "skipped" in d} == {
        "texts/copy.md": "same text as an earlier document",
        "texts/none.txt": "empty",
    }
    assert found.manifest.skipped == 2 and sum(s.documents for s in found.manifest.splits.values()) == 40


def test_duplicates_are_found_bucket_by_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [TEXTS[i % 150] for i in range(300)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    whole = prepare(config(path), tmp_path / "one")
    monkeypatch.setattr("scantling.data.survey._BUCKET", 7)
    monkeypatch.setattr("scantling.data.survey._CHUNK", 11)
    cut_up = prepare(config(path), tmp_path / "two")
    assert whole.fingerprint == cut_up.fingerprint and prepared(whole).manifest.skipped == 150
    assert [d["name"] for d in prepared(cut_up).documents() if "split" in d] == [f"a.jsonl:{i + 1}" for i in range(150)]


def test_single_text_file_is_cut_at_the_end_of_a_line(tmp_path: Path, cache: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "one.log").write_text(text)
    dataset = prepare(config(tmp_path / "one.log", validation_fraction=0.1), cache)
    train, validation = (dataset.tokenizer.decode(tokens(dataset, split))[:-1] for split in SPLITS)
    assert train + validation == text and train.endswith("\n")
    assert 0.9 * len(text) - len("line 99\n") <= len(train) <= 0.9 * len(text)
    twice = write_jsonl(tmp_path / "twice.jsonl", ["", text, text])
    again = prepare(config(twice, validation_fraction=0.1), cache)
    assert again.fingerprint == dataset.fingerprint
    bpe = {"kind": "bpe", "vocab_size": 300}
    assert prepare(config(tmp_path / "one.log", tokenizer=bpe), cache).tokens("validation") > 0


@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=2), f=st.floats(0.01, 0.99)
)
@FIXED
def test_single_document_cut_loses_nothing(text: str, f: float) -> None:
    parts = cut(text, f)
    assert abs(len(parts[0]) / len(text) - (1 - f)) <= f + 2 / len(text)
    assert all(parts) and "".join(parts) == text


def test_jsonl_and_lists_of_sources(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps({"body": f"text {i} é\nmore"}) + "\n\n" for i in range(40)), encoding="utf-8")
    (tmp_path / "last.txt").write_text("last one")
    both = DataConfig(source=[str(path), str(tmp_path / "last.txt")], text_key="body")
    items = [item for item in read(both) if isinstance(item, Text)]
    assert [i.text for i in items] == [f"text {i} é\nmore" for i in range(40)] + ["last one"]
    assert [items[0].name, items[1].name] == ["records.jsonl:1", "records.jsonl:3"]
    assert prepared(prepare(both, cache)).manifest.splits["train"].documents > 0


def test_python_stdlib_is_text_of_the_running_python(stdlib: Dataset) -> None:
    found = prepared(stdlib)
    kept = [d for d in found.documents() if "split" in d]
    names = [d["name"] for d in kept]
    assert "python-stdlib/argparse.py" in names and "python-stdlib/json/decoder.py" in names
    assert names == sorted(names)
    assert not any("/test/" in n or "/tests/" in n or "site-packages" in n for n in names)
    assert len({d["sha256"] for d in kept}) == len(names)
    assert all(stdlib.tokens(split) > 100_000 for split in SPLITS) and stdlib.tokens() > 5_000_000
    entry = next(d for d in kept if d["name"] == "python-stdlib/argparse.py")
    assert entry["sha256"] == hashlib.sha256(Path(argparse.__file__).read_bytes()).hexdigest()
    text = stdlib.tokenizer.decode(tokens(stdlib)[:200_000])
    assert text.count("\0") > 3 and "�" not in text[:-1]


def test_stdlib_skips_what_is_not_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, raw in {"a.py": b"good", "bad.py": b"x\xff", "zero.py": b"\0", "test/b.py": b"test"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(raw)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    items = read(DataConfig(source=PYTHON_STDLIB))
    assert [i.name for i in items if isinstance(i, Empty)] == ["python-stdlib/bad.py", "python-stdlib/zero.py"]
    assert "".join(i.text for i in items if isinstance(i, Text)) == "good"


# --- every form of the same texts ----------------------------------------------------------------------------------


def write(root: Path, form: str) -> DataConfig:
    """`TEXTS` in one of the forms they may come in."""
    root.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    table = pa.table({"number": range(len(TEXTS)), "text": TEXTS})
    if form == "parquet":
        parquet.write_table(table, root / "a.parquet", row_group_size=17)
    elif form == "jsonl.zst":
        half = len(lines) // 2  # two frames, cut in the middle of a line
        compress = zstandard.ZstdCompressor().compress
        (root / "a.jsonl.zst").write_bytes(compress(lines[:half]) + compress(lines[half:]))
    elif form == "jsonl.gz":
        (root / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    elif form == "separated.zst":
        joined = "\n<|endoftext|>\n".join(text.strip("\n") for text in TEXTS).encode()
        (root / "a.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(joined))
        return DataConfig(source=str(root), separator="<|endoftext|>")
    elif form == "saved":
        datasets.Dataset(table).save_to_disk(str(root / "set"), num_shards=3)
        return DataConfig(source={"kind": "datasets", "path": str(root / "set")})
    elif form == "saved splits":
        both = datasets.DatasetDict({"train": datasets.Dataset(table), "other": datasets.Dataset(table.slice(0, 3))})
        both.save_to_disk(str(root / "set"))
        return DataConfig(source={"kind": "datasets", "path": str(root / "set"), "split": "train"})
    elif form == "files":
        for i, text in enumerate(TEXTS):
            (root / f"{i:03d}.txt").write_text(text, encoding="utf-8")
    else:
        (root / "a.jsonl").write_bytes(lines)
    return DataConfig(source=str(root))


FORMS = ["jsonl", "jsonl.zst", "jsonl.gz", "parquet", "separated.zst", "saved", "saved splits", "files"]


@pytest.mark.parametrize("piece_bytes", [2**24, 300])
@pytest.mark.parametrize("form", FORMS)
def test_the_same_texts_in_any_form_are_the_same_data(
    tmp_path: Path, cache: Path, form: str, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = write_jsonl(tmp_path / "plain.jsonl", TEXTS)
    expected = prepare(config(plain), cache)
    monkeypatch.setattr(sources, "PIECE_BYTES", piece_bytes)
    found = prepare(write(tmp_path / "form", form), tmp_path / "other")
    assert found.fingerprint == expected.fingerprint
    for split in SPLITS:
        assert np.array_equal(tokens(found, split), tokens(expected, split))
    if piece_bytes == 300 and form in ("jsonl", "parquet", "saved", "files"):
        assert len(prepared(found).manifest.shards) > 5
    numbers = [int(d["name"].split(":")[1]) for d in prepared(found).documents() if ":" in d["name"]]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) in (0, len(TEXTS))


def test_a_jsonl_piece_begins_at_any_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(json.dumps({"text": "é" * (i % 90)}).encode() + b"\n" * (1 + i % 3) for i in range(500)))
    whole = read(config(path))
    monkeypatch.setattr(sources, "PIECE_BYTES", 1000)
    monkeypatch.setattr(sources, "_BLOCK", 77)
    assert read(config(path)) == whole and len(whole) == 500


# --- wrong input ---------------------------------------------------------------------------------------------------


def test_config_is_closed() -> None:
    for bad in (
        {"source": ""},
        {"source": []},
        {"source": ["a", ""]},
        {"source": 3},
        {"source": {"kind": "hub", "path": "a"}},
        {"source": "a", "tokenizer": "bpe"},
        {"source": "a", "tokenizer": {"kind": "bpe", "vocab_size": 200}},
        {"source": "a", "tokenizer": {"kind": "ids", "vocab_size": 10, "end_of_document": 10}},
        {},
        {"source": "a", "mixture": {"b": {"source": "b", "weight": 1}}},
        {"mixture": {}},
        {"mixture": {"b": {"source": "b", "weight": 0}}},
    ):
        with pytest.raises(ValidationError):
            DataConfig.model_validate(bad)
    for fraction in (0, 1, -0.1, math.nan):
        with pytest.raises(ValidationError):
            DataConfig(source="a", validation_fraction=fraction)
    with pytest.raises(ValidationError, match="Extra inputs"):
        DataConfig.model_validate({"source": "a", "validation_fractoin": 0.1})


def test_what_is_dumped_is_read_back_and_old_files_keep_their_hash() -> None:
    for value in (
        {"source": "a"},
        {"source": ["a", {"kind": "datasets", "path": "b"}], "separator": "--"},
        {"mixture": {"a": {"source": "a", "weight": 2}}, "tokenizer": {"kind": "bpe", "vocab_size": 300}},
    ):
        read_in = DataConfig.model_validate(value)
        assert DataConfig.model_validate(json.loads(json.dumps(read_in.model_dump(mode="json")))) == read_in
    assert DataConfig(source="a").model_dump(mode="json") == {
        "source": "a",
        "tokenizer": "bytes",
        "validation_fraction": 0.05,
        "text_key": "text",
    }


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


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.zst"])
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
def test_bad_jsonl_line(tmp_path: Path, cache: Path, line: bytes, words: str, ending: str) -> None:
    path = tmp_path / f"records.{ending}"
    raw = b'{"text": "a good one"}\n' + line + b"\n"
    path.write_bytes(zstandard.ZstdCompressor().compress(raw) if ending.endswith("zst") else raw)
    with pytest.raises(InputError, match=rf"records\.{ending}{words}"):
        prepare(config(path), cache)


def test_damaged_files_say_so(tmp_path: Path, cache: Path) -> None:
    for form in ("parquet", "jsonl.zst", "jsonl.gz"):
        write(tmp_path / form, form)
        path = tmp_path / form / f"a.{form}"
        raw = path.read_bytes()
        for bad in (raw[: len(raw) // 2], raw[:-3], b"not at all " * 20):
            path.write_bytes(bad)
            with pytest.raises(InputError, match=rf"a\.{form}: not a whole \.\w+ file: .*copy it again"):
                prepare(config(path), cache)
        if form == "parquet":  # the footer is whole, what it points to is not
            path.write_bytes(raw[:4] + bytes(200) + raw[204:])
            with pytest.raises(InputError, match=r"a\.parquet: damaged after row \d+"):
                prepare(config(path), cache)
    assert leftovers(cache) == []


def test_columns(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.parquet"
    for column, words in {
        "txet": r"no column 'text'; did you mean 'txet'\?; data\.text_key",
        "text": r"a\.parquet:2: expected a string in column 'text', got (int|NoneType)",
    }.items():
        parquet.write_table(pa.table({column: ["a", None]}), path)
        with pytest.raises(InputError, match=words):
            prepare(config(path), cache)
    saved = tmp_path / "set"
    datasets.Dataset.from_dict({"body": TEXTS}).save_to_disk(str(saved))
    with pytest.raises(InputError, match="no column 'text'"):
        prepare(DataConfig(source={"kind": "datasets", "path": str(saved)}), cache)
    named = DataConfig(source={"kind": "datasets", "path": str(saved)}, text_key="body")
    assert (
        prepare(named, cache).fingerprint
        == prepare(config(write_jsonl(tmp_path / "b.jsonl", TEXTS)), cache).fingerprint
    )
    for file in saved.glob("*.arrow"):
        file.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be loaded"):
        prepare(named, tmp_path / "new")


def test_a_data_set_on_the_hub_never_runs_its_code(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(InputError, match="set: cannot be loaded"):
        prepare(DataConfig(source={"kind": "datasets", "path": str(tmp_path / "set")}), cache)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("module", "extra"), [("zstandard", "data"), ("pyarrow", "data"), ("datasets", "hf")])
def test_a_missing_extra_is_named(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str
) -> None:
    form = {"zstandard": "jsonl.zst", "pyarrow": "parquet", "datasets": "saved"}[module]
    data = write(tmp_path / "x", form)
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(
        InputError, match=rf"needs the package {module}; install it with: pip install 'scantling\[{extra}\]'"
    ):
        prepare(data, cache)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_unreadable_file(folder: Path, cache: Path) -> None:
    (folder / "05.txt").chmod(0)
    with pytest.raises(InputError, match=r"05\.txt: cannot be read: Permission denied"):
        prepare(config(folder), cache)


def test_read_error_names_the_file(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "05.txt":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"05\.txt: cannot be read: Permission denied"):
        prepare(config(folder), cache)


@pytest.mark.parametrize(("fraction", "split"), [(1e-6, "validation"), (1 - 1e-6, "train")])
def test_nothing_left_for_a_split_says_which_fraction_works(
    folder: Path, cache: Path, fraction: float, split: Any
) -> None:
    with pytest.raises(InputError, match=f"of 40 documents none falls into {split}") as caught:
        prepare(config(folder, validation_fraction=fraction), cache)
    remedy = float(str(caught.value).split("set it to at ")[1].split()[1].rstrip(","))
    manifest = prepared(prepare(config(folder, validation_fraction=remedy), cache)).manifest
    assert manifest.splits[split].documents >= 1
