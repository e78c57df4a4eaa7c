"""A fitted or published law as data: parameters, uncertainty, where it was measured, and what is wrong with it.

Fits and published laws are the same kind of object: a published one lacks what its source does not give.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scantling.errors import InputError, suggest
from scantling.laws.forms import Chinchilla, Downstream, Floats, as_floats, chinchilla_loss, compute_optimum

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = "scantling.law/1"
PARAMETERS = {"chinchilla": ("A", "B", "E", "alpha", "beta")}


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
        compute_ratio: largest 6 N D held out over the sum of 6 N D fitted.
    """

    rule: str
    n_fit: int
    n_held: int
    are: float
    bias: float
    baseline_are: float
    compute_ratio: float


@dataclass(frozen=True)
class Certificate:
    """Evidence that the minimum is one.

    Attributes:
        gradient: largest component of the gradient over the sum of the absolute contributions that cancel in it.
        starts: spread-out starts refined.
        agreeing: starts that reached the best objective within 1e-7 relative.
        condition: condition number of the Jacobian in centred log parameters, columns scaled to unit length.
    """

    gradient: float
    starts: int
    agreeing: int
    condition: float


@dataclass(frozen=True, eq=False)
class LawFit:
    """A law with what is known about it.

    Attributes:
        law: name of the form; "chinchilla" is L(N, D) = E + A N^-alpha + B D^-beta.
        params: the point estimate.
        source: where the law comes from: the table's columns, or a citation.
        conventions: how N, D, C and loss are counted, in words.
        ranges: lowest and highest N, D, M and loss fitted, where known.
        tied: alpha = beta was imposed.
        fixed: parameters that were given, not fitted.
        draws: (R, parameters) bootstrap estimates in the order of `params`, or None.
        bootstrap: how the draws were made, or why there are none.
        stated_intervals: marginal 95% intervals printed by the source of a published law, by parameter.
        objective: "huber", "lad", "ols" (squared log residuals), "ols_raw" (squared residuals), or None.
        delta: Huber's delta, where used.
        objective_value: sum over rows of weight x Huber, |r| or r^2/2.
        n: rows fitted.
        n_runs: distinct runs among them.
        residual_sd: standard deviation of the log residuals with n - p degrees of freedom.
        certificate: evidence of convergence.
        holdouts: errors on held-out rows.
        downstream: laws from loss to task error that belong to this law, by name.
        fingerprint: SHA-256 of the rows used, independent of their order.
        warnings: what a reader must know before using the law.
    """

    law: str
    params: Mapping[str, float]
    source: str
    conventions: Mapping[str, str]
    ranges: Mapping[str, tuple[float, float]]
    tied: bool = False
    fixed: Mapping[str, float] = field(default_factory=dict)
    draws: Floats | None = None
    bootstrap: str = "none"
    stated_intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    objective: str | None = None
    delta: float | None = None
    objective_value: float | None = None
    n: int | None = None
    n_runs: int | None = None
    residual_sd: float | None = None
    certificate: Certificate | None = None
    holdouts: tuple[HoldOut, ...] = ()
    downstream: Mapping[str, Downstream] = field(default_factory=dict)
    fingerprint: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def form(self) -> Chinchilla:
        """The point estimate as a closed form."""
        return Chinchilla(**self.params)

    def intervals(self, level: float = 0.95) -> dict[str, tuple[float, float] | None]:
        """Percentile interval of each parameter from the draws; a source's own 95% interval when there are no draws.

        Fixed parameters have none. Marginal intervals must not be combined: A and alpha are correlated above 0.999.
        """
        if self.draws is None:
            given = self.stated_intervals if level == 0.95 else {}
            return {name: given.get(name) for name in self.params}
        low, high = _percentiles(self.draws, level)
        return {
            name: None if name in self.fixed else (float(low[i]), float(high[i])) for i, name in enumerate(self.params)
        }

    def covariance(self) -> "pd.DataFrame | None":
        """Covariance of the free parameters over the draws, in log A, log B, E, alpha, beta; None without draws."""
        frame = self._log_draws()
        return None if frame is None else frame.cov()

    def correlations(self) -> "pd.DataFrame | None":
        """Correlations of the free parameters over the draws, in log A, log B, E, alpha, beta; None without draws."""
        frame = self._log_draws()
        return None if frame is None else frame.corr()

    def _log_draws(self) -> "pd.DataFrame | None":
        if self.draws is None:
            return None
        columns = {}
        for i, name in enumerate(self.params):
            if name not in self.fixed and not (self.tied and name == "beta"):
                log = name in ("A", "B")
                columns[f"log_{name}" if log else name] = np.log(self.draws[:, i]) if log else self.draws[:, i]
        import pandas as pd

        return pd.DataFrame(columns)

    def predict(self, N: npt.ArrayLike, D: npt.ArrayLike, level: float = 0.95) -> Prediction:
        """The loss at N parameters and D tokens, with a percentile interval over the draws.

        Raises:
            InputError: N, D or `level` is not a positive finite number (level below 1).
        """
        n, d = np.broadcast_arrays(_positive("N", N), _positive("D", D))
        value = self.form.loss(n, d)
        notes = self.outside(n, d)
        if self.draws is None:
            return Prediction(value, None, None, (*notes, f"no interval: {self.bootstrap}"))
        shape = (len(self.params), -1, *[1] * n.ndim)
        low, high = _percentiles(chinchilla_loss(self.draws.T.reshape(shape), n, d), level)
        return Prediction(value, low, high, notes)

    def optimum(self, C: float, level: float = 0.95) -> OptimumEstimate:
        """The compute-optimal N, D, M and loss at C = 6 N D FLOPs, with intervals over the draws.

        `notes` says when the answer lies outside what was sampled: then it is the form that speaks, not the data.

        Raises:
            InputError: C or `level` is not usable, or the law is so poor that its optimum is not a finite model.
        """
        c = float(_positive("C", C))
        best = self.form.optimum(c)
        if not (np.isfinite(best.M) and best.M > 0):
            raise InputError(
                f"C = {c:.4g}: the law has no usable optimum, A and B are too far apart; fit more varied runs"
            )
        notes = self.outside(best.N, best.D, "the optimum: ")
        names = ("N", "D", "M", "loss")
        if self.draws is None:
            found = {name: Estimate(float(getattr(best, name)), None, None) for name in names}
            return OptimumEstimate(c, **found, notes=(*notes, f"no interval: {self.bootstrap}"))
        spread = compute_optimum(self.draws.T, c)
        found = {}
        for name in names:
            low, high = _percentiles(getattr(spread, name), level)
            found[name] = Estimate(float(getattr(best, name)), float(low), float(high))
        return OptimumEstimate(c, **found, notes=notes)

    def outside(self, N: npt.ArrayLike, D: npt.ArrayLike, prefix: str = "") -> tuple[str, ...]:
        """A sentence for each of N, D and M = D/N that leaves the fitted range; empty inside it."""
        n, d = as_floats(N), as_floats(D)
        notes = []
        for name, values in (("N", n), ("D", d), ("M", d / n)):
            if name not in self.ranges:
                continue
            low, high = self.ranges[name]
            if np.max(values) > high * (1 + 1e-9):
                notes.append(
                    f"{prefix}{name} = {np.max(values):.4g} is {np.max(values) / high:.3g} times above the fitted "
                    f"range {low:.4g} to {high:.4g}"
                )
            if np.min(values) < low * (1 - 1e-9):
                notes.append(
                    f"{prefix}{name} = {np.min(values):.4g} is {low / np.min(values):.3g} times below the fitted "
                    f"range {low:.4g} to {high:.4g}"
                )
        return tuple(notes)

    def to_json(self) -> dict[str, Any]:
        """A plain dict of JSON types; `from_json` gives the same law back."""
        plain: dict[str, Any] = {"schema": SCHEMA}
        for f in fields(self):
            plain[f.name] = getattr(self, f.name)
        plain["params"], plain["fixed"] = dict(self.params), dict(self.fixed)
        plain["conventions"] = dict(self.conventions)
        plain["ranges"] = {name: list(pair) for name, pair in self.ranges.items()}
        plain["stated_intervals"] = {name: list(pair) for name, pair in self.stated_intervals.items()}
        plain["draws"] = None if self.draws is None else self.draws.tolist()
        plain["certificate"] = None if self.certificate is None else vars(self.certificate).copy()
        plain["holdouts"] = [vars(h).copy() for h in self.holdouts]
        plain["downstream"] = {name: vars(law).copy() for name, law in self.downstream.items()}
        plain["warnings"] = list(self.warnings)
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any], where: str = "law") -> "LawFit":
        """The law that `to_json` wrote.

        Args:
            plain: the parsed JSON object.
            where: what to call it in a message, such as the file's name.

        Raises:
            InputError: another schema, unknown or missing keys, an unknown form, or values of the wrong kind.
        """
        if not isinstance(plain, Mapping):
            raise InputError(f"{where}: expected a JSON object, got {type(plain).__name__}")
        if plain.get("schema") != SCHEMA:
            raise InputError(f"{where}: expected schema {SCHEMA!r}, got {plain.get('schema')!r}; fit the law again")
        given = {key: value for key, value in plain.items() if key != "schema"}
        _check_keys(where, given, [f.name for f in fields(cls)], ("law", "params", "source", "conventions", "ranges"))
        if given["law"] not in PARAMETERS:
            raise InputError(f"{where}: unknown law {given['law']!r}{suggest(str(given['law']), PARAMETERS)}")
        names = PARAMETERS[given["law"]]
        try:
            _check_keys(f"{where}, params", given["params"], names, names)
            given["params"] = {name: float(given["params"][name]) for name in names}
            for key in ("ranges", "stated_intervals"):
                given[key] = {name: (float(lo), float(hi)) for name, (lo, hi) in given.get(key, {}).items()}
            if given.get("draws") is not None:
                given["draws"] = as_floats(given["draws"]).reshape(-1, len(names))
            if given.get("certificate") is not None:
                given["certificate"] = _record(Certificate, f"{where}, certificate", given["certificate"])
            given["holdouts"] = tuple(_record(HoldOut, f"{where}, holdouts", h) for h in given.get("holdouts", ()))
            given["downstream"] = {
                name: _record(Downstream, f"{where}, downstream {name}", law)
                for name, law in given.get("downstream", {}).items()
            }
            given["warnings"] = tuple(str(sentence) for sentence in given.get("warnings", ()))
            law = cls(**given)
            _ = law.form
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{where}: not a law as scantling writes it ({error}); fit the law again") from None
        return law


def _record(kind: type[Any], where: str, plain: Mapping[str, Any]) -> Any:
    names = [f.name for f in fields(kind)]
    _check_keys(where, plain, names, names)
    return kind(**plain)


def _check_keys(where: str, given: Mapping[str, Any], known: list[str] | tuple[str, ...], needed: Any) -> None:
    faults = [f"{where}: unknown key {key!r}{suggest(key, known)}" for key in given if key not in known]
    faults += [f"{where}: missing key {key!r}" for key in needed if key not in given]
    if faults:
        raise InputError(*faults)


def _percentiles(draws: Floats, level: float) -> tuple[Floats, Floats]:
    if not 0 < level < 1:
        raise InputError(f"level: expected a number between 0 and 1 such as 0.95, got {level}")
    low, high = np.quantile(np.minimum(draws, 1e300), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def _positive(name: str, value: npt.ArrayLike) -> Floats:
    values = as_floats(value)
    bad = values[~(np.isfinite(values) & (values > 0))]
    if values.size == 0 or bad.size:
        got = "nothing" if values.size == 0 else f"{bad.flat[0]}"
        raise InputError(f"{name}: expected positive finite numbers, got {got}")
    return values
