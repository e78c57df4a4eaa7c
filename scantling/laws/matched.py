"""Runs of two families that can be compared: same paths, overlapping compute."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from scantling.errors import InputError, suggest
from scantling.laws.bootstrap import Codes
from scantling.laws.forms import Floats
from scantling.laws.rows import levels
from scantling.laws.tables import numeric_column, places, require_columns, shorten, text_column


@dataclass(frozen=True, eq=False)
class MatchedRuns:
    """Both families' rows: `second` marks the candidate's, `run` numbers runs within both, `path` the paths."""

    C: Floats
    M: Floats
    loss: Floats
    second: npt.NDArray[np.bool_]
    run: Codes
    path: Codes

    def only(self, keep: npt.NDArray[np.bool_]) -> "MatchedRuns":
        run, path = (np.unique(codes[keep], return_inverse=True)[1] for codes in (self.run, self.path))
        return MatchedRuns(self.C[keep], self.M[keep], self.loss[keep], self.second[keep], run, path)


def matched_runs(
    table: pd.DataFrame,
    baseline: str,
    candidate: str | None,
    wanted: dict[str, str],
) -> tuple[MatchedRuns, list[str], str, list[str]]:
    """Usable rows of both families on their common paths, each run's name, the candidate, and what was left out."""
    require_columns(table, wanted)
    families, runs = (text_column(table, wanted[role], role) for role in ("family", "run"))
    known = sorted(set(families))
    if candidate is None:
        others = [name for name in known if name != baseline]
        if len(others) != 1:
            raise InputError(
                f"candidate: name one of {', '.join(others) or 'no other family'}; the table does not decide"
            )
        candidate = others[0]
    faults = [
        f"{role}: no family {name!r} in column {wanted['family']!r}{suggest(name, known)}"
        for role, name in (("baseline", baseline), ("candidate", candidate))
        if name not in known
    ]
    if baseline == candidate:
        faults.append(f"candidate: expected another family than the baseline {baseline!r}")
    if faults:
        raise InputError(*faults)
    c, y = (numeric_column(table, wanted[role], role) for role in ("compute", "loss"))
    m = numeric_column(table, wanted["path"], "path") if "path" in wanted else np.ones(len(table))
    chosen = np.isin(families, (baseline, candidate))
    good = np.logical_and.reduce([np.isfinite(x) & (x > 0) for x in (c, y, m)])
    notes = []
    if (chosen & ~good).any():
        where = places(table)
        named = shorten(where[i] for i in np.flatnonzero(chosen & ~good))
        notes.append(f"left out, a value is not a positive finite number: {named}")
    keep = chosen & good
    second = np.array(families)[keep] == candidate
    names = [name for name, kept in zip(runs, keep, strict=True) if kept]
    if second.all() or not second.any():
        raise InputError(*notes, f"no usable rows of {baseline if second.all() else candidate} are left")
    codes = np.unique([f"{int(s)} {name}" for s, name in zip(second, names, strict=True)], return_inverse=True)[1]
    rows = MatchedRuns(c[keep], m[keep], y[keep], second, codes, levels(m[keep], 1.1))
    shared = np.intersect1d(rows.path[second], rows.path[~second])
    if not len(shared):
        raise InputError(f"{baseline} and {candidate} share no value of {wanted['path']}: matched runs need one path")
    off = ~np.isin(rows.path, shared)
    if off.any():
        notes.append(f"{int(off.sum())} rows on paths that only one family has are left out")
        names = [name for name, gone in zip(names, off, strict=True) if not gone]
        rows = rows.only(~off)
    for name, mask in ((baseline, ~rows.second), (candidate, rows.second)):
        distinct = int(levels(rows.C[mask], 1.02).max()) + 1
        if distinct < 3:
            raise InputError(f"{name}: expected at least 3 distinct compute budgets, got {distinct}; add runs")
    a, b = rows.C[~rows.second], rows.C[rows.second]
    if min(a.max(), b.max()) < max(a.min(), b.min()):
        raise InputError(
            f"the families share no compute: {baseline} {a.min():.3g} to {a.max():.3g}, {candidate} {b.min():.3g} to "
            f"{b.max():.3g} FLOPs; a saving would be extrapolated"
        )
    return rows, names, candidate, notes
