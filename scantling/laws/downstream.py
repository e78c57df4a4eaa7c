"""Fitting the law from loss to task error, with its uncertainty, and chaining it to a law of loss."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from scantling.errors import InputError
from scantling.laws.bootstrap import case_counts, enough_runs, small_sample
from scantling.laws.forms import Downstream, Floats, as_floats
from scantling.laws.lawfit import LawFit
from scantling.laws.tables import numeric_column

GAMMAS = np.geomspace(1e-2, 20.0, 80)  # values of gamma that a refit compares
ROUNDS = 30  # golden sections between the neighbours of the best
GOLDEN = (np.sqrt(5) - 1) / 2


def fit_downstream(loss: npt.ArrayLike, error: npt.ArrayLike) -> Downstream:
    """Unweighted least squares of Err(L) = epsilon - k exp(-gamma L) from the start (1, 1, 1).

    The recipe of arXiv 2403.08540 (section 2.3 and its code): measured losses in, one law per training set, the error a
    mean over many tasks. Errors of single tasks are not predictable this way (its Table 2).

    Args:
        loss: (n,) measured losses, nats per token.
        error: (n,) 1 - accuracy.

    Raises:
        InputError: fewer than three points, lengths that differ, or values that are not finite.
    """
    from scipy.optimize import least_squares  # loaded only when such a law is fitted

    x, y = as_floats(loss), as_floats(error)
    if x.ndim != 1 or x.shape != y.shape:
        raise InputError(f"loss and error: expected two lists of one length, got shapes {x.shape} and {y.shape}")
    if len(x) < 3:
        raise InputError(f"loss and error: expected at least 3 points for 3 parameters, got {len(x)}; add models")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InputError("loss and error: expected finite numbers; leave out the models without a measured value")

    def residuals(theta: Floats) -> Floats:
        return Downstream(epsilon=float(theta[2]), k=float(theta[0]), gamma=float(theta[1])).error(x) - y

    found = least_squares(residuals, np.ones(3), method="lm", max_nfev=10_000, xtol=1e-14, ftol=1e-14, gtol=1e-14)
    k, gamma, epsilon = (float(value) for value in found.x)
    return Downstream(epsilon=epsilon, k=k, gamma=gamma)


def downstream_draws(law: Downstream, loss: Floats, error: Floats, *, resamples: int, seed: int = 0) -> Floats | None:
    """(R, 3) epsilon, k, gamma: models drawn again, or with fewer than 9 of them noise drawn around the law.

    The noise has the residuals' variance with n - 3 degrees of freedom, itself drawn from its chi-square distribution.
    Three points leave no residuals: then None.
    """
    n, rng = len(loss), np.random.default_rng(seed)
    if n <= 3 or resamples == 0 or not (law.gamma > 0 and law.k > 0):
        return None
    if enough_runs(n, 3):
        found = _refits(loss, error[None], case_counts(np.arange(n), resamples, rng))
        wider = small_sample(n, 3, 1.0)
    else:
        left = error - law.error(loss)
        sd = np.sqrt(left @ left / rng.chisquare(n - 3, size=(resamples, 1)))
        found = _refits(loss, law.error(loss) + sd * rng.standard_normal((resamples, n)), np.ones((1, n)))
        wider = 1.0
    middle = np.array([law.epsilon, np.log(law.k), np.log(law.gamma)])
    with np.errstate(all="ignore"):
        shifted = middle + wider * (np.stack([found[:, 0], *np.log(found[:, 1:].T)], axis=1) - middle)
        draws = np.stack([shifted[:, 0], *np.exp(shifted[:, 1:].T)], axis=1)
    return np.asarray(draws[np.isfinite(draws).all(1)], dtype=np.float64)


def _refits(loss: Floats, error: Floats, weights: Floats) -> Floats:
    """(R, 3) weighted least squares for R vectors of errors or weights: linear in epsilon and k at each gamma."""
    error, weights = np.broadcast_arrays(error, weights)

    def at(gamma: Floats) -> tuple[Floats, Floats, Floats]:
        x = -np.exp(-gamma[:, None] * (loss - loss.mean()))
        total = weights.sum(1)
        mean_x, mean_y = (weights * x).sum(1) / total, (weights * error).sum(1) / total
        apart, off = x - mean_x[:, None], error - mean_y[:, None]
        k = (weights * apart * off).sum(1) / np.maximum((weights * apart**2).sum(1), 1e-300)
        missed = (weights * (off - k[:, None] * apart) ** 2).sum(1)
        return missed, mean_y - k * mean_x, k * np.exp(gamma * loss.mean())

    levels = np.stack([at(np.full(len(error), gamma))[0] for gamma in GAMMAS])
    best = np.argmin(levels, axis=0)
    low, high = (np.log(GAMMAS[np.clip(best + step, 0, len(GAMMAS) - 1)]) for step in (-1, 1))
    for _ in range(ROUNDS):
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        down = at(np.exp(left))[0] < at(np.exp(right))[0]
        low, high = np.where(down, low, left), np.where(down, right, high)
    gamma = np.exp((low + high) / 2)
    _, epsilon, k = at(gamma)
    return np.stack([epsilon, k, gamma], axis=1)


def with_errors(law: LawFit, table: pd.DataFrame, loss: str, errors: Sequence[str], *, seed: int = 0) -> LawFit:
    """The law of loss together with a law from loss to each column of task errors, fitted to the rows that have both.

    Draws of the error law are paired with those of the law of loss: given the measured losses, what scatters about the one
    tells nothing of what scatters about the other.

    Raises:
        InputError: a column is missing, or fewer than three rows have a loss and an error.
    """
    found, draws, warnings = dict(law.downstream), dict(law.downstream_draws), list(law.warnings)
    for name in errors:
        x, y = numeric_column(table, loss, "loss"), numeric_column(table, name, "error")
        both = np.isfinite(x) & np.isfinite(y)
        if (y[both] > 1).any() or (y[both] < 0).any():
            raise InputError(f"column {name!r}: errors are shares between 0 and 1, got {float(y[both].max()):g}")
        found[name] = fit_downstream(x[both], y[both])
        count = len(law.draws) if law.draws is not None else 0
        drawn = downstream_draws(found[name], x[both], y[both], resamples=count, seed=seed)
        if drawn is not None and len(drawn) > count / 2:
            draws[name] = drawn
        if found[name].gamma <= 0 or found[name].k <= 0:
            warnings.append(f"{name}: the error does not fall with the loss in these rows; do not predict by it")
    return replace(law, downstream=found, downstream_draws=draws, warnings=tuple(warnings)) if errors else law
