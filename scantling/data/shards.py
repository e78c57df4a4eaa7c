"""Texts tokenised once into a folder of the cache: a pair of shards for each piece of the corpus, made side by side.

A prepared folder holds `train-00000.bin`, `validation-00000.bin`, ... (little-endian uint16 or uint32 ids, every document
followed by the end-of-document id), `documents-00000.jsonl`, ... (what each document is, or why it is left out), the
tokenizer, and `manifest.json`. It grows under a temporary name, a shard being there once its `shard-00000.json` is; a
process that goes on where another was killed keeps those. It is renamed when complete, so that one with its final name
is whole. That name is the fingerprint: SHA-256 over the texts in their order and every setting that changes a token.
Where the texts lie and what their files are called is not part of it; the manifest tells it as it was.
"""

import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from scantling.data.readers import Empty, Piece, read_piece
from scantling.data.streams import Shard, TokenStream, open_raw
from scantling.data.survey import DUPLICATE, SPLITS, Split, Survey, cut, read_records, sha256_of
from scantling.data.tokens import TokenArray, Tokenizer, TokenizerKind, load_tokenizer, save_tokenizer, token_dtype
from scantling.data.workers import in_order
from scantling.errors import InputError, RunError

IDENTITY = 1  # of the tokens; raise it when the same texts and settings give others
LAYOUT = 2  # of a prepared folder

_MANIFEST, _RECORDS = "manifest.json", "records.bin"
_BUFFER = 2**20  # tokens held before they are written
_AT_REST = "start again when the source is at rest"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SplitEntry(_Frozen):
    """What a split holds. `tokens` counts one end of document per document, `bytes` (UTF-8 text) does not."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0


class ShardEntry(_Frozen):
    """The shards of one piece, and what they hold."""

    number: int
    splits: dict[Split, SplitEntry]
    skipped: int

    def file(self, split: Split) -> str:
        """The name of its shard."""
        return f"{split}-{self.number:05d}.bin"


class Manifest(_Frozen):
    """What a prepared folder holds; `manifest.json`."""

    layout: Literal[2] = 2
    fingerprint: str
    source: tuple[str, ...]
    python: str
    tokenizer: TokenizerKind
    vocab_size: int
    end_of_document: int
    dtype: Literal["uint16", "uint32"]
    validation_fraction: float
    splits: dict[Split, SplitEntry]
    skipped: int
    shards: tuple[ShardEntry, ...]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A prepared folder, its shards mapped into memory."""

    path: Path
    manifest: Manifest
    tokenizer: Tokenizer
    streams: dict[Split, TokenStream]

    def documents(self) -> Iterator[dict[str, Any]]:
        """What each document is: `name, sha256, bytes, tokens, split`; or `name` and `skipped`, the reason."""
        for entry in self.manifest.shards:
            with (self.path / f"documents-{entry.number:05d}.jsonl").open(encoding="utf-8") as stream:
                yield from map(json.loads, stream)


def fingerprint(found: Survey, tokenizer: object) -> str:
    """SHA-256 over the texts and what decides their tokens; equal fingerprints mean equal tokens."""
    rest = {"format": IDENTITY, "tokenizer": tokenizer, "validation_fraction": found.validation_fraction}
    total = hashlib.sha256(b'{"documents": [')
    for number, line in enumerate(found.identities()):
        total.update((", " if number else "").encode() + line.encode())
    total.update(b"], " + json.dumps(rest, sort_keys=True)[1:].encode())
    return total.hexdigest()


def tokenise(
    temporary: Path,
    folder: Path,
    found: Survey,
    tokenizer: Tokenizer,
    workers: int,
    progress: Callable[[int], None],
) -> None:
    """Write the prepared folder of a corpus, in `temporary` until it is whole.

    Args:
        temporary: where to go on, or to begin.
        folder: its final name, the fingerprint.
        found: the corpus.
        tokenizer: of its texts.
        workers: processes that tokenise.
        progress: told the bytes of every piece that is done.

    Raises:
        RunError: the texts changed since they were surveyed.
        OSError: the folder cannot be written. Finished shards stay.
    """
    temporary.mkdir(exist_ok=True)
    shutil.copyfile(found.records, temporary / _RECORDS)
    save_tokenizer(temporary, tokenizer)
    done: dict[int, ShardEntry] = {}
    jobs: list[_Job] = []
    for number, piece in enumerate(found.pieces):
        if (entry := _finished(temporary, number, tokenizer)) is not None:
            done[number] = entry
            progress(piece.size)
            continue
        start, stop = (0, 2) if found.cut else found.starts[number : number + 2]
        jobs.append(
            _Job(
                temporary, number, piece, start, stop - start, found.cut, found.validation_fraction,
                tokenizer.kind, tokenizer.vocab_size, tokenizer.end_of_document,
            )
        )  # fmt: skip
    try:
        for job, entry in zip(jobs, in_order(_tokenise_piece, jobs, workers), strict=True):
            done[job.number] = entry
            progress(job.piece.size)
    except BaseException:
        for path in temporary.glob("*.tmp"):
            path.unlink(missing_ok=True)
        if not any(temporary.glob("shard-*.json")):
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    entries = tuple(done[number] for number in range(len(found.pieces)))
    _write_manifest(temporary, folder.name, found, tokenizer, entries)
    for path in (temporary / _RECORDS, *temporary.glob("shard-*.json"), *temporary.glob("*.tmp")):
        path.unlink(missing_ok=True)
    temporary.rename(folder)


