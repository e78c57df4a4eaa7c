"""What is left out of a table before a law is fitted, by rules that are stated, and never silently.

The rules, in order:
1. a row whose state says that the run did not end well (diverged, crashed, failed, killed, running) is left out;
2. a run whose model grew on the way, or that began with another run's weights, is left out: its parameters and tokens are not
   those of one model;
3. a row equal to an earlier one in every column is left out;
4. a row whose loss is at least `DIVERGED` times that of a run with no more parameters and no more tokens is left out: it
   diverged, or was trained with settings that no law describes;
5. a row with a value that is not a positive finite number is left out (by the fit itself).
A table whose units contradict each other, or whose runs were trained in several precisions, is refused.
"""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from scantling.errors import InputError, suggest
from scantling.laws.forms import Floats
from scantling.laws.tables import numeric_column, places, shorten
from scantling.units import DECIMAL

DIVERGED = 1.15
MOST_DIVERGED = 1 / 3  # of the rows; beyond, the columns are more likely wrong than the runs
STATES = ("status", "state", "State")
ENDED = {"done", "finished", "completed", "complete", "success", "ok", ""}
CELLS = 2000  # distinct sizes (or tokens) compared one by one; beyond, in bins of 1%
LOSS_UNITS = {"nats": 1.0, "bits": math.log(2)}
HIGHEST_LOSS = 20.0  # nats per token; the logarithm of any vocabulary is far below
LOWEST_LOSS = 0.01  # nats per token, of the worst run
SMALLEST = 1000.0  # parameters or tokens; below, a column is in millions or billions


