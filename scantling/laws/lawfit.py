"""A fitted or published law as data: parameters, uncertainty, where it was measured, and what is wrong with it.

Fits and published laws are the same kind of object: a published one lacks what its source does not give.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scantling.errors import InputError, suggest
from scantling.laws.evidence import (
    Certificate,
    Estimate,
    FittedRows,
    HoldOut,
    OptimumEstimate,
    Prediction,
    Residuals,
    Sensitivity,
)
from scantling.laws.forms import Chinchilla, Downstream, Floats, as_floats, compute_optimum, from_overtraining
from scantling.laws.formula import Formula, base_of, parse_law

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = "scantling.law/1"
NEARLY = 1.01  # a size is outside the fitted range when it is so many times beyond: sizes are quoted rounded


@dataclass(frozen=True, eq=False)
class LawFit:
    """A law with what is known about it.

    Attributes:
        law: name of the form, or its equation; "chinchilla" is L(N, D) = E + A N^-alpha + B D^-beta.
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
        downstream_draws: (R, 3) bootstrap estimates of epsilon, k, gamma of those laws, by name, where there are any.
        fingerprint: SHA-256 of the rows used, independent of their order.
        warnings: what a reader must know before using the law.
        groups: the values of each grouping column of the law.
        ties: parameters that copy another.
        bounds: lowest and highest values that were allowed.
        at_bound: parameters that ended at a bound.
        profiles: 95% profile interval of each free parameter; an end is None where the rows set no limit.
        profile_curves: the objective with a parameter held: values, and chi-square statistic there.
        left_out: lowest and highest value of each parameter over fits with one run left out.
        residuals: what the residuals look like.
        sensitivity: the same rows fitted in other ways.
        extrapolation: hold-outs at several shares of the compute: fit the cheap part, predict the dear part.
        rows: the rows fitted, for a drawing; of a published law None.
        predicts: what the equation gives: "loss", or "N" or "D" for the optimum over compute (approaches 1 and 2).
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
    downstream_draws: Mapping[str, Floats] = field(default_factory=dict)
    fingerprint: str | None = None
    warnings: tuple[str, ...] = ()
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    at_bound: tuple[str, ...] = ()
    profiles: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    profile_curves: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=dict)
    left_out: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    residuals: Residuals | None = None
    sensitivity: tuple[Sensitivity, ...] = ()
    extrapolation: tuple[HoldOut, ...] = ()
    rows: FittedRows | None = None
    predicts: str = "loss"

    @property
    def formula(self) -> Formula:
        """The law's equation."""
        return parse_law(self.law)

    @property
    def form(self) -> Chinchilla:
        """The point estimate as a closed form of N and D.

        Raises:
            InputError: the law is not one of N and D.
        """
        if self.law == "overtraining":
            return from_overtraining(**self.params)
        if self.law != "chinchilla":
            raise InputError(
                f"law: {self.law!r} is not a law of parameters and tokens; fit chinchilla, or predict at its own columns "
                f"{', '.join(self.formula.columns)}"
            )
        return Chinchilla(**self.params)

    def _chinchilla_draws(self) -> Floats:
        """(5, R) draws of A, B, E, alpha, beta."""
        assert self.draws is not None
        columns = dict(zip(self.params, self.draws.T, strict=True))
        if self.law == "overtraining":
            eta = columns["eta"]
            return np.stack([columns["a"] * 6**-eta, columns["b"] * 6**-eta, columns["E"], 2 * eta, 2 * eta])
        return self.draws.T

    def intervals(self, level: float = 0.95) -> dict[str, tuple[float, float] | None]:
        """Percentile interval of each parameter from the draws; a source's own 95% interval when there are no draws.

        Fixed parameters have none, nor those that every draw has at a bound. Marginal intervals must not be combined: A
        and alpha are correlated above 0.999.
        """
        if self.draws is None:
            given = self.stated_intervals if level == 0.95 else {}
            return {name: given.get(name) for name in self.params}
        low, high = _percentiles(self.draws, level)
        return {
            name: None
            if name in self.fixed or (name in self.at_bound and low[i] == high[i])
            else (float(low[i]), float(high[i]))
            for i, name in enumerate(self.params)
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
        exponents, constant = self.formula.exponents, self.formula.constant
        for i, name in enumerate(self.params):
            copied = name in self.ties or (self.tied and self.law == "chinchilla" and name == "beta")
            if name not in (*self.fixed, *self.at_bound) and not copied:
                log = base_of(name) not in (*exponents, constant)
                columns[f"log_{name}" if log else name] = np.log(self.draws[:, i]) if log else self.draws[:, i]
        import pandas as pd

        return pd.DataFrame(columns)

    def predict(self, N: npt.ArrayLike, D: npt.ArrayLike, level: float = 0.95) -> Prediction:
        """The loss at N parameters and D tokens, with a percentile interval over the draws.

        Raises:
            InputError: N, D or `level` is not a positive finite number (level below 1), or the law needs other columns.
        """
        n, d = np.broadcast_arrays(_positive("N", N), _positive("D", D))
        given = {"N": n, "D": d, "M": d / n, "C": 6 * n * d}
        missing = [name for name in (*self.formula.columns, *self.groups) if name not in given]
        if missing:
            raise InputError(f"law {self.law!r}: needs {', '.join(missing)} besides N and D; use predict_at")
        notes = self.outside(n, d)
        return self._predict({name: given[name] for name in self.formula.columns}, {}, level, notes)

    def predict_at(
        self, columns: Mapping[str, npt.ArrayLike], groups: Mapping[str, str] | None = None, level: float = 0.95
    ) -> Prediction:
        """The loss at values of the law's own columns.

        Args:
            columns: a number or array for each numeric column; M and C follow from N and D.
            groups: the group, for each grouping column.
            level: of the interval.

        Raises:
            InputError: a column or group is missing, unknown, or not a positive finite number.
        """
        given = {name: _positive(name, value) for name, value in columns.items()}
        if {"N", "D"} <= set(given):
            given |= {k: v for k, v in {"M": given["D"] / given["N"], "C": 6 * given["N"] * given["D"]}.items()
                      if k not in given}  # fmt: skip
        groups = dict(groups or {})
        faults = [
            f"{name}: the law {self.law!r} needs it; give a number"
            for name in self.formula.columns
            if name not in given
        ]
        needed = (*self.formula.columns, "N", "D", "M", "C", *self.groups)
        faults += [
            f"{name}: not a column of the law{suggest(name, needed)}"
            for name in (*columns, *groups)
            if name not in needed
        ]
        for name, known in self.groups.items():
            if groups.get(name) not in known:
                faults.append(
                    f"{name}: the law was fitted for {', '.join(known)}, got {groups.get(name, 'nothing')}; give one of them"
                )
        if faults:
            raise InputError(*faults)
        values = dict(
            zip(self.formula.columns, np.broadcast_arrays(*(given[n] for n in self.formula.columns)), strict=True)
        )
        return self._predict(values, groups, level, self._beyond(given))

    def predict_error(self, name: str, N: npt.ArrayLike, D: npt.ArrayLike, level: float = 0.95) -> Prediction:
        """The task error at N parameters and D tokens: the law of loss chained to the law from loss to that error.

        The interval carries the uncertainty of both laws where both have draws, and of one where only that one has.

        Raises:
            InputError: no such error law, or as `predict`.
        """
        n, d = np.broadcast_arrays(_positive("N", N), _positive("D", D))
        found = self.predict(n, d, level)
        losses = None
        if self.draws is not None:
            given = {"N": n, "D": d, "M": d / n, "C": 6 * n * d}
            flat = {column: given[column].reshape(-1) for column in self.formula.columns}
            draws = {key: self.draws[:, i : i + 1] for i, key in enumerate(self.params)}
            losses = self.formula.predict(draws, flat, {}).reshape(-1, *n.shape)
        answer = self._error(name, found.value, losses, level)
        return replace(answer, notes=(*self.outside(n, d), *answer.notes))

    def error_at_loss(self, name: str, loss: npt.ArrayLike, level: float = 0.95) -> Prediction:
        """The task error at a measured loss, with the uncertainty of the law from loss to error.

        Raises:
            InputError: no such error law, or `loss` or `level` is not usable.
        """
        return self._error(name, _positive("loss", loss), None, level)

    def _error(self, name: str, loss: Floats, losses: Floats | None, level: float) -> Prediction:
        if name not in self.downstream:
            raise InputError(f"{name}: the law has no such error{suggest(name, list(self.downstream))}")
        if not 0 < level < 1:
            raise InputError(f"level: expected a number between 0 and 1 such as 0.95, got {level}")
        law, own = self.downstream[name], self.downstream_draws.get(name)
        value = law.error(loss)
        if own is None and losses is None:
            return Prediction(value, None, None, (f"{name}: no interval, its source gives no joint uncertainty",))
        notes = () if own is not None else (f"{name}: the interval is that of the loss alone",)
        if own is None:
            spread = law.error(losses if losses is not None else loss)
        else:
            count = len(own) if losses is None else min(len(own), len(losses))
            epsilon, k, gamma = (column[:count].reshape(-1, *[1] * np.ndim(loss)) for column in own.T)
            spread = epsilon - k * np.exp(-gamma * (loss if losses is None else losses[:count]))
        low, high = _percentiles(spread, level)
        return Prediction(value, low, high, notes)

    def _predict(
        self, columns: Mapping[str, Floats], groups: Mapping[str, str], level: float, notes: tuple[str, ...]
    ) -> Prediction:
        shape = next(iter(columns.values())).shape
        flat = {name: values.reshape(-1) for name, values in columns.items()}
        size = next(iter(flat.values())).size
        rows = {name: [group] * size for name, group in groups.items()}
        value = as_floats(self.formula.predict(self.params, flat, rows)).reshape(shape)
        if self.draws is None:
            return Prediction(value, None, None, (*notes, f"no interval: {self.bootstrap}"))
        draws = {name: self.draws[:, i : i + 1] for i, name in enumerate(self.params)}
        low, high = _percentiles(self.formula.predict(draws, flat, rows), level)
        return Prediction(value, low.reshape(shape), high.reshape(shape), notes)

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
        spread = compute_optimum(self._chinchilla_draws(), c)
        found = {}
        for name in names:
            low, high = _percentiles(getattr(spread, name), level)
            found[name] = Estimate(float(getattr(best, name)), float(low), float(high))
        return OptimumEstimate(c, **found, notes=notes)

    def outside(self, N: npt.ArrayLike, D: npt.ArrayLike, prefix: str = "") -> tuple[str, ...]:
        """A sentence for each of N, D and M = D/N that leaves the fitted range; empty inside it."""
        n, d = as_floats(N), as_floats(D)
        return self._beyond({"N": n, "D": d, "M": d / n} | ({} if "N" in self.ranges else {"C": 6 * n * d}), prefix)

    def _beyond(self, columns: Mapping[str, Floats], prefix: str = "") -> tuple[str, ...]:
        notes = []
        for name, values in columns.items():
            if name not in self.ranges:
                continue
            low, high = self.ranges[name]
            if np.max(values) > high * NEARLY:
                notes.append(
                    f"{prefix}{name} = {np.max(values):.4g} is {np.max(values) / high:.3g} times above the fitted "
                    f"range {low:.4g} to {high:.4g}"
                )
            if np.min(values) < low / NEARLY:
                notes.append(
                    f"{prefix}{name} = {np.min(values):.4g} is {low / np.min(values):.3g} times below the fitted "
                    f"range {low:.4g} to {high:.4g}"
                )
        return tuple(notes)

    def to_json(self) -> dict[str, Any]:
        """A plain dict of JSON types; `from_json` gives the same law back."""
        plain: dict[str, Any] = {"schema": SCHEMA}
        for f in fields(self):
            plain[f.name] = _plain(getattr(self, f.name))
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
        try:
            formula = parse_law(str(given["law"]))
        except InputError as error:
            raise InputError(
                *(f"{where}: {fault.replace('law: unknown', 'unknown law')}" for fault in error.faults)
            ) from None
        try:
            given["groups"] = {name: tuple(map(str, values)) for name, values in given.get("groups", {}).items()}
            names = formula.parameters(given["groups"])
            _check_keys(f"{where}, params", given["params"], names, names)
            given["params"] = {name: float(given["params"][name]) for name in names}
            for key in ("ranges", "stated_intervals", "bounds", "left_out"):
                given[key] = {name: (float(lo), float(hi)) for name, (lo, hi) in given.get(key, {}).items()}
            given["profiles"] = {name: (lo, hi) for name, (lo, hi) in given.get("profiles", {}).items()}
            given["profile_curves"] = {
                name: (tuple(map(float, x)), tuple(map(float, y)))
                for name, (x, y) in given.get("profile_curves", {}).items()
            }
            if given.get("draws") is not None:
                given["draws"] = as_floats(given["draws"]).reshape(-1, len(names))
            if given.get("certificate") is not None:
                found = _record(Certificate, f"{where}, certificate", given["certificate"])
                basins = tuple((float(level), int(count)) for level, count in found.basins)
                given["certificate"] = replace(found, basins=basins)
            if given.get("residuals") is not None:
                shape = _record(Residuals, f"{where}, residuals", given["residuals"])
                given["residuals"] = replace(shape, worst=tuple((int(i), float(r)) for i, r in shape.worst))
            if given.get("rows") is not None:
                given["rows"] = _fitted_rows(f"{where}, rows", given["rows"])
            for key, kind in (("holdouts", HoldOut), ("extrapolation", HoldOut), ("sensitivity", Sensitivity)):
                given[key] = tuple(_record(kind, f"{where}, {key}", item) for item in given.get(key, ()))
            given["downstream"] = {
                name: _record(Downstream, f"{where}, downstream {name}", law)
                for name, law in given.get("downstream", {}).items()
            }
            given["downstream_draws"] = {
                name: as_floats(values).reshape(-1, 3) for name, values in given.get("downstream_draws", {}).items()
            }
            given["at_bound"] = tuple(map(str, given.get("at_bound", ())))
            given["warnings"] = tuple(str(sentence) for sentence in given.get("warnings", ()))
            law = cls(**given)
            if law.law in ("chinchilla", "overtraining"):
                _ = law.form
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{where}: not a law as scantling writes it ({error}); fit the law again") from None
        return law


def _plain(value: Any) -> Any:
    """Dataclasses, arrays and tuples as JSON knows them; a number that is not finite becomes null."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _fitted_rows(where: str, plain: Mapping[str, Any]) -> FittedRows:
    found = _record(FittedRows, where, plain)
    every = (*found.columns.values(), *found.groups.values(), found.measured, found.predicted)
    if len({len(values) for values in every}) != 1:
        raise InputError(f"{where}: expected columns of one length; fit the law again")
    return FittedRows(
        columns={name: tuple(map(float, values)) for name, values in found.columns.items()},
        groups={name: tuple(map(str, values)) for name, values in found.groups.items()},
        measured=tuple(map(float, found.measured)),
        predicted=tuple(map(float, found.predicted)),
        total=int(found.total),
    )


def _record(kind: type[Any], where: str, plain: Mapping[str, Any]) -> Any:
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    _check_keys(where, plain, [f.name for f in fields(kind)], needed)
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
