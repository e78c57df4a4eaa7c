"""Where a run's weights come from: a checkpoint it starts with, and the larger models it becomes on its way."""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from scantling.costing import param_counts
from scantling.errors import InputError
from scantling.files import SPEC, STATE, checkpoint_folder
from scantling.parts import Fraction, Frozen, Positive
from scantling.rows import rows
from scantling.spec import ModelSpec
from scantling.yamlio import canonical_json, load, show

_SHARE = re.compile(r"^\s*([0-9.eE+-]+)\s*(%?)\s*of\s+tokens\s*$")


def _share(value: object) -> object:
    """`0.3`, `0.3 of tokens` or `30% of tokens`, as a share."""
    if isinstance(value, str) and (found := _SHARE.match(value)):
        try:
            return float(found[1]) / (100 if found[2] else 1)
        except ValueError:
            pass
    if isinstance(value, str | bool):
        raise ValueError(f"expected a share of the tokens such as 0.3 or `0.3 of tokens`, got {show(value)}")
    return value


class Policy(Frozen):
    """How a model grows; but for `stack` and `qk_noise` the function is preserved whichever way.

    Attributes:
        seed: of random entries; each tensor draws its own numbers, whatever the order and however many rows at a time.
        new_layers: weights of a new layer: a `copy` of the layer before it where shapes agree, or `random`; its output is
            zero either way. `stack` repeats layers verbatim (arXiv 2405.15319), which does not preserve the function.
        free: random entries are the model's own initialiser's (`initializer`), or have the standard deviation of the tensor
            they join (`matching`).
        moments: what second moments of new entries in old tensors start from: `mean` (of the tensor: no overshoot), or
            `zero`, where torch's one step count per tensor makes their first updates up to 6.6 times too large (beta2 0.999).
        width: new coordinates, heads and inner units beside the old ones (`pad`), or whole `copies` of the old ones (integer
            multiples; arXiv 2409.12903).
        snr_db: with copies, noise on them that cancels, by its signal-to-noise ratio in dB; without it they stay equal for ever.
        qk_noise: where head_dim grows under a q/k norm over the whole head: spread of new queries, as a share of the usual. Not
            exact: the error is quadratic in it.
    """

    seed: int = Field(default=0, ge=0, lt=2**63)
    new_layers: Literal["copy", "random", "stack"] = "copy"
    free: Literal["initializer", "matching"] = "initializer"
    moments: Literal["mean", "zero"] = "mean"
    width: Literal["pad", "copies"] = "pad"
    snr_db: float | None = None
    qk_noise: float | None = None


USUAL = Policy()


class GrowthEntry(Policy):
    """One growth of a run, as its file says it: what, when, and `Policy`.

    Attributes:
        at: the share of the run's tokens before it.
        to: the larger model: a mapping as in `model`, or the path of a spec, relative to the run's file.
        optimizer: its state grows with the weights (`grown`), or begins anew (`fresh`).
        rewarmup: share of all steps over which the learning rate rises from 0 back to its schedule after the growth.
        learning_rate_factor: on all learning rates from here on: larger models as a rule want smaller ones.
    """

    at: Annotated[float, BeforeValidator(_share), Field(gt=0, lt=1)]
    to: str | dict[str, Any]
    optimizer: Literal["grown", "fresh"] = "grown"
    rewarmup: Fraction = 0.0
    learning_rate_factor: Positive = 1.0


@dataclass(frozen=True)
class Stage:
    """A stretch of a run with one model.

    Attributes:
        first: its first 0-based step.
        growth: what led into it; None for the first stage.
    """

    first: int
    spec: ModelSpec
    growth: GrowthEntry | None = None

    def dump(self) -> dict[str, Any] | None:
        """The growth into it as plain data that decides weights; None for the first stage."""
        return None if self.growth is None else {**self.growth.model_dump(mode="json"), "to": self.spec.dump()}


