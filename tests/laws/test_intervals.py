"""Profiles, left-out runs, sensitivity, extrapolation and residuals: against brute force and exact cases."""

import numpy as np
import pytest
from scipy.stats import chi2

from scantling.laws import Chinchilla, LawFit, fit
from scantling.laws.bootstrap import case_counts
from scantling.laws.descent import Objective, refine
from scantling.laws.formula import parse_law
from scantling.laws.newton import minimise, nudge, resample
from scantling.laws.rows import usable_rows
from scantling.laws.solving import Problem, solve
from tests.laws.ladders import MULTIPLIERS, SIZES, TIED, TRUE, grid


@pytest.fixture(scope="module")
def law() -> LawFit:
    return fit(grid(TRUE, SIZES, MULTIPLIERS, noise=0.004), objective="ols", resamples=300)


def test_profile_is_the_refit_with_the_parameter_held(law: LawFit) -> None:
    table = grid(TRUE, SIZES, MULTIPLIERS, noise=0.004)
    scale = 2 * (16 - 5) / (2 * law.objective_value)
    for name in ("E", "alpha", "A"):
        values, statistic = law.profile_curves[name]
        for value, found in list(zip(values, statistic, strict=True))[::4]:
            if found > 30 or value <= 0:
                continue
            held = fit(table, objective="ols", fixed={name: value}, resamples=0, checks=False)
            assert scale * (held.objective_value - law.objective_value) == pytest.approx(found, rel=1e-4, abs=1e-6), (
                name
            )


def test_profile_interval_is_where_the_likelihood_ratio_crosses(law: LawFit) -> None:
    values, statistic = (np.array(x) for x in law.profile_curves["alpha"])
    low, high = law.profiles["alpha"]
    assert low < law.params["alpha"] < high
    inside = statistic <= chi2.ppf(0.95, 1)
    assert values[inside].min() >= low and values[inside].max() <= high


def test_profile_and_bootstrap_agree_about_gaussian_noise() -> None:
    table = grid(TIED, tuple(np.geomspace(1e7, 1e9, 8)), (10.0, 20.0, 40.0, 80.0, 160.0, 320.0), noise=0.003)
    found = fit(table, objective="ols", tied=True, resamples=600)
    for name, (low, high) in found.profiles.items():
        ends = found.intervals()[name]
        assert high - low == pytest.approx(ends[1] - ends[0], rel=0.3), name


def test_a_floor_that_runs_to_zero_is_a_bound() -> None:
    rows = grid(Chinchilla(A=30.0, B=40.0, E=0.3, alpha=0.12, beta=0.12), SIZES, MULTIPLIERS, noise=0.01)
    found = fit(rows, objective="ols", resamples=60)
    held = fit(rows, objective="ols", fixed={"E": 0.0}, resamples=0, checks=False)
    assert found.params["E"] == 0.0 and found.at_bound == ("E",)
    assert found.params == pytest.approx(held.params, rel=1e-6)
    assert found.intervals()["E"] is None and "E" not in found.profiles
    assert any("E runs to zero: it is not identified" in sentence for sentence in found.warnings)
    assert LawFit.from_json(found.to_json()).to_json() == found.to_json()


def test_left_out_runs_are_refits(law: LawFit) -> None:
    table = grid(TRUE, SIZES, MULTIPLIERS, noise=0.004)
    refits = [fit(table.drop(index=i), objective="ols", resamples=0, checks=False).params["alpha"] for i in table.index]
    assert law.left_out["alpha"] == pytest.approx((min(refits), max(refits)), rel=1e-4)


