"""What stands beside kaplan, isoflop and envelope: profiles, hold-outs, sensitivity, against brute force and known truths."""

import numpy as np
import pandas as pd
import pytest

from scantling.errors import InputError
from scantling.laws import LawFit, fit
from scantling.laws.formula import parse_law
from tests.laws.ladders import MULTIPLIERS, SIZES, TRUE
from tests.laws.test_formula import ladder_of_budgets

KAPLAN = {"Nc": 8.8e13, "Dc": 5.4e13, "alpha_N": 0.076, "alpha_D": 0.095}


def kaplan_rows(noise: float, seed: int = 0) -> pd.DataFrame:
    n, m = (x.ravel() for x in np.meshgrid((*SIZES, 2.4e9), MULTIPLIERS, indexing="ij"))
    exact = parse_law("kaplan").predict(KAPLAN, {"N": n, "D": n * m}, {})
    return pd.DataFrame(
        {"N": n, "D": n * m, "loss": exact * np.exp(noise * np.random.default_rng(seed).normal(size=len(n)))}
    )


def curves(noise: float = 0.0) -> pd.DataFrame:
    draw = np.random.default_rng(0)
    rows = [(i, n, n * m, float(TRUE.loss(n, n * m)) * np.exp(noise * draw.standard_normal()))
            for i, n in enumerate(np.geomspace(1e7, 3e9, 16)) for m in np.geomspace(1, 400, 60)]  # fmt: skip
    return pd.DataFrame(rows, columns=["run", "N", "D", "loss"])


@pytest.fixture(scope="module")
def kaplan() -> LawFit:
    return fit(kaplan_rows(0.004), law="kaplan", objective="ols", resamples=60, also={"all": "N"})


def test_kaplan_profile_is_the_refit_with_the_parameter_held(kaplan: LawFit) -> None:
    """Brute force: SciPy's minimiser over the other three logarithms."""
    from scipy.optimize import minimize

    rows = kaplan_rows(0.004)
    columns = {"N": rows.N.to_numpy(), "D": rows.D.to_numpy()}
    names, best = list(KAPLAN), np.log(list(kaplan.params.values()))

    def objective(x: np.ndarray) -> float:
        given = dict(zip(names, np.exp(x), strict=True))
        return float(np.sum((np.log(rows.loss) - np.log(parse_law("kaplan").predict(given, columns, {}))) ** 2) / 2)

    scale = 2 * (len(rows) - 4) / (2 * kaplan.objective_value)
    for i, name in enumerate(names):
        values, statistic = kaplan.profile_curves[name]
        for k in (4, 10):
            others = [j for j in range(4) if j != i]
            held = np.log(values[k])

            def restricted(y: np.ndarray, others: list[int] = others, i: int = i, held: float = held) -> float:
                x = np.empty(4)
                x[others], x[i] = best[others] + y, held
                return 1e6 * objective(x)

            found = min(
                minimize(restricted, start * np.ones(3), method="Nelder-Mead",
                         options={"xatol": 1e-9, "fatol": 1e-9, "maxiter": 8000, "maxfev": 8000}).fun
                for start in (0.0, 0.05)
            ) / 1e6  # fmt: skip
            wanted = scale * (found - kaplan.objective_value)
            assert statistic[k] <= wanted * 1.001 + 1e-4, name
            assert statistic[k] == pytest.approx(wanted, rel=0.05, abs=0.02), name


def test_kaplan_hold_outs_and_sensitivity_are_fits(kaplan: LawFit) -> None:
    table = kaplan_rows(0.004)
    lines = {line.change: line for line in kaplan.sensitivity}
    assert lines["as fitted"].params == pytest.approx(kaplan.params)
    assert lines["N counted as all"].params == pytest.approx(kaplan.params, rel=1e-4)
    cut = fit(table[SIZES[0] * 1.1 < table.N], law="kaplan", objective="ols", resamples=0, checks=False)
    assert lines["without the smallest size"].params == pytest.approx(cut.params, rel=1e-3)
    huber = fit(table, law="kaplan", delta=1e-2, resamples=0, checks=False)
    assert lines["Huber, delta 0.01"].params == pytest.approx(huber.params, rel=1e-3)
    held = {item.rule: item for item in (*kaplan.holdouts, *kaplan.extrapolation)}
    big = SIZES[-1] * 1.1 < table.N
    small = fit(table[~big], law="kaplan", objective="ols", resamples=0, checks=False)
    error = small.predict_at({"N": table.N[big], "D": table.D[big]}).value / table.loss[big] - 1
    assert held["largest sizes"].are == pytest.approx(float(np.abs(error).mean()), rel=0.01)
    assert held["largest sizes"].n_held == 4 and len(kaplan.extrapolation) == 3
    low, high = kaplan.left_out["alpha_N"]
    assert low < kaplan.params["alpha_N"] < high
    assert LawFit.from_json(kaplan.to_json()).to_json() == kaplan.to_json()


