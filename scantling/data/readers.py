"""Text in: the documents of a piece of a source, one in memory at a time.

| a file | holds |
|---|---|
| `.jsonl` | one document a line, under `text_key` |
| `.parquet`, or a data set of the `datasets` library | one document a row, in the column `text_key` |
| any other | one document, or, with `separator`, those between separators |

Text files and `.jsonl` may be compressed: `.zst`, `.gz`. Text is UTF-8 and is kept character by character (line ends
around a separator excepted). Character 0 ends a document, so no text may hold it. Nothing that is read is executed.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from scantling.data.corpus import HubSource
from scantling.errors import InputError, RunError, suggest

if TYPE_CHECKING:
    import datasets

COMPRESSED = (".zst", ".gz")

_BLOCK = 2**20
_ROWS = 1000  # documents read at once from Parquet and Arrow


@dataclass(frozen=True)
class File:
    """A file of a source as it was when it was found."""

    path: Path
    name: str
    optional: bool  # a file that is not text is skipped instead of refused
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Piece:
    """Some documents of a source that follow each other."""

    source: str
    files: tuple[File, ...]
    size: int  # bytes, about
    text_key: str
    separator: str | None = None
    hub: HubSource | None = None
    start: int = 0  # of the only file: first byte of a .jsonl, row group of a .parquet, row of a data set
    stop: int | None = None
    line: int = 1  # number of the first line or row


@dataclass(frozen=True)
class Empty:
    """A document without text, or an optional file that is not text."""

    name: str
    reason: str


@dataclass(frozen=True)
class Text:
    """A document. `name` is its path inside the source, with `:line` (or row) for one of several in a file."""

    name: str
    text: str = field(repr=False)


def read_piece(piece: Piece) -> Iterator[Text | Empty]:
    """The documents of a piece, in order.

    Raises:
        InputError: a file is gone, unreadable, damaged or not UTF-8, or holds a bad record; says where.
    """
    if piece.hub is not None:
        yield from _dataset_rows(piece)
        return
    for file in piece.files:
        try:
            for name, text in _texts(piece, file):
                yield Text(name, text) if text else Empty(name, "empty")
        except _NotTextError as error:
            if not file.optional:
                raise
            yield Empty(file.name, error.reason)
        except FileNotFoundError as error:
            raise RunError(
                f"{file.path}: vanished while it was read; start again when the source is at rest"
            ) from error
        except OSError as error:
            raise InputError(f"{file.path}: cannot be read: {error.strerror or error}") from error


def bare_name(name: str) -> str:
    """A file name in lower case without the ending that says that it is compressed."""
    name = name.lower()
    return next((name.removesuffix(end) for end in COMPRESSED if name.endswith(end)), name)


def _texts(piece: Piece, file: File) -> Iterator[tuple[str, str]]:
    bare = bare_name(file.name)
    if bare.endswith(".jsonl"):
        return _lines(piece, file)
    if bare.endswith(".parquet"):
        return _parquet_rows(piece, file)
    if piece.separator is not None:
        return _separated(file, piece.separator)
    return iter([(file.name, _decode(b"".join(_blocks(file.path)), file.path, 0))])


class _NotTextError(InputError):
    reason = ""


def _not_text(where: object, reason: str) -> _NotTextError:
    error = _NotTextError(f"{where}: {reason}")
    error.reason = reason
    return error


def _decode(raw: bytes, where: object, offset: int) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise _not_text(where, f"not UTF-8 at byte {at} (0x{raw[error.start]:02x}); convert it to UTF-8") from error
    if (zero := raw.find(0)) >= 0:
        raise _not_text(where, f"byte 0 at byte {offset + zero}; it marks the end of a document, remove it")
    return text


def _blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, decompressed."""
    ending = path.suffix.lower()
    if ending == ".zst":
        yield from _zst_blocks(path)
    elif ending == ".gz":
        try:
            with gzip.open(path, "rb") as stream:
                while block := stream.read(_BLOCK):
                    yield block
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise InputError(f"{path}: not a whole .gz file: {error}; copy it again") from error
    else:
        yield path.read_bytes()


