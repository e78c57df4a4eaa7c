"""Closed forms against published and independently computed values."""

import pytest

from scantling.laws import Chinchilla
from tests.published.targets import value

EPOCH = Chinchilla(A=482.01, B=2085.43, E=1.8172, alpha=0.3478, beta=0.3658)


def test_compute_optimal() -> None:
    best = EPOCH.optimum(1e21)
    wanted = value("forms/compute_optimal_1e21")
    assert (float(best.N), float(best.D), float(best.M), float(best.loss)) == pytest.approx(
        (wanted["N"], wanted["D"], wanted["M"], wanted["L"]), rel=1e-4
    )


def test_cost_of_over_training() -> None:
    for m, wanted in value("forms/overtraining_cost").items():
        factor = float(m.removeprefix("m="))
        assert float(EPOCH.overtraining_factor(factor)) == pytest.approx(wanted["h"], rel=1e-5)
        assert float(EPOCH.overtraining_compute(factor)) == pytest.approx(wanted["compute_ratio"], rel=1e-5)


def test_inference_aware_optimum() -> None:
    wanted = value("forms/inference_aware_13B_2T")
    law = Chinchilla(A=406.4, B=410.7, E=1.69, alpha=0.336, beta=0.283)
    c = 6 * 13e9 * wanted["D_chinchilla"]
    assert float(law.optimum(c).N) == pytest.approx(13e9, rel=0.01)
    d = float(law.tokens_for_loss(13e9, law.optimum(c).loss))
    reference = 6 * 13e9 * d + 2 * 13e9 * 2e12
    best = law.inference_optimum(float(law.loss(13e9, d)), 2e12)
    saved = reference - best.total_flops
    assert d == pytest.approx(wanted["D_chinchilla"], rel=0.01)
    assert (best.N, best.D, saved, saved / reference) == pytest.approx(
        (wanted["N_opt"], wanted["D_opt"], wanted["saving_flops"], wanted["saving_frac"]), rel=0.01
    )
    balance = law.alpha * law.A * best.N**-law.alpha / (law.beta * law.B * best.D**-law.beta)
    assert balance == pytest.approx(1 + 2e12 / (3 * best.D), rel=1e-9)
