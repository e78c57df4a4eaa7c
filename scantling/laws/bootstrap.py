"""Resampled data for a batch of refits: whole runs drawn again, or noise drawn around the fitted law.

A run with all its checkpoints is one unit. Drawing few runs again often leaves fewer distinct ones than parameters, so
that small studies get the parametric kind.
"""

import numpy as np
import numpy.typing as npt

from scantling.laws.forms import Floats

Codes = npt.NDArray[np.intp]
FEWEST_RUNS = 8  # below this many runs, noise is drawn instead of runs


def enough_runs(runs: int, free: int) -> bool:
    """Whether runs can be drawn again: at least 8, and three for each free parameter."""
    return runs >= max(FEWEST_RUNS, 3 * free)


def case_counts(runs: Codes, resamples: int, rng: np.random.Generator) -> Floats:
    """(R, n) how often each row appears when the runs are drawn with replacement, checkpoints following their run."""
    number = int(runs.max()) + 1
    if number > 5000:  # drawing the runs one by one and counting them is quicker than a multinomial over so many
        counts = np.empty((resamples, number))
        for i in range(resamples):
            counts[i] = np.bincount(rng.integers(0, number, number), minlength=number)
        return counts if len(runs) == number and (np.diff(runs) == 1).all() else counts[:, runs]
    drawn = rng.multinomial(number, np.full(number, 1 / number), size=resamples)
    return np.asarray(drawn[:, runs], dtype=np.float64)


def equal_run_weights(runs: Codes) -> Floats:
    """(n,) weights that give every run the same sum, whatever its number of checkpoints, and 1 on average."""
    counts = np.bincount(runs)
    return np.asarray(len(runs) / (len(counts) * counts[runs]), dtype=np.float64)


def noisy_losses(
    prediction: Floats, residuals: Floats, runs: Codes, *, free: int, resamples: int, rng: np.random.Generator
) -> Floats:
    """(R, n) losses drawn around the fitted ones: prediction x exp(noise).

    The noise has the residuals' variance with n - p degrees of freedom and, for checkpoints of one run, their
    correlation rho. Each resample also draws that variance from its chi-square distribution with n_eff - p degrees of
    freedom, n_eff = n / (1 + (n per run - 1) rho), so that a few points do not look surer than they are.

    Args:
        prediction: (n,) fitted losses.
        residuals: (n,) log residuals.
        runs: (n,) number of each row's run.
        free: fitted parameters p.
        resamples: R.
        rng: source of randomness.
    """
    n, number = len(residuals), int(runs.max()) + 1
    rho = run_correlation(residuals, runs)
    freedom = max(1.0, independent_rows(residuals, runs) - free)
    sd = residual_sd(residuals, free) * np.sqrt(freedom / rng.chisquare(freedom, size=(resamples, 1)))
    shared = rng.standard_normal((resamples, number))[:, runs]
    own = rng.standard_normal((resamples, n))
    return np.asarray(prediction * np.exp(sd * (np.sqrt(rho) * shared + np.sqrt(1 - rho) * own)), dtype=np.float64)


def independent_rows(residuals: Floats, runs: Codes) -> float:
    """n_eff = n / (1 + (n per run - 1) rho): what the rows are worth when checkpoints of one run agree (2404.10102)."""
    n = len(residuals)
    return float(n / (1 + (n / (int(runs.max()) + 1) - 1) * run_correlation(residuals, runs)))


def residual_sd(residuals: Floats, free: int) -> float:
    """sqrt(sum r^2 / (n - p))."""
    return float(np.sqrt(np.sum(residuals**2) / (len(residuals) - free)))


def run_correlation(residuals: Floats, runs: Codes) -> float:
    """Mean product of residuals over pairs of one run, over the mean square; between 0 and 1, and 0 without pairs."""
    sums, squares = np.bincount(runs, residuals), np.bincount(runs, residuals**2)
    counts = np.bincount(runs)
    pairs = float(np.sum(counts * (counts - 1)))
    square = float(np.mean(residuals**2))
    if pairs == 0 or square == 0:
        return 0.0
    return float(np.clip(np.sum(sums**2 - squares) / pairs / square, 0.0, 1.0))
