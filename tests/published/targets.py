"""The published numbers and tables that a correct implementation must reproduce."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

DATA = Path(__file__).parents[1] / "data" / "scaling"


@cache
def targets() -> dict[str, Any]:
    found = json.loads((DATA / "targets.json").read_text(encoding="utf-8"))["targets"]
    return {target["id"]: target for target in found}


def value(name: str) -> Any:
    return targets()[name]["value"]


def table(name: str) -> pd.DataFrame:
    return pd.read_csv(DATA / f"{name}.csv")


def kept_rows() -> pd.DataFrame:
    """The 240 rows of the Chinchilla replication, in file order."""
    every = table("chinchilla_epoch")
    return every[every.kept == 1].reset_index(drop=True)
