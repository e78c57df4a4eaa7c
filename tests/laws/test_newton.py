"""The minimiser: derivatives against finite differences, and one warm start per resample against many starts."""

import numpy as np
import pytest

from scantling.laws.descent import Design, Objective, derivatives, refine
from scantling.laws.newton import minimise, resample
from tests.laws.ladders import MULTIPLIERS, SIZES, TRUE, grid


def problem(noise: float = 0.01) -> tuple[Design, np.ndarray]:
    table = grid(TRUE, SIZES, MULTIPLIERS, noise=noise)
    n, d = (np.log(table[c]).to_numpy() for c in ("N", "D"))
    terms = np.zeros((3, len(n), 5))
    terms[0, :, 0] = terms[1, :, 1] = terms[2, :, 2] = 1
    terms[0, :, 3], terms[1, :, 4] = n.mean() - n, d.mean() - d
    names, exponent = ("A", "B", "E", "alpha", "beta"), (False, False, False, True, True)
    return Design(names, exponent, terms, np.zeros((3, len(n)))), table.loss.to_numpy()


@pytest.mark.parametrize(
    "objective", [Objective(1e-3), Objective(0.05), Objective(np.inf), Objective(np.inf, raw=True)]
)
def testderivatives(objective: Objective) -> None:
    design, loss = problem(0.03)
    weights = np.linspace(0.5, 2, len(loss))
    theta = np.array([[0.1, 0.2, 0.5, 0.4, 0.3]])
    _, gradient, hessian, _, _ = derivatives(design, loss, weights, objective, theta)
    step = 1e-6
    for p in range(5):
        ends = [derivatives(design, loss, weights, objective, theta + sign * step * np.eye(5)[p]) for sign in (1, -1)]
        assert (ends[0][0] - ends[1][0]) / (2 * step) == pytest.approx(gradient[:, p], rel=1e-4, abs=1e-8)
        np.testing.assert_allclose((ends[0][1] - ends[1][1])[0] / (2 * step), hessian[0, p], rtol=1e-4, atol=1e-6)


def test_one_warm_start_finds_what_many_starts_find() -> None:
    design, loss = problem()
    objective = Objective(1e-3)
    best = minimise(design, loss, np.ones(16), objective)
    counts = np.random.default_rng(0).multinomial(16, np.full(16, 1 / 16), size=60).astype(float)
    counts = counts[(counts > 0).sum(1) >= 8]
    found = refine(design, loss, counts, objective, resample(design, loss, counts, objective, best.theta))[1]
    many = np.array([minimise(design, loss, w, objective).value for w in counts])
    assert np.mean(found > many * (1 + 1e-6)) <= 0.05


def test_a_piecewise_batch_equals_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    design, loss = problem()
    best = minimise(design, loss, np.ones(16), Objective(np.inf))
    counts = np.random.default_rng(0).multinomial(16, np.full(16, 1 / 16), size=9).astype(float)
    whole = resample(design, loss, counts, Objective(np.inf), best.theta)
    monkeypatch.setattr("scantling.laws.newton.CELLS", 100)
    np.testing.assert_allclose(resample(design, loss, counts, Objective(np.inf), best.theta), whole, rtol=1e-6)
