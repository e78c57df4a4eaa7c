"""Tokens out: shards mapped into memory, read as one stream; rows of it by their places.

A shard is little-endian raw ids (`.bin`) or a one-dimensional `.npy` of uint16, uint32, int32 or int64. It is never
copied. A file that was cut short under a memory map would kill the process, so every shard is looked at before it is
read from: one that vanished or changed is an error in words.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scantling.errors import InputError, RunError

Ids = npt.NDArray[np.int64]
AnyIds = npt.NDArray[np.integer[Any]]

NPY_DTYPES = ("uint16", "uint32", "int32", "int64")


@dataclass(frozen=True, eq=False)
class Shard:
    """Some tokens [tokens] of a stream, and the file they lie in (None: they are in memory)."""

    ids: AnyIds
    path: Path | None = None
    size: int = 0
    mtime_ns: int = 0

    def check(self) -> None:
        """See that the file is still the one that was opened.

        Raises:
            RunError: it vanished or changed.
        """
        if self.path is None:
            return
        try:
            found = os.stat(self.path)
        except OSError as error:
            raise RunError(
                f"{self.path}: vanished while it was being trained on ({error.strerror}); put it back and run the same "
                "command again"
            ) from error
        if (found.st_size, found.st_mtime_ns) != (self.size, self.mtime_ns):
            raise RunError(
                f"{self.path}: changed while it was being trained on (expected {self.size} bytes, got {found.st_size}"
                f"{', written to since' if found.st_size == self.size else ''}); restore it and run the same command again"
            )


def open_raw(path: Path, dtype: npt.DTypeLike) -> Shard:
    """A file of raw ids.

    Raises:
        InputError: its size is no whole number of ids.
        OSError: it cannot be opened.
    """
    dtype = np.dtype(dtype).newbyteorder("<")
    found = path.stat()
    if found.st_size % dtype.itemsize:
        raise InputError(f"{path}: expected a whole number of {dtype.name} ids, got {found.st_size} bytes")
    ids = np.asarray(np.memmap(path, dtype, "r")) if found.st_size else np.zeros(0, dtype)
    return Shard(ids, path, found.st_size, found.st_mtime_ns)


def open_npy(path: Path) -> Shard:
    """A `.npy` file of ids; no pickle is ever loaded.

    Raises:
        InputError: not one row of whole numbers of a known type.
        OSError: it cannot be opened.
    """
    found = path.stat()
    expected = f"expected a one-dimensional .npy of {', '.join(NPY_DTYPES)}"
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: {expected}: {error}; name a file of raw uint16 ids .bin") from error
    if ids.ndim != 1 or ids.dtype.name not in NPY_DTYPES:
        raise InputError(f"{path}: {expected}, got {ids.dtype.name} of shape {ids.shape}")
    return Shard(np.asarray(ids), path, found.st_size, found.st_mtime_ns)


class TokenStream:
    """Shards one after the other."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shard for shard in shards if shard.ids.size)
        self.starts = np.cumsum([0, *(shard.ids.size for shard in self.shards)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> AnyIds:
        """Tokens [stop - start] of the stream."""
        found: list[AnyIds] = []
        for shard, first in zip(self.shards, self.starts[:-1].tolist(), strict=True):
            if start < first + shard.ids.size and stop > first:
                shard.check()
                found.append(shard.ids[max(0, start - first) : stop - first])
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def gather(self, places: Ids, length: int) -> AnyIds:
        """Rows [places, length] of tokens, each from its place on.

        Raises:
            RunError: a shard vanished or changed.
        """
        owner = np.searchsorted(self.starts, places, "right") - 1
        owners = sorted(set(owner.tolist()))
        if len(owners) == 1 and int(places.max()) + length <= self.starts[owners[0] + 1]:
            return self._windows(owners[0], places, length)
        rows = np.empty((len(places), length), np.int64)
        for number in owners:
            whole = (owner == number) & (places + length <= self.starts[number + 1])
            if whole.any():
                rows[whole] = self._windows(number, places[whole], length)
        for row in np.flatnonzero(places + length > self.starts[owner + 1]).tolist():
            rows[row] = self.read(int(places[row]), int(places[row]) + length)
        return rows

    def _windows(self, number: int, places: Ids, length: int) -> AnyIds:
        shard = self.shards[number]
        shard.check()
        rows: AnyIds = np.lib.stride_tricks.sliding_window_view(shard.ids, length)[places - self.starts[number]]
        return rows
