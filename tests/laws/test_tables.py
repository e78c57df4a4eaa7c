"""Reading tables of runs: the good ones come out as numbers, each bad one gives a sentence with its place."""

from pathlib import Path

import numpy as np
import pytest

from scantling.errors import InputError
from scantling.laws import fit, read_table
from tests.laws.ladders import MULTIPLIERS, SIZES, TRUE, grid

HEADER = "N,D,loss\n"
GOOD = "1e7,1e9,4.0\n2e7,1e9,3.9\n"


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", "", "the file is empty"),
        ("t.csv", "\n \n", "the file is empty"),
        ("t.csv", HEADER, "at least two rows, got 0"),
        ("t.csv", HEADER + "1e7,1e9,4.0\n", "at least two rows, got 1"),
        ("t.csv", b"N,D,loss\n1e7,1e9,4.0\n\xff\xfe,1,2\n", "line 3: not UTF-8"),
        ("t.csv", HEADER + GOOD + "1,2\n", "line 4: expected 3 entries.*got 2"),
        ("t.csv", HEADER + GOOD + "1,2,3,4\n", "line 4: expected 3 entries.*got 4"),
        ("t.csv", "N,N,loss\n" + GOOD, "line 1: column 'N' is named twice"),
        ("t.xlsx", HEADER + GOOD, "ending in .csv, .tsv, .jsonl, .parquet, got '.xlsx'"),
        ("t.jsonl", '{"N": 1}\n{"N": 2\n', "line 2: not JSON"),
        ("t.jsonl", '{"N": 1}\n[1, 2]\n', "line 2: expected a JSON object, got list"),
        ("t.jsonl", '{"N": 1}\n', "at least two rows, got 1"),
    ],
)
def test_files_that_are_not_tables(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(InputError, match=said) as caught:
        read_table(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("N,D,Loss\n" + GOOD, "column 'loss' .argument loss. is not in the table; did you mean 'Loss'"),
        ("params,D,loss\n" + GOOD, "column 'N' .argument params. is not in the table; expected one of"),
        (HEADER + GOOD + "3e7,1e9,bad\n", "line 4, column 'loss': expected a number, got 'bad'"),
        (HEADER + GOOD + "70M,1e9,3.5\n", "line 4, column 'N': expected a number, got '70M'"),
        (HEADER + ",,\n1e7,,\n-1,2,3\n", "no usable rows"),
        (HEADER + GOOD, "at least 3 distinct sizes"),
    ],
)
def test_tables_that_cannot_be_fitted(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        fit(read_table(write(tmp_path, "t.csv", content)))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_table(tmp_path / "folder.csv")


def test_the_three_kinds_give_one_fit(tmp_path: Path) -> None:
    table = grid(TRUE, SIZES, MULTIPLIERS, noise=0.003)
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_csv(tmp_path / "t.tsv", index=False, sep="\t")
    table.to_json(tmp_path / "t.jsonl", orient="records", lines=True, double_precision=15)
    wanted = fit(table, resamples=0)
    for name in ("t.csv", "t.tsv", "t.jsonl"):
        found = fit(read_table(tmp_path / name), resamples=0)
        assert found.params == pytest.approx(wanted.params, rel=1e-6), name
    assert fit(read_table(tmp_path / "t.csv"), resamples=0).fingerprint == wanted.fingerprint


def test_lines_blanks_and_huge_integers(tmp_path: Path) -> None:
    content = "\ufeffN,D,loss,name\n1,2,3,a\n\n 4 , 100000000000000000000000 ,,b\n"
    table = read_table(write(tmp_path, "t.csv", content))
    assert list(table.index) == [2, 4]
    assert table.loc[4, "D"] == 1e23
    assert np.isnan(table.loc[4, "loss"])
    assert list(table["name"]) == ["a", "b"]


def test_excluded_rows_are_named_by_line(tmp_path: Path) -> None:
    table = grid(TRUE, SIZES, MULTIPLIERS)
    table.loc[3, "loss"] = np.nan
    table.to_csv(tmp_path / "t.csv", index=False)
    law = fit(read_table(tmp_path / "t.csv"), resamples=0)
    assert "left out, loss is not a positive finite number: line 5 (nan)" in law.warnings
