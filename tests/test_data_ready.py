"""Tokens made elsewhere: read as they are, where they lie."""

import os
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scantling.data import prepare
from scantling.data.corpus import DataConfig
from scantling.errors import InputError, RunError
from tests.corpora import config, tokens, write_jsonl

IDS: dict[str, Any] = {"kind": "ids", "vocab_size": 1000, "end_of_document": 7}
RNG = np.random.default_rng(0)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    """A folder as nanoGPT's prepare.py writes it."""
    root = tmp_path / "openwebtext"
    root.mkdir()
    for name, n in (("train", 5000), ("val", 600)):
        RNG.integers(0, 1000, n).astype(np.uint16).tofile(root / f"{name}.bin")
    return root


def test_nanogpt_files_are_read_as_they_are(nano: Path, cache: Path) -> None:
    dataset = prepare(config(nano, tokenizer=IDS), cache)
    for split, name in (("train", "train"), ("validation", "val")):
        assert np.array_equal(tokens(dataset, split), np.fromfile(nano / f"{name}.bin", np.uint16))
    (shard,) = dataset.sources[0].streams["train"].shards
    assert shard.path == nano / "train.bin" and not shard.ids.flags.writeable and not shard.ids.flags.owndata
    assert not [path for path in cache.rglob("*") if path.stat().st_size > 4096 and path.is_file()]
    # nanoGPT's get_batch, at the same places
    inputs, labels, documents = dataset.sequences(seed=1, first=5, count=6, sequence_length=32, documents=True)
    raw = np.memmap(nano / "train.bin", np.uint16, "r")
    for x, y in zip(inputs, labels, strict=True):
        at = next(i for i in range(0, 5000, 32) if np.array_equal(raw[i : i + 32], x))
        assert np.array_equal(raw[at + 1 : at + 33].astype(np.int64), y)
    assert documents is not None and documents.max() <= (inputs == 7).sum(axis=1).max()
    assert np.isnan(dataset.bytes_per_token())
    assert prepare(config(nano, tokenizer={**IDS, "bytes_per_token": 4.5}), cache).bytes_per_token() == 4.5


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
def test_npy_shards(tmp_path: Path, cache: Path, dtype: str) -> None:
    ids = RNG.integers(0, 1000, 3000)
    root = tmp_path / "npy"
    root.mkdir()
    for i, part in enumerate(np.array_split(ids[:2700], 4)):
        np.save(root / f"shard_train_{i:03d}.npy", part.astype(dtype))
    np.save(root / "shard_val_000.npy", ids[2700:].astype(dtype))
    np.save(root / "test.npy", ids[:5].astype(dtype))
    dataset = prepare(config(root, tokenizer=IDS), cache)
    assert np.array_equal(tokens(dataset), ids[:2700]) and np.array_equal(tokens(dataset, "validation"), ids[2700:])
    inputs, labels = dataset.batch(seed=0, step=0, batch_sequences=dataset.windows(100), sequence_length=100)
    assert sorted(inputs.ravel().tolist()) == sorted(ids[:2600].tolist()) and inputs.dtype == labels.dtype == np.int64


def test_without_a_file_for_validation_the_end_is_held_out(tmp_path: Path, cache: Path) -> None:
    ids = RNG.integers(0, 1000, 1000)
    paths = [tmp_path / f"{i}.npy" for i in range(3)]
    for path, part in zip(paths, np.array_split(ids, 3), strict=True):
        np.save(path, part)
    dataset = prepare(DataConfig(source=[str(p) for p in paths], tokenizer=IDS, validation_fraction=0.4), cache)
    assert np.array_equal(tokens(dataset), ids[:600]) and np.array_equal(tokens(dataset, "validation"), ids[600:])


def test_fingerprints_follow_the_ids(nano: Path, cache: Path) -> None:
    first = prepare(config(nano, tokenizer=IDS), cache).fingerprint
    copy = nano.with_name("copy")
    nano.rename(copy)
    assert prepare(config(copy, tokenizer=IDS), cache).fingerprint == first
    ids = np.fromfile(copy / "train.bin", np.uint16)
    ids[17] ^= 1
    ids.tofile(copy / "train.bin")
    assert prepare(config(copy, tokenizer=IDS), cache).fingerprint != first


