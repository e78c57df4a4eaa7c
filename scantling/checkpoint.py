"""Checkpoints: safetensors and JSON only, checksummed, written under a temporary name and renamed.

A checkpoint from a stranger can execute nothing. A folder named `step_NNNNNNNN` is whole; `load_latest` verifies it and
falls back to the one before when a file was damaged since.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scantling.errors import InputError
from scantling.files import SPEC, STATE, checkpoint_folders, explained, step_of, sync_folder
from scantling.model import Decoder
from scantling.model.guided import is_guide, plain_name
from scantling.placement import placed
from scantling.resolve import spec_from, to_mapping
from scantling.spec import ModelSpec

MODEL, OPTIMIZER, AVERAGE, GUIDES = "model", "optimizer", "average", "guides"  # groups of tensors, a file each
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        tensors: by group: `model` (parameters of the plain model by name, a tied table once), `optimizer`, and where the run
            has them `average` (of the weights) and `guides` (of self-guided training).
        state: the trainer's own: step, run hash, seconds and what else it needs to go on.
    """

    folder: Path
    spec: ModelSpec
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]

    def group(self, name: str) -> dict[str, Tensor]:
        """The tensors of a group, none when the checkpoint has no such file."""
        return self.tensors.get(name, {})


def weights_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters by name, a tied table once: those of the plain model, and the guides of a guided one."""
    weights: dict[str, Tensor] = {}
    guides: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        (guides if is_guide(name) else weights)[plain_name(name)] = parameter.detach()
    return weights, guides


def optimizer_tensors(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Optimizer state as `<state name>.<parameter name>`, so that it belongs to parameters and not to positions."""
    names: dict[Tensor, str] = {parameter: plain_name(name) for name, parameter in model.named_parameters()}
    return {
        f"{key}.{names[parameter]}": value.detach()
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer], tensors: Tensors) -> None:
    """Put saved state back.

    Raises:
        InputError: state for a parameter that no optimizer has.
    """
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    owners = {
        parameter: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, tensor in tensors.items():
        key, _, owner = name.partition(".")
        parameter = parameters.get(owner)
        if parameter is None:
            raise InputError(f"optimizer state for {owner!r}, which this model does not have")
        own = placed(tensor, parameter) if tensor.ndim else tensor
        owners[parameter].state[parameter][key] = own.clone()


def write_tensors(tensors: Tensors, path: Path) -> None:
    """One file of tensors, flushed to disk.

    Raises:
        OSError: it cannot be written.
    """
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # safetensors hides the errno of a full disk in its text
        raise OSError(28 if "No space" in str(error) or "os error 28" in str(error) else 5, str(error)) from error
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def save(
    root: Path,
    step: int,
    spec: ModelSpec,
    tensors: Mapping[str, Tensors],
    state: Mapping[str, Any],
    keep: int,
    protected: Collection[int] = (),
    write: Callable[[Tensors, Path], None] = write_tensors,
) -> Path:
    """Write `root/step_NNNNNNNN` and drop all but the newest `keep` and the `protected` steps.

    Args:
        tensors: by group, a file each.
        write: how a group becomes a file.

    Raises:
        RunError: the disk is full or not writable; nothing half-written stays and older checkpoints are untouched.
    """
    target, temporary = root / f"step_{step:08d}", root / f".step_{step:08d}.{os.getpid()}.tmp"
    with explained(root):
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            for name, group in tensors.items():
                if group:
                    write(group, temporary / f"{name}.safetensors")
            _write(temporary / SPEC, json.dumps(to_mapping(spec), indent=1))
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
    for old in checkpoint_folders(root)[:-keep]:
        if step_of(old) not in protected:
            shutil.rmtree(old, ignore_errors=True)
    return target


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        tensors: dict[str, dict[str, Tensor]] = {}
        for name in sums:
            if name.endswith(
                ".safetensors"
            ):  # `optimizer.scalars.safetensors` belongs to `optimizer`, a shard to `model`
                tensors.setdefault(_SHARD.sub("", name.partition(".")[0]), {}).update(load_file(folder / name))
        if MODEL not in tensors:
            raise InputError(f"{folder}: has no {MODEL}.safetensors; the checkpoint is incomplete")
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: no such file; the checkpoint is incomplete") from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{folder}: not a readable checkpoint: {error}") from None
    return Checkpoint(folder, spec, tensors, {key: value for key, value in state.items() if key != "sha256"})


def load_latest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint below `root`, and a sentence for each damaged one passed over.

    The caller owns the folder: what a killed process left half-written under a temporary name is removed.
    """
    for stale in root.glob(".step_*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)
    passed: list[str] = []
    for folder in reversed(checkpoint_folders(root)):
        try:
            return load(folder), passed
        except InputError as error:
            passed.append(f"checkpoint passed over: {error}")
    return None, passed


def load_model(path: Path) -> Decoder:
    """The model of a checkpoint folder, or of a run folder's newest checkpoint; averaged weights where the run kept them."""
    checkpoint = load(path) if (path / STATE).exists() else load_latest(path / "checkpoints")[0]
    if checkpoint is None:
        raise InputError(f"{path}: expected a checkpoint folder or a run folder with checkpoints")
    model = Decoder(checkpoint.spec)
    weights = checkpoint.group(MODEL) | {
        name: value for name, value in checkpoint.group(AVERAGE).items() if name in checkpoint.group(MODEL)
    }
    restore_weights(model, weights)
    return model


def restore_weights(model: nn.Module, weights: Tensors, guides: Tensors | None = None) -> None:
    """Copy saved weights into a model of the same spec, and saved guides into a guided one.

    Raises:
        InputError: names or shapes differ.
    """
    saved = {**weights, **(guides or {})}
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    if parameters.keys() != saved.keys():
        odd = sorted(parameters.keys() ^ saved.keys())
        raise InputError(f"the checkpoint's tensors are not this model's; first difference: {odd[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != saved[name].shape:
                raise InputError(f"{name}: expected shape {tuple(parameter.shape)}, got {tuple(saved[name].shape)}")
            parameter.copy_(placed(saved[name], parameter))
