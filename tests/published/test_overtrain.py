"""arXiv 2403.08540 end to end: loss laws from five small runs, error laws, and what they predict of large runs."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from scantling.laws import Chinchilla, Downstream, extrapolate, fit, fit_downstream, to_overtraining
from tests.published.targets import table, value

TRAIN_SETS = ("c4", "redpajama", "refinedweb")
AVERAGES = ("err_avg17", "err_avg46")


@cache
def runs(train_set: str) -> pd.DataFrame:
    every = table("overtrain")
    return every[every.train_set == train_set]


@cache
def loss_law(train_set: str, column: str = "loss_c4_val") -> Chinchilla:
    rows = runs(train_set)
    return fit(rows[rows.in_loss_fit == 1], loss=column, objective="ols_raw", tied=True, resamples=0).form


@cache
def error_law(train_set: str, column: str, rows: str = "in_error_fit") -> Downstream:
    used = runs(train_set)[runs(train_set)[rows] == 1]
    return fit_downstream(used.loss_c4_val, used[column])


def large_run(train_set: str, label: str) -> pd.Series:
    size, multiplier = (part.split("=")[1] for part in label.split())
    rows = runs(train_set)
    near = rows[(rows.M.round() == int(multiplier)) & (rows.N > 1.4e9) & ((rows.N > 6e9) == (size == "6.9B"))]
    assert len(near) == 1
    return near.iloc[0]


def miss(predicted: float, measured: float) -> float:
    """Relative error in percent."""
    return 100 * abs(float(predicted) - float(measured)) / float(measured)


def test_seventeen_tasks() -> None:
    tasks = table("overtrain_tasks")
    middle = table("overtrain").query("N == 153677376")
    assert len(middle) == 24
    best = {task: (1 - middle[f"err_{task}"]).max() for task in tasks.task}
    above = [best[t] - chance >= 0.10 for t, chance in zip(tasks.task, tasks.chance_accuracy, strict=True)]
    assert above == list(tasks.in_17 == 1)
    assert sum(above) == 17


@pytest.mark.parametrize("train_set", TRAIN_SETS)
def test_loss_law(train_set: str) -> None:
    law, wanted = loss_law(train_set), value(f"overtrain/{train_set}/loss_law")
    a, b, eta = to_overtraining(law)
    assert pytest.approx(wanted["E"], abs=0.005) == law.E
    assert (a, b) == pytest.approx((wanted["a"], wanted["b"]), rel=0.01)
    assert eta == pytest.approx(wanted["eta"], abs=5e-4)
    assert float(law.optimum(1e20).M) == pytest.approx(wanted["M_star"], abs=0.02)
    assert float(law.optimum(1e24).M) == pytest.approx(wanted["M_star"], abs=0.02)


@pytest.mark.parametrize("train_set", TRAIN_SETS)
def test_loss_extrapolation(train_set: str) -> None:
    for label, wanted in value(f"overtrain/{train_set}/loss_extrapolation").items():
        run = large_run(train_set, label)
        predicted = float(loss_law(train_set).loss(run.N, run.D))
        assert predicted == pytest.approx(wanted["predicted"], abs=5e-4)
        assert miss(predicted, run.loss_c4_val) == pytest.approx(wanted["rel_err_pct"], abs=0.02)


@pytest.mark.parametrize("train_set", TRAIN_SETS)
def test_mean_error_over_the_grid(train_set: str) -> None:
    rows = runs(train_set).query("M > 9.99")
    errors = 100 * np.abs(loss_law(train_set).loss(rows.N, rows.D) / rows.loss_c4_val - 1)
    wanted = value(f"overtrain/{train_set}/grid_error_M>=10")
    assert len(errors) == wanted["n"]
    assert (errors.mean(), errors.max()) == pytest.approx((wanted["mean_pct"], wanted["max_pct"]), abs=0.02)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("train_set", TRAIN_SETS)
def test_error_law(train_set: str, average: str) -> None:
    law, wanted = error_law(train_set, average), value(f"overtrain/{train_set}/error_law/{average}")
    assert law.epsilon == pytest.approx(wanted["epsilon"], abs=0.001)
    assert law.k == pytest.approx(wanted["k"], rel=0.01)
    assert law.gamma == pytest.approx(wanted["gamma"], abs=0.003)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("train_set", TRAIN_SETS)
def test_chained_error(train_set: str, average: str) -> None:
    for label, wanted in value(f"overtrain/{train_set}/chained_error/{average}").items():
        run = large_run(train_set, label)
        predicted = float(error_law(train_set, average).error(loss_law(train_set).loss(run.N, run.D)))
        assert miss(predicted, run[average]) == pytest.approx(wanted["rel_err_pct"], abs=0.02)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("train_set", TRAIN_SETS)
def test_chained_error_without_the_largest_fitted_run(train_set: str, average: str) -> None:
    run = large_run(train_set, "N=6.9B M=20")
    predicted = error_law(train_set, average, "in_loss_fit").error(loss_law(train_set).loss(run.N, run.D))
    wanted = value(f"overtrain/{train_set}/chained_error_without_1.4B/{average}")["rel_err_pct"]
    assert miss(float(predicted), run[average]) == pytest.approx(wanted, abs=0.05)


@pytest.mark.parametrize("train_set", TRAIN_SETS)
def test_single_tasks_are_not_predictable(train_set: str) -> None:
    run = large_run(train_set, "N=6.9B M=20")
    loss = loss_law(train_set).loss(run.N, run.D)
    for task, wanted in value(f"overtrain/{train_set}/individual_tasks_6.9B_rel_err_pct").items():
        predicted = float(error_law(train_set, f"err_{task}").error(loss))
        assert miss(predicted, run[f"err_{task}"]) == pytest.approx(wanted, abs=0.1), task


def test_fit_compute() -> None:
    rows, wanted = runs("redpajama"), value("overtrain/fit_compute")
    flops = 6.0 * rows.N.astype(float) * rows.D.astype(float)
    loss_flops, error_flops = flops[rows.in_loss_fit == 1].sum(), flops[rows.in_error_fit == 1].sum()
    long_run, big_run = (
        6.0 * float(run.N) * float(run.D)
        for run in (large_run("redpajama", "N=1.4B M=640"), large_run("redpajama", "N=6.9B M=20"))
    )
    found = {
        "loss_law_flops": loss_flops,
        "error_law_flops": error_flops,
        "ratio_1p4B_M640": long_run / loss_flops,
        "ratio_6p9B": big_run / loss_flops,
        "ratio_err_1p4B_M640": long_run / error_flops,
        "ratio_err_6p9B": big_run / error_flops,
    }
    assert found == pytest.approx(wanted, rel=0.005)


def test_ranking_of_the_large_models() -> None:
    predicted, measured = [], []
    for train_set in TRAIN_SETS:
        rows = runs(train_set).query("N > 1.4e9")
        predicted += list(error_law(train_set, "err_avg17").error(loss_law(train_set).loss(rows.N, rows.D)))
        measured += list(rows.err_avg17)
    wanted = value("overtrain/rank_correlation")
    assert len(measured) == wanted["n"]
    assert spearmanr(predicted, measured).statistic == pytest.approx(wanted["spearman"], abs=0.001)


def test_tied_exponents_extrapolate_better() -> None:
    wanted = value("overtrain/mean_extrapolation_error")
    found = {}
    for label, tied in (("tied_huber_M10_pct", True), ("free_huber_M10_pct", False)):
        errors: list[float] = []
        for train_set in TRAIN_SETS:
            rows = runs(train_set)
            law = fit(rows.query("N < 1e9 and M > 9.99"), loss="loss_c4_val", tied=tied, resamples=0).form
            large = rows.query("N > 1.4e9")
            errors += [miss(law.loss(run.N, run.D), run.loss_c4_val) for run in large.itertuples()]
        found[label] = float(np.mean(errors))
    default = [
        miss(loss_law(train_set).loss(run.N, run.D), run.loss_c4_val)
        for train_set in TRAIN_SETS
        for run in runs(train_set).query("N > 1.4e9").itertuples()
    ]
    found["default_5pt_lsq_pct"] = float(np.mean(default))
    assert found == pytest.approx(wanted, abs=0.05)


def test_other_validation_sets() -> None:
    for label, wanted in value("overtrain/other_validation_sets_max_rel_err_pct").items():
        train_set, column = label.split("->")
        rows = runs(train_set).query("M > 9.99")
        errors = 100 * np.abs(loss_law(train_set, column).loss(rows.N, rows.D) / rows[column] - 1)
        assert errors.max() == pytest.approx(wanted, abs=0.1), label


def test_the_extrapolation_rule_beside_the_papers_fits() -> None:
    """docs/fitting.md: the first, blind version (delta 0.01 throughout) missed; the second was chosen after that."""
    found: dict[str, list[float]] = {"rule": [], "first version": [], "paper": []}
    for train_set in TRAIN_SETS:
        rows = runs(train_set)
        small, large = rows.query("N < 1e9"), rows.query("N > 1.4e9")
        rule = extrapolate(small, loss="loss_c4_val", resamples=0, checks=False)
        assert (rule.n, rule.delta, rule.at_bound) == (len(small.query("M > 9.99")), 1e-3, ())
        first = fit(
            small.query("M > 9.99"), loss="loss_c4_val", tied=True, delta=1e-2, bounds={"alpha": (0.2, 0.5)},
            resamples=0, checks=False,
        )  # fmt: skip
        for name, law in (("rule", rule.form), ("first version", first.form), ("paper", loss_law(train_set))):
            found[name] += [miss(law.loss(run.N, run.D), run.loss_c4_val) for run in large.itertuples()]
    means = {name: float(np.mean(errors)) for name, errors in found.items()}
    assert means == pytest.approx({"rule": 0.929, "first version": 1.389, "paper": 1.15}, abs=0.01)