def _zst_blocks(path: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise _missing(path, "zstandard", "data") from error
    frame: Any = None
    with path.open("rb") as stream:
        while rest := stream.read(_BLOCK):
            while rest:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(rest)
                except zstandard.ZstdError as error:
                    raise InputError(f"{path}: not a whole .zst file: {error}; copy it again") from error
                rest = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise InputError(f"{path}: not a whole .zst file: it ends in the middle of a frame; copy it again")


def _missing(where: object, package: str, extra: str) -> InputError:
    return InputError(f"{where}: needs the package {package}; install it with: pip install 'scantling[{extra}]'")


class _Blocks(io.RawIOBase):
    """Blocks of bytes as a stream."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self.blocks, self.rest = blocks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.rest:
            block = next(self.blocks, None)
            if block is None:
                return 0
            self.rest = block
        count = min(len(buffer), len(self.rest))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        return count


def _open(path: Path) -> BinaryIO | io.BufferedReader:
    if path.suffix.lower() in COMPRESSED:
        return io.BufferedReader(_Blocks(_blocks(path)), _BLOCK)
    return path.open("rb")


def _lines(piece: Piece, file: File) -> Iterator[tuple[str, str]]:
    offset = piece.start
    with _open(file.path) as stream:
        if offset:
            stream.seek(offset)
        for number, raw in enumerate(stream, piece.line):
            where = f"{file.path}:{number}"
            line = _decode(raw, where, offset).rstrip()
            offset += len(raw)
            if line:
                yield f"{file.name}:{number}", _record_text(line, where, piece.text_key)
            if piece.stop is not None and offset >= piece.stop:
                return


def _record_text(line: str, where: str, text_key: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON at column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not readable as JSON: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected an object with the key {text_key!r}, got {type(record).__name__}")
    if text_key not in record:
        raise InputError(f"{where}: no key {text_key!r}{suggest(text_key, record)}; data.text_key names the key")
    return _checked(record[text_key], where, f"under {text_key!r}")


def _checked(text: object, where: str, place: str) -> str:
    if not isinstance(text, str):
        raise InputError(f"{where}: expected a string {place}, got {type(text).__name__}")
    if "\0" in text:
        raise InputError(f"{where}: character 0 in the text; it marks the end of a document, remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: half a surrogate pair at character {error.start} of the text") from error
    return text


def _separated(file: File, separator: str) -> Iterator[tuple[str, str]]:
    """The texts between separators, without the line ends around them."""
    mark = separator.encode()
    number, offset, held = 1, 0, b""
    for block in _open_blocks(file.path):
        *whole, rest = (held + block).split(mark)
        for raw in whole:
            yield f"{file.name}:{number}", _decode(raw, file.path, offset).strip("\r\n")
            number, offset = number + 1, offset + len(raw) + len(mark)
        held = rest
    if text := _decode(held, file.path, offset).strip("\r\n"):
        yield f"{file.name}:{number}", text


def _open_blocks(path: Path) -> Iterator[bytes]:
    with _open(path) as stream:
        while block := stream.read(_BLOCK):
            yield block


def open_parquet(path: Path) -> Any:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise _missing(path, "pyarrow", "data") from error
    try:
        return parquet.ParquetFile(path)
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a whole .parquet file: {error}; copy it again") from error


def _parquet_rows(piece: Piece, file: File) -> Iterator[tuple[str, str]]:
    key = piece.text_key
    with open_parquet(file.path) as table:
        import pyarrow as pa

        columns = table.schema_arrow.names
        if key not in columns:
            raise InputError(f"{file.path}: no column {key!r}{suggest(key, columns)}; data.text_key names the column")
        groups = range(piece.start, table.num_row_groups if piece.stop is None else piece.stop)
        number = piece.line
        try:
            for batch in table.iter_batches(_ROWS, row_groups=groups, columns=[key], use_threads=False):
                for text in batch.column(0).to_pylist():
                    where = f"{file.path}:{number}"
                    yield f"{file.name}:{number}", _checked(text, where, f"in column {key!r}")
                    number += 1
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            raise InputError(f"{file.path}: damaged after row {number - 1}: {error}; copy it again") from error


def open_hub(piece: Piece) -> "datasets.Dataset":
    hub = piece.hub
    assert hub is not None
    where = f"data.source: {hub.path}"
    try:
        import datasets
    except ImportError as error:
        raise _missing(where, "datasets", "hf") from error
    try:
        if (Path(hub.path).expanduser() / "state.json").exists():
            found = datasets.load_from_disk(str(Path(hub.path).expanduser()))
        elif (Path(hub.path).expanduser() / "dataset_dict.json").exists():
            found = datasets.load_from_disk(str(Path(hub.path).expanduser()))[hub.split]
        else:
            found = datasets.loadopen_hub(hub.path, hub.name, split=hub.split, revision=hub.revision)
    except Exception as error:  # the library and what it uses raise nothing narrower
        raise InputError(f"{where}: cannot be loaded: {type(error).__name__}: {error}") from error
    if piece.text_key not in found.column_names:
        hint = suggest(piece.text_key, found.column_names)
        raise InputError(f"{where}: no column {piece.text_key!r}{hint}; data.text_key names the column")
    return found.select_columns([piece.text_key])


def _dataset_rows(piece: Piece) -> Iterator[Text | Empty]:
    rows, key = open_hub(piece), piece.text_key
    stop = len(rows) if piece.stop is None else piece.stop
    if stop > len(rows):
        raise RunError(f"{piece.source}: changed while it was read; start again when the source is at rest")
    for start in range(piece.start, stop, _ROWS):
        for number, value in enumerate(rows[start : min(start + _ROWS, stop)][key], start + 1):
            name = f"{Path(piece.source).name}:{number}"
            text = _checked(value, f"{piece.source}:{number}", f"in column {key!r}")
            yield Text(name, text) if text else Empty(name, "empty")
