"""Text in: the documents of a corpus, in one fixed order, de-duplicated and split by what they say.

A source is `python-stdlib`, a text file (one document), a `.jsonl` file (one document per line) or a folder, searched
recursively for files ending in one of `TEXT_SUFFIXES`; names starting with a dot are left out. Files come in the order
of their relative path, sources in the order given.

Rules that hold for every source:

- Text is UTF-8 and is kept character by character. Character 0 ends a document, so no text may hold it.
- Of documents with the same text only the first is kept, and empty ones are left out; both are recorded as skipped.
- A document belongs to validation when the first 64 bits of the SHA-256 of its text, read as a fraction of 2**64, lie
  below `validation_fraction`: neither the order nor any other document has a say in it. A corpus of one single
  document (one text file) is instead cut in two at the end of a line, its last part being validation.

`python-stdlib` is the library of the interpreter that runs, so it differs between Python versions (the manifest lists
every file with its hash). Left out of it: what is not part of the library (site-packages), what differs from machine
to machine (build configuration) or is not installed everywhere (the tests, which also hold broken files on purpose),
and what is generated rather than written (`pydoc_data`, the character tables of `encodings`, near-copies of each other
that would leak from training into validation). Files that are not text by the rules above are skipped and recorded.
"""

import hashlib
import json
import math
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from scantling.errors import InputError, suggest
from scantling.tokens import TokenizerKind

PYTHON_STDLIB = "python-stdlib"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".py", ".jsonl")

Split = Literal["train", "validation"]

