"""Fitting the law from loss to task error, and chaining it to a law of loss."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import least_squares

from scantling.errors import InputError
from scantling.laws.forms import Downstream, Floats, as_floats
from scantling.laws.lawfit import LawFit
from scantling.laws.tables import numeric_column


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


def with_errors(law: LawFit, table: pd.DataFrame, loss: str, errors: Sequence[str]) -> LawFit:
    """The law of loss together with a law from loss to each column of task errors, fitted to the rows that have both.

    Raises:
        InputError: a column is missing, or fewer than three rows have a loss and an error.
    """
    found = dict(law.downstream)
    for name in errors:
        x, y = numeric_column(table, loss, "loss"), numeric_column(table, name, "error")
        both = np.isfinite(x) & np.isfinite(y)
        found[name] = fit_downstream(x[both], y[both])
    return replace(law, downstream=found) if errors else law