def _write_manifest(
    temporary: Path, name: str, found: Survey, tokenizer: Tokenizer, entries: tuple[ShardEntry, ...]
) -> None:
    assert tokenizer.end_of_document is not None
    totals = {
        split: SplitEntry(
            tokens=sum(entry.splits[split].tokens for entry in entries),
            documents=sum(entry.splits[split].documents for entry in entries),
            bytes=sum(entry.splits[split].bytes for entry in entries),
        )
        for split in SPLITS
    }
    manifest = Manifest(
        fingerprint=name,
        source=tuple(dict.fromkeys(piece.source for piece in found.pieces)),
        python=platform.python_version(),
        tokenizer=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        dtype="uint16" if token_dtype(tokenizer.vocab_size).itemsize == 2 else "uint32",
        validation_fraction=found.validation_fraction,
        splits=totals,
        skipped=sum(entry.skipped for entry in entries),
        shards=entries,
    )
    with (temporary / _MANIFEST).open("wb") as stream:
        stream.write(manifest.model_dump_json(indent=1).encode())
        _flush(stream)


# --- one piece ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    folder: Path
    number: int
    piece: Piece
    start: int  # of its documents in the records
    count: int
    cut: bool
    validation_fraction: float
    kind: TokenizerKind
    vocab_size: int
    end: int | None


_load = lru_cache(maxsize=1)(load_tokenizer)


def _tokenise_piece(job: _Job) -> ShardEntry:
    """The shards of a piece, each written under another name and renamed; last the entry that says they are whole."""
    tokenizer = _load(job.folder, job.kind, job.vocab_size, job.end)
    names = {split: f"{split}-{job.number:05d}.bin" for split in SPLITS}
    listing = f"documents-{job.number:05d}.jsonl"
    entry = f"shard-{job.number:05d}.json"
    paths = {name: job.folder / f"{name}.{os.getpid()}.tmp" for name in (*names.values(), listing, entry)}
    totals = {split: SplitEntry() for split in SPLITS}
    skipped = 0
    with (
        paths[names["train"]].open("wb") as train,
        paths[names["validation"]].open("wb") as validation,
        paths[listing].open("wb") as lines,
    ):
        streams: dict[Split, BinaryIO] = {"train": train, "validation": validation}
        held: dict[Split, list[TokenArray]] = {split: [] for split in SPLITS}
        waiting = 0
        end = np.array([job.end], token_dtype(job.vocab_size))
        for name, text, split, sha256 in _kept(job):
            if split is None:
                skipped += 1
                reason = text if not sha256 else "same text as an earlier document"
                line: dict[str, Any] = {"name": name, "skipped": reason, **({"sha256": sha256} if sha256 else {})}
            else:
                ids = tokenizer.encode(text)
                held[split] += [ids, end]
                waiting += len(ids) + 1
                size = len(text.encode())
                old = totals[split]
                totals[split] = SplitEntry(
                    tokens=old.tokens + len(ids) + 1, documents=old.documents + 1, bytes=old.bytes + size
                )
                line = {"name": name, "sha256": sha256, "bytes": size, "tokens": len(ids) + 1, "split": split}
            lines.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            if waiting >= _BUFFER:
                _append_all(streams, held)
                waiting = 0
        _append_all(streams, held)
        for stream in (train, validation, lines):
            _flush(stream)
    result = ShardEntry(number=job.number, splits=totals, skipped=skipped)
    with paths[entry].open("wb") as stream:
        stream.write(result.model_dump_json().encode())
        _flush(stream)
    for name, path in paths.items():
        path.replace(job.folder / name)
    return result