def clean(
    table: pd.DataFrame,
    *,
    loss: str = "loss",
    params: str = "N",
    tokens: str = "D",
    units: Mapping[str, str] | None = None,
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """The rows that the rules leave, in nats and counts, and a sentence for each rule that left some out.

    Args:
        table: rows as read.
        loss: column of losses.
        params: column of parameters.
        tokens: column of training tokens.
        units: of columns: K, M, B, T for counts; bits, nats or perplexity for the loss.

    Raises:
        InputError: units that contradict each other, or several precisions.
    """
    table, said = _in_units(table, dict(units or {}), loss)
    _refuse_precisions(table)
    table, more = _ended(table)
    said += more
    table, more = _from_scratch(table)
    said += more
    repeated = _repeated(table) if table.index.name == "line" else np.zeros(len(table), dtype=np.bool_)
    if repeated.any():
        named = shorten(np.array(places(table))[repeated].tolist())
        said.append(f"left out, equal to an earlier row in every column: {named}")
        table = table[~repeated]
    if loss in table.columns and params in table.columns and tokens in table.columns:
        n, d, y = (numeric_column(table, c, r) for c, r in ((params, "params"), (tokens, "tokens"), (loss, "loss")))
        _refuse_units(loss, params, tokens, n, d, y)
        gone = diverged(n, d, y)
        if gone.any():
            where = places(table)
            named = shorten(f"{where[i]} ({y[i]:.4g})" for i in np.flatnonzero(gone))
            if gone.mean() > MOST_DIVERGED:
                raise InputError(
                    f"loss does not fall with size and tokens: {int(gone.sum())} of {len(gone)} rows have {DIVERGED:g} times the "
                    f"loss of a run with no more parameters and no more tokens ({named}); check the columns"
                )
            said.append(
                f"left out, diverged: the loss is {DIVERGED:g} times that of a run with no more parameters and no more "
                f"tokens: {named}"
            )
            table = table[~gone]
    return table, tuple(said)


def _repeated(table: pd.DataFrame) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    try:
        return table.duplicated().to_numpy()
    except TypeError:  # cells that hold lists or objects
        return table.astype(str).duplicated().to_numpy()


def diverged(n: Floats, d: Floats, loss: Floats) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """(n,) whether a row's loss is `DIVERGED` times the lowest among rows with no more parameters and no more tokens."""
    good = np.isfinite(n) & np.isfinite(d) & np.isfinite(loss) & (n > 0) & (d > 0) & (loss > 0)
    found = np.zeros(len(n), dtype=np.bool_)
    if not good.any():
        return found
    codes = []
    for values in (n[good], d[good]):
        distinct, code = np.unique(values, return_inverse=True)
        if len(distinct) > CELLS:
            code = np.floor(np.log(values / values.min()) / 0.01).astype(np.intp)
        codes.append(np.minimum(code, 4 * CELLS))
    lowest = np.full((codes[0].max() + 1, codes[1].max() + 1), np.inf)
    np.minimum.at(lowest, tuple(codes), loss[good])
    lowest = np.minimum.accumulate(np.minimum.accumulate(lowest, axis=0), axis=1)
    found[good] = loss[good] >= DIVERGED * lowest[tuple(codes)]
    return found


def _ended(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    column = next((name for name in STATES if name in table.columns), None)
    if column is None or not pd.api.types.is_string_dtype(table[column].dropna().astype(object).map(type).map(str)):
        return table, []
    states = table[column].fillna("").astype(str).str.strip().str.lower()
    bad = ~states.isin(ENDED).to_numpy()
    numeric = pd.to_numeric(states, errors="coerce").notna().all()
    if not bad.any() or numeric:
        return table, []
    where = np.array(places(table))
    named = shorten(f"{place} ({state})" for place, state in zip(where[bad], states[bad], strict=True))
    kept = table[~bad]
    if kept.empty:
        raise InputError(f"no run ended well, column {column!r}: {named}; there is nothing to fit")
    return kept, [f"left out, {column} is not 'finished': {named}"]


def _from_scratch(table: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    if "grown" not in table.columns:
        return table, []
    grown = table["grown"].isin([True, "True", "true"]).to_numpy()
    if not grown.any():
        return table, []
    named = shorten(np.array(places(table))[grown].tolist())
    if grown.all():
        raise InputError(
            f"every run was grown or began with another's weights ({named}); a law needs runs from scratch"
        )
    return table[~grown], [f"left out, grown or begun with another run's weights: {named}"]


def _refuse_precisions(table: pd.DataFrame) -> None:
    if "precision" not in table.columns:
        return
    kinds = sorted({str(value) for value in table["precision"].dropna() if str(value).strip()})
    if len(kinds) > 1:
        counts = ", ".join(f"{kind} ({int((table['precision'].astype(str) == kind).sum())})" for kind in kinds)
        raise InputError(
            f"the runs were trained in several precisions: {counts}; losses of one law must share theirs: fit one with "
            f"--only precision={kinds[0]}"
        )


def _in_units(table: pd.DataFrame, units: dict[str, str], loss: str) -> tuple[pd.DataFrame, list[str]]:
    said = []
    for column, unit in units.items():
        name = loss if column == "loss" else column
        if name not in table.columns:
            raise InputError(
                f"--unit {column}={unit}: no column {name!r}{suggest(name, list(map(str, table.columns)))}"
            )
        values = numeric_column(table, name, "unit")
        if name == loss and unit in LOSS_UNITS:
            values = values * LOSS_UNITS[unit]
        elif name == loss and unit == "perplexity":
            with np.errstate(all="ignore"):
                values = np.log(values)
        elif unit.upper() in DECIMAL and unit:
            values = values * DECIMAL[unit.upper()]
        else:
            known = [*LOSS_UNITS, "perplexity", *(key for key in DECIMAL if key)]
            raise InputError(
                f"--unit {column}={unit}: unknown unit{suggest(unit, known)}; expected one of {', '.join(known)}"
            )
        table = table.assign(**{name: values})
        said.append(f"{name} was read in {unit}")
    if "loss" not in units and loss not in units:
        low = loss.lower()
        for word, unit in (
            ("bits", "bits"),
            ("bpb", "bits"),
            ("bpc", "bits"),
            ("perplexity", "perplexity"),
            ("ppl", "perplexity"),
        ):
            if word in low and loss in table.columns:
                raise InputError(
                    f"column {loss!r} (argument loss) seems to hold {unit}, laws are fitted in nats: give --unit loss={unit} "
                    "(or --unit loss=nats if it holds nats)"
                )
    return table, said


def _refuse_units(loss: str, params: str, tokens: str, n: Floats, d: Floats, y: Floats) -> None:
    faults = []
    high = float(np.nanmax(np.where(np.isfinite(y), y, np.nan), initial=0.0))
    if high > HIGHEST_LOSS:
        faults.append(
            f"column {loss!r}: {high:.4g} is more than any loss in nats per token; perplexities need --unit loss=perplexity"
        )
    positive = y[np.isfinite(y) & (y > 0)]
    if len(positive) and positive.max() < LOWEST_LOSS:
        faults.append(
            f"column {loss!r}: at most {positive.max():.4g}, less than any loss of language in nats per token; check the column"
        )
    for name, values in ((params, n), (tokens, d)):
        usable = values[np.isfinite(values) & (values > 0)]
        if len(usable) and usable.min() < SMALLEST:
            mixed = usable.max() > 1000 * SMALLEST
            faults.append(
                f"column {name!r}: {usable.min():g} is no count of {'parameters' if name == params else 'tokens'}"
                + (
                    f" beside {usable.max():g}: mixed units; write all as counts, or all with units, as 70M"
                    if mixed
                    else f"; write counts (70000000, 7e7 or 70M), or give --unit {name}=M (K, M, B, T)"
                )
            )
    if faults:
        raise InputError(*faults)
