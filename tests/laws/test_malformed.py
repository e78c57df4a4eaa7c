"""Tables that people really have: each wrong one ends with exit 2 and a sentence that says what to do."""

import gzip
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scantling.cli import main
from scantling.laws import clean, fit, read_table
from scantling.laws.cleaning import diverged
from scantling.record import RunRecord
from tests.laws.ladders import MULTIPLIERS, SIZES, TRUE, grid

GOOD = grid(TRUE, SIZES, MULTIPLIERS, noise=0.003).drop(columns="run")


def csv(table: pd.DataFrame, separator: str = ",") -> str:
    return str(table.to_csv(index=False, sep=separator))


def put(row: int, column: str, value: object) -> pd.DataFrame:
    table = GOOD.astype(object)
    table.loc[row, column] = value
    return table


def scaled(**factors: float) -> pd.DataFrame:
    return GOOD.assign(**{name: GOOD[name] * factor for name, factor in factors.items()})


MALFORMED: dict[str, tuple[str, str | bytes, tuple[str, ...], str]] = {
    "empty": ("t.csv", "", (), "the file is empty"),
    "header only": ("t.csv", "N,D,loss\n", (), "expected at least two rows, got 0"),
    "one row": ("t.csv", csv(GOOD[:1]), (), "expected at least two rows, got 1"),
    "two rows": ("t.csv", csv(GOOD[:2]), (), "expected at least 3 distinct"),
    "semicolons": ("t.csv", csv(GOOD, ";"), (), "separated by semicolons; give --separator ';'"),
    "tabs in csv": ("t.csv", csv(GOOD, "\t"), (), "separated by tabs"),
    "commas in tsv": ("t.tsv", csv(GOOD), (), "separated by commas; give --separator ','"),
    "decimal commas": ("t.csv", csv(GOOD.map(lambda x: f"{x:.6f}".replace(".", ",")), ";"), ("--separator", ";"),
                       "expected a number, got '10000000,000000'"),
    "two separators": ("t.csv", csv(GOOD), ("--separator", ";;"), "expected one character"),
    "no header": ("t.csv", csv(GOOD).split("\n", 1)[1], (), "column 'N' (argument params) is not in the table"),
    "other names": ("t.csv", csv(GOOD.rename(columns={"loss": "Loss"})), (), "did you mean 'Loss'"),
    "column twice": ("t.csv", "N,N,loss\n1e7,1e9,3\n2e7,1e9,3\n", (), "column 'N' is named twice"),
    "ragged": ("t.csv", csv(GOOD) + "1e9,2e10\n", (), "expected 3 entries, one per column of the header, got 2"),
    "text in numbers": ("t.csv", csv(put(3, "loss", "n/a")), (), "line 5, column 'loss': expected a number, got 'n/a'"),
    "mixed units in text": ("t.csv", csv(put(2, "N", "70M")), (), "expected a number, got '70M'"),
    "mixed units in numbers": ("t.csv", csv(put(2, "N", 70.0)), (), "mixed units"),
    "parameters in millions": ("t.csv", csv(scaled(N=1e-6)), (), "--unit N=M"),
    "tokens in billions": ("t.csv", csv(scaled(D=1e-9)), (), "is no count of tokens"),
    "unknown unit": ("t.csv", csv(GOOD), ("--unit", "N=furlong"), "unknown unit"),
    "unit of no column": ("t.csv", csv(GOOD), ("--unit", "size=M"), "no column 'size'"),
    "loss in bits": ("t.csv", csv(GOOD.rename(columns={"loss": "bits_per_byte"})), ("--loss", "bits_per_byte"),
                     "seems to hold bits"),
    "perplexity": ("t.csv", csv(GOOD.assign(loss=np.exp(GOOD.loss))), (), "more than any loss in nats per token"),
    "perplexity by name": ("t.csv", csv(GOOD.rename(columns={"loss": "val_ppl"})), ("--loss", "val_ppl"),
                           "seems to hold perplexity"),
    "all losses equal": ("t.csv", csv(GOOD.assign(loss=3.0)), (), "every loss is 3: nothing scales"),
    "all rows equal": ("t.csv", csv(pd.concat([GOOD[:1]] * 6)), (), "expected at least 3 distinct"),
    "all negative": ("t.csv", csv(scaled(loss=-1)), (), "no usable rows are left"),
    "all infinite": ("t.csv", csv(GOOD.assign(loss=math.inf)), (), "no usable rows are left"),
    "all empty": ("t.csv", csv(GOOD.assign(loss=math.nan)), (), "no usable rows are left"),
    "one size": ("t.csv", csv(GOOD[SIZES[0] == GOOD.N]), (), "distinct sizes N"),
    "one D/N": ("t.csv", csv(GOOD[GOOD.D == 20 * GOOD.N]), (), "distinct token multipliers"),
    "loss rises": ("t.csv", csv(GOOD.assign(loss=sorted(GOOD.loss))), (), "loss does not fall with size and tokens"),
    "all crashed": ("t.csv", csv(GOOD.assign(State="crashed")), (), "no run ended well"),
    "two precisions": ("t.csv", csv(GOOD.assign(precision=["float32", "bfloat16"] * 8)), (), "several precisions"),
    "not UTF-8": ("t.csv", b"N,D,loss\n\xff\xfe\n", (), "not UTF-8"),
    "a spreadsheet": ("t.xlsx", b"PK\x03\x04", (), "expected a table ending in"),
    "not parquet": ("t.parquet", b"PAR0", (), "parquet"),
    "broken JSON lines": ("t.jsonl", '{"N": 1}\n{"N": \n', (), "line 2: not JSON"),
    "a JSON list": ("t.jsonl", "[1]\n[2]\n", (), "expected a JSON object, got list"),
    "a Git LFS pointer": ("t.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", (), "git lfs pull"),
    "a web page": ("t.csv", "<!DOCTYPE html><html><body>404</body></html>\n<p>x</p>\n", (), "a web page instead of a table"),
    "gzip": ("t.csv", gzip.compress(csv(GOOD).encode()), (), "compressed with gzip; unpack it first"),
    "UTF-16": ("t.csv", csv(GOOD).encode("utf-16"), (), "not UTF-8 text"),
    "an open quote": ("t.csv", 'N,D,loss\n"1e7,2e8,3\n1e8,2e9,2.5\n', (), "expected 3 entries"),
    "a NUL in the header": ("t.csv", csv(GOOD).replace("N", "N\0", 1), (), "column 'N' (argument params) is not in the table"),
    "nothing but commas": ("t.csv", ",,\n,,\n,,\n", (), "expected at least two rows, got 0"),
    "a column without a name": ("t.csv", csv(GOOD.rename(columns={"loss": ""})), (), "column 'loss' (argument loss)"),
    "percent signs": ("t.csv", csv(GOOD.assign(loss=[f"{x:.2f}%" for x in GOOD.loss])), (), "expected a number, got"),
    "thousands separated": ("t.csv", csv(GOOD.assign(N=[f"{int(n):,}" for n in GOOD.N])), (), "got '10,000,000'"),
    "hexadecimal": ("t.csv", csv(GOOD.assign(N=[hex(int(n)) for n in GOOD.N])), (), "expected a number, got '0x"),
    "losses of nothing": ("t.csv", csv(scaled(loss=1e-8)), (), "less than any loss of language"),
    "lists in cells": ("t.jsonl", '{"N": [1e7], "D": {"x": 1}, "loss": 3}\n' * 5, (), "expected a number, got [10000000.0]"),
    "true for a number": ("t.jsonl", '{"N": true, "D": 1e9, "loss": 3}\n' * 5, (), "expected a number, got True"),
    "numbers beyond floats": ("t.jsonl", '{"N": 1e999, "D": 1e9, "loss": 3}\n' * 5, (), "no usable rows are left"),
    "brackets without end": ("t.jsonl", "[" * 100_000, (), "line 1: not JSON"),
    "other keys in each line": ("t.jsonl", '{"N": 1e7, "D": 1e9, "loss": 3}\n{"n": 1e7, "d": 1e9, "l": 3}\n', (),
                                "line 2 (nan)"),
    "W&B chart without values": ("t.csv", '"Step","a - loss","b - loss"\n1,,\n2,,\n', (), "expected at least two rows, got 0"),
    "W&B chart without sizes": ("t.csv", '"Step","a - loss","b - loss"\n1,3.0,2.9\n2,2.8,2.7\n', (),
                                "column 'N' (argument params) is not in the table; expected one of loss, run, step"),
    "W&B chart with a run twice": ("t.csv", '"Step","a - loss","a - loss"\n1,3.0,2.9\n2,2.8,2.7\n', (), "named twice"),
    "W&B runs all running": ("t.csv", '"Name","State","N","D","loss"\n' + '"r","running","1e7","2e8","3.9"\n' * 4, (),
                             "no run ended well, column 'State'"),
    "W&B config in a cell": ("t.csv", '"Name","config","loss"\n"a","{""N"": 1}","3"\n"b","{""N"": 2}","2.9"\n', (),
                             "expected one of Name, config, loss"),
    "wrong option value": ("t.csv", csv(GOOD), ("--bound", "alpha=0.5"), "expected name=low:high"),
    "unknown law": ("t.csv", csv(GOOD), ("--law", "chinchila"), "did you mean 'chinchilla'"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, content, options, said = MALFORMED[name]
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as end:
        main(["fit", str(path), "--resamples", "0", *options])
    printed = capsys.readouterr()
    assert end.value.code == 2, printed.err
    assert said in printed.err
    assert "Traceback" not in printed.err and "internal error" not in printed.err


def read(tmp_path: Path, text: str, name: str = "t.csv", **options: str) -> pd.DataFrame:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_table(tmp_path / name, **options)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    table = GOOD.assign(state="finished").astype(object)
    table.loc[4, "state"] = "crashed"
    table.loc[9, "loss"] = float(GOOD.loss[9]) * 1.6
    table = pd.concat([table, table[2:3]])
    rows, said = clean(read(tmp_path, csv(table)))
    assert len(rows) == 14
    assert said == (
        "left out, state is not 'finished': line 6 (crashed)",
        "left out, equal to an earlier row in every column: line 18",
        f"left out, diverged: the loss is 1.15 times that of a run with no more parameters and no more tokens: line 11 "
        f"({table.loc[9, 'loss']:.4g})",
    )  # fmt: skip
    assert fit(rows, resamples=0, checks=False, excluded=said).warnings[:3] == said


def test_nothing_is_left_out_of_the_published_tables() -> None:
    every = pd.read_csv(Path(__file__).parents[1] / "data" / "scaling" / "overtrain.csv")
    for _, rows in every.groupby("train_set"):
        kept, said = clean(rows, loss="loss_c4_val")
        assert len(kept) == len(rows) and said == ()


def test_diverged_against_every_pair() -> None:
    draw = np.random.default_rng(0)
    n, d = draw.choice([1.0, 2, 4, 8], 60), draw.choice([1.0, 3, 9], 60)
    loss = 3 * np.exp(0.1 * draw.standard_normal(60))
    wanted = [any(n[j] <= n[i] and d[j] <= d[i] and loss[i] >= 1.15 * loss[j] for j in range(60)) for i in range(60)]
    assert diverged(n, d, loss).tolist() == wanted
    assert 0 < sum(wanted) < 60


def test_units_give_the_same_law(tmp_path: Path) -> None:
    wanted = fit(GOOD, resamples=0, checks=False).params
    written = GOOD.assign(N=[f"{n / 1e6:.6f}M" for n in GOOD.N], D=[f"{d / 1e9:.9f} B" for d in GOOD.D])
    assert fit(read(tmp_path, csv(written)), resamples=0, checks=False).params == pytest.approx(wanted, rel=1e-4)
    small = scaled(N=1e-6, D=1e-9, loss=1 / math.log(2))
    rows, said = clean(small, units={"N": "M", "D": "B", "loss": "bits"})
    assert fit(rows, resamples=0, checks=False).params == pytest.approx(wanted, rel=1e-4)
    assert said == ("N was read in M", "D was read in B", "loss was read in bits")
    rows, _ = clean(GOOD.assign(loss=np.exp(GOOD.loss)), units={"loss": "perplexity"})
    assert fit(rows, resamples=0, checks=False).params == pytest.approx(wanted, rel=1e-4)


def test_other_separators_and_exports(tmp_path: Path) -> None:
    assert read(tmp_path, csv(GOOD, ";"), separator=";").loss.tolist() == pytest.approx(GOOD.loss.tolist())
    chart = (
        'Step,"small - loss","small - loss__MIN","small - loss__MAX","big - loss"\n1,3.0,2.9,3.1,2.5\n2,2.9,2.8,3.0,\n'
    )
    table = read(tmp_path, chart)
    assert table.to_dict("list") == {"run": ["small", "big", "small"], "step": [1.0, 1.0, 2.0], "loss": [3.0, 2.5, 2.9]}
    assert table.index.tolist() == [2, 2, 3]
    runs = '"Name","State","N","D","loss"\n"a","finished","1e7","2e8","3.9"\n"b","crashed","2e7","2e8","9.9"\n'
    rows, said = clean(read(tmp_path, runs))
    assert rows["Name"].tolist() == ["a"] and "line 3 (crashed)" in said[0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("half", "not a parquet table"), ("none", "not a parquet table"), ("lists", "expected a number, got array"),
        ("text", "expected a number, got 'a'"), ("nulls", "no usable rows are left"), ("no rows", "at least two rows, got 0"),
    ],
)  # fmt: skip
def test_broken_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "t.parquet"
    changed: dict[str, pd.DataFrame] = {
        "lists": GOOD.assign(N=[[1.0, 2.0]] * len(GOOD)), "text": GOOD.assign(N="a"), "nulls": GOOD.assign(D=np.nan),
        "no rows": GOOD[:0],
    }  # fmt: skip
    changed.get(name, GOOD).to_parquet(path)
    if name in ("half", "none"):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if name == "half" else b"")
    with pytest.raises(SystemExit) as end:
        main(["fit", str(path), "--resamples", "0"])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and said in printed and "internal error" not in printed


