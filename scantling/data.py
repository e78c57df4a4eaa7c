"""Token data for training: `prepare` once into a cache folder, then `Dataset.batch` as a pure function of (seed, step).

A prepared folder holds `train.bin` and `validation.bin` (little-endian uint16 or uint32 tokens, every document followed
by the end-of-document id), `chars.json` for the chars tokenizer, and `manifest.json`. The folder is written under a
temporary name and renamed when complete, so that one with its final name is whole. That name is the fingerprint:
SHA-256 over the texts in their order and every setting that changes a token. Where the texts lie and what their files
are called is not part of it; the manifest tells it as it was when the folder was written.

The order of training: a split of n tokens has (n - 1) // T windows of T tokens, window i being tokens [i*T, i*T + T]
(inputs and, one later, labels; the tail is left out). Epoch e is a permutation of all windows drawn from (seed, e), and
the sequences of all epochs, one after the other, are numbered; row r of step s with B sequences is number s*B + r.
A micro-batch or a rank that takes part of a step therefore asks for a finer step with fewer sequences.
"""

import errno
import hashlib
import json
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from scantling.corpus import DataConfig, DocumentEntry, Skipped, Split, read_corpus
from scantling.errors import InputError, RunError
from scantling.tokens import (
    END_OF_DOCUMENT,
    ByteTokenizer,
    CharTokenizer,
    TokenArray,
    Tokenizer,
    TokenizerKind,
    load_tokenizer,
    save_tokenizer,
    token_dtype,
)

__all__ = ["DataConfig", "Dataset", "Manifest", "SplitEntry", "default_cache_dir", "open_dataset", "prepare"]

FORMAT = 1  # of a prepared folder; raise it when the same texts and settings give other files
STALE_SECONDS = 3600.0  # a temporary folder nobody has written to for this long belongs to a dead process
SPLITS: tuple[Split, ...] = ("train", "validation")

_MANIFEST = "manifest.json"
_TEMPORARY = ".preparing-"

Ids = npt.NDArray[np.int64]