def test_sensitivity_lines_are_fits() -> None:
    table = grid(TRUE, SIZES, (2.0, *MULTIPLIERS), noise=0.004).assign(small=lambda t: 0.7 * t.N)
    found = fit(table, resamples=0, also={"non-embedding": "small"})
    lines = {line.change: line for line in found.sensitivity}
    assert lines["as fitted"].params == found.params
    other = {
        "least squares of log loss": fit(table, objective="ols", resamples=0, checks=False),
        "equal exponents": fit(table, tied=True, resamples=0, checks=False),
        "only D/N of 5 and more": fit(table[table.D >= 4.99 * table.N], resamples=0, checks=False),
        "N counted as non-embedding": fit(table, params="small", resamples=0, checks=False),
    }
    for name, wanted in other.items():
        assert lines[name].params == pytest.approx(wanted.params, rel=1e-4), name
    ahead = found.form.loss(6e8 * 10**0.5, 6e8 * 320 * 10**0.5)
    assert lines["as fitted"].ahead == pytest.approx(float(ahead))
    refused = [line for line in found.sensitivity if line.refused]
    assert all(line.ahead is None for line in refused)


def test_extrapolation_holds_out_the_dear_rows() -> None:
    table = grid(TRUE, (*SIZES, 2.4e9), MULTIPLIERS)
    found = fit(table, resamples=0)
    assert [item.n_held for item in found.extrapolation] == [10, 6, 2]
    for item in found.extrapolation:
        assert item.are < 1e-6 and item.reducible_are < 1e-5
        assert item.are < item.tied_are < item.baseline_are


def test_residuals_of_a_wrong_form_bend() -> None:
    table = grid(TIED, SIZES, MULTIPLIERS, noise=0.002, repeats=3)
    bent = table.assign(loss=table.loss * np.exp(-0.02 * (np.log(table.N / 8e7) / 2) ** 2))
    right, wrong = (fit(rows, tied=True, objective="ols", resamples=0) for rows in (table, bent))
    assert right.residuals is not None and wrong.residuals is not None
    assert max(abs(t) for t in right.residuals.curvature.values()) < 3.5
    assert any("residuals bend" in sentence for sentence in wrong.warnings)


def test_one_newton_step_is_a_resample_of_a_large_table() -> None:
    table = grid(TRUE, tuple(np.geomspace(1e7, 1e9, 40)), tuple(np.geomspace(10, 300, 50)), noise=0.01)
    rows, _ = usable_rows(table, {"N": "N", "D": "D"}, loss="loss")
    solved = solve(rows, Problem(parse_law("chinchilla"), Objective(np.inf), {}, {}, {}))
    counts = case_counts(rows.run, 60, np.random.default_rng(0))
    full = resample(solved.design, rows.loss, counts, Objective(np.inf), solved.minimum.theta)
    step = nudge(
        solved.design, rows.loss, counts - 1, Objective(np.inf), solved.minimum.theta, weights=rows.weight, inside=1.0
    )
    spread = full.std(0)
    assert (np.abs(step - full).max(0) < 0.35 * spread).all()
    assert step.std(0) == pytest.approx(spread, rel=0.1)


def test_large_tables_are_thinned_only_for_their_starts() -> None:
    table = grid(TRUE, tuple(np.geomspace(1e7, 1e9, 100)), tuple(np.geomspace(10, 300, 100)), noise=0.01)
    rows, _ = usable_rows(table, {"N": "N", "D": "D"}, loss="loss")
    solved = solve(rows, Problem(parse_law("chinchilla"), Objective(1e-3), {}, {}, {}))
    _, value = refine(
        solved.design, rows.loss, rows.weight, Objective(1e-3), solved.minimum.theta[None] + 0.01, steps=200
    )
    assert solved.minimum.value <= value[0] * (1 + 1e-9)
    assert solved.minimum.gradient < 1e-6


def test_basins_count_every_start() -> None:
    rows, _ = usable_rows(grid(TRUE, SIZES, MULTIPLIERS, noise=0.02), {"N": "N", "D": "D"}, loss="loss")
    solved = solve(rows, Problem(parse_law("chinchilla"), Objective(1e-3), {}, {}, {}))
    found = minimise(solved.design, rows.loss, rows.weight, Objective(1e-3))
    assert sum(count for _, count in found.basins) == found.starts
    levels = [level for level, _ in found.basins]
    assert levels == sorted(levels) and levels[0] == pytest.approx(found.value)