def stages(
    spec: ModelSpec, growth: Sequence[tuple[GrowthEntry, ModelSpec]], tokens_before: Sequence[int]
) -> tuple[Stage, ...]:
    """The stages of a run; each growth comes before the first step that has its share of the tokens behind it.

    Args:
        tokens_before: tokens before each step, and last the total.

    Raises:
        InputError: growths out of order, or two before one step, or one before the first or after the last.
    """
    found = [Stage(0, spec)]
    for number, (entry, target) in enumerate(growth):
        goal, steps = entry.at * tokens_before[-1], len(tokens_before) - 1
        first = next(step for step, tokens in enumerate(tokens_before) if tokens >= goal * (1 - 1e-12))
        if not found[-1].first < first < steps:
            after = "the first step" if number == 0 else f"step {found[-1].first}, where the growth before it comes,"
            raise InputError(
                f"growth[{number}].at: {entry.at:g} of the tokens comes before step {first} of {steps}; "
                f"expected a step after {after} and before the end"
            )
        found.append(Stage(first, target, entry))
    return tuple(found)


def learning_rate_factor(found: Sequence[Stage], step: int, steps: int) -> float:
    """What growth does to the schedule's learning rates at a 0-based step: the factors so far, and a re-warm-up.

    The re-warm-up is linear: (steps since the growth + 1)/W over W = ceil(rewarmup x steps).
    """
    factor = 1.0
    for stage in found:
        if stage.growth is None or stage.first > step:
            continue
        warm = math.ceil(stage.growth.rewarmup * steps)
        factor *= stage.growth.learning_rate_factor * min(1.0, (step - stage.first + 1) / max(1, warm))
    return factor


class StartEntry(Frozen):
    """What a run starts from, as its file says it.

    Attributes:
        checkpoint: a checkpoint's folder or a run's (its newest one), relative to the run's file. A Hugging Face folder is
            imported first (`scantling import`).
        optimizer: `fresh`, or `kept`: moments and step counts of the checkpoint.
        identity: of the checkpoint's files, added when the run is resolved; another one there is then refused.
    """

    checkpoint: str
    optimizer: Literal["fresh", "kept"] = "fresh"
    identity: str | None = None


@dataclass(frozen=True)
class Start:
    """A checkpoint to start from.

    Attributes:
        spec: its model as plain data; None when the checkpoint is gone but the run was resolved when it was there.
    """

    folder: Path
    optimizer: Literal["fresh", "kept"]
    identity: str
    spec: dict[str, Any] | None

    def dump(self) -> dict[str, Any]:
        """The file form."""
        return {"checkpoint": str(self.folder), "optimizer": self.optimizer, "identity": self.identity}


def find_start(entry: StartEntry, base: Path) -> Start:
    """The checkpoint an entry names; its tensors are verified when they are read.

    Raises:
        InputError: none there, or another one than when the run was resolved.
    """
    given = (base / entry.checkpoint).absolute()
    if (given / "config.json").is_file():
        raise InputError(f"{given}: is a Hugging Face folder; import it first: scantling import {given} --out DIR")
    if entry.identity is not None and not given.exists():
        return Start(given, entry.optimizer, entry.identity, None)
    folder = checkpoint_folder(given)
    sums = load(folder / STATE).value.get("sha256")
    if not isinstance(sums, dict):
        raise InputError(f"{folder / STATE}: expected sha256 by file name")
    identity = hashlib.sha256(canonical_json(sums).encode()).hexdigest()
    if entry.identity not in (None, identity):
        raise InputError(
            f"{folder}: expected the checkpoint {str(entry.identity)[:12]} that this run began with, got {identity[:12]}; "
            "bring it back, or start another run"
        )
    return Start(folder, entry.optimizer, identity, load(folder / SPEC).value)


def ancestry(state: Mapping[str, Any], source: str, spec: ModelSpec) -> list[dict[str, Any]]:
    """All stages that led to a checkpoint, oldest first: of earlier runs (`parents`), then of its own (`stages`).

    A checkpoint that tells nothing (imported, or from before stages were kept) is one stage whose tokens and FLOPs are None.

    Raises:
        InputError: they are not lists of mappings with tokens and FLOPs.
    """
    found = [state.get(key, []) for key in ("parents", "stages")]
    entries = [entry for part in found if isinstance(part, list) for entry in part]
    for entry in entries:
        sizes = [entry.get(key) for key in ("tokens", "train_flops")] if isinstance(entry, dict) else [entry]
        if not all(size is None or (isinstance(size, int | float) and 0 <= size < math.inf) for size in sizes):
            raise InputError(f"{source}: expected stages with tokens and train_flops, got {show(entry)}")
    untold = {
        "spec_hash": spec.hash,
        "params": param_counts(rows(spec))["total"],
        "steps": state.get("step", 0),
        "tokens": None,
        "train_flops": None,
    }
    return entries or [untold]