_STDLIB_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings", "__pycache__"}
)
_STDLIB_PREFIXES_LEFT_OUT = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataConfig(_Frozen):
    """What to train on. Relative paths start at the working directory."""

    source: str | tuple[str, ...] = Field(
        description="python-stdlib, or the path of a text file, a .jsonl file or a folder; or a list of these"
    )
    tokenizer: TokenizerKind = "bytes"
    validation_fraction: float = Field(default=0.05, gt=0, lt=1, description="expected share of documents held out")
    text_key: str = Field(default="text", description="key of the text in a .jsonl record")

    @field_validator("source")
    @classmethod
    def _names_something(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value or "" in (value if isinstance(value, tuple) else ()):
            raise ValueError("expected python-stdlib or a path, got nothing")
        return value

    @property
    def sources(self) -> tuple[str, ...]:
        """`source` as a tuple."""
        return (self.source,) if isinstance(self.source, str) else self.source


class DocumentEntry(_Frozen):
    """A document without its text.

    `name` is its path inside the source, with `:line` for a line of a `.jsonl` file; `bytes` its length in UTF-8.
    """

    name: str
    sha256: str
    bytes: int
    split: Split


class Skipped(_Frozen):
    """A text that is not in the corpus, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Document:
    """One text of the corpus."""

    entry: DocumentEntry
    text: str


@dataclass(frozen=True)
class _File:
    path: Path
    name: str
    optional: bool  # a file that is not text is skipped instead of refused


def read_corpus(config: DataConfig) -> Iterator[Document | Skipped]:
    """The documents of all sources, in their order; one in memory at a time.

    Raises:
        InputError: a source is missing, unreadable, empty, not UTF-8, or holds a bad record; says where. At the end,
            when no document fell into one of the splits.
    """
    seen: dict[str, str] = {}  # name by hash
    first: Document | None = None  # held back until a second one shows that it need not be cut
    for source in config.sources:
        has_text = False
        files = _stdlib_files() if source == PYTHON_STDLIB else _files(source)
        for item in _texts(files, config.text_key):
            if isinstance(item, Skipped):
                yield item
                continue
            has_text = True
            document = _document(*item, config.validation_fraction)
            entry = document.entry
            if entry.sha256 in seen:
                yield Skipped(name=entry.name, reason=f"same text as {seen[entry.sha256]}")
                continue
            seen[entry.sha256] = entry.name
            if len(seen) == 1:
                first = document
                continue
            if first is not None:
                yield first
                first = None
            yield document
        if not has_text:
            raise InputError(f"data.source: {source}: no text in it; every file or record is empty or was skipped")
    if first is not None:
        yield from _cut(first, config.validation_fraction)
    else:
        _refuse_empty_split(config.validation_fraction, [_fraction(sha256) for sha256 in seen])


def _fraction(sha256: str) -> float:
    return int(sha256[:16], 16) / 2**64


def _document(name: str, text: str, validation_fraction: float, split: Split | None = None) -> Document:
    raw = text.encode()
    sha256 = hashlib.sha256(raw).hexdigest()
    if split is None:
        split = "validation" if _fraction(sha256) < validation_fraction else "train"
    return Document(DocumentEntry(name=name, sha256=sha256, bytes=len(raw), split=split), text)


def _cut(document: Document, validation_fraction: float) -> Iterator[Document]:
    name, text = document.entry.name, document.text
    if len(text) < 2:
        raise InputError(f"{name}: one character of text cannot be split into training and validation")
    target = min(max(1, round(len(text) * (1 - validation_fraction))), len(text) - 1)
    earliest = max(0, target - (len(text) - target))  # no line end may more than double the validation part
    cut = text.rfind("\n", earliest, target) + 1 or target
    yield _document(f"{name} (train part)", text[:cut], validation_fraction, "train")
    yield _document(f"{name} (validation part)", text[cut:], validation_fraction, "validation")


def _refuse_empty_split(validation_fraction: float, fractions: Sequence[float]) -> None:
    """Both splits need a document; the message holds the fraction that just reaches the nearest one."""
    if validation_fraction <= min(fractions):
        split, remedy = "validation", f"at least {math.ceil(min(fractions) * 1e4 + 1) / 1e4:.4f}"
    elif validation_fraction > max(fractions):
        split, remedy = "train", f"at most {math.floor(max(fractions) * 1e4) / 1e4:.4f}"
    else:
        return
    raise InputError(
        f"data: of {len(fractions)} documents none falls into {split} with validation_fraction "
        f"{validation_fraction:g}; set it to {remedy}, or add documents"
    )


def _files(source: str) -> list[_File]:
    root = Path(source).expanduser()
    try:
        if root.is_file():
            return [_File(root, _printable(root.name), optional=False)]
        if not root.is_dir():
            what = "is neither a file nor a folder" if root.exists() else "does not exist"
            raise InputError(f"data.source: {root} {what}; expected {PYTHON_STDLIB}, a text file or a folder")
    except OSError as error:
        raise InputError(f"data.source: {root}: cannot be read: {error.strerror}") from error
    files = [
        _File(root / name, _printable(f"{root.resolve().name}/{name}"), optional=False)
        for name in _walk(root)
        if name.lower().endswith(TEXT_SUFFIXES) and not any(part.startswith(".") for part in name.split("/"))
    ]
    if not files:
        raise InputError(f"data.source: {root}: no file in it ends in {', '.join(TEXT_SUFFIXES)}")
    return files


def _stdlib_files() -> list[_File]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        _File(root / name, f"{PYTHON_STDLIB}/{name}", optional=True)
        for name in (_walk(root) if os.path.isdir(root) else [])
        if name.endswith(".py")
        and _STDLIB_LEFT_OUT.isdisjoint(parts := name.split("/"))
        and not any(part.startswith(_STDLIB_PREFIXES_LEFT_OUT) for part in parts)
    ]
    if not files:
        raise InputError(f"data.source: {PYTHON_STDLIB}: this Python keeps no .py files in {root}; name a path instead")
    return files


def _printable(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()  # file names need not be UTF-8


def _walk(root: Path) -> list[str]:
    """Paths of all files below a folder, relative to it, with `/`, sorted. Linked folders are not entered."""

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error

    return sorted(
        (Path(folder) / file).relative_to(root).as_posix()
        for folder, _, files in os.walk(root, onerror=fail)
        for file in files
    )


def _texts(files: Sequence[_File], text_key: str) -> Iterator[tuple[str, str] | Skipped]:
    """Name and text of every document that is not empty."""
    for file in files:
        try:
            jsonl = file.path.suffix.lower() == ".jsonl"
            for name, text in _records(file, text_key) if jsonl else [(file.name, _read(file.path))]:
                yield (name, text) if text else Skipped(name=name, reason="empty")
        except _NotTextError as error:
            if not file.optional:
                raise
            yield Skipped(name=file.name, reason=error.reason)
        except OSError as error:
            raise InputError(f"{file.path}: cannot be read: {error.strerror or error}") from error


class _NotTextError(InputError):
    def __init__(self, where: object, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{where}: {reason}")


def _read(path: Path) -> str:
    return _decode(path.read_bytes(), path, 0)


def _decode(raw: bytes, where: object, offset: int) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise _NotTextError(where, f"not UTF-8 at byte {at} (0x{raw[error.start]:02x}); convert it to UTF-8") from error
    if (zero := raw.find(0)) >= 0:
        raise _NotTextError(where, f"byte 0 at byte {offset + zero}; it marks the end of a document, remove it")
    return text


def _records(file: _File, text_key: str) -> Iterator[tuple[str, str]]:
    offset = 0
    with file.path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            where = f"{file.path}:{number}"
            line = _decode(raw, where, offset).rstrip()
            offset += len(raw)
            if line:
                yield f"{file.name}:{number}", _record_text(line, where, text_key)


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
    text = record[text_key]
    if not isinstance(text, str):
        raise InputError(f"{where}: expected a string under {text_key!r}, got {type(text).__name__}")
    if "\0" in text:
        raise InputError(f"{where}: character 0 in the text; it marks the end of a document, remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: half a surrogate pair at character {error.start} of the text") from error
    return text
