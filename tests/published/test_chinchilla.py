"""The Chinchilla data refitted: optima of every objective, the bootstrap, and why the printed constants are off."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import huber

from scantling.laws import Chinchilla, LawFit, fit
from tests.published.targets import kept_rows, table, targets, value


def check_params(law: LawFit, name: str) -> None:
    target = targets()[name]
    for parameter in ("A", "B", "E", "alpha", "beta"):
        wanted = target["value"][parameter]
        relative, absolute = (target["tolerance"].get(f"{parameter}_{kind}", 0.0) for kind in ("rel", "abs"))
        assert law.params[parameter] == pytest.approx(wanted, rel=relative, abs=absolute), parameter


@pytest.fixture(scope="module")
def bootstrapped() -> LawFit:
    return fit(kept_rows(), resamples=4000, seed=0)


def mean_huber(theta: np.ndarray) -> float:
    rows = kept_rows()
    a, b, e, alpha, beta = theta
    prediction = np.exp(a - alpha * np.log(rows.N)) + np.exp(b - beta * np.log(rows.D)) + np.exp(e)
    return float(np.mean(huber(1e-3, np.log(rows.loss) - np.log(prediction))))


def test_rows() -> None:
    every = table("chinchilla_epoch")
    fifth = every.loss.nlargest(5).min()
    assert {"total": len(every), "kept": int(every.kept.sum())} == value("chinchilla/rows")
    assert ((every.loss < fifth) == (every.kept == 1)).all()
    np.testing.assert_allclose(every.D, every.C / (6 * every.N), rtol=1e-6)


def test_huber_optimum(bootstrapped: LawFit) -> None:
    assert bootstrapped.objective_value == pytest.approx(value("chinchilla/huber1e-3/objective"), rel=1e-7)
    assert bootstrapped.objective_value <= 0.00101827405  # what the 4500-start grid is allowed
    check_params(bootstrapped, "chinchilla/huber1e-3/params")
    certificate = bootstrapped.certificate
    assert certificate is not None
    assert certificate.agreeing == certificate.starts == 6
    assert certificate.gradient < 1e-8


def test_published_constants_are_least_absolute_deviations() -> None:
    law = fit(kept_rows(), objective="lad", resamples=0)
    check_params(law, "chinchilla/published_replication/params")
    assert law.objective_value == pytest.approx(value("chinchilla/lad/objective"), rel=1e-7)


def test_least_squares() -> None:
    law = fit(kept_rows(), objective="ols", resamples=0)
    check_params(law, "chinchilla/ols_log/params")
    assert law.objective_value == pytest.approx(value("chinchilla/ols_log/params")["half_sum_sq"], rel=1e-6)


def test_without_exclusion() -> None:
    law = fit(table("chinchilla_epoch"), resamples=0)
    check_params(law, "chinchilla/huber1e-3/all245")
    assert law.objective_value == pytest.approx(value("chinchilla/huber1e-3/all245")["objective"], rel=1e-6)


@pytest.mark.parametrize(
    ("which", "constants"),
    [
        ("unrounded", (np.exp(6.0073404), np.exp(6.0179186), np.exp(0.5267228), 0.33917084, 0.2849083)),
        ("rounded", (406.4, 410.7, 1.69, 0.34, 0.28)),
    ],
)
def test_objective_at_the_printed_constants(which: str, constants: tuple[float, ...]) -> None:
    rows = kept_rows()
    law = Chinchilla(*map(float, constants))
    found = float(np.sum(huber(1e-3, np.log(rows.loss) - np.log(law.loss(rows.N, rows.D)))))
    assert found == pytest.approx(value("chinchilla/huber_objective_at_hoffmann")[which], abs=2e-6)


def test_a_library_minimiser_stops_at_the_printed_constants() -> None:
    stopped = minimize(mean_huber, [6.0073404, 6.0179186, 0.5267228, 0.33917084, 0.2849083], method="L-BFGS-B")
    a, b, e, alpha, beta = stopped.x
    wanted = value("forms/hoffmann_premature_stop")
    found = {"A": np.exp(a), "B": np.exp(b), "E": np.exp(e), "alpha": alpha, "beta": beta}
    for name, number in wanted.items():
        assert found[name] == pytest.approx(number, rel=2e-3), name
    assert len(kept_rows()) * stopped.fun > 1.1 * value("chinchilla/huber1e-3/objective")


def test_bootstrap_intervals(bootstrapped: LawFit) -> None:
    tolerance = targets()["chinchilla/bootstrap4000/ci95"]["tolerance"]
    found = bootstrapped.intervals(0.95)
    for name, ends in value("chinchilla/bootstrap4000/ci95").items():
        relative, absolute = tolerance.get(f"{name}_rel", 0.0), tolerance.get(f"{name}_abs", 0.0)
        assert found[name] == pytest.approx(tuple(ends), rel=relative, abs=absolute), name


def test_bootstrap_standard_errors(bootstrapped: LawFit) -> None:
    assert bootstrapped.draws is not None
    found = dict(zip(bootstrapped.params, bootstrapped.draws.std(0), strict=True))
    alpha, beta = bootstrapped.draws[:, 3], bootstrapped.draws[:, 4]
    found["a"] = np.std(beta / (alpha + beta))
    for name, wanted in value("chinchilla/bootstrap4000/se").items():
        assert found[name] == pytest.approx(wanted, rel=0.08), name


def test_first_resample() -> None:
    drawn = np.random.RandomState(42).choice(list(range(240)), size=240, replace=True)
    law = fit(kept_rows().iloc[drawn], resamples=0)
    for name, wanted in value("chinchilla/bootstrap4000/first_resample").items():
        assert law.params[name] == pytest.approx(wanted, rel=5e-4), name


def test_parameter_correlations(bootstrapped: LawFit) -> None:
    found = bootstrapped.correlations()
    assert found is not None
    for pair, wanted in value("chinchilla/parameter_correlation").items():
        first, second = pair.replace("log", "log_").rsplit("_", 1)
        tolerance = 0.001 if pair.startswith("log") else 0.05
        assert found.loc[first, second] == pytest.approx(wanted, abs=tolerance), pair
    eigenvalues = np.sort(np.linalg.eigvalsh(found.to_numpy()))
    assert eigenvalues[-2:].sum() / eigenvalues.sum() == pytest.approx(0.995, abs=0.002)


def test_compute_optimal(bootstrapped: LawFit) -> None:
    wanted = value("chinchilla/compute_optimal")
    law = bootstrapped.form
    assert law.beta / (law.alpha + law.beta) == pytest.approx(wanted["a"], abs=5e-4)
    for compute, ratio in wanted["tokens_per_param_at"].items():
        assert float(law.optimum(float(compute)).M) == pytest.approx(ratio, rel=0.01)


def test_optimum_interval_at_the_chinchilla_budget(bootstrapped: LawFit) -> None:
    ratio = bootstrapped.optimum(5.76e23, level=0.8).M
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((17.9, 9.9, 29.0), rel=0.05)
