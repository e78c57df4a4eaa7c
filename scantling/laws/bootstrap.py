"""Resampled data for a batch of refits: whole runs drawn again or weighed at random, or noise drawn around the fitted law.

A run with all its checkpoints is one unit. Drawing few runs again often leaves fewer distinct ones than parameters, so
that small studies get the parametric kind.
"""

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri, stdtrit

from scantling.laws.forms import Floats

Codes = npt.NDArray[np.intp]
FEWEST_RUNS = 8  # below this many runs, noise is drawn instead of runs
ABSOLUTE = 0.5  # share of residuals inside delta below which an objective behaves as absolute deviations
FEW_PER_PARAMETER = 20  # runs per parameter below which absolute deviations need smooth weights


def enough_runs(runs: int, free: int) -> bool:
    """Whether runs can be drawn again: at least 8, and three for each free parameter."""
    return runs >= max(FEWEST_RUNS, 3 * free)


def run_weights(
    runs: Codes, free: int, inside: float, resamples: int, rng: np.random.Generator
) -> tuple[Floats, float, str]:
    """(R, n) weights of the rows in each refit, how much wider its draws must be, and the scheme in words.

    Runs are drawn again with replacement (a run counts 0, 1, 2, ... times), except under absolute deviations, or Huber's
    loss with delta far below the noise, and few runs: the bootstrap of a median is too wide in small samples, because a
    refit to the two thirds of the runs that were drawn jumps between fewer rows. There each run gets a random weight with the
    same mean and variance, exponential, and none is left out (Rubin 1981; Jin, Ying and Wei 2001). In linear regression
    with 4, 7, 12 and 24 runs per parameter, redrawn runs give 90% intervals 1.18, 1.09, 1.07 and 1.05 times as wide as the
    truth, and random weights 1.03, 1.02, 1.05 and 1.03. For squares it is the other way round: leaving runs out makes up for
    residuals that are smaller than the noise, and random weights give 0.78 to 0.96.

    Args:
        runs: (n,) number of each row's run.
        free: fitted parameters p.
        inside: expected share of residuals within delta; 1 for squares.
        resamples: R.
        rng: source of randomness.
    """
    number = int(runs.max()) + 1
    if inside < ABSOLUTE and number < FEW_PER_PARAMETER * free:
        how = f"{resamples} refits, each of {number} runs with a random weight"
        return np.asarray(rng.exponential(size=(resamples, number))[:, runs], dtype=np.float64), 1.0, how
    wider = small_sample(number, free, inside)
    return case_counts(runs, resamples, rng), wider, f"{resamples} resamples of {number} runs"


def small_sample(runs: int, free: int, inside: float) -> float:
    """How much wider the draws of few runs must be: sqrt(n / (n - p)) times Student's over the normal 97.5% point.

    Redrawn runs keep the residuals of the fit, which are smaller than the noise by the parameters fitted. Objectives near
    absolute deviations do not: theirs hardly depend on the size of a residual, so that the excess counts by the share of
    residuals inside delta. benchmarks/results/laws_coverage.md has the coverage with it.
    """
    excess = np.sqrt(runs / (runs - free)) * stdtrit(runs - free, 0.975) / ndtri(0.975) - 1
    return float(1 + inside * excess)


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


def share_inside(residuals: Floats, delta: float) -> float:
    """Expected share of residuals within delta, smoothed: a hard count says little when delta is far below the noise."""
    if not np.isfinite(delta):
        return 1.0
    width = 0.9 * max(1.4826 * float(np.median(np.abs(residuals))), 1e-12) * len(residuals) ** -0.2
    return float(np.mean(ndtr((delta - residuals) / width) - ndtr((-delta - residuals) / width)))


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
