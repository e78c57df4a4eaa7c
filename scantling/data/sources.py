"""The files of a source, and the pieces that workers read: they depend on the files alone.

A source is a file, a folder (searched recursively for names that end in one of `TEXT_SUFFIXES`, or, for tokens made
elsewhere, `TOKEN_SUFFIXES`; names starting with a dot are left out), a data set of the `datasets` library, or
`python-stdlib`. Files come in the order of their relative path, sources in the order given. A piece is neighbouring
small files, or a range of lines, row groups or rows of a large one.

`python-stdlib` is the library of the interpreter that runs, so it differs between Python versions. Left out of it: what
is not part of the library (site-packages), what differs from machine to machine (build configuration) or is not
installed everywhere (the tests, which also hold broken files on purpose), and what is generated rather than written
(`pydoc_data`, the character tables of `encodings`, near-copies of each other that would leak from training into
validation). Files that are not text are skipped and listed.
"""

import os
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from scantling.data.corpus import PYTHON_STDLIB, HubSource, Part
from scantling.data.readers import COMPRESSED, File, Piece, bare_name, open_hub, open_parquet
from scantling.errors import InputError

PIECE_BYTES = 2**24  # of a source; larger where there would be more than MOST_PIECES
MOST_PIECES = 4096
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".py", ".jsonl", ".parquet")
TOKEN_SUFFIXES = (".bin", ".npy")

_BLOCK = 2**20
_STDLIB_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "encodings", "__pycache__"}
)
_STDLIB_PREFIXES_LEFT_OUT = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")


def find_files(source: str | HubSource) -> tuple[File, ...]:
    """The files of a source in their order; of a data set on the hub none.

    Raises:
        InputError: it does not exist, cannot be read, or holds no file of a kind that is known.
    """
    if isinstance(source, HubSource):
        root = Path(source.path).expanduser()
        return tuple(_file(root / name, name) for name in _walk(root)) if root.is_dir() else ()
    if source == PYTHON_STDLIB:
        return _stdlib_files()
    root = Path(source).expanduser()
    try:
        if root.is_file():
            return (_file(root, root.name),)
        if not root.is_dir():
            here = "" if root.is_absolute() else f" in {Path.cwd()}"
            what = "is neither a file nor a folder" if root.exists() else f"does not exist{here}"
            raise InputError(f"data.source: {root} {what}; expected {PYTHON_STDLIB}, a text file or a folder")
    except OSError as error:
        raise InputError(f"data.source: {root}: cannot be read: {error.strerror}") from error
    endings = (*TEXT_SUFFIXES, *TOKEN_SUFFIXES)
    files = tuple(
        _file(root / name, f"{root.resolve().name}/{name}")
        for name in _walk(root)
        if bare_name(name).endswith(endings) and not any(part.startswith(".") for part in name.split("/"))
    )
    if not files:
        raise InputError(
            f"data.source: {root}: no file in it ends in {', '.join(endings)} (texts also compressed: .zst, .gz)"
        )
    return files


def _file(path: Path, name: str, optional: bool = False) -> File:
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    printable = name.encode(errors="backslashreplace").decode()  # file names need not be UTF-8
    return File(path, printable, optional, found.st_size, found.st_mtime_ns)


def _stdlib_files() -> tuple[File, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    files = tuple(
        _file(root / name, f"{PYTHON_STDLIB}/{name}", optional=True)
        for name in (_walk(root) if os.path.isdir(root) else [])
        if name.endswith(".py")
        and _STDLIB_LEFT_OUT.isdisjoint(parts := name.split("/"))
        and not any(part.startswith(_STDLIB_PREFIXES_LEFT_OUT) for part in parts)
    )
    if not files:
        raise InputError(f"data.source: {PYTHON_STDLIB}: this Python keeps no .py files in {root}; name a path instead")
    return files


def _walk(root: Path) -> list[str]:
    """Paths of all files below a folder, relative to it, with `/`, sorted. Linked folders are not entered."""

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error

    start = len(os.path.join(root, ""))
    return sorted(
        os.path.join(folder, file)[start:].replace(os.sep, "/")
        for folder, _, files in os.walk(root, onerror=fail)
        for file in files
    )


def pieces(part: Part, files: Sequence[tuple[str | HubSource, tuple[File, ...]]]) -> list[Piece]:
    """The sources of `part`, whose files are `files`, cut into pieces.

    Raises:
        InputError: a Parquet file or a data set cannot be opened; says which extra is missing when it is one.
    """
    size = max(PIECE_BYTES, sum(text_size(file) for _, found in files for file in found) // MOST_PIECES)
    key, separator = part.text_key or "text", part.separator
    cut: list[Piece] = []
    for source, found in files:
        if isinstance(source, HubSource):
            cut += _row_pieces(Piece(source.path, (), 0, key, hub=source), size)
            continue
        group: list[File] = []
        blank = Piece(source, (), 0, key, separator)
        held = 0
        for file in found:
            split = _SPLITTERS.get(file.path.suffix.lower()) if text_size(file) > size else None
            if group and (split or held + text_size(file) > size):
                cut.append(_whole(blank, group))
                group, held = [], 0
            if split:
                cut += _split(split, _whole(blank, [file]), size)
            else:
                group.append(file)
                held += text_size(file)
        if group:
            cut.append(_whole(blank, group))
    return cut


def _whole(blank: Piece, files: Sequence[File]) -> Piece:
    return replace(blank, files=tuple(files), size=sum(map(text_size, files)))


def text_size(file: File) -> int:
    """Bytes of text in a file, about: of a compressed one four times its size."""
    return file.size * (4 if file.path.suffix.lower() in (*COMPRESSED, ".parquet") else 1)


def _line_pieces(whole: Piece, size: int) -> list[Piece]:
    """A .jsonl file by ranges of whole lines, numbered by counting."""
    path, found = whole.files[0].path, []
    start = at = 0
    first = line = 1
    with path.open("rb") as stream:
        while block := stream.read(min(_BLOCK, size)):
            block += stream.readline()
            at += len(block)
            line += block.count(b"\n")
            if at - start >= size:
                found.append(replace(whole, start=start, stop=at, size=at - start, line=first))
                start, first = at, line
    if at > start:
        found.append(replace(whole, start=start, stop=at, size=at - start, line=first))
    return found


def _group_pieces(whole: Piece, size: int) -> list[Piece]:
    """A .parquet file by row groups."""
    with open_parquet(whole.files[0].path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        found, start, row, held = [], 0, 1, 0
        first = row
        for i, group in enumerate(groups):
            held += group.total_byte_size
            row += group.num_rows
            if held >= size or i == len(groups) - 1:
                found.append(replace(whole, start=start, stop=i + 1, size=held, line=first))
                start, first, held = i + 1, row, 0
    return found


def _row_pieces(whole: Piece, size: int) -> list[Piece]:
    """A data set by rows."""
    rows = open_hub(whole)
    total = int(rows.data.nbytes)
    step = max(1, len(rows) * size // max(1, total))
    size = total * step // max(1, len(rows))
    return [
        replace(whole, start=start, stop=min(start + step, len(rows)), size=size, line=start + 1)
        for start in range(0, len(rows), step)
    ]


_SPLITTERS: dict[str, Callable[[Piece, int], list[Piece]]] = {".jsonl": _line_pieces, ".parquet": _group_pieces}


def _split(split: Callable[[Piece, int], list[Piece]], whole: Piece, size: int) -> list[Piece]:
    try:
        return split(whole, size)
    except OSError as error:
        raise InputError(f"{whole.files[0].path}: cannot be read: {error.strerror or error}") from error
