"""Tables of runs into laws per family and the loss-matched saving between families, with what was found in sentences."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from scantling.errors import InputError, suggest
from scantling.laws import LawFit, Saving, fit, read_table, saving
from scantling.record import find_records
from scantling.study import collect

SCHEMA = "scantling.compare/1"


@dataclass(frozen=True)
class Comparison:
    """Laws per family, savings against the baseline, and sentences."""

    families: dict[str, LawFit]
    savings: tuple[Saving, ...]
    findings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data; `saving` is the first candidate's, `savings` all of them."""
        savings = [_finite({**dataclasses.asdict(item), "sentence": item.sentence()}) for item in self.savings]
        return {
            "schema": SCHEMA,
            "families": {name: law.to_json() for name, law in self.families.items()},
            "saving": savings[0] if savings else None,
            "savings": savings,
            "findings": list(self.findings),
        }


def read_rows(path: Path, count: str, separator: str | None = None) -> tuple[pd.DataFrame, dict[str, str] | None]:
    """A table of runs from a file or a study folder, and how its columns are counted where that is known.

    Runs of a folder carry their precision, so that a law over several is refused.

    Raises:
        InputError: no runs, or not a table.
    """
    if not path.is_dir():
        return read_table(path, separator), None
    rows = collect(path, count)
    if rows.empty:
        raise InputError(f"{path}: no finished run (record.json) in this folder; run the study first")
    gone = rows[rows.status != "done"]
    if len(gone) == len(rows):
        raise InputError(f"{path}: all {len(rows)} runs diverged; there is nothing to fit")
    precisions = {str(folder): record.environment.get("precision", "") for folder, record in find_records(path)}
    rows = rows.assign(precision=rows.folder.map(precisions))
    conventions = {
        "N": f"{count} parameters",
        "D": "tokens trained on",
        "C": "3 x forward FLOPs as performed, full attention, head included",
        "loss": "validation, nats per token",
    }
    return rows, conventions


def select(rows: pd.DataFrame, conditions: tuple[str, ...]) -> pd.DataFrame:
    """Rows where column=value holds for every condition.

    Raises:
        InputError: an unknown column, or no row left.
    """
    for condition in conditions:
        column, equals, value = condition.partition("=")
        if not equals or column not in rows.columns:
            raise InputError(f"--only {condition}: no column {column!r}{suggest(column, rows.columns)}")
        kept = rows[
            (rows[column].astype(str) == value) | (pd.to_numeric(rows[column], errors="coerce") == _number(value))
        ]
        if kept.empty:
            raise InputError(
                f"--only {condition}: no row has it; the column holds {', '.join(sorted(set(map(_shown, rows[column])))[:8])}"
            )
        rows = kept
    return rows


def _number(text: str) -> float:
    """The number a text holds, or NaN, which equals nothing."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def compare_families(rows: pd.DataFrame, column: str, baseline: str | None, settings: dict[str, Any]) -> Comparison:
    """Fit each family, and the saving of every other family over the baseline.

    The saving needs the columns C (actual training FLOPs), the loss, and, when present, `tokens_per_parameter` as the path
    and `cell` as what pairs runs across families.
    """
    if column not in rows.columns:
        raise InputError(f"--compare {column}: no such column{suggest(column, rows.columns)}")
    names = list(dict.fromkeys(rows[column].astype(str)))
    first = baseline if baseline is not None else ("uniform" if "uniform" in names else names[0])
    if first not in names:
        raise InputError(f"--baseline {first}: no such family{suggest(first, names)}")
    if len(names) < 2:
        raise InputError(f"--compare {column}: expected at least two families, got only {names[0]!r}")
    names = [first, *(name for name in names if name != first)]
    laws = {name: fit(rows[rows[column].astype(str) == name], **settings) for name in names}
    if not {"cell", "run"} & set(rows.columns):
        rows = rows.assign(run=[f"row {i + 1}" for i in range(len(rows))])
    path = "tokens_per_parameter" if "tokens_per_parameter" in rows.columns else None
    savings = tuple(
        saving(
            rows,
            baseline=first,
            candidate=name,
            family=column,
            loss=settings["loss"],
            run="cell" if "cell" in rows.columns else "run",
            path=path,
            resamples=settings["resamples"],
            seed=settings["seed"],
        )
        for name in names[1:]
    )
    return Comparison(
        laws, savings, tuple([_law_sentence(name, law) for name, law in laws.items()] + [s.sentence() for s in savings])
    )


def _finite(value: Any) -> Any:
    """JSON knows no infinities: an interval end that resamples never reach becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _law_sentence(name: str, law: LawFit) -> str:
    """What a family's fit amounts to."""
    text = f"{name}: {law.n} runs fit L(N, D)"
    if law.residual_sd is not None:
        text += f" with residuals of {law.residual_sd:.2%}"
    if law.holdouts:
        held = law.holdouts[0]
        text += f"; fitted without the {held.rule}, the law predicts them to {held.are:.2%} (bias {held.bias:+.2%})"
    return text + "."
