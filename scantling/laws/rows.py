"""The rows a fit uses: checked, in an order of their own, with a fingerprint."""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from scantling.errors import InputError
from scantling.laws.bootstrap import Codes, equal_run_weights
from scantling.laws.forms import Floats
from scantling.laws.tables import numeric_column, places, require_columns, shorten, text_column


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows a fit uses, in an order that does not depend on the table's."""

    N: Floats
    D: Floats
    loss: Floats
    weight: Floats
    run: Codes
    fingerprint: str

    def only(self, keep: npt.NDArray[np.bool_]) -> "Rows":
        """A selection of rows, runs numbered anew."""
        run = np.unique(self.run[keep], return_inverse=True)[1]
        return Rows(self.N[keep], self.D[keep], self.loss[keep], self.weight[keep], run, self.fingerprint)


def usable_rows(
    table: pd.DataFrame, wanted: dict[str, str], *, weights: str | None, clusters: str | None
) -> tuple[Rows, list[str]]:
    """The usable rows in canonical order, and a sentence about those left out."""
    wanted = wanted | ({"weights": weights} if weights else {})
    require_columns(table, wanted | ({"clusters": clusters} if clusters else {}))
    columns = {role: numeric_column(table, name, role) for role, name in wanted.items()}
    where = places(table)
    usable = np.ones(len(table), dtype=np.bool_)
    warnings = []
    for role, values in columns.items():
        bad = ~(np.isfinite(values) & (values > 0))
        if bad.any():
            named = shorten(f"{where[i]} ({values[i]:g})" for i in np.flatnonzero(bad))
            warnings.append(f"left out, {wanted[role]} is not a positive finite number: {named}")
        usable &= ~bad
    if not usable.any():
        raise InputError(*warnings, "no usable rows are left; a law needs several runs")
    n, d, y = (columns[role][usable] for role in ("params", "tokens", "loss"))
    names = np.array(text_column(table, clusters, "clusters") if clusters else [""] * len(table))[usable]
    per_run = np.unique(names, return_inverse=True)
    if weights:
        w = columns["weights"][usable]
    elif clusters:
        w = equal_run_weights(per_run[1])
    else:
        w = np.ones(len(n))
    order = np.lexsort((per_run[1], w, y, d, n))
    n, d, y, w, names = n[order], d[order], y[order], w[order], names[order]
    run = per_run[1][order] if clusters else np.arange(len(n))
    lines = [
        f"{a!r},{b!r},{c!r},{e!r},{r}" for a, b, c, e, r in zip(*(x.tolist() for x in (n, d, y, w, names)), strict=True)
    ]
    fingerprint = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return Rows(n, d, y, w, run, fingerprint), warnings


def levels(values: Floats, width: float) -> Codes:
    """Numbers from 0 up for groups of nearly equal values: a group ends at `width` times its smallest member."""
    codes = np.zeros(len(values), dtype=np.intp)
    first, level = -math.inf, -1
    for i in np.argsort(values, kind="stable"):
        if values[i] > first * width or level < 0:
            first, level = float(values[i]), level + 1
        codes[i] = level
    return codes
