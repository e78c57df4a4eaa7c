"""Checkpoints: safetensors and JSON only, checksummed, written under a temporary name and renamed.

A checkpoint from a stranger can execute nothing. A folder named `step_NNNNNNNN` is whole; `load_latest` verifies it and
falls back to the one before when a file was damaged since.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scantling.errors import InputError
from scantling.files import explained, sync_folder
from scantling.model import Decoder
from scantling.resolve import spec_from, to_mapping
from scantling.spec import ModelSpec

MODEL, OPTIMIZER, SPEC, STATE = "model.safetensors", "optimizer.safetensors", "spec.json", "state.json"
_STEP = re.compile(r"^step_(\d{8,})$")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint. `state` is the trainer's own: step, run hash, seconds and what else it needs to go on."""

    folder: Path
    spec: ModelSpec
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def weights_of(model: Decoder) -> dict[str, Tensor]:
    """Parameters by name, a tied table once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def optimizer_tensors(model: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as `<state name>.<parameter name>`, so that it belongs to parameters and not to positions."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{key}.{names[parameter]}": value.detach().clone()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(model: Decoder, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put saved state back."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        key, _, parameter = name.partition(".")
        if parameter not in parameters:
            raise InputError(f"optimizer state for {parameter!r}, which this model does not have")
        optimizer.state[parameters[parameter]][key] = tensor.clone()


def save(
    root: Path, step: int, model: Decoder, optimizer: torch.optim.Optimizer | None, state: dict[str, Any], keep: int
) -> Path:
    """Write `root/step_NNNNNNNN` and drop all but the newest `keep`.

    Raises:
        RunError: the disk is full or not writable; nothing half-written stays and older checkpoints are untouched.
    """
    target, temporary = root / f"step_{step:08d}", root / f".step_{step:08d}.{os.getpid()}.tmp"
    with explained(root):
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            _save_tensors(weights_of(model), temporary / MODEL)
            if optimizer is not None:
                _save_tensors(optimizer_tensors(model, optimizer), temporary / OPTIMIZER)
            _write(temporary / SPEC, json.dumps(to_mapping(model.spec), indent=1))
            sums = {file.name: _digest(file) for file in sorted(temporary.iterdir())}
            _write(temporary / STATE, json.dumps({"step": step, **state, "sha256": sums}, indent=1))
            sync_folder(temporary)
            if target.exists():
                shutil.rmtree(target)
            os.rename(temporary, target)
            sync_folder(root)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    for old in folders(root)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # safetensors hides the errno of a full disk in its text
        raise OSError(28 if "No space" in str(error) or "os error 28" in str(error) else 5, str(error)) from error
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folders(root: Path) -> list[Path]:
    """Checkpoint folders below `root`, oldest first; temporary ones are not among them."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _STEP.match(path.name))]
    return [path for _, path in sorted(found)]


def load(folder: Path) -> Checkpoint:
    """One checkpoint, verified.

    Raises:
        InputError: a file is missing, altered, truncated, or not what it should be.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        sums = state["sha256"]
        for name, expected in sums.items():
            if Path(name).name != name or not (folder / name).is_file():
                raise InputError(f"{folder / name}: missing; the checkpoint is incomplete")
            if (found := _digest(folder / name)) != expected:
                raise InputError(
                    f"{folder / name}: expected sha256 {expected[:12]}, got {found[:12]}; the file was altered or damaged"
                )
        spec = spec_from(json.loads((folder / SPEC).read_text(encoding="utf-8")), str(folder / SPEC))
        weights = load_file(folder / MODEL)
        optimizer = load_file(folder / OPTIMIZER) if OPTIMIZER in sums else {}
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: no such file; the checkpoint is incomplete") from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{folder}: not a readable checkpoint: {error}") from None
    return Checkpoint(folder, spec, weights, optimizer, {key: value for key, value in state.items() if key != "sha256"})


def load_latest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint below `root`, and a sentence for each damaged one passed over.

    The caller owns the folder: what a killed process left half-written under a temporary name is removed.
    """
    for stale in root.glob(".step_*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    passed: list[str] = []
    for folder in reversed(folders(root)):
        try:
            return load(folder), passed
        except InputError as error:
            passed.append(f"checkpoint passed over: {error}")
    return None, passed


def load_model(path: Path) -> Decoder:
    """The model of a checkpoint folder, or of a run folder's newest checkpoint."""
    checkpoint = load(path) if (path / STATE).exists() else load_latest(path / "checkpoints")[0]
    if checkpoint is None:
        raise InputError(f"{path}: expected a checkpoint folder or a run folder with checkpoints")
    model = Decoder(checkpoint.spec)
    restore_weights(model, checkpoint.weights)
    return model


def restore_weights(model: Decoder, weights: Mapping[str, Tensor]) -> None:
    """Copy saved weights into a model of the same spec.

    Raises:
        InputError: names or shapes differ.
    """
    parameters = dict(model.named_parameters())
    if parameters.keys() != weights.keys():
        odd = sorted(parameters.keys() ^ weights.keys())
        raise InputError(f"the checkpoint's tensors are not this model's; first difference: {odd[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != weights[name].shape:
                raise InputError(f"{name}: expected shape {tuple(parameter.shape)}, got {tuple(weights[name].shape)}")
            parameter.copy_(weights[name])