@pytest.mark.slow
def test_kaplan_profiles_hold_the_truth_about_as_often_as_they_say() -> None:
    inside = [
        low <= KAPLAN["alpha_N"] <= high
        for seed in range(12)
        for low, high in [fit(kaplan_rows(0.004, seed), law="kaplan", objective="ols", resamples=0).profiles["alpha_N"]]
    ]
    assert sum(inside) >= 9  # 95% intervals: fewer than 9 of 12 has probability 0.0002


def test_isoflop_predicts_the_dearest_budget() -> None:
    found = fit(ladder_of_budgets(TRUE, 0.0), law="isoflop", resamples=20)
    held = {item.rule: item for item in found.holdouts}
    dearest = held["best size of the dearest budget"]
    assert dearest.are < 0.02
    assert dearest.baseline_are > 0.4
    assert dearest.n_fit == 45 and dearest.n_held == 9
    lines = {line.change: line for line in found.sensitivity}
    top = 1e21
    assert lines["as fitted"].ahead == pytest.approx(float(TRUE.optimum(10 * top).N), rel=0.1)
    assert lines["as fitted"].optimum == pytest.approx(float(TRUE.optimum(top).M), rel=0.1)
    assert {"a cubic instead of a parabola", "only sizes within 3 times of the lowest loss"} <= set(lines)
    cubic, square = (abs(lines[name].ahead / float(TRUE.optimum(10 * top).N) - 1)
                     for name in ("a cubic instead of a parabola", "as fitted"))  # fmt: skip
    assert cubic < 0.05 and square < 0.1
    low, high = found.left_out["a"]
    assert low <= found.params["a"] <= high
    assert found.profiles == {}


def test_isoflop_says_what_it_cannot_hold_out_or_trust() -> None:
    table = ladder_of_budgets(TRUE, 0.0)
    three = table[6 * table.N * table.D < 2e19]
    found = fit(three, law="isoflop", resamples=20)
    assert any(
        "no hold-out of the best size of the dearest budget: 2 budgets with a minimum" in w for w in found.warnings
    )
    assert any(line.refused for line in found.sensitivity)
    budget = np.round(np.log(6 * table.N * table.D)).astype(int)
    shift = {code: 0.25 * (-1) ** i for i, code in enumerate(sorted(set(budget)))}
    moved = table.assign(N=table.N * np.exp([shift[b] for b in budget]))
    noisy = moved.assign(
        D=table.N * table.D / moved.N, loss=table.loss * np.exp(1e-4 * np.random.default_rng(0).normal(size=len(table)))
    )
    assert any(
        "as much about the line as noise in the losses explains" in w for w in fit(noisy, law="isoflop").warnings
    )


def test_envelope_predicts_its_dearest_decade() -> None:
    found = fit(curves(), law="envelope", clusters="run", resamples=20)
    assert [item.rule for item in found.holdouts] == [
        "best sizes of the dearest factor 3", "best sizes of the dearest decade",
    ]  # fmt: skip
    for item in found.holdouts:
        assert item.are < 0.2 < item.baseline_are
    lines = {line.change: line for line in found.sensitivity}
    assert lines["one point for each size, midway in its budgets"].params["a"] == pytest.approx(
        found.params["a"], abs=0.02
    )
    assert "without the largest size" in lines and found.left_out


def test_the_rows_of_a_drawing() -> None:
    found = fit(curves(0.01)[lambda t: t.D > 5 * t.N], resamples=0, checks=False)
    assert found.rows is not None
    assert found.rows.total == found.n > len(found.rows.measured) >= 400
    left = np.log(np.array(found.rows.measured) / np.array(found.rows.predicted))
    assert np.abs(left).max() > 3.2 * 0.01  # the largest residuals are kept
    plain = found.to_json()
    assert LawFit.from_json(plain).rows == found.rows
    plain["rows"]["measured"].pop()
    with pytest.raises(InputError, match="columns of one length"):
        LawFit.from_json(plain)