def test_files_at_rest_are_looked_through_once(nano: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in nano.iterdir():
        os.utime(path, (time.time() - 60,) * 2)
    first = prepare(config(nano, tokenizer=IDS), cache).fingerprint
    monkeypatch.setattr("scantling.data.ready._facts", lambda shard: pytest.fail("read again"))
    assert prepare(config(nano, tokenizer=IDS), cache).fingerprint == first


def test_with_the_tokenizer_they_were_made_with(tmp_path: Path, cache: Path) -> None:
    texts = [f"héllo {i} " * (i % 9 + 1) for i in range(200)]
    made = prepare(
        config(write_jsonl(tmp_path / "a.jsonl", texts), tokenizer={"kind": "bpe", "vocab_size": 300}), cache
    )
    root = tmp_path / "ids"
    root.mkdir()
    for split in ("train", "validation"):
        tokens(made, split).astype(np.uint16).tofile(root / f"{split}.bin")
    table = str(made.path / "tokenizer.json")
    dataset = prepare(config(root, tokenizer=table), cache)
    assert dataset.vocab_size == made.vocab_size and dataset.tokenizer == made.tokenizer
    assert dataset.bytes_per_token() == made.bytes_per_token()
    parts = {
        "ids": {"source": str(root), "weight": 1},
        "text": {"source": str(tmp_path / "a.jsonl"), "weight": 1},
    }
    mixture = prepare(DataConfig.model_validate({"mixture": parts, "tokenizer": table}), cache)
    assert [source.tokens() for source in mixture.sources] == [made.tokens()] * 2
    with pytest.raises(InputError, match=r"expected the tokenizer\.json they were made with, or \{kind: ids"):
        prepare(config(root, tokenizer="chars"), cache)


def test_wrong_files(nano: Path, cache: Path) -> None:
    def refused(words: str, error: type[Exception] = InputError, **keys: Any) -> None:
        with pytest.raises(error, match=words):
            prepare(config(nano, tokenizer={**IDS, **keys}), cache)

    refused(r"train\.bin: id \d+ at token \d+ is outside the vocabulary of 900", vocab_size=900)
    with (nano / "train.bin").open("ab") as stream:
        stream.write(b"x")
    refused(r"train\.bin: expected a whole number of uint16 ids, got 10001 bytes")
    (nano / "train.bin").unlink()
    np.save(nano / "train.npy", np.array([[1, 2]]))
    refused(r"train\.npy: expected a one-dimensional \.npy of .*, got int64 of shape \(1, 2\)")
    np.save(nano / "train.npy", np.array([1.0, 2.0]))
    refused(r"got float64 of shape")
    np.save(nano / "train.npy", np.array([3, -1, 2]))
    refused(r"train\.npy: id -1 at token 1 is outside")
    (nano / "train.npy").write_bytes(bytes(500))
    refused(r"train\.npy: expected a one-dimensional \.npy .*name a file of raw uint16 ids \.bin")
    (nano / "notes.txt").write_text("text")
    refused(r"holds tokens and .*notes\.txt text")


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trapped",)


def test_a_pickle_is_never_loaded(nano: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    np.save(nano / "train.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"train\.npy: expected"):
        prepare(config(nano, tokenizer=IDS), cache)
    (nano / "train.npy").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(InputError, match=r"train\.npy: expected"):
        prepare(config(nano, tokenizer=IDS), cache)
    assert not (tmp_path / "trapped").exists()


def test_a_file_cut_short_while_it_is_used(nano: Path, cache: Path) -> None:
    dataset = prepare(config(nano, tokenizer=IDS), cache)
    os.truncate(nano / "train.bin", 100)
    with pytest.raises(
        RunError, match=r"train\.bin: changed while it was being trained on \(expected 10000 bytes, got 100"
    ):
        dataset.sequences(seed=0, first=0, count=1, sequence_length=8)
    with pytest.raises(InputError, match="document masks need the id"):
        prepare(config(nano, tokenizer={**IDS, "end_of_document": None}), cache).sequences(
            seed=0, first=0, count=1, sequence_length=8, documents=True
        )
