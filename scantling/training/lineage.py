"""Weights that come from elsewhere: the checkpoint a run starts from, and a checkpoint grown into the run's next model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scantling import checkpoint
from scantling.checkpoint import AVERAGE, MODEL, OPTIMIZER, Checkpoint
from scantling.config import RunConfig
from scantling.errors import InputError
from scantling.files import checkpoint_folders, write_json
from scantling.growth import grown_state, path
from scantling.growth.receipt import measured, receipt_of
from scantling.growth.steps import Step
from scantling.growth.weights import applied
from scantling.lineage import Stage, ancestry
from scantling.model import Decoder, build
from scantling.tensor_files import Held
from scantling.yamlio import load

Groups = Mapping[str, Mapping[str, Tensor]]


def initial(config: RunConfig, device: str, out: Path) -> Decoder:
    """The model as the run begins: random weights, or those of the checkpoint it starts from; once it has checkpoints of its own
    these are read later, and the other may be gone.

    Raises:
        InputError: the checkpoint is gone or damaged.
    """
    model = build(config.spec, seed=config.train.seed, device=device)
    if config.start is not None and not checkpoint_folders(out / "checkpoints"):
        checkpoint.restore_weights(model, _started_from(config).group(MODEL))
    return model


def started_optimizer(config: RunConfig) -> dict[str, Tensor]:
    """The optimizer state the run begins with: none, or that of the checkpoint it starts from."""
    if config.start is None or config.start.optimizer == "fresh":
        return {}
    found = _started_from(config)
    if not found.group(OPTIMIZER):
        raise InputError(f"{found.folder}: has no optimizer state; set start.optimizer: fresh")
    return found.group(OPTIMIZER)


def parents(config: RunConfig) -> list[dict[str, Any]]:
    """The stages of earlier runs that led to this one, oldest first."""
    if config.start is None:
        return []
    found = _started_from(config)
    return ancestry(found.state, str(found.folder), found.spec)


def _started_from(config: RunConfig) -> Checkpoint:
    assert config.start is not None
    return checkpoint.load(config.start.folder)


def plan(config: RunConfig) -> list[tuple[Stage, tuple[Step, ...]]]:
    """The expansions that lead into each stage but the first.

    Raises:
        InputError: some target cannot be reached exactly; the message names the nearest that can.
    """
    found, before = [], config.spec
    for number, stage in enumerate(config.stages[1:]):
        assert stage.growth is not None
        try:
            found.append((stage, path(before, stage.spec, stage.growth)))
        except InputError as error:
            raise InputError(*(f"growth[{number}].to: {fault}" for fault in error.faults)) from None
        before = stage.spec
    return found


def grown_groups(found: Checkpoint, stage: Stage, out: Path, main: bool) -> Groups:
    """A checkpoint's weights, average and optimizer state, grown into a stage; the main process writes the receipt."""
    assert stage.growth is not None
    entry = stage.growth
    steps = path(found.spec, stage.spec, entry)
    if main:
        _write_receipt(out, found, stage, steps)

    def group(name: str) -> dict[str, Tensor]:
        tensors = applied(Held(found.group(name)), list(steps), entry)
        return {each: tensors.tensor(each).clone() for each in tensors.names}

    groups: dict[str, dict[str, Tensor]] = {MODEL: group(MODEL)}
    if found.group(AVERAGE):
        groups[AVERAGE] = group(AVERAGE)
    if entry.optimizer == "grown":
        groups[OPTIMIZER] = grown_state(found.group(OPTIMIZER), list(steps), entry)
    return groups


def _write_receipt(out: Path, found: Checkpoint, stage: Stage, steps: tuple[Step, ...]) -> None:
    """The receipt of a growth within a run, measured and written into the run folder."""
    assert stage.growth is not None
    with torch.random.fork_rng(devices=[]):  # measuring must not move the run's random numbers
        proof = measured(found.spec, list(steps), Held(found.group(MODEL)), stage.growth)
    optimizer = f"{stage.growth.optimizer}; moments {stage.growth.moments}"
    receipt = receipt_of(str(found.folder), str(out), found.spec, steps, proof, optimizer=optimizer)
    write_json(receipt_path(out, stage), receipt.to_json())


def receipt_path(out: Path, stage: Stage) -> Path:
    """Where the receipt of the growth into a stage lies."""
    return out / f"growth_{stage.first:08d}.json"


def described(config: RunConfig, steps: int, out: Path) -> list[dict[str, Any]]:
    """The stages of the first `steps` steps, each with the receipt of the growth that led into it."""
    found = config.history(steps)
    receipts = [receipt_path(out, stage) for stage in config.stages]
    return [
        {**entry, **({"receipt": load(path).value} if path.is_file() else {})}
        for entry, path in zip(found, receipts, strict=False)
    ]
