"""Statistics against scipy.stats, which they replace for the sake of the start-up."""

import numpy as np
import pytest
from scipy.stats import kurtosis, linregress, spearmanr

from scantling.laws.statistics import excess_kurtosis, line, rank_correlation


@pytest.mark.parametrize("n", [5, 12, 240])
def test_as_scipy(n: int) -> None:
    draw = np.random.default_rng(n)
    x = draw.integers(0, 6, n).astype(float)  # ties
    y = 0.3 * x + draw.standard_normal(n)
    wanted = linregress(x, y)
    found = line(x, y)
    assert (found.slope, found.intercept, found.stderr, found.p_value) == pytest.approx(
        (wanted.slope, wanted.intercept, wanted.stderr, wanted.pvalue)
    )
    rho = spearmanr(x, y)
    assert rank_correlation(x, y) == pytest.approx((rho.statistic, rho.pvalue))
    assert excess_kurtosis(y) == pytest.approx(kurtosis(y))
    assert rank_correlation(x, 2 * x) == pytest.approx((1.0, 0.0))
