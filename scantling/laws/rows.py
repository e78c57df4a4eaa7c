"""The rows a fit uses: checked, in an order of their own, with a fingerprint."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd

from scantling.errors import InputError
from scantling.laws.bootstrap import Codes, equal_run_weights
from scantling.laws.forms import Floats
from scantling.laws.tables import numeric_column, places, require_columns, shorten, text_column

ROLES = {"N": "params", "D": "tokens"}  # the arguments that name the columns of parameters and tokens


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows a fit uses, in an order that does not depend on the table's.

    Attributes:
        columns: (n,) values of each column of the law.
        loss: (n,) nats per token.
        weight: (n,) weights of the objective.
        run: (n,) number of each row's run.
        fingerprint: SHA-256 of the rows.
        groups: for each grouping column of the law, the group of each row.
    """

    columns: Mapping[str, Floats]
    loss: Floats
    weight: Floats
    run: Codes
    fingerprint: str
    groups: Mapping[str, list[str]] = field(default_factory=dict)

    @property
    def N(self) -> Floats:
        """Parameters."""
        return self.columns["N"]

    @property
    def D(self) -> Floats:
        """Training tokens."""
        return self.columns["D"]

    @property
    def M(self) -> Floats | None:
        """Tokens per parameter, where the law knows both or M itself."""
        if "N" in self.columns and "D" in self.columns:
            return np.asarray(self.D / self.N, dtype=np.float64)
        return self.columns.get("M")

    @property
    def C(self) -> Floats | None:
        """Training FLOPs, 6 N D where there is no column C."""
        if "C" in self.columns:
            return self.columns["C"]
        return np.asarray(6 * self.N * self.D) if "N" in self.columns and "D" in self.columns else None

    def only(self, keep: npt.NDArray[np.bool_]) -> "Rows":
        """A selection of rows, runs numbered anew."""
        run = np.unique(self.run[keep], return_inverse=True)[1]
        columns = {name: values[keep] for name, values in self.columns.items()}
        groups = {
            name: [v for v, kept in zip(values, keep, strict=True) if kept] for name, values in self.groups.items()
        }
        return Rows(columns, self.loss[keep], self.weight[keep], run, self.fingerprint, groups)


def usable_rows(
    table: pd.DataFrame,
    wanted: Mapping[str, str],
    *,
    loss: str,
    weights: str | None = None,
    clusters: str | None = None,
    groups: Mapping[str, str] | None = None,
    sizes: tuple[str, str] = ("N", "D"),
) -> tuple[Rows, list[str]]:
    """The usable rows in canonical order, and a sentence about those left out.

    Args:
        table: one row per run or checkpoint.
        wanted: the table's column for each column of the law; M and C missing from the table are made from N and D.
        loss: column of losses.
        weights: column of weights.
        clusters: column naming each row's run.
        groups: the table's column for each grouping column of the law.
        sizes: the table's columns of parameters and tokens, from which M and C are made.
    """
    groups = dict(groups or {})
    table = _with_derived(table, wanted, sizes)
    roles = {ROLES.get(name, name): column for name, column in wanted.items()} | {"loss": loss}
    roles |= {"weights": weights} if weights else {}
    labels = groups | ({"clusters": clusters} if clusters else {})
    require_columns(table, roles | labels)
    columns = {role: numeric_column(table, name, role) for role, name in roles.items()}
    where = places(table)
    usable = np.ones(len(table), dtype=np.bool_)
    warnings = []
    for role, values in columns.items():
        bad = ~(np.isfinite(values) & (values > 0))
        if bad.any():
            named = shorten(f"{where[i]} ({values[i]:g})" for i in np.flatnonzero(bad))
            warnings.append(f"left out, {roles[role]} is not a positive finite number: {named}")
        usable &= ~bad
    if not usable.any():
        raise InputError(*warnings, "no usable rows are left; a law needs several runs")
    y = columns["loss"][usable]
    x = {name: columns[ROLES.get(name, name)][usable] for name in wanted}
    names = np.array(text_column(table, clusters, "clusters") if clusters else [""] * len(table))[usable]
    kinds = {name: np.array(text_column(table, column, name))[usable] for name, column in groups.items()}
    per_run = np.unique(names, return_inverse=True)
    if weights:
        w = columns["weights"][usable]
    elif clusters:
        w = equal_run_weights(per_run[1])
    else:
        w = np.ones(len(y))
    order = np.lexsort((*kinds.values(), per_run[1], w, y, *reversed(x.values())))
    x = {name: values[order] for name, values in x.items()}
    y, w, names = y[order], w[order], names[order]
    kinds = {name: values[order] for name, values in kinds.items()}
    run = per_run[1][order] if clusters else np.arange(len(y))
    numbers = zip(*(values.tolist() for values in (*x.values(), y, w)), strict=True)
    tails = zip(names.tolist(), *(values.tolist() for values in kinds.values()), strict=True)
    lines = [",".join([*map(repr, row), *tail]) for row, tail in zip(numbers, tails, strict=True)]
    fingerprint = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return Rows(x, y, w, run, fingerprint, {name: values.tolist() for name, values in kinds.items()}), warnings


def _with_derived(table: pd.DataFrame, wanted: Mapping[str, str], sizes: tuple[str, str]) -> pd.DataFrame:
    """M = D / N and C = 6 N D where the law wants them and the table has only N and D."""
    for name in ("M", "C"):
        if wanted.get(name) == name and name not in table.columns and set(sizes) <= set(table.columns):
            n, d = numeric_column(table, sizes[0], "params"), numeric_column(table, sizes[1], "tokens")
            with np.errstate(all="ignore"):
                table = table.assign(**{name: d / n if name == "M" else 6 * n * d})
    return table


def levels(values: Floats, width: float) -> Codes:
    """Numbers from 0 up for groups of nearly equal values: a group ends at `width` times its smallest member."""
    order = np.argsort(values, kind="stable")
    ordered = values[order].tolist()
    found, first, level = [], -math.inf, -1
    for value in ordered:
        if value > first * width or level < 0:
            first, level = value, level + 1
        found.append(level)
    codes = np.empty(len(values), dtype=np.intp)
    codes[order] = found
    return codes