def test_broken_run_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, said in (
        (None, "no finished run"),
        ("{", "not a readable record"),
        ("[]", "record"),
        ("{}", "record"),
    ):
        run = tmp_path / "study" / "a"
        run.mkdir(parents=True, exist_ok=True)
        if content is not None:
            (run / "record.json").write_text(content, encoding="utf-8")
        with pytest.raises(SystemExit) as end:
            main(["fit", str(tmp_path / "study"), "--resamples", "0"])
        printed = capsys.readouterr().err
        assert end.value.code == 2 and said in printed and "internal error" not in printed, printed


def test_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    GOOD.to_parquet(tmp_path / "t.parquet")
    found = fit(read_table(tmp_path / "t.parquet"), resamples=0, checks=False)
    assert found.params == fit(GOOD, resamples=0, checks=False).params


def test_a_study_of_two_precisions_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, row in enumerate(GOOD.itertuples()):
        record = RunRecord(
            name=f"run{i}", status="done", run_hash=f"{i}", spec_hash="s", config={}, params={"total": int(row.N)},
            flops={"train": 6.0 * row.N * row.D}, tokens=int(row.D), steps=1, seed=0,
            final={"validation_loss": float(row.loss)}, data={}, performance={},
            environment={"precision": "bfloat16" if i % 5 == 0 else "float32"},
        )  # fmt: skip
        (tmp_path / f"run{i}").mkdir()
        record.write(tmp_path / f"run{i}")
    with pytest.raises(SystemExit) as end:
        main(["fit", str(tmp_path), "--resamples", "0"])
    assert end.value.code == 2
    assert "several precisions: bfloat16 (4), float32 (12)" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["fit", str(tmp_path), "--resamples", "0", "--only", "precision=float32"])
    assert end.value.code == 0
