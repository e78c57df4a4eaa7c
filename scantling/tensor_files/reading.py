"""Safetensors files as `Tensors`: headers read and checked at once, tensors when asked for.

Tensors are read into memory of their own, because a memory-mapped file would count as this process's memory.
"""

import io
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scantling.errors import InputError
from scantling.tensor_files.tensors import PIECE_BYTES, Rows, Shape, Tensors, as_bytes
from scantling.yamlio import show

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
AHEAD_BYTES = 2**22
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: bytes `start` to `end` of a file."""

    file: Path
    start: int
    end: int
    shape: Shape
    dtype: torch.dtype


@dataclass(frozen=True)
class _Files(Tensors):
    """Tensors in safetensors files."""

    source: Path
    places: Mapping[str, _Place]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.places)

    def _place(self, name: str) -> _Place:
        if name not in self.places:
            raise InputError(f"{self.source}: has no tensor {show(name)}")
        return self.places[name]

    def shape(self, name: str) -> Shape:
        return self._place(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._place(name).dtype

    def tensor(self, name: str) -> Tensor:
        place = self._place(name)
        tensor = torch.empty(place.shape, dtype=place.dtype)
        with open(place.file, "rb", buffering=0) as file:
            _fill(as_bytes(tensor), file, place.start, name)
        return tensor

    def rows(self, name: str) -> Rows:
        place = self._place(name)
        rest = place.shape[1:]
        row_bytes = math.prod(rest) * place.dtype.itemsize

        def read(start: int, end: int) -> Tensor:
            tensor = torch.empty((end - start, *rest), dtype=place.dtype)
            with open(place.file, "rb", buffering=0) as file:
                _fill(as_bytes(tensor), file, place.start + start * row_bytes, name)
            return tensor

        return read

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Through one small buffer: fresh memory for every tensor takes longer than reading it."""
        place = self._place(name)
        buffer = memoryview(bytearray(min(place.end - place.start, PIECE_BYTES)))
        with open(place.file, "rb", buffering=0) as file:
            for start in range(place.start, place.end, PIECE_BYTES):
                piece = buffer[: place.end - start]
                _fill(piece, file, start, name)
                yield piece


def _fill(buffer: memoryview, file: io.FileIO, start: int, name: str) -> None:
    """Read as many bytes as the buffer holds; the disk is asked for the next ones already."""
    with readable(Path(file.name)):
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), start + len(buffer), AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        while buffer and (count := os.preadv(file.fileno(), [buffer], start)):
            buffer, start = buffer[count:], start + count
    if buffer:
        raise InputError(f"{file.name}: {name}: the file ends {len(buffer):,} bytes early; it was cut short")


def open_tensors(path: Path) -> Tensors:
    """The tensors of a `.safetensors` file, or of a folder with `model.safetensors` or its shards and index.

    Headers are read and checked; tensors are read when asked for.

    Raises:
        InputError: nothing to read, a pickle (it could execute code), or a damaged or incomplete file; every fault found.
    """
    if path.is_file():
        _refuse_pickle(path)
        return _Files(path, _header(path))
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder; expected a .safetensors file or a folder with {SINGLE}")
    if (path / SINGLE).exists():
        return _Files(path, _header(path / SINGLE))
    if (path / INDEX).exists():
        return _Files(path, _sharded(path))
    found = sorted(file.name for file in path.iterdir())
    for name in found:
        _refuse_pickle(path / name)
    raise InputError(
        f"{path}: expected {SINGLE} or {INDEX}, got {', '.join(found[:8]) + (', ...' if found[8:] else '') or 'nothing'}"
    )


def _refuse_pickle(path: Path) -> None:
    if path.suffix in PICKLES:
        raise InputError(
            f"{path}: a pickle, which could execute code when read; expected safetensors: load it where you trust it and "
            "save it again with save_pretrained(..., safe_serialization=True)"
        )


def _sharded(folder: Path) -> dict[str, _Place]:
    index = folder / INDEX
    with readable(index):
        weight_map = read_json(index, index.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: expected a weight_map from tensors to files, got {show(weight_map)}")
    faults: list[str] = []
    headers: dict[str, dict[str, _Place]] = {}
    for name in dict.fromkeys(map(str, weight_map.values())):
        if Path(name).name != name or name in ("", ".", ".."):
            faults.append(f"{index}: expected file names, got {show(name)}")
        elif not (folder / name).is_file():
            tensors = [tensor for tensor, file in weight_map.items() if file == name]
            faults.append(
                f"{folder / name}: missing; the index places {len(tensors)} tensors in it, such as {tensors[0]}"
            )
        else:
            try:
                headers[name] = _header(folder / name)
            except InputError as error:
                faults.extend(error.faults)
    for tensor, name in weight_map.items():
        if name in headers and tensor not in headers[name]:
            faults.append(f"{folder / name}: {tensor}: missing; {INDEX} places it in this file")
    for name, header in headers.items():
        for tensor in header:
            if weight_map.get(tensor) != name:
                where = f"in {weight_map[tensor]} too" if tensor in weight_map else "not named by the index"
                faults.append(f"{folder / name}: {tensor}: {where}; expected every tensor once")
    if faults:
        raise InputError(*faults)
    return {tensor: headers[name][tensor] for tensor, name in weight_map.items()}


def _header(path: Path) -> dict[str, _Place]:
    """What a safetensors file says of its tensors, checked against its size; in order of their bytes."""
    with readable(path), open(path, "rb") as file:
        total = os.fstat(file.fileno()).st_size
        first = file.read(8)
        if len(first) < 8:
            raise InputError(f"{path}: expected a safetensors file, got {total} bytes")
        length: int = struct.unpack("<Q", first)[0]
        if length > min(total - 8, MAX_HEADER_BYTES):
            raise InputError(
                f"{path}: not a safetensors file, or cut short: its header claims {length:,} bytes of {total - 8:,}"
            )
        entries = read_json(path, file.read(length))
    entries.pop("__metadata__", None)
    faults: list[str] = []
    places: list[tuple[str, _Place]] = []
    for name, entry in entries.items():
        try:
            places.append((name, _entry(path, entry, 8 + length)))
        except ValueError as error:
            faults.append(f"{path}: {name}: {error}")
    if faults:
        raise InputError(*faults)
    places.sort(key=lambda item: (item[1].start, item[1].end))
    at = 8 + length
    for name, place in places:
        if place.start != at:
            raise InputError(
                f"{path}: {name}: expected its bytes to start at {at:,}, got {place.start:,}; not a whole file"
            )
        at = place.end
    if at != total:
        which = next((name for name, place in places if place.end > total), None)
        cut = f"{which}: " if which else ""
        what = "it was cut short" if total < at else "it has bytes of no tensor"
        raise InputError(f"{path}: {cut}expected a file of {at:,} bytes, got {total:,}; {what}")
    return dict(places)


def _entry(path: Path, entry: Any, origin: int) -> _Place:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"expected dtype, shape and data_offsets, got {show(entry)}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"expected a dtype of {', '.join(DTYPES)}, got {show(code)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"expected a list of whole numbers, got {show(numbers)}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != (size := math.prod(shape) * DTYPES[code].itemsize):
        raise ValueError(
            f"expected {size if len(offsets) == 2 else 2} bytes for {code} {shape}, got offsets {show(offsets)}"
        )
    return _Place(path, origin + offsets[0], origin + offsets[1], tuple(shape), DTYPES[code])


def read_json(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise InputError(f"{path}: {show(key)} is named twice; expected every tensor once")
            found[key] = value
        return found

    try:
        value = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: damaged: expected a JSON object, got {show(value)}")
    return value


@contextmanager
def readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