def _kept(job: _Job) -> Iterator[tuple[str, str, Split | None, str]]:
    """(name, text, split, sha256) of each document of a piece, checked against the survey; skipped ones have no split.

    Raises:
        RunError: a text is not what it was.
    """
    records = read_records(job.folder / _RECORDS, job.start, job.count)
    at = 0
    for item in read_piece(job.piece):
        if isinstance(item, Empty):
            yield item.name, item.reason, None, ""
            continue
        texts = [(item.name, item.text)]
        if job.cut and at == len(records):  # a copy of the one document
            yield item.name, "", None, sha256_of(item.text)[0].hex()
            continue
        if job.cut and len(item.text) > 1:
            halves = cut(item.text, job.validation_fraction)
            texts = [(f"{item.name} ({split} part)", half) for split, half in zip(SPLITS, halves, strict=True)]
        for name, text in texts:
            sha256 = sha256_of(text)[0]
            if at == len(records) or sha256 != records["sha256"][at].tobytes():
                raise RunError(f"{item.name}: changed while it was read; {_AT_REST}")
            part = int(records["part"][at])
            at += 1
            yield name, text, None if part == DUPLICATE else SPLITS[part], sha256.hex()
    if at != len(records) and not job.cut:
        raise RunError(f"{job.piece.source}: {len(records) - at} documents vanished while it was read; {_AT_REST}")


def _append_all(streams: dict[Split, BinaryIO], held: dict[Split, list[TokenArray]]) -> None:
    for split, stream in streams.items():
        if held[split]:
            _append(stream, np.concatenate(held[split]))
            held[split].clear()


def _append(stream: BinaryIO, ids: TokenArray) -> None:
    stream.write(ids.tobytes())


def _flush(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _finished(folder: Path, number: int, tokenizer: Tokenizer) -> ShardEntry | None:
    """The entry of a piece whose shards are there and whole."""
    width = token_dtype(tokenizer.vocab_size).itemsize
    try:
        entry = ShardEntry.model_validate_json((folder / f"shard-{number:05d}.json").read_bytes())
        sizes = {split: (folder / entry.file(split)).stat().st_size for split in SPLITS}
    except (OSError, ValidationError):
        return None
    return entry if all(sizes[split] == entry.splits[split].tokens * width for split in SPLITS) else None


# --- opening -----------------------------------------------------------------------------------------------------------


def open_prepared(folder: Path) -> Prepared:
    """Open a prepared folder.

    Raises:
        InputError: the folder is not a prepared one, or a file is missing, damaged or of the wrong size.
    """
    rebuild = f"delete {folder} to rebuild it"
    try:
        manifest = Manifest.model_validate_json((folder / _MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        raise InputError(f"{folder / _MANIFEST}: {_brief(error)}; not a prepared dataset, {rebuild}") from error
    width = np.dtype(manifest.dtype).itemsize
    shards: dict[Split, list[Shard]] = {split: [] for split in SPLITS}
    faults: list[str] = []
    for entry in manifest.shards:
        for split in SPLITS:
            path = folder / entry.file(split)
            expected = entry.splits[split].tokens * width
            try:
                size = path.stat().st_size
                if size == expected:
                    shards[split].append(open_raw(path, manifest.dtype))
                else:
                    faults.append(f"{path}: expected {expected} bytes, got {size}; {rebuild}")
            except OSError as error:
                faults.append(f"{path}: expected {expected} bytes, got none: {error.strerror}; {rebuild}")
    if faults:
        raise InputError(*faults)
    try:
        tokenizer = load_tokenizer(folder, manifest.tokenizer, manifest.vocab_size, manifest.end_of_document)
    except InputError as error:
        raise InputError(f"{error}; {rebuild}") from error
    return Prepared(folder, manifest, tokenizer, {split: TokenStream(shards[split]) for split in SPLITS})


def _brief(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def write_error(error: OSError, cache: Path, most_bytes: int) -> InputError | RunError:
    """An OSError while something was written below `cache`, in words."""
    where = f"{cache}: the prepared data cannot be written"
    remedy = "set SCANTLING_CACHE to a folder elsewhere"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(next(path for path in (cache, *cache.absolute().parents) if path.exists())).free
        needed = f"up to {most_bytes} bytes are needed, " if most_bytes else ""
        return RunError(
            f"{where}: disk full; {needed}{free} are free; make room and run the same command again (finished shards are "
            f"kept), or {remedy}"
        )
    if isinstance(error, PermissionError | FileExistsError | NotADirectoryError) or error.errno == errno.EROFS:
        return InputError(f"{where}: {error.strerror}; {remedy}")
    return RunError(f"{where}: {error.strerror or error}; {remedy}")
