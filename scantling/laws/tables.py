"""Tables of runs: reading csv, tsv, jsonl and parquet with errors that name the line, and numeric columns out of them."""

import csv
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scantling.errors import InputError, suggest
from scantling.laws.forms import Floats
from scantling.laws.wandb import melted
from scantling.units import parse_count

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
NO_TABLES = {  # how files begin that are often mistaken for tables
    b"version https://git-lfs": "a Git LFS pointer instead of the table; fetch the file itself with git lfs pull",
    b"<!doctype html": "a web page instead of a table; download the raw file",
    b"<html": "a web page instead of a table; download the raw file",
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"pk\x03\x04": "a spreadsheet or zip archive; save the table as .csv",
}
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
_WITH_UNIT = re.compile(r"^\s*\d[\d_]*\.?\d*(?:[eE][+-]?\d+)?\s*(?:[KMBGTPkm]|[Kk]i|[Mm]i|[Gg]i)[A-Za-z]*\s*$")


def read_table(path: str | Path, separator: str | None = None) -> pd.DataFrame:
    """A table of runs from a .csv, .tsv or .jsonl file in UTF-8, or a .parquet file.

    The index holds the line each row came from, so that later messages can name it. Columns whose every entry is a
    number or empty become float64 (empty becomes NaN), and so do columns whose every entry has a unit, as 70M; the others
    stay as they are. A Weights & Biases chart export (Step, "run - metric", ...) becomes one row per run and step.

    Args:
        path: the file.
        separator: between entries; default a comma in .csv and a tab in .tsv.

    Raises:
        InputError: no such file, another kind of file, not UTF-8, empty, fewer than two rows, a row with too many or
            too few entries, a column named twice, or a line that is not a JSON object.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"{path}: expected a table ending in {', '.join(SUFFIXES)}, got {path.suffix or 'no ending'!r}"
        )
    if path.suffix.lower() == ".parquet":
        return _parquet(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the path of a table of runs") from None
    for start, what in NO_TABLES.items():
        if data[:40].lstrip().lower().startswith(start):
            raise InputError(f"{path}: {what}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text; save the table as UTF-8") from None
    if not text.strip():
        raise InputError(f"{path}: the file is empty; expected a header and one row per run")
    if path.suffix.lower() == ".jsonl":
        lines, rows = _json_rows(path, text)
    else:
        lines, rows = _delimited_rows(path, text, separator or ("," if path.suffix.lower() == ".csv" else "\t"))
        lines, rows = melted(lines, rows)
    if len(rows) < 2:
        raise InputError(f"{path}: expected at least two rows, got {len(rows)}; a law needs several runs")
    table = pd.DataFrame(rows, index=pd.Index(lines, name="line"))
    for name in table.columns:
        numbers = _as_numbers(table[name])
        if numbers is not None:
            table[name] = numbers
    return table


def _parquet(path: Path) -> pd.DataFrame:
    if not path.exists():
        raise InputError(f"{path}: cannot be read (no such file); give the path of a table of runs")
    try:
        table = pd.read_parquet(path)
    except ImportError:
        raise InputError(
            f"{path}: reading parquet needs pyarrow; install it (pip install pyarrow), or save the table as .csv"
        ) from None
    except Exception as error:
        raise InputError(f"{path}: not a parquet table ({error})") from None
    if len(table) < 2:
        raise InputError(f"{path}: expected at least two rows, got {len(table)}; a law needs several runs")
    table = table.reset_index(drop=True)
    table.columns = [str(name) for name in table.columns]
    return table


def numeric_column(table: pd.DataFrame, name: str, role: str) -> Floats:
    """A column as float64, empty entries NaN.

    Args:
        table: the table.
        name: column wanted.
        role: the argument that named it, for the message.

    Raises:
        InputError: the column is missing (with the nearest name) or holds text (with the lines).
    """
    require_columns(table, {role: name})
    values = []
    faults = []
    for where, value in zip(places(table), table[name], strict=True):
        number = _as_number(value)
        if number is None:
            faults.append(f"{where}, column {name!r}: expected a number, got {value!r}")
        values.append(np.nan if number is None else number)
    if faults:
        more = [f"... and {len(faults) - 5} more entries of column {name!r}"] if len(faults) > 5 else []
        raise InputError(*faults[:5], *more)
    return np.array(values, dtype=np.float64)


def text_column(table: pd.DataFrame, name: str, role: str) -> list[str]:
    """A column of names as text.

    Raises:
        InputError: the column is missing, or an entry is empty (with the lines).
    """
    require_columns(table, {role: name})
    missing = [place for place, value in zip(places(table), table[name], strict=True) if pd.isna(value) or value == ""]
    if missing:
        raise InputError(f"column {name!r} (argument {role}) is empty in {shorten(missing)}; give every row a name")
    return [str(value) for value in table[name]]


def require_columns(table: pd.DataFrame, wanted: dict[str, str]) -> None:
    """Refuses a table without the named columns; `wanted` maps the argument to the column it names."""
    columns = [str(name) for name in table.columns]
    faults = [
        f"column {name!r} (argument {role}) is not in the table{suggest(name, columns)}"
        for role, name in wanted.items()
        if name not in columns
    ]
    if faults:
        raise InputError(*faults)


def places(table: pd.DataFrame) -> list[str]:
    """How to call each row in a message: its line in the file, or its position counted from 1."""
    if table.index.name == "line":
        return [f"line {line}" for line in table.index]
    return [f"row {i + 1}" for i in range(len(table))]


def shorten(names: Iterable[str], most: int = 6) -> str:
    """`'line 3, line 5 and 12 more'`."""
    every = list(names)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


def _delimited_rows(path: Path, text: str, separator: str) -> tuple[list[int], list[dict[str, Any]]]:
    if len(separator) != 1:
        raise InputError(f"{path}: --separator: expected one character such as ';', got {separator!r}")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    lines: list[int] = []
    rows: list[dict[str, Any]] = []
    header: list[str] | None = None
    try:
        for entries in reader:
            if not any(entry.strip() for entry in entries):
                continue
            if header is None:
                header = [entry.strip() for entry in entries]
                other = next((mark for mark in (*SEPARATORS, ",") if mark in header[0]), None)
                if len(header) == 1 and other is not None and other != separator:
                    raise InputError(
                        f"{path}, line {reader.line_num}: the header is one column {header[0]!r}, it seems to be separated by "
                        f"{SEPARATORS.get(other, 'commas')}; give --separator {other!r}"
                    )
                twice = {name for name in header if header.count(name) > 1}
                if twice:
                    raise InputError(f"{path}, line {reader.line_num}: column {min(twice)!r} is named twice")
                continue
            if len(entries) != len(header):
                raise InputError(
                    f"{path}, line {reader.line_num}: expected {len(header)} entries, one per column of the header, "
                    f"got {len(entries)}"
                )
            lines.append(reader.line_num)
            rows.append(dict(zip(header, (entry.strip() for entry in entries), strict=True)))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not a delimited table ({error})") from None
    return lines, rows


def _json_rows(path: Path, text: str) -> tuple[list[int], list[dict[str, Any]]]:
    lines: list[int] = []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON ({error}); expected one object per line") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
        lines.append(number)
        rows.append(row)
    return lines, rows


def _as_numbers(column: "pd.Series[Any]") -> Floats | None:
    texts = [value for value in column if isinstance(value, str) and value.strip()]
    only_text = all(value is None or isinstance(value, str) for value in column)
    if texts and only_text and all(_WITH_UNIT.match(value) for value in texts):
        try:
            return np.array([parse_count(v) if v and v.strip() else np.nan for v in column], dtype=np.float64)
        except InputError:
            return None
    numbers = [_as_number(value) for value in column]
    return None if any(n is None for n in numbers) else np.array(numbers, dtype=np.float64)


def _as_number(value: Any) -> float | None:
    """The number an entry holds, NaN for an empty one, None for anything else."""
    if value is None or value is pd.NA or (isinstance(value, str) and not value.strip()):
        return float("nan")
    if isinstance(value, bool | np.bool_) or not isinstance(value, str | int | float | np.number):
        return None
    try:
        return float(value)
    except OverflowError:
        return float("inf")
    except ValueError:
        return None
