"""Fits recover what made the data, do not depend on how it is written, and say what they do not know."""

import numpy as np
import pandas as pd
import pytest

from scantling.errors import InputError
from scantling.laws import fit
from tests.laws.ladders import MULTIPLIERS, SIZES, TIED, TRUE, grid


@pytest.mark.parametrize("objective", ["huber", "lad", "ols", "ols_raw"])
@pytest.mark.parametrize(("true", "tied"), [(TRUE, False), (TIED, True), (TIED, False)])
def test_exact_data_is_recovered(true, tied, objective) -> None:
    law = fit(grid(true, SIZES, MULTIPLIERS), objective=objective, tied=tied, resamples=0)
    for name, wanted in vars(true).items():
        assert law.params[name] == pytest.approx(wanted, rel=1e-4), name
    assert law.holdouts[0].are < 1e-6


def test_free_and_tied_hold_outs() -> None:
    law = fit(grid(TRUE, SIZES, MULTIPLIERS, noise=0.003), resamples=0)
    largest, longest = law.holdouts
    assert (largest.rule, largest.n_fit, largest.n_held) == ("largest sizes", 12, 4)
    assert (longest.rule, longest.n_fit, longest.n_held) == ("largest token multipliers", 12, 4)
    assert largest.are < 0.03 < largest.baseline_are
    assert abs(largest.bias) <= largest.are
    assert largest.compute_ratio == pytest.approx(6e8**2 * 320 / np.sum([n * n * 430 for n in SIZES[:3]]))


def test_intervals_cover_the_truth() -> None:
    """40 data sets, 90% intervals: between 31 and 40 should cover (99.5% of such counts do)."""
    covered = np.zeros(3, dtype=int)
    for seed in range(40):
        table = grid(TIED, SIZES, MULTIPLIERS, noise=0.004, seed=seed)
        law = fit(table, objective="ols", tied=True, resamples=200, checks=False)
        ends = law.intervals(0.9)
        ahead = law.predict(3e9, 6e10, level=0.9)
        covered += [
            ends["E"][0] <= TIED.E <= ends["E"][1],
            ends["alpha"][0] <= TIED.alpha <= ends["alpha"][1],
            ahead.low <= TIED.loss(3e9, 6e10) <= ahead.high,
        ]
    assert (covered >= 31).all(), covered


def test_few_runs_get_a_parametric_bootstrap_that_covers() -> None:
    covered = 0
    for seed in range(40):
        table = grid(TIED, SIZES, (20.0, 80.0), noise=0.003, seed=seed)
        law = fit(table, objective="ols", tied=True, resamples=200, checks=False)
        assert law.bootstrap.startswith("parametric")
        ahead = law.predict(1.2e9, 2.4e10, level=0.9)
        covered += bool(ahead.low <= TIED.loss(1.2e9, 2.4e10) <= ahead.high)
    assert covered >= 31


def test_row_order_does_not_matter() -> None:
    table = grid(TRUE, SIZES, MULTIPLIERS, noise=0.01)
    first = fit(table, resamples=50).to_json()
    assert fit(table.sample(frac=1, random_state=3), resamples=50).to_json() == first


def test_units_do_not_matter() -> None:
    table = grid(TRUE, SIZES, MULTIPLIERS, noise=0.01)
    law = fit(table, resamples=0)
    scaled = fit(table.assign(N=table.N / 1e6, D=table.D / 1e6), resamples=0)
    for name in ("E", "alpha", "beta", "A", "B"):
        exponent = {"A": law.params["alpha"], "B": law.params["beta"]}.get(name, 0.0)
        assert scaled.params[name] * 1e6**exponent == pytest.approx(law.params[name], rel=1e-6), name
    assert scaled.objective_value == pytest.approx(law.objective_value, rel=1e-9)


def test_fixed_parameters() -> None:
    table = grid(TRUE, SIZES, MULTIPLIERS, noise=0.005)
    law = fit(table, fixed={"E": 1.82}, resamples=60)
    assert law.params["E"] == 1.82
    assert law.intervals()["E"] is None
    assert law.params["alpha"] == pytest.approx(0.348, abs=0.05)
    assert list(law.correlations().columns) == ["log_A", "log_B", "alpha", "beta"]
    borrowed = fit(grid(TRUE, (1.5e8,), MULTIPLIERS), fixed={"A": TRUE.A, "alpha": TRUE.alpha}, resamples=0)
    assert borrowed.params["beta"] == pytest.approx(TRUE.beta, rel=1e-4)
    assert fit(table, fixed={"E": 0.0}, resamples=0).params["E"] == 0.0


def test_weights_act_like_repeated_rows() -> None:
    table = grid(TRUE, SIZES, MULTIPLIERS, noise=0.01).assign(weight=[1.0, 3.0] * 8)
    repeated = pd.concat([table, table[table.weight == 3], table[table.weight == 3]])
    weighted = fit(table, weights="weight", resamples=0)
    assert weighted.params == pytest.approx(fit(repeated, resamples=0).params, rel=1e-6)


def test_checkpoints_follow_their_run() -> None:
    """Copies of a row are not new evidence when the run is named."""
    table = grid(TRUE, SIZES, MULTIPLIERS, noise=0.01)
    tripled = pd.concat([table] * 3)
    named = fit(tripled, clusters="run", resamples=300)
    blind = fit(tripled, resamples=300)
    single = fit(table, resamples=300)
    widths = [law.intervals()["alpha"][1] - law.intervals()["alpha"][0] for law in (named, blind, single)]
    assert named.n == 48
    assert named.n_runs == 16
    assert widths[0] == pytest.approx(widths[2], rel=0.3)
    assert widths[1] < 0.8 * widths[0]


