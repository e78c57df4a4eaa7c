"""The pre-registered rule for predicting larger runs; docs/fitting.md has it in words and the day it was written."""

from typing import Any

import numpy as np
import pandas as pd

from scantling.errors import InputError
from scantling.laws.fitting import fit
from scantling.laws.lawfit import LawFit
from scantling.laws.rows import levels
from scantling.laws.tables import numeric_column, text_column

DELTAS = (1e-3, 1e-2)  # of Huber's loss: with `MANY` rows or more, and with fewer
MANY = 20
EXPONENT = (0.2, 0.5)
LEAST = ((10.0, MANY), (5.0, 6))  # tokens per parameter, and the rows that must remain to ask for so many
WARM = 0.1  # share of a run's tokens whose checkpoints are dropped


def extrapolate(
    table: pd.DataFrame, *, params: str = "N", tokens: str = "D", clusters: str | None = None, **settings: Any
) -> LawFit:
    """The law that the rule fits, with a warning that names each choice it made.

    Args:
        table: one row per run or checkpoint.
        params: column of parameter counts N.
        tokens: column of training tokens D.
        clusters: column naming each row's run, when rows are checkpoints.
        settings: other arguments of `fit` that are not the rule's to choose: loss, weights, resamples, seed, ...

    Raises:
        InputError: as `fit`; or a setting that the rule chooses was given.
    """
    taken = {"law", "objective", "delta", "tied", "fixed", "ties", "bounds"} & set(settings)
    if taken:
        raise InputError(f"the extrapolation rule chooses {', '.join(sorted(taken))} itself; leave it out")
    n, d = numeric_column(table, params, "params"), numeric_column(table, tokens, "tokens")
    with np.errstate(all="ignore"):
        good = np.isfinite(n) & np.isfinite(d) & (n > 0) & (d > 0)
        m = np.where(good, d / np.where(good, n, 1.0), np.nan)
    keep, said = good.copy(), []
    if clusters is not None:
        runs = np.unique(text_column(table, clusters, "clusters"), return_inverse=True)[1]
        longest = np.zeros(runs.max() + 1)
        np.maximum.at(longest, runs[good], d[good])
        late = keep & (d >= WARM * longest[runs])
        if late.sum() < keep.sum():
            said.append(f"{int(keep.sum() - late.sum())} checkpoints from the first tenth of their run are left out")
        keep = late
    for least, fewest in LEAST:
        enough = keep & (m >= least * (1 - 1e-6))
        if enough.sum() >= fewest and _count(n[enough], 1.05) > 1 and _count(m[enough], 1.1) > 1:
            if enough.sum() < keep.sum():
                said.append(
                    f"{int(keep.sum() - enough.sum())} rows with fewer than {least:g} tokens per parameter are left out"
                )
            keep = enough
            break
    chosen: dict[str, Any] = {"law": "chinchilla", "tied": True, "bounds": {"alpha": EXPONENT}}
    if keep.any() and _count(n[keep], 1.05) == 1:
        chosen = {"law": "tokens", "bounds": {"beta": EXPONENT}}
        said.append("one size: a law of tokens alone")
    elif keep.any() and _count(m[keep], 1.1) == 1:
        chosen = {"law": "frontier", "bounds": {"eta": (EXPONENT[0] / 2, EXPONENT[1] / 2)}}
        said.append("one value of tokens per parameter: a law of compute along it")
    sentences = ("fitted by the extrapolation rule of docs/fitting.md", *said)
    return fit(
        table[keep | ~good],
        params=params,
        tokens=tokens,
        clusters=clusters,
        objective="huber",
        delta=DELTAS[0] if keep.sum() >= MANY else DELTAS[1],
        **{**settings, "excluded": (*settings.get("excluded", ()), *sentences)},
        **chosen,
    )


def _count(values: "np.ndarray[tuple[int], np.dtype[np.float64]]", width: float) -> int:
    return int(levels(values, width).max()) + 1
