"""The one structured record a finished run leaves, and tables of many."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from scantling.errors import InputError
from scantling.files import write_json

SCHEMA_VERSION = 2
FILE = "record.json"


@dataclass(frozen=True)
class RunRecord:
    """What a run was and what came of it. Losses are nats per token.

    Attributes:
        status: `done`, or `diverged` (the loss became non-finite; `final` then holds what there is).
        labels: what a study calls this run: family, size, tokens_per_parameter, seed.
        run_hash, spec_hash: identities carried from the YAML to the last plot.
        config: the resolved run, as in config.yaml.
        params: parameter counts by name (`cost.param_counts`).
        flops: training FLOPs by convention, summed over stages: `train` (performed: 3 x forward, full attention),
            `train_causal`, `chinchilla_6nd`; `train_cumulative` adds what the parents performed.
        tokens, steps: what was actually trained on.
        final: `train_loss` (mean of the last 5 % of the steps), `validation_loss`, `bits_per_byte`, and
            `validation_std_error` (over validation batches: sampling noise of the split, not seed noise).
        data: fingerprint, vocabulary and token counts of the corpus; `epochs` seen.
        performance: `seconds`, `tokens_per_second`, `mfu` and the measured `ceiling_flops_per_second` it refers to.
        environment: device, threads, precision and versions.
        warnings: what a reader must know, in sentences.
        parents: stages of the runs whose weights this one began with, oldest first (`RunConfig.history`).
        stages: what this run trained: one entry for each model it was, with the receipt of the growth that led into it.
    """

    name: str
    status: str
    run_hash: str
    spec_hash: str
    config: dict[str, Any]
    params: dict[str, int]
    flops: dict[str, float]
    tokens: int
    steps: int
    seed: int
    final: dict[str, float]
    data: dict[str, Any]
    performance: dict[str, float]
    environment: dict[str, Any]
    labels: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    parents: tuple[dict[str, Any], ...] = ()
    stages: tuple[dict[str, Any], ...] = ()
    schema_version: int = SCHEMA_VERSION

    def write(self, folder: Path) -> None:
        """Write `record.json` atomically; its presence means the run is over."""
        write_json(folder / FILE, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain data, as in `record.json`."""
        return dataclasses.asdict(self)


def read_record(folder: str | Path) -> RunRecord:
    """The record of one run folder.

    Raises:
        InputError: no record, not JSON, or another schema.
    """
    path = Path(folder) / FILE
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; the run is not finished or this is not a run folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a readable record: {error}") from None
    names = {item.name for item in dataclasses.fields(RunRecord)}
    version = value.get("schema_version") if isinstance(value, dict) else None
    if version == 1:  # before runs could grow
        kept = {name: item for name, item in value.items() if name != "parent"}
        value = {**kept, "parents": [], "stages": [], "schema_version": SCHEMA_VERSION}
        version = SCHEMA_VERSION
    if version != SCHEMA_VERSION or set(value) != names:
        raise InputError(f"{path}: expected a record of schema {SCHEMA_VERSION}, got {version!r} with other keys")
    return RunRecord(**value | {name: tuple(value[name]) for name in ("warnings", "parents", "stages")})


def find_records(folder: str | Path) -> list[tuple[Path, RunRecord]]:
    """Every finished run at or below a folder, by path."""
    root = Path(folder)
    return [(path.parent, read_record(path.parent)) for path in sorted(root.rglob(FILE))]


def to_frame(records: Iterable[tuple[Path, RunRecord]], parameters: str = "total") -> pd.DataFrame:
    """One row per finished run, with the columns that laws are fitted to.

    Columns: run, family, size, tokens_per_parameter (as planned), seed, cell (the same for all families: what pairs
    runs), status, grown (whether its model grew, or began with another run's weights), N (the parameter count that
    `parameters` names), D (tokens), M = D/N, C (training FLOPs performed), loss (validation), train_loss, run_hash,
    spec_hash, folder.
    """
    table = []
    for folder, record in records:
        count = record.params[parameters]
        table.append(
            {
                "run": record.name,
                "family": record.labels.get("family", record.name),
                "size": record.labels.get("size", ""),
                "tokens_per_parameter": record.labels.get("tokens_per_parameter", record.tokens / count),
                "seed": record.seed,
                "cell": "-".join(str(record.labels.get(key, "")) for key in ("size", "tokens_per_parameter", "seed")),
                "status": record.status,
                "grown": len(record.stages) > 1 or bool(record.parents),
                "N": count,
                "D": record.tokens,
                "M": record.tokens / count,
                "C": record.flops["train"],
                "loss": record.final.get("validation_loss"),
                "train_loss": record.final.get("train_loss"),
                "run_hash": record.run_hash,
                "spec_hash": record.spec_hash,
                "folder": str(folder),
            }
        )
    return pd.DataFrame(table)