class SplitEntry(BaseModel):
    """One shard. `tokens` counts one end of document per document, `bytes` (UTF-8 text) does not."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    tokens: int
    documents: int
    bytes: int
    size_bytes: int


class Manifest(BaseModel):
    """What a prepared folder holds; `manifest.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    fingerprint: str
    source: tuple[str, ...]
    python: str
    tokenizer: TokenizerKind
    vocab_size: int
    end_of_document: int
    dtype: Literal["uint16", "uint32"]
    validation_fraction: float
    splits: dict[Split, SplitEntry]
    documents: tuple[DocumentEntry, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A prepared folder, its shards mapped into memory. Made by `prepare` or `open_dataset`."""

    path: Path
    manifest: Manifest
    tokenizer: Tokenizer
    shards: Mapping[Split, TokenArray]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the texts and the settings; equal fingerprints mean equal tokens."""
        return self.manifest.fingerprint

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.manifest.vocab_size

    def tokens(self, split: Split = "train") -> int:
        """Tokens of a split, ends of documents included."""
        return self.manifest.splits[split].tokens

    def bytes_per_token(self, split: Split = "validation") -> float:
        """UTF-8 bytes of text per token: bits per byte = nats per token / ln 2 / bytes per token."""
        entry = self.manifest.splits[split]
        return entry.bytes / entry.tokens

    def windows(self, sequence_length: int, split: Split = "train") -> int:
        """Sequences of `sequence_length` tokens in one epoch of a split.

        Raises:
            InputError: not even one fits.
        """
        _at_least(1, sequence_length=sequence_length)
        windows = (self.tokens(split) - 1) // sequence_length
        if windows < 1:
            raise InputError(
                f"sequence_length {sequence_length} needs {sequence_length + 1} tokens, but the {split} split of "
                f"{self.path} has {self.tokens(split)}; shorten the sequences or add text"
            )
        return windows

    def epochs(self, tokens: float, sequence_length: int, split: Split = "train") -> float:
        """How often a budget of training tokens goes through a split; above 1, text is repeated."""
        return tokens / (self.windows(sequence_length, split) * sequence_length)

    def batch(
        self, *, seed: int, step: int, batch_sequences: int, sequence_length: int, split: Split = "train"
    ) -> tuple[Ids, Ids]:
        """Inputs and labels of one step, each [batch_sequences, sequence_length]; any step, without replay.

        Args:
            seed: of the order, at least 0.
            step: counted from 0, for this `batch_sequences`.
            batch_sequences: rows; it may exceed an epoch.
            sequence_length: tokens of a row; `labels[:, t]` follows `inputs[:, t]` in the text.
            split: which shard.

        Raises:
            InputError: the split is shorter than one sequence, or a number is out of its range.
        """
        _at_least(0, seed=seed, step=step)
        _at_least(1, batch_sequences=batch_sequences)
        windows = self.windows(sequence_length, split)
        first = step * batch_sequences
        epoch, place = np.divmod(np.arange(first, first + batch_sequences), windows)
        chosen = np.empty(batch_sequences, np.int64)
        for e in range(int(epoch[0]), int(epoch[-1]) + 1):
            rows = epoch == e
            chosen[rows] = _permutation(seed, e, windows)[place[rows]]
        return self._gather(chosen, sequence_length, split)

    def validation_batches(
        self, sequence_length: int, batch_sequences: int, max_tokens: int | None = None
    ) -> Iterator[tuple[Ids, Ids]]:
        """Inputs and labels, each [rows, sequence_length], through the validation split in the order of the text.

        The same at every call. The last batch may have fewer than `batch_sequences` rows.

        Args:
            sequence_length: tokens of a row.
            batch_sequences: most rows of a batch.
            max_tokens: take only as many whole sequences as fit in it, evenly spaced over the split.

        Raises:
            InputError: the split or `max_tokens` is shorter than one sequence.
        """
        _at_least(1, batch_sequences=batch_sequences)
        windows = taken = self.windows(sequence_length, "validation")
        if max_tokens is not None:
            if max_tokens < sequence_length:
                raise InputError(f"max_tokens {max_tokens} is less than one sequence of {sequence_length} tokens")
            taken = min(windows, max_tokens // sequence_length)
        chosen = np.arange(taken) * windows // taken
        return (
            self._gather(chosen[start : start + batch_sequences], sequence_length, "validation")
            for start in range(0, taken, batch_sequences)
        )

    def _gather(self, chosen: Ids, sequence_length: int, split: Split) -> tuple[Ids, Ids]:
        windows = np.lib.stride_tricks.sliding_window_view(self.shards[split], sequence_length + 1)[::sequence_length]
        rows = windows[chosen]
        return rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)


def _at_least(low: int, **numbers: int) -> None:
    faults = [f"{name}: expected at least {low}, got {value}" for name, value in numbers.items() if value < low]
    if faults:
        raise InputError(*faults)


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> Ids:
    """Order of the windows in an epoch [count]. Raw bits, stably sorted: the same under every NumPy version."""
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(count)
    order = np.argsort(bits, kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


def default_cache_dir() -> Path:
    """`$SCANTLING_CACHE`, or `~/.cache/scantling`."""
    return Path(os.environ.get("SCANTLING_CACHE") or "~/.cache/scantling").expanduser()


def prepare(config: DataConfig, cache_dir: Path | str | None = None) -> Dataset:
    """The dataset of a config: opened where it lies in the cache, else tokenised into it.

    The texts are read in any case, to know that they are the same.

    Args:
        config: what to read and how.
        cache_dir: parent of the prepared folders; default `default_cache_dir()`.

    Raises:
        InputError: a source cannot be used, a split would be empty, the cache cannot be written or is damaged.
        RunError: the disk is full, or the texts changed while they were read. Nothing half-written stays behind.
    """
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    survey = _survey(config)
    folder = cache / survey.fingerprint
    temporary = cache / f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
    try:
        if folder.exists():
            return open_dataset(folder)
        cache.mkdir(parents=True, exist_ok=True)
        _remove_stale(cache)
        temporary.mkdir()
        _write(temporary, config, survey)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # else another process finished the same data first
                raise
    except OSError as error:
        _remove(temporary)
        raise _write_error(error, cache, survey) from error
    finally:
        _remove(temporary)
    return open_dataset(folder)


def open_dataset(folder: Path | str) -> Dataset:
    """Open a prepared folder.

    Raises:
        InputError: the folder is not a prepared one, or a file is missing, damaged or of the wrong size.
    """
    folder = Path(folder)
    rebuild = f"delete {folder} to rebuild it"
    try:
        manifest = Manifest.model_validate_json((folder / _MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(f"{folder / _MANIFEST}: {_brief(error)}; not a prepared dataset, {rebuild}") from error
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    shards: dict[Split, TokenArray] = {}
    faults: list[str] = []
    for split in SPLITS:
        entry = manifest.splits[split]
        path = folder / entry.file
        try:
            size = path.stat().st_size
            if size == entry.size_bytes == entry.tokens * dtype.itemsize:
                shards[split] = np.asarray(np.memmap(path, dtype, "r"))
            else:
                faults.append(f"{path}: expected {entry.size_bytes} bytes, got {size}; {rebuild}")
        except OSError as error:
            faults.append(f"{path}: expected {entry.size_bytes} bytes, got none: {error.strerror}; {rebuild}")
    if faults:
        raise InputError(*faults)
    try:
        tokenizer = load_tokenizer(folder, manifest.tokenizer, manifest.vocab_size)
    except InputError as error:
        raise InputError(f"{error}; {rebuild}") from error
    return Dataset(folder, manifest, tokenizer, shards)


def _brief(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


@dataclass(frozen=True)
class _Survey:
    """What a first pass over the texts found; the second pass writes."""

    documents: tuple[DocumentEntry, ...]
    skipped: tuple[Skipped, ...]
    tokenizer: Tokenizer
    fingerprint: str

    @property
    def most_bytes(self) -> int:
        """Upper bound of the size of the shards: no tokenizer makes more tokens than there are bytes."""
        return sum(d.bytes + 1 for d in self.documents) * token_dtype(self.tokenizer.vocab_size).itemsize


def _survey(config: DataConfig) -> _Survey:
    documents: list[DocumentEntry] = []
    skipped: list[Skipped] = []
    characters = {chr(END_OF_DOCUMENT)}
    for item in read_corpus(config):
        if isinstance(item, Skipped):
            skipped.append(item)
            continue
        documents.append(item.entry)
        if config.tokenizer == "chars":
            characters.update(item.text)
    identity = {
        "format": FORMAT,
        "tokenizer": config.tokenizer,
        "validation_fraction": config.validation_fraction,
        "documents": [[d.sha256, d.split] for d in documents],
    }
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    tokenizer = CharTokenizer("".join(sorted(characters))) if config.tokenizer == "chars" else ByteTokenizer()
    return _Survey(tuple(documents), tuple(skipped), tokenizer, fingerprint)


def _write(folder: Path, config: DataConfig, survey: _Survey) -> None:
    """Second pass: the shards, the table of characters, and last the manifest."""
    dtype = token_dtype(survey.tokenizer.vocab_size)
    end = np.array([END_OF_DOCUMENT], dtype)
    tokens: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    with (folder / "train.bin").open("wb") as train, (folder / "validation.bin").open("wb") as validation:
        streams: dict[Split, BinaryIO] = {"train": train, "validation": validation}
        expected = iter(survey.documents)
        for item in read_corpus(config):
            if isinstance(item, Skipped):
                continue
            if item.entry != next(expected, None):
                raise RunError(f"{item.entry.name}: changed while it was read; start again when the source is at rest")
            ids = np.concatenate([survey.tokenizer.encode(item.text), end])
            tokens[item.entry.split] += len(ids)
            _append(streams[item.entry.split], ids)
        if (missing := next(expected, None)) is not None:
            raise RunError(f"{missing.name}: vanished while it was read; start again when the source is at rest")
        for stream in streams.values():
            _flush(stream)
    save_tokenizer(folder, survey.tokenizer)
    manifest = Manifest(
        fingerprint=survey.fingerprint,
        source=config.sources,
        python=platform.python_version(),
        tokenizer=config.tokenizer,
        vocab_size=survey.tokenizer.vocab_size,
        end_of_document=END_OF_DOCUMENT,
        dtype="uint16" if dtype.itemsize == 2 else "uint32",
        validation_fraction=config.validation_fraction,
        splits={split: _split_entry(split, tokens[split], dtype.itemsize, survey) for split in SPLITS},
        documents=survey.documents,
        skipped=survey.skipped,
    )
    with (folder / _MANIFEST).open("wb") as stream:
        stream.write(manifest.model_dump_json(indent=1).encode())
        _flush(stream)


def _split_entry(split: Split, tokens: int, itemsize: int, survey: _Survey) -> SplitEntry:
    mine = [d.bytes for d in survey.documents if d.split == split]
    return SplitEntry(
        file=f"{split}.bin", tokens=tokens, documents=len(mine), bytes=sum(mine), size_bytes=tokens * itemsize
    )


def _append(stream: BinaryIO, ids: TokenArray) -> None:
    stream.write(ids.tobytes())


def _flush(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _write_error(error: OSError, cache: Path, survey: _Survey) -> InputError | RunError:
    where = f"{cache}: the prepared data cannot be written"
    remedy = "set SCANTLING_CACHE to a folder elsewhere"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(next(path for path in (cache, *cache.absolute().parents) if path.exists())).free
        return RunError(f"{where}: disk full; up to {survey.most_bytes} bytes are needed, {free} are free; {remedy}")
    if isinstance(error, PermissionError | FileExistsError | NotADirectoryError) or error.errno == errno.EROFS:
        return InputError(f"{where}: {error.strerror}; {remedy}")
    return RunError(f"{where}: {error.strerror or error}; {remedy}")


def _remove_stale(cache: Path) -> None:
    """Temporary folders of processes that were killed."""
    for folder in cache.glob(f"{_TEMPORARY}*"):
        try:
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        except OSError:
            continue  # its owner has just finished with it
        if time.time() - newest > STALE_SECONDS:
            _remove(folder)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
