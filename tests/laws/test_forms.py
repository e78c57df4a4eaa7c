"""Closed forms agree with each other and with brute force."""

import numpy as np
import pytest

from scantling.errors import InputError
from scantling.laws import Chinchilla, Downstream, from_overtraining, to_overtraining

LAW = Chinchilla(A=482.0, B=2085.4, E=1.8169, alpha=0.3478, beta=0.3659)


def test_optimum_is_the_minimum_along_equal_compute() -> None:
    best = LAW.optimum(1e21)
    n = float(best.N) * np.geomspace(0.2, 5, 4001)
    losses = LAW.loss(n, 1e21 / (6 * n))
    assert losses.argmin() == 2000
    assert float(best.loss) == pytest.approx(losses.min(), rel=1e-12)
    assert LAW.alpha * LAW.A * best.N**-LAW.alpha == pytest.approx(LAW.beta * LAW.B * best.D**-LAW.beta)


def test_inverses() -> None:
    budgets = np.geomspace(1e18, 1e26, 9)
    np.testing.assert_allclose(LAW.compute_for_loss(LAW.optimum(budgets).loss), budgets, rtol=1e-9)
    np.testing.assert_allclose(LAW.tokens_for_loss(1e9, LAW.loss(1e9, [1e9, 1e11])), [1e9, 1e11], rtol=1e-9)
    assert np.isinf(LAW.compute_for_loss(LAW.E))
    assert np.isinf(LAW.tokens_for_loss(1e6, 2.0))


def test_over_training_by_direct_evaluation() -> None:
    best = LAW.optimum(1e22)
    m = np.array([0.25, 1.0, 3.0, 20.0])
    direct = (LAW.loss(best.N / np.sqrt(m), best.D * np.sqrt(m)) - LAW.E) / (best.loss - LAW.E)
    np.testing.assert_allclose(LAW.overtraining_factor(m), direct, rtol=1e-12)
    c = 1e22 * LAW.overtraining_compute(3.0)
    longer = LAW.optimum(c)
    assert float(LAW.loss(longer.N / np.sqrt(3), longer.D * np.sqrt(3))) == pytest.approx(float(best.loss), rel=1e-12)


def test_token_factor_keeps_the_loss() -> None:
    best = LAW.optimum(1e22)
    assert float(LAW.loss(0.5 * best.N, LAW.token_factor(0.5) * best.D)) == pytest.approx(float(best.loss), rel=1e-12)
    limit = (1 + LAW.alpha / LAW.beta) ** (-1 / LAW.alpha)
    assert np.isinf(LAW.token_factor(0.99 * limit))
    assert np.isfinite(LAW.token_factor(1.01 * limit))


def test_inference_optimum_is_the_cheapest() -> None:
    best = LAW.inference_optimum(2.2, 1e13)
    n = best.N * np.geomspace(0.9, 1.2, 1001)
    d = LAW.tokens_for_loss(n, 2.2)
    assert best.total_flops == pytest.approx((6 * n * d + 2 * n * 1e13).min(), rel=1e-6)
    assert float(LAW.optimum(LAW.compute_for_loss(2.2)).N) > best.N
    assert float(LAW.loss(best.N, best.D)) == pytest.approx(2.2, rel=1e-9)


def test_without_inference_it_is_the_compute_optimum() -> None:
    best = LAW.inference_optimum(2.2, 0.0)
    assert best.total_flops == pytest.approx(float(LAW.compute_for_loss(2.2)), rel=1e-9)


def test_over_training_form() -> None:
    law = from_overtraining(E=1.51, a=141, b=190, eta=0.121)
    c, m = 3.3e20, 77.0
    n, d = np.sqrt(c / (6 * m)), np.sqrt(c * m / 6)
    assert float(law.loss(n, d)) == pytest.approx(1.51 + (141 * m**0.121 + 190 * m**-0.121) * c**-0.121, rel=1e-12)
    assert to_overtraining(law) == pytest.approx((141, 190, 0.121))
    with pytest.raises(InputError, match="tied=True"):
        to_overtraining(LAW)


def test_large_integers_do_not_overflow() -> None:
    n, d = np.array([1_439_795_200]), np.array([921_468_928_000])
    assert float(LAW.loss(n, d)[0]) == pytest.approx(float(LAW.loss(1_439_795_200.0, 921_468_928_000.0)))
    assert float(LAW.optimum(10**26).loss) > LAW.E


def test_downstream_bounds() -> None:
    law = Downstream(epsilon=0.85, k=2.08, gamma=0.756)
    errors = law.error(np.linspace(1.5, 8, 50))
    assert (np.diff(errors) > 0).all()
    assert errors.max() < 0.85


@pytest.mark.parametrize(
    ("loss", "tokens", "said"), [(1.8, 1e12, "raise it"), (2.2, -1.0, "zero or more"), (2.2, np.inf, "zero or more")]
)
def test_refusals(loss: float, tokens: float, said: str) -> None:
    with pytest.raises(InputError, match=said):
        LAW.inference_optimum(loss, tokens)


def test_impossible_constants() -> None:
    with pytest.raises(InputError) as caught:
        Chinchilla(A=-1.0, B=np.nan, E=-0.1, alpha=0.3, beta=0.3)
    assert len(caught.value.faults) == 3
