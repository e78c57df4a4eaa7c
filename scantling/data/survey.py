"""A first pass over the texts: what they are, which of them are the same, and which are held out.

Rules that hold for every source:

- Of documents with the same text only the first is kept, and empty ones are left out; both are listed as skipped.
- A document belongs to validation when the first 64 bits of the SHA-256 of its text, read as a fraction of 2**64, lie
  below `validation_fraction`: neither the order nor any other document has a say in it. A corpus of one single
  document (one text file) is instead cut in two at the end of a line, its last part being validation.

A document is 41 bytes of `records` on disk; what is held in memory does not grow with the corpus.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from scantling.data.readers import Empty, Piece, Text, read_piece
from scantling.data.workers import in_order
from scantling.errors import InputError

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
DUPLICATE = 2  # in the place of the number of a split

RECORD = np.dtype([("sha256", "u1", (32,)), ("bytes", "<i8"), ("part", "i1")])
Records = npt.NDArray[np.void]

_CHUNK = 2**20  # records looked at together
_BUCKET = 2**22  # hashes compared in memory at a time


@dataclass(frozen=True)
class Survey:
    """The pieces of a corpus and a record of each of their documents, in order."""

    pieces: tuple[Piece, ...]
    starts: tuple[int, ...]  # of each piece in the records, and their end
    records: Path
    characters: frozenset[str]
    cut: bool  # one single document: the records are those of its two parts
    validation_fraction: float

    def chunks(self) -> Iterator[Records]:
        """The records, some at a time."""
        yield from _chunks(self.records)

    def digest(self) -> str:
        """SHA-256 over the kept texts in their order and their splits."""
        found = hashlib.sha256()
        for line in self.identities():
            found.update(line.encode())
        return found.hexdigest()

    def identities(self) -> Iterator[str]:
        """`["<sha256>", "<split>"]` of each kept document."""
        for chunk in self.chunks():
            for sha256, part in zip(chunk["sha256"], chunk["part"].tolist(), strict=True):
                if part != DUPLICATE:
                    yield json.dumps([sha256.tobytes().hex(), SPLITS[part]])

    def bytes_of(self, split: Split) -> int:
        """UTF-8 bytes of the kept texts of a split."""
        number = SPLITS.index(split)
        return sum(int(chunk["bytes"][chunk["part"] == number].sum()) for chunk in self.chunks())

    def documents(self) -> int:
        """How many documents are kept."""
        return sum(int((chunk["part"] != DUPLICATE).sum()) for chunk in self.chunks())


def survey(
    pieces: list[Piece],
    folder: Path,
    validation_fraction: float,
    characters: bool,
    workers: int,
    progress: Callable[[int], None],
) -> Survey:
    """Read every document once.

    Args:
        pieces: of one corpus.
        folder: gets the file of records.
        validation_fraction: expected share of documents held out.
        characters: collect them, for the chars tokenizer.
        workers: processes that read.
        progress: told the bytes of every piece that is done.

    Raises:
        InputError: a text cannot be used, a source holds none, or one of the splits would be empty.
    """
    path = folder / "records.bin"
    seen: set[str] = set()
    counts: list[int] = []
    with path.open("wb") as stream:
        jobs = [(piece, validation_fraction, characters) for piece in pieces]
        for piece, (records, found) in zip(pieces, in_order(_survey_piece, jobs, workers), strict=True):
            stream.write(records.tobytes())
            counts.append(len(records))
            seen |= found
            progress(piece.size)
    held: dict[str, int] = {}
    for piece, count in zip(pieces, counts, strict=True):
        held[piece.source] = held.get(piece.source, 0) + count
    if empty := [source for source, count in held.items() if not count]:
        raise InputError(
            *(f"data.source: {s}: no text in it; every file or record is empty or was skipped" for s in empty)
        )
    kept = _mark_duplicates(path)
    starts = tuple(np.cumsum([0, *counts]).tolist())
    result = Survey(tuple(pieces), starts, path, frozenset(seen), kept == 1, validation_fraction)
    if kept == 1:
        _cut_records(result)
    else:
        _refuse_empty_split(result)
    return result


def sha256_of(text: str) -> tuple[bytes, int]:
    """SHA-256 of a text and its length in UTF-8."""
    raw = text.encode()
    return hashlib.sha256(raw).digest(), len(raw)


def cut(text: str, validation_fraction: float) -> tuple[str, str]:
    """A single text in two, at the end of a line if there is one: for training and for validation."""
    target = min(max(1, round(len(text) * (1 - validation_fraction))), len(text) - 1)
    earliest = max(0, target - (len(text) - target))  # no line end may more than double the validation part
    at = text.rfind("\n", earliest, target) + 1 or target
    return text[:at], text[at:]


def sampled_texts(found: Survey, share: float) -> Iterator[str]:
    """About `share` of the training texts, chosen by their hashes alone."""
    for number, piece in enumerate(found.pieces):
        records = read_records(found.records, found.starts[number], found.starts[number + 1] - found.starts[number])
        if found.cut:
            yield from (cut(item.text, found.validation_fraction)[0] for item in _texts(piece))
            return
        low = records["sha256"][:, 8:16].copy().view(">u8")[:, 0]
        wanted = (records["part"] == 0) & (low / 2.0**64 < share)
        if wanted.any():
            yield from (item.text for item, take in zip(_texts(piece), wanted, strict=False) if take)


def read_records(path: Path, start: int, count: int) -> Records:
    """Some records [count]."""
    return np.fromfile(path, RECORD, count, offset=start * RECORD.itemsize)


def _texts(piece: Piece) -> Iterator[Text]:
    return (item for item in read_piece(piece) if isinstance(item, Text))


def _survey_piece(job: tuple[Piece, float, bool]) -> tuple[Records, set[str]]:
    piece, fraction, characters = job
    seen: set[str] = set()
    hashes: list[bytes] = []
    sizes: list[int] = []
    for item in read_piece(piece):
        if isinstance(item, Empty):
            continue
        sha256, size = sha256_of(item.text)
        hashes.append(sha256)
        sizes.append(size)
        if characters:
            seen.update(item.text)
    records = np.zeros(len(hashes), RECORD)
    records["sha256"] = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
    records["bytes"] = sizes
    records["part"] = _fractions(records) < fraction
    return records, seen


def _fractions(records: Records) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = _words(records, 0) / 2.0**64
    return found


def _words(records: Records, byte: int) -> npt.NDArray[np.uint64]:
    """Eight bytes of every hash [records] as a number."""
    return records["sha256"][:, byte : byte + 8].copy().view(">u8")[:, 0].astype(np.uint64)


def _chunks(path: Path) -> Iterator[Records]:
    at = 0
    while len(chunk := read_records(path, at, _CHUNK)):
        yield chunk
        at += len(chunk)


def _mark_duplicates(path: Path) -> int:
    """Mark the second and later of equal texts (128 bits of their hashes); returns how many documents are left."""
    total = path.stat().st_size // RECORD.itemsize
    if not total:
        return 0
    records = np.memmap(path, RECORD, "r+")
    buckets = -(-total // _BUCKET)
    left = total
    for bucket in range(buckets):
        high, low, where = [], [], []
        at = 0
        for chunk in _chunks(path):
            first = _words(chunk, 0)
            mine = np.flatnonzero(first % np.uint64(buckets) == bucket)
            high.append(first[mine])
            low.append(_words(chunk, 8)[mine])
            where.append(mine + at)
            at += len(chunk)
        a, b, places = np.concatenate(high), np.concatenate(low), np.concatenate(where)
        order = np.lexsort((places, b, a))
        same = (a[order][1:] == a[order][:-1]) & (b[order][1:] == b[order][:-1])
        later = places[order[1:][same]]
        records["part"][later] = DUPLICATE
        left -= len(later)
    records.flush()
    return left


def _cut_records(found: Survey) -> None:
    """Replace the records of a corpus of one document by those of its two parts."""
    text = next(item for piece in found.pieces for item in _texts(piece))
    if len(text.text) < 2:
        raise InputError(f"{text.name}: one character of text cannot be split into training and validation")
    records = np.zeros(2, RECORD)
    for part, half in enumerate(cut(text.text, found.validation_fraction)):
        sha256, size = sha256_of(half)
        records[part] = (np.frombuffer(sha256, np.uint8), size, part)
    found.records.write_bytes(records.tobytes())


def _refuse_empty_split(found: Survey) -> None:
    """Both splits need a document; the message holds the fraction that just reaches the nearest one."""
    lowest, highest, count = math.inf, -math.inf, 0
    for chunk in found.chunks():
        fractions = _fractions(chunk[chunk["part"] != DUPLICATE])
        count += len(fractions)
        if len(fractions):
            lowest, highest = min(lowest, fractions.min()), max(highest, fractions.max())
    if found.validation_fraction <= lowest:
        split, remedy = "validation", f"at least {math.ceil(lowest * 1e4 + 1) / 1e4:.4f}"
    elif found.validation_fraction > highest:
        split, remedy = "train", f"at most {math.floor(highest * 1e4) / 1e4:.4f}"
    else:
        return
    raise InputError(
        f"data: of {count} documents none falls into {split} with validation_fraction "
        f"{found.validation_fraction:g}; set it to {remedy}, or add documents"
    )
