"""Laws as files: round trips, strictness, and the published ones."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from scantling.cli import main
from scantling.errors import InputError
from scantling.laws import LawFit, fit, fit_downstream, load_law, load_published, published_names
from tests.laws.ladders import MULTIPLIERS, SIZES, TRUE, grid
from tests.published.targets import kept_rows, table, value


@pytest.fixture(scope="module")
def law() -> LawFit:
    return fit(grid(TRUE, SIZES, MULTIPLIERS, noise=0.005), resamples=40)


def test_round_trip(law: LawFit, tmp_path: Path) -> None:
    path = tmp_path / "law.json"
    path.write_text(json.dumps(law.to_json()), encoding="utf-8")
    back = load_law(path)
    assert back.to_json() == law.to_json()
    assert back.predict(1e9, 2e10).low == law.predict(1e9, 2e10).low
    assert back.certificate == law.certificate
    assert back.holdouts == law.holdouts


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.update(parms={}), "unknown key 'parms'; did you mean 'params'"),
        (lambda p: p.pop("params"), "missing key 'params'"),
        (lambda p: p["params"].pop("E"), "params: missing key 'E'"),
        (lambda p: p["params"].update(alpha="steep"), "not a law as scantling writes it"),
        (lambda p: p["params"].update(alpha=-1.0), "alpha must be a positive finite number"),
        (lambda p: p["certificate"].update(luck=1), "certificate: unknown key 'luck'"),
        (lambda p: p.update(schema="scantling.law/0"), "expected schema 'scantling.law/1'"),
        (lambda p: p.update(law="chinchila"), "unknown law 'chinchila'; did you mean"),
        (lambda p: p.update(draws=[[1.0, 2.0]]), "not a law as scantling writes it"),
    ],
)
def test_damaged_files(law: LawFit, tmp_path: Path, change: Any, said: str) -> None:
    plain = copy.deepcopy(law.to_json())
    change(plain)
    path = tmp_path / "law.json"
    path.write_text(json.dumps(plain), encoding="utf-8")
    with pytest.raises(InputError, match=said) as caught:
        load_law(path)
    assert "law" in str(caught.value)


def test_files_that_are_not_laws(tmp_path: Path) -> None:
    path = tmp_path / "law.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="not JSON"):
        load_law(path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match="expected a JSON object, got list"):
        load_law(path)
    with pytest.raises(InputError, match="cannot be read"):
        load_law(tmp_path / "none.json")
    with pytest.raises(InputError, match="did you mean 'chinchilla-epoch'"):
        load_law("chinchila-epoch")


def test_intervals_and_predictions_are_ordered(law: LawFit) -> None:
    wide, narrow = law.predict(1e9, 2e10, level=0.95), law.predict(1e9, 2e10, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high
    many = law.predict(np.array([1e8, 1e9]), np.array([[2e9], [2e10], [2e11]]))
    assert many.value.shape == many.low.shape == many.high.shape == (3, 2)
    assert many.low[1, 1] == pytest.approx(float(wide.low))


@pytest.mark.parametrize(
    ("n", "d", "level", "said"),
    [(-1.0, 1e9, 0.95, "N: expected positive"), (1e9, np.nan, 0.95, "D: expected"), (1e9, 1e9, 95, "level: expected")],
)
def test_impossible_questions(law: LawFit, n: float, d: float, level: float, said: str) -> None:
    with pytest.raises(InputError, match=said):
        law.predict(n, d, level=level)


def test_every_published_law_loads_predicts_and_round_trips() -> None:
    assert len(published_names()) == 21
    for name in published_names():
        law = load_published(name)
        if {"N", "D"} == set(law.formula.columns):
            assert 1.7 < float(law.predict(70e9, 1.4e12).value) < 2.3, name
            assert {"N", "D", "C", "loss"} <= set(law.conventions)
        assert "arXiv" in law.source
        assert {"N", "loss"} <= set(law.conventions)
        assert LawFit.from_json(law.to_json()).to_json() == law.to_json()


def test_chinchilla_epoch_at_the_chinchilla_model() -> None:
    law = load_published("chinchilla-epoch")
    found = law.predict(70e9, 1.4e12)
    assert float(found.value) == pytest.approx(1.81686 + 482.00572 * 7e10**-0.34781 + 2085.4342 * 1.4e12**-0.36585)
    assert found.low is None
    assert any("no interval" in note for note in found.notes)
    assert any("times above the fitted range" in note for note in found.notes)
    assert law.intervals()["alpha"] == (0.317, 0.373)
    joint = load_published("chinchilla-epoch-huber").predict(70e9, 1.4e12)
    assert joint.low < found.value < joint.high


def test_head_laws_give_the_printed_curves() -> None:
    """arXiv 2503.09579, Appendix I: the two 470M rows agree to 0.008; at 20 heads 2.872 and 2.876. Figure 2 by E = 1.95."""
    own, common = (load_published(f"heads-470m-1k{end}") for end in ("", "-common"))
    heads = np.geomspace(2, 128, 40)
    apart = own.predict_at({"heads": heads}).value - common.predict_at({"heads": heads}).value
    assert np.abs(apart).max() < 0.0085
    assert [round(float(law.predict_at({"heads": 20}).value), 3) for law in (own, common)] == [2.872, 2.876]
    figure = load_published("gqa-figure-2")
    assert float(figure.predict_at({"N": 264241152}, {"heads": "8,8"}).value) == pytest.approx(2.7601, abs=0.006)
    with pytest.raises(InputError, match="fitted for 1,1, 2,1"):
        figure.predict_at({"N": 1e9}, {"heads": "3,1"})


def test_unknown_published_name() -> None:
    with pytest.raises(InputError, match="did you mean 'overtrain-c4'"):
        load_published("overtrain-c5")


def test_shipped_refits_are_what_the_data_give() -> None:
    fresh = fit(kept_rows(), resamples=0)
    shipped = load_published("chinchilla-epoch-huber")
    assert shipped.params == pytest.approx(fresh.params, rel=1e-6)
    assert shipped.fingerprint == fresh.fingerprint
    for train_set in ("c4", "redpajama", "refinedweb"):
        rows = table("overtrain").query("train_set == @train_set")
        small = rows[rows.in_loss_fit == 1]
        fresh = fit(small, loss="loss_c4_val", objective="ols_raw", tied=True, resamples=0)
        shipped = load_published(f"overtrain-{train_set}-refit")
        assert shipped.params == pytest.approx(fresh.params, rel=1e-5)
        for name, ends in fresh.ranges.items():
            assert shipped.ranges[name] == pytest.approx(ends), name
        used = rows[rows.in_error_fit == 1]
        for name in ("err_avg17", "err_avg46"):
            law = fit_downstream(used.loss_c4_val, used[name])
            assert vars(shipped.downstream[name]) == pytest.approx(vars(law), rel=1e-5)


@pytest.mark.parametrize("train_set", ["c4", "redpajama", "refinedweb"])
def test_printed_over_training_constants(train_set: str) -> None:
    wanted = value(f"overtrain/{train_set}/loss_law")
    law = load_published(f"overtrain-{train_set}")
    assert float(law.optimum(1e21).M.value) == pytest.approx(wanted["M_star"], rel=0.06)
    assert law.params["E"] == pytest.approx(wanted["E"], abs=0.006)
    assert any("below the fitted range" in note for note in law.optimum(1e17).notes)
    assert law.downstream["err_avg17"].epsilon == pytest.approx(
        value(f"overtrain/{train_set}/error_law/err_avg17")["epsilon"], abs=0.001
    )


def test_downstream_refusals() -> None:
    with pytest.raises(InputError, match="at least 3 points"):
        fit_downstream([3.0, 2.5], [0.7, 0.6])
    with pytest.raises(InputError, match="one length"):
        fit_downstream([3.0, 2.5, 2.2], [0.7, 0.6])
    with pytest.raises(InputError, match="finite"):
        fit_downstream([3.0, 2.5, np.nan], [0.7, 0.6, 0.5])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["chinchilla-epoch", "--params", "70e9", "--tokens", "1.4e12"], "loss 1.9734"),
        (["chinchilla-epoch-huber", "--compute", "5.76e23"], "tokens per parameter: 17.92"),
        (["heads-470m-1k", "--at", "heads=16"], "loss 2.8836"),
        (["gqa-figure-2", "--params", "1B", "--at", "heads=8,1"], "loss 2.6136"),
        (["overtrain-c4", "--params", "6.9B", "--tokens", "138B"], "err_avg17: 0.48"),
    ],
)
def test_predict_as_typed(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["predict", *words])
    assert end.value.code == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gqa-figure-2", "--params", "1B", "--at", "head=8,1"], "did you mean 'heads'"),
        (["gqa-figure-2", "--params", "1B"], "got nothing; give one of them"),
        (["heads-470m-1k", "--params", "1B"], "needs it; give a number"),
        (["chinchilla-epoch"], "needs --params and --tokens"),
    ],
)
def test_predict_refuses_in_words(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["predict", *words])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_fit_as_typed_then_predict_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way a person goes: a table, a law in groups, a prediction from its file, a page."""
    rows = pd.concat(
        [grid(TRUE, SIZES, MULTIPLIERS, noise=0.003, seed=s).assign(set=name) for s, name in ((0, "x"), (1, "y"))]
    )
    rows.rename(columns={"N": "n_params"}).to_csv(tmp_path / "runs.csv", index=False)
    out, page = tmp_path / "law.json", tmp_path / "page.html"
    equation = "E + A[set]*N^-alpha + B*D^-beta"
    for words in (
        [
            "fit",
            str(tmp_path / "runs.csv"),
            "--params",
            "n_params",
            "--law",
            equation,
            "--resamples",
            "50",
            "--out",
            str(out),
        ],
        ["predict", str(out), "--params", "1B", "--tokens", "20B", "--at", "set=y"],
        ["report", str(out), "--out", str(page)],
    ):
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
    printed = capsys.readouterr().out
    for text in ("A[x]", "A[y]", "95 % profile", "dearest 50% of the rows", "equal exponents", "loss 2."):
        assert text in printed
    html = page.read_text(encoding="utf-8")
    for text in (
        'id="fit-law"',
        'id="residuals-law"',
        "32 rows; lines are the law",
        "A[x]",
        "Sensitivity: law",
        "How sure: law",
        "Residuals: law",
        "dearest 10% of the rows",
    ):
        assert text in html
