"""Tokens made elsewhere, read where they lie: nanoGPT's `train.bin` and `val.bin`, `.npy` shards.

A file whose name holds the word `val`, `valid`, `validation` or `dev` belongs to validation, one with `test` is left out,
the others are for training, in the order of their names. Without a file for validation the last `validation_fraction`
of the tokens is held out. `.bin` is raw little-endian uint16 where the vocabulary fits in it, else uint32. Every file is
read once through, for its fingerprint and for ids outside the vocabulary; the cache remembers that of a file as long as
its size and time of change stay.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from scantling.data.readers import File
from scantling.data.sources import TOKEN_SUFFIXES
from scantling.data.streams import Shard, TokenStream, open_npy, open_raw
from scantling.data.survey import Split
from scantling.data.tokens import token_dtype
from scantling.errors import InputError, RunError

_VALIDATION = re.compile(r"(?<![a-z])(val|valid|validation|dev)(?![a-z])")
_TEST = re.compile(r"(?<![a-z])test(?![a-z])")
_CHUNK = 2**24  # tokens looked at together


def is_ready(files: Sequence[File]) -> bool:
    """Whether these files hold tokens.

    Raises:
        InputError: only some of them do.
    """
    tokens = [file.path.suffix.lower() in TOKEN_SUFFIXES for file in files]
    if any(tokens) and not all(tokens):
        text = files[tokens.index(False)].path
        raise InputError(
            f"data.source: {files[tokens.index(True)].path} holds tokens and {text} text; keep them in sources of their own, "
            "and give each its part of a mixture"
        )
    return bool(tokens) and all(tokens)


def open_ready(
    files: Sequence[File],
    vocab_size: int,
    validation_fraction: float,
    remembered: Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]],
    progress: Callable[[int], None],
) -> tuple[str, dict[Split, TokenStream]]:
    """The fingerprint and the streams of token files.

    Args:
        files: in their order.
        vocab_size: every id lies below it.
        validation_fraction: share held out at the end when no file is for validation.
        remembered: what a function returned for a key, as long as the cache keeps it.
        progress: told the bytes of every file that is read.

    Raises:
        InputError: a file is no row of ids, or an id is outside the vocabulary.
    """
    shards: dict[Split, list[Shard]] = {"train": [], "validation": []}
    identity: list[list[str]] = []
    for file in files:
        if _TEST.search(file.path.stem.lower()):
            continue
        shard = _open(file, vocab_size)
        key = json.dumps([str(file.path.absolute()), file.size, file.mtime_ns])
        facts = remembered(key, lambda shard=shard: _facts(shard))  # type: ignore[misc]
        if not 0 <= facts["lowest"] <= facts["highest"] < vocab_size:
            raise InputError(_outside(shard, vocab_size))
        split: Split = "validation" if _VALIDATION.search(file.path.stem.lower()) else "train"
        shards[split].append(shard)
        identity.append([facts["sha256"], split])
        progress(file.size)
    total = {"files": identity, "format": 1, "vocab_size": vocab_size}
    if not shards["validation"]:
        total["validation_fraction"] = validation_fraction
        shards = _cut(shards["train"], validation_fraction)
    fingerprint = hashlib.sha256(json.dumps(total, sort_keys=True).encode()).hexdigest()
    return fingerprint, {split: TokenStream(found) for split, found in shards.items()}


def _open(file: File, vocab_size: int) -> Shard:
    try:
        return (
            open_npy(file.path) if file.path.suffix.lower() == ".npy" else open_raw(file.path, token_dtype(vocab_size))
        )
    except FileNotFoundError as error:
        raise RunError(
            f"{file.path}: vanished while it was read; put it back and run the same command again"
        ) from error
    except OSError as error:
        raise InputError(f"{file.path}: cannot be read: {error.strerror or error}") from error


def _facts(shard: Shard) -> dict[str, Any]:
    sha256, lowest, highest = hashlib.sha256(shard.ids.dtype.name.encode()), 0, 0
    for start in range(0, shard.ids.size, _CHUNK):
        chunk = np.ascontiguousarray(shard.ids[start : start + _CHUNK])
        sha256.update(chunk.data)
        lowest, highest = min(lowest, int(chunk.min())), max(highest, int(chunk.max()))
    return {"sha256": sha256.hexdigest(), "lowest": lowest, "highest": highest}


def _outside(shard: Shard, vocab_size: int) -> str:
    for start in range(0, shard.ids.size, _CHUNK):
        chunk = shard.ids[start : start + _CHUNK]
        bad = np.flatnonzero((chunk < 0) | (chunk >= vocab_size))
        if bad.size:
            at = int(bad[0])
            hint = (
                f" (read as {shard.ids.dtype.name}, as vocab_size asks)"
                if shard.path and shard.path.suffix == ".bin"
                else ""
            )
            return (
                f"{shard.path}: id {int(chunk[at])} at token {start + at} is outside the vocabulary of {vocab_size}{hint}; set "
                "data.tokenizer to the tokenizer of these ids, or its vocab_size to theirs"
            )
    return f"{shard.path}: changed while it was read; start again when the source is at rest"


def _cut(shards: Sequence[Shard], validation_fraction: float) -> dict[Split, list[Shard]]:
    """The last tokens held out."""
    total = sum(shard.ids.size for shard in shards)
    left = min(total - 1, max(1, round(total * (1 - validation_fraction)))) if total > 1 else total
    parts: dict[Split, list[Shard]] = {"train": [], "validation": []}
    for shard in shards:
        here = max(0, min(left, shard.ids.size))
        parts["train"].append(replace(shard, ids=shard.ids[:here]))
        parts["validation"].append(replace(shard, ids=shard.ids[here:]))
        left -= here
    return parts