def test_one_bad_run_moves_huber_little() -> None:
    table = grid(TRUE, SIZES, MULTIPLIERS, noise=0.002)
    table.loc[5, "loss"] *= 1.4
    robust, squares = (fit(table, objective=o, resamples=0).params["alpha"] for o in ("huber", "ols"))
    assert abs(robust - TRUE.alpha) < 0.03 < abs(squares - TRUE.alpha)


def test_bad_rows_are_left_out_and_named() -> None:
    table = grid(TRUE, SIZES, MULTIPLIERS)
    table.loc[2, "loss"], table.loc[7, "N"], table.loc[9, "D"] = np.nan, -1.0, np.inf
    law = fit(table, resamples=0)
    assert law.n == 13
    assert [w for w in law.warnings if w.startswith("left out")] == [
        "left out, N is not a positive finite number: row 8 (-1)",
        "left out, D is not a positive finite number: row 10 (inf)",
        "left out, loss is not a positive finite number: row 3 (nan)",
    ]


def test_small_ladder_is_fitted_with_a_warning() -> None:
    law = fit(grid(TIED, SIZES, (20.0, 80.0), noise=0.001), tied=True, resamples=0)
    said = " ".join(law.warnings)
    assert "only 2 token multipliers" in said
    assert "equal exponents are assumed" in said
    assert "outside the sampled 20 to 80" in said
    assert law.params["alpha"] == law.params["beta"]


def test_missing_floor_is_noticed() -> None:
    table = grid(TRUE, SIZES, MULTIPLIERS)
    pure = table.assign(loss=482.0 * table.N**-0.2 + 900.0 * table.D**-0.25)
    rng = np.random.default_rng(1)
    law = fit(pure.assign(loss=pure.loss * np.exp(0.01 * rng.standard_normal(16))), resamples=0)
    assert any("not identified" in sentence for sentence in law.warnings)
    clear = fit(grid(TRUE, SIZES, MULTIPLIERS, noise=1e-4), resamples=0)
    assert not any("not identified" in sentence for sentence in clear.warnings)


def test_extrapolation_is_flagged() -> None:
    law = fit(grid(TRUE, SIZES, MULTIPLIERS, noise=0.002), resamples=50)
    assert law.predict(1e8, 2e9).notes == ()
    assert law.predict(6e9, 1.2e11).notes[0] == "N = 6e+09 is 10 times above the fitted range 1e+07 to 6e+08"
    assert any(note.startswith("M = 1 is 10 times below") for note in law.predict(1e9, 1e9).notes)
    best = law.optimum(1e24)
    assert any(note.startswith("the optimum: N") for note in best.notes)
    assert best.N.low < best.N.value < best.N.high


def test_data_without_scaling_is_refused() -> None:
    rng = np.random.default_rng(0)
    table = grid(TRUE, SIZES, MULTIPLIERS)
    with pytest.raises(InputError, match=r"does not fall|cannot separate"):
        fit(table.assign(loss=np.sort(table.loss) * np.exp(1e-3 * rng.standard_normal(16))), resamples=0)


@pytest.mark.parametrize(
    ("sizes", "multipliers", "options", "said"),
    [
        (SIZES[:2], MULTIPLIERS, {}, "at least 3 distinct sizes N.*got 2.*tied=True"),
        (SIZES, (20.0,), {}, "at least 3 distinct token multipliers D/N.*got 1"),
        (SIZES, (20.0,), {"tied": True}, "at least 2 distinct token multipliers"),
        (SIZES[:2], (20.0, 80.0), {"fixed": {"alpha": 0.3, "beta": 0.3}, "tied": True}, None),
        (SIZES[:1], MULTIPLIERS[:2], {"tied": True}, "at least 2 distinct sizes"),
    ],
)
def test_too_few_cells(sizes, multipliers, options, said) -> None:
    table = grid(TIED, sizes, multipliers)
    if said is None:
        assert fit(table, resamples=0, **options).params["E"] == pytest.approx(1.7, abs=0.5)
    else:
        with pytest.raises(InputError, match=said):
            fit(table, resamples=0, **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"law": "chinchila"}, "did you mean 'chinchilla'"),
        ({"objective": "hubr"}, "did you mean 'huber'"),
        ({"delta": 0.0}, "delta: expected a positive number"),
        ({"fixed": {"gamma": 1.0}}, "unknown parameter 'gamma'"),
        ({"fixed": {"E": -1.0}}, "E must be a finite number"),
        ({"fixed": {"alpha": 0.3, "beta": 0.4}, "tied": True}, "tied exponents cannot be"),
        ({"fixed": {"A": 1.0, "B": 1.0, "E": 1.0, "alpha": 0.3, "beta": 0.3}}, "every parameter is fixed"),
        ({"resamples": 1}, "resamples: expected 0 or at least 2"),
        ({"loss": "los"}, "column 'los' .argument loss. is not in the table; did you mean 'loss'"),
        ({"clusters": "seed"}, "column 'seed' .argument clusters."),
    ],
)
def test_wrong_arguments(options, said) -> None:
    with pytest.raises(InputError, match=said):
        fit(grid(TRUE, SIZES, MULTIPLIERS), **options)
