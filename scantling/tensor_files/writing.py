"""`Tensors` as a folder of safetensors shards: one tensor in memory at a time, checksummed, whole or not at all."""

import ctypes
import fcntl
import glob
import hashlib
import io
import json
import os
import shutil
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

import torch

from scantling.errors import InputError, RunError
from scantling.files import explained, sync_folder, write_json
from scantling.tensor_files.reading import CODES, INDEX, SINGLE, read_json, readable
from scantling.tensor_files.tensors import PIECE_BYTES, Tensors
from scantling.yamlio import show

CHECKSUMS = "checksums.json"
SHARD_BYTES = 5 * 10**9
BUFFERS = 4


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        sha256: of every file, by name, taken of the bytes on their way to the disk.
        tensors: how many.
        bytes: of all tensors.
    """

    sha256: dict[str, str]
    tensors: int
    bytes: int


def write_tensors(
    folder: Path, tensors: Tensors, max_shard_bytes: int = SHARD_BYTES, metadata: Mapping[str, str] | None = None
) -> Written:
    """A new folder with the shards of `tensors` and their `checksums.json`; one tensor in memory at a time.

    Args:
        folder: must not exist. It appears whole, or not at all.
        max_shard_bytes: a tensor larger than this has a file of its own.
        metadata: texts for the header of every file.

    Raises:
        InputError: the folder exists.
        RunError: the disk is full or not writable.
    """
    with new_folder(folder, needed(tensors)) as temporary:
        written = write_shards(temporary, tensors, max_shard_bytes, metadata)
        write_json(temporary / CHECKSUMS, {"sha256": written.sha256})
    return written


def needed(tensors: Tensors) -> int:
    """Bytes of all tensors."""
    return sum(map(tensors.size, tensors.names))


@contextmanager
def new_folder(target: Path, bytes_needed: int = 0) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends well, and is removed when it does not.

    What a killed process left of an earlier try is removed first.

    Raises:
        InputError: the target exists.
        RunError: the disk has no room for `bytes_needed`, fills up, or is not writable.
    """
    if target.exists() or target.is_symlink():
        raise InputError(f"{target}: exists already; choose another folder, or remove it first")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        free = shutil.disk_usage(target.parent).free
        if free < bytes_needed:
            raise RunError(
                f"{target}: needs {bytes_needed:,} bytes, the disk has {free:,} free; make room and run it again"
            )
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            with _locked(temporary):
                yield temporary
                sync_folder(temporary)
                os.rename(temporary, target)
            sync_folder(target.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    """Temporary folders of `target` whose writer lives no more: nobody holds their lock."""
    for folder in target.parent.glob(f".{glob.escape(target.name)}.[0-9]*.tmp"):
        with suppress(OSError), _locked(folder, required=True):
            shutil.rmtree(folder)


@contextmanager
def _locked(folder: Path, required: bool = False) -> Iterator[None]:
    """A folder locked as long as this process lives; where the file system has no locks, not, unless `required`.

    Raises:
        OSError: `required` and another process has it, or nobody can.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with nullcontext() if required else suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def write_shards(
    folder: Path, tensors: Tensors, max_shard_bytes: int | None = SHARD_BYTES, metadata: Mapping[str, str] | None = None
) -> Written:
    """As `write_tensors`, into a folder that exists, such as `new_folder`'s, and without `checksums.json`.

    Args:
        max_shard_bytes: None for one file of any size.

    Raises:
        OSError: it cannot be written; `new_folder` makes a sentence of it.
    """
    shards = _shards(tensors, max_shard_bytes)
    files = [f"model-{at:05d}-of-{len(shards):05d}.safetensors" for at in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else [SINGLE]
    sums: dict[str, str] = {}
    with _one_thread():
        for file, names in zip(files, shards, strict=True):
            sums[file] = _write_shard(folder / file, tensors, names, metadata or {})
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": needed(tensors)}, "weight_map": weight_map})
        sums[INDEX] = digest(folder / INDEX)
    return Written(sums, len(tensors.names), needed(tensors))


def _shards(tensors: Tensors, most: int | None) -> list[list[str]]:
    """Names by file, in order; wide dtypes first within a file, so that every tensor is aligned."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in tensors.names:
        size = tensors.size(name)
        if shards[-1] and most is not None and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return [sorted(names, key=lambda name: -tensors.dtype(name).itemsize) for names in shards]


def _write_shard(path: Path, tensors: Tensors, names: list[str], metadata: Mapping[str, str]) -> str:
    """One file, header first; its SHA-256."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    at = 0
    for name in names:
        end = at + tensors.size(name)
        code = CODES[tensors.dtype(name)]
        header[name] = {"dtype": code, "shape": list(tensors.shape(name)), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file, _Behind(file) as behind:
        behind.put(memoryview(struct.pack("<Q", len(text)) + text))
        for name in names:
            _put(tensors.pieces(name), behind)
            if tensors.size(name) > PIECE_BYTES:
                _give_back_memory()
        behind.finish()
        os.fsync(file.fileno())
    return behind.sha256.hexdigest()


def _put(pieces: Iterable[memoryview], behind: "_Behind") -> None:
    """A function of its own, so that no name outlives the tensor while the next is made."""
    for piece in pieces:
        behind.put(piece)


class _Behind:
    """Hashes and writes in threads of their own, through a few small buffers, while the next pieces are made.

    It writes past the page cache where the file system lets it: all of a file must reach the disk before it counts as written,
    and another copy of it in memory can take more time than everything else together.
    """

    def __init__(self, file: io.FileIO) -> None:
        self.sha256 = hashlib.sha256()
        self._file = file
        self._hashing, self._writing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._begun: deque[tuple[mmap, Future[None], Future[None]]] = deque()
        self._buffer, self._filled = mmap(-1, PIECE_BYTES), 0  # whole pages, as such writes need
        _set_direct(file, True)

    def __enter__(self) -> "_Behind":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in (self._hashing, self._writing):
            worker.shutdown(cancel_futures=True)

    def put(self, piece: memoryview) -> None:
        """A piece, copied.

        Raises:
            OSError: of an earlier piece.
        """
        while piece:
            part = piece[: PIECE_BYTES - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            piece = piece[len(part) :]
            if self._filled == PIECE_BYTES:
                self._begin()

    def finish(self) -> None:
        """Wait for all of it.

        Raises:
            OSError: it could not be written.
        """
        rest, size = self._buffer, self._filled
        while self._begun:
            self._ended()
        _set_direct(self._file, False)  # the rest is no whole page
        self.sha256.update(memoryview(rest)[:size])
        self._write(memoryview(rest)[:size])

    def _begin(self) -> None:
        """Hash and write the buffer that is full; go on with another."""
        full = memoryview(self._buffer)
        hashed, written = self._hashing.submit(self.sha256.update, full), self._writing.submit(self._write, full)
        self._begun.append((self._buffer, hashed, written))
        self._buffer = mmap(-1, PIECE_BYTES) if len(self._begun) < BUFFERS else self._ended()
        self._filled = 0

    def _ended(self) -> mmap:
        """The oldest buffer, once it is hashed and written."""
        buffer, hashed, written = self._begun.popleft()
        hashed.result()
        written.result()
        return buffer

    def _write(self, rest: memoryview) -> None:
        while rest:
            rest = rest[self._file.write(rest) :]


def _set_direct(file: io.FileIO, direct: bool) -> None:
    """Have writes go past the page cache, or not; nothing where it is not to be had."""
    if hasattr(os, "O_DIRECT"):
        flags = fcntl.fcntl(file, fcntl.F_GETFL) & ~os.O_DIRECT
        with suppress(OSError):
            fcntl.fcntl(file, fcntl.F_SETFL, flags | (os.O_DIRECT if direct else 0))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Operations on pieces are too small to be shared out, and one core has the hashing and writing to do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _give_back_memory() -> None:
    """Have glibc return freed memory: it keeps blocks of up to 32 MiB, and small objects in them hinder their reuse."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


# --- checksums ---------------------------------------------------------------------------------------------------------


def verify(folder: Path, listed: str = CHECKSUMS, only: str = "") -> dict[str, str]:
    """Read the files that a JSON file names under `sha256` and compare; the checksums by file.

    Args:
        listed: the JSON file.
        only: compare files with this in their names.

    Raises:
        InputError: no checksums, or files that are missing or altered; every fault found.
    """
    path = folder / listed
    with readable(path):
        sums = read_json(path, path.read_bytes()).get("sha256")
    if not isinstance(sums, dict):
        raise InputError(f"{path}: expected sha256 by file name, got {show(sums)}")
    sums = {name: sha256 for name, sha256 in sums.items() if only in name}
    check_files(folder, sums)
    return sums


def check_files(folder: Path, sums: Mapping[str, str]) -> None:
    """Read files of a folder and compare with their SHA-256.

    Raises:
        InputError: files that are missing or altered; every fault found.
    """
    faults: list[str] = []
    for name, expected in sums.items():
        path = folder / name
        if Path(name).name != name:
            faults.append(f"{folder}: expected checksums by file name, got {show(name)}")
        elif not path.is_file():
            faults.append(f"{path}: missing; the folder is incomplete")
        else:
            with readable(path):
                found = digest(path)
            if found != expected:
                faults.append(f"{path}: expected sha256 {str(expected)[:12]}, got {found[:12]}; altered or damaged")
    if faults:
        raise InputError(*faults)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
