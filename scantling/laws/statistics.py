"""The few statistics the laws need, on scipy.special alone: scipy.stats takes longer to import than a fit takes."""

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr

from scantling.laws.forms import Floats


@dataclass(frozen=True)
class Line:
    """A least-squares line: y = intercept + slope x, with the slope's standard error and two-sided p-value."""

    slope: float
    intercept: float
    stderr: float
    p_value: float


def line(x: Floats, y: Floats) -> Line:
    """The least-squares line through (n,) points; without spread or freedom its error is infinite or not a number."""
    n, apart = len(x), x - x.mean()
    with np.errstate(all="ignore"):
        slope = float(apart @ y / (apart @ apart))
        intercept = float(y.mean() - slope * x.mean())
        left = y - intercept - slope * x
        stderr = float(np.sqrt(np.float64(left @ left) / (n - 2) / (apart @ apart))) if n > 2 else float("nan")
        p = 2 * float(stdtr(n - 2, -abs(np.float64(slope) / stderr))) if n > 2 else float("nan")
    return Line(slope, intercept, stderr, p)


def rank_correlation(x: Floats, y: Floats) -> tuple[float, float]:
    """Spearman's rho, ties averaged, and its two-sided p-value by Student's distribution."""
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    rho = float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1.0, 1.0))
    freedom = len(x) - 2
    if freedom < 1:
        return rho, float("nan")
    with np.errstate(divide="ignore"):
        score = abs(rho) * np.sqrt(freedom / np.float64((1 - rho) * (1 + rho)))
    return rho, 2 * float(stdtr(freedom, -score))


def excess_kurtosis(values: Floats) -> float:
    """m4 / m2^2 - 3."""
    apart = values - values.mean()
    return float(np.mean(apart**4) / np.mean(apart**2) ** 2 - 3)


def _ranks(values: Floats) -> Floats:
    """(n,) from 1; equal values share the mean of their ranks."""
    _, code, count = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(count) - (count - 1) / 2)[code], dtype=np.float64)
