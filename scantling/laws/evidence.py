"""What stands beside a law's parameters: predictions, intervals, hold-outs, residuals, and the certificate of the fit."""

from collections.abc import Mapping
from dataclasses import dataclass

from scantling.laws.forms import Floats


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; None where the law has no joint uncertainty."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Prediction:
    """Predicted losses with the interval of the law itself: a single run scatters around it by the residual sd.

    Attributes:
        value: nats per token, shaped like the broadcast of N and D.
        low: lower end, or None when the law has no joint uncertainty.
        high: upper end, or None.
        notes: how far any point lies outside the fitted range, and why an interval is missing.
    """

    value: Floats
    low: Floats | None
    high: Floats | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class OptimumEstimate:
    """The compute-optimal split of C = 6 N D with intervals from the draws (not from marginal intervals)."""

    C: float
    N: Estimate
    D: Estimate
    M: Estimate
    loss: Estimate
    notes: tuple[str, ...]


@dataclass(frozen=True)
class HoldOut:
    """A fit on the cheap part of the rows, judged on the dear part it did not see.

    Attributes:
        rule: what was held out.
        n_fit: rows fitted.
        n_held: rows held out.
        are: mean |L - prediction| / L.
        bias: mean (prediction - L) / L; negative means too optimistic.
        baseline_are: the same error for the prediction "the lowest loss among the fitted rows".
        compute_ratio: largest compute held out over the sum of the compute fitted; None when the law knows no compute.
        reducible_are: mean |L - prediction| / (L - E), with E of the fit to all rows; None without E below the losses.
        tied_are: the mean error of the same law with equal exponents; None when they are equal or it cannot be fitted.
    """

    rule: str
    n_fit: int
    n_held: int
    are: float
    bias: float
    baseline_are: float
    compute_ratio: float | None
    reducible_are: float | None = None
    tied_are: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """The same rows fitted in another defensible way.

    Attributes:
        change: what differs from the fit.
        params: the estimate.
        n: rows used.
        ahead: its prediction at ten times the largest compute fitted (N and D both larger by sqrt 10); None where the law
            knows no compute.
        optimum: its compute-optimal D/N at the largest compute fitted, where it has one.
        refused: why it could not be fitted; then nothing else is given.
    """

    change: str
    params: Mapping[str, float]
    n: int
    ahead: float | None
    optimum: float | None
    refused: str | None = None


@dataclass(frozen=True)
class Residuals:
    """What the log residuals look like: under a law that describes the rows, nothing.

    Attributes:
        rank_correlation: Spearman's rho with the log of each column and with the prediction.
        p_values: of those correlations.
        curvature: t value of a squared term of the log of each column, added to the residuals' regression on it.
        worst: the largest residuals: row (sorted by columns, from 0) and residual.
        kurtosis: excess; above about 3 a few rows carry the misfit.
        run_correlation: of residuals of one run; zero when every row is a run.
    """

    rank_correlation: Mapping[str, float]
    p_values: Mapping[str, float]
    curvature: Mapping[str, float]
    worst: tuple[tuple[int, float], ...]
    kurtosis: float
    run_correlation: float


@dataclass(frozen=True)
class FittedRows:
    """The rows behind a law, for a drawing: as many as tell the story.

    Attributes:
        columns: values of the law's columns, in the order of the rows.
        groups: the group of each row, for each grouping column.
        measured: losses (best sizes, for approaches 1 and 2).
        predicted: what the law gives there.
        total: rows fitted; of a large table those kept are evenly spaced in the prediction, and the largest residuals.
    """

    columns: Mapping[str, tuple[float, ...]]
    groups: Mapping[str, tuple[str, ...]]
    measured: tuple[float, ...]
    predicted: tuple[float, ...]
    total: int


@dataclass(frozen=True)
class Certificate:
    """Evidence that the minimum is one.

    Attributes:
        gradient: largest component of the gradient over the sum of the absolute contributions that cancel in it.
        starts: spread-out starts refined.
        agreeing: starts that reached the best objective within 1e-7 relative.
        condition: condition number of the Jacobian in centred log parameters, columns scaled to unit length.
        basins: the distinct minima found: objective, and how many starts ended there; best first.
    """

    gradient: float
    starts: int
    agreeing: int
    condition: float
    basins: tuple[tuple[float, int], ...] = ()
