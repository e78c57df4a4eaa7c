"""Intervals of the law from loss to error: refits against SciPy, coverage, and the chain."""

import numpy as np
import pandas as pd
import pytest

from scantling.cli import main
from scantling.errors import InputError
from scantling.laws import Downstream, LawFit, fit, fit_downstream, load_published, with_errors
from scantling.laws.downstream import _refits, downstream_draws
from tests.laws.ladders import MULTIPLIERS, SIZES, TRUE, grid
from tests.published.targets import table

LAW = Downstream(epsilon=0.85, k=2.08, gamma=0.756)


def points(n: int, seed: int, noise: float = 0.004) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    loss = np.linspace(2.3, 4.5, n)
    return loss, LAW.error(loss) + noise * draw.standard_normal(n)


def test_refits_are_the_fit() -> None:
    loss, error = points(12, 0)
    weights = np.random.default_rng(1).integers(1, 4, (5, 12)).astype(float)
    for w, found in zip(weights, _refits(loss, error[None], weights), strict=True):
        wanted = fit_downstream(np.repeat(loss, w.astype(int)), np.repeat(error, w.astype(int)))
        assert tuple(found) == pytest.approx((wanted.epsilon, wanted.k, wanted.gamma), rel=1e-4)


@pytest.mark.parametrize("n", [6, 14])
def test_intervals_cover(n: int) -> None:
    """90% intervals of the error at a new loss over 120 repetitions, by noise (6 points) and by models drawn again (14)."""
    at, inside = 2.1, []
    for seed in range(120):
        loss, error = points(n, seed)
        draws = downstream_draws(fit_downstream(loss, error), loss, error, resamples=120)
        assert draws is not None
        low, high = np.quantile(draws[:, 0] - draws[:, 1] * np.exp(-draws[:, 2] * at), [0.05, 0.95])
        inside.append(low <= float(LAW.error(at)) <= high)
    assert 0.82 <= np.mean(inside) <= 0.98  # 85 to 95%, and 3 points for the few repetitions


def test_the_chain_is_wider_than_either_link() -> None:
    rows = grid(TRUE, SIZES, MULTIPLIERS, noise=0.004)
    rows = rows.assign(err=LAW.error(rows.loss) + 0.004 * np.random.default_rng(3).standard_normal(len(rows)))
    law = with_errors(fit(rows, objective="ols", resamples=300, checks=False), rows, "loss", ["err"])
    n, d = 3e9, 6e10
    chained, loss = law.predict_error("err", n, d), law.predict(n, d)
    own = law.error_at_loss("err", loss.value)
    through = law.downstream["err"].error(np.array([loss.low, loss.high]))
    width = float(chained.high - chained.low)
    assert width > float(own.high - own.low) and width > 0.95 * float(through[1] - through[0])
    assert width < float(own.high - own.low) + float(through[1] - through[0])
    assert chained.low < float(LAW.error(TRUE.loss(n, d))) < chained.high
    back = LawFit.from_json(law.to_json())
    assert back.predict_error("err", n, d).low == chained.low
    many = law.predict_error("err", np.array([1e9, 2e9]), 6e10)
    assert many.value.shape == many.low.shape == (2,)


def test_what_has_no_interval_says_so() -> None:
    published = load_published("overtrain-c4")
    found = published.predict_error("err_avg17", 6.9e9, 1.38e11)
    assert found.low is None and any("no interval" in note for note in found.notes)
    with pytest.raises(InputError, match="did you mean 'err_avg17'"):
        published.predict_error("err_avg71", 6.9e9, 1.38e11)
    three = grid(TRUE, SIZES[:3], MULTIPLIERS)
    rows = three.assign(err=np.where(np.arange(len(three)) < 3, LAW.error(three.loss), np.nan))
    law = with_errors(fit(rows, resamples=20, checks=False), rows, "loss", ["err"])
    assert "err" not in law.downstream_draws
    assert any("of the loss alone" in note for note in law.predict_error("err", 1e9, 2e10).notes)


def test_errors_that_are_no_errors() -> None:
    rows = grid(TRUE, SIZES, MULTIPLIERS)
    law = fit(rows, resamples=0, checks=False)
    with pytest.raises(InputError, match="shares between 0 and 1"):
        with_errors(law, rows.assign(err=47.0), "loss", ["err"])
    rising = with_errors(law, rows.assign(err=0.2 + 0.01 * (6 - rows.loss)), "loss", ["err"])
    assert any("does not fall with the loss" in warning for warning in rising.warnings)


def test_as_typed(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    rows = table("overtrain").query("train_set == 'redpajama'")
    pd.DataFrame(rows).to_csv(tmp_path / "runs.csv", index=False)
    out = tmp_path / "law.json"
    for words in (
        ["fit", str(tmp_path / "runs.csv"), "--loss", "loss_c4_val", "--error", "err_avg17", "--resamples", "60",
         "--out", str(out)],
        ["predict", str(out), "--params", "6.9B", "--tokens", "138B"], ["predict", str(out), "--at", "loss=2.4"],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main(words)
        assert end.value.code == 0
    printed = capsys.readouterr().out
    assert printed.count("err_avg17: 0.4") == 2 and " to 0.4" in printed
    assert "times above the fitted range" not in printed
