"""`grow`: a model, a checkpoint or a Hugging Face folder into a larger one with the same function."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scantling import checkpoint
from scantling.checkpoint import weights_of
from scantling.errors import InputError
from scantling.files import SPEC, STATE, checkpoint_folder
from scantling.growth.path import path
from scantling.growth.receipt import Receipt, measured, not_measured, receipt_of
from scantling.growth.steps import Computed, Moved, Step
from scantling.growth.weights import Role, applied
from scantling.hf_folder import (
    CONFIG,
    FILES,
    carried_files,
    imported_tokenizer,
    load_weights,
    source_files,
    stock_config,
    write_checkpoint,
    write_stock,
)
from scantling.hf_weights import from_hf
from scantling.lineage import USUAL, Policy, ancestry
from scantling.model import Decoder
from scantling.resolve import load_spec, spec_from
from scantling.spec import ModelSpec
from scantling.tensor_files import CHECKSUMS, Held, Tensors, open_tensors, verify
from scantling.yamlio import load

RECEIPT = "growth.json"
MOMENTS: dict[str, Role] = {
    "exp_avg": "first",
    "momentum_buffer": "first",
    "exp_avg_sq": "second",
    "max_exp_avg_sq": "second",
}


def grow(model: Decoder, to: ModelSpec, policy: Policy = USUAL) -> Decoder:
    """A larger model with the same function, in the same dtype.

    Raises:
        InputError: the spec cannot be reached exactly; the message names the nearest one that can.
    """
    steps = list(path(model.spec, to, policy))
    weights, _ = weights_of(model)
    return load_weights(to, applied(Held(weights), steps, policy), next(model.parameters()).dtype)


@dataclass(frozen=True)
class Source:
    """What a folder holds: the spec, its weights, and for a folder of Hugging Face's its config."""

    folder: Path
    spec: ModelSpec
    weights: Tensors
    config: Mapping[str, Any] | None
    files: list[Path]


def opened(folder: Path) -> Source:
    """A checkpoint of ours (or a run's newest), or a Hugging Face folder; checksums compared where it has them.

    Raises:
        InputError: neither, or damaged.
    """
    if (folder / CONFIG).is_file():
        if (folder / CHECKSUMS).is_file():
            verify(folder, only="safetensors")
        config, spec = load(folder / CONFIG).value, load_spec(folder / CONFIG)
        return Source(folder, spec, from_hf(open_tensors(folder), config, spec), config, source_files(folder))
    found = checkpoint_folder(folder)
    verify(found, STATE)
    spec = spec_from(load(found / SPEC).value, str(found / SPEC))
    return Source(found, spec, open_tensors(found), None, carried_files(found))


def grow_folder(
    source: Path, to: Path, out: Path, policy: Policy = USUAL, text: Path | None = None, measure: bool = True
) -> Receipt:
    """A folder grown into a new one, one tensor in memory at a time; the source is only read.

    A Hugging Face folder becomes one where some class can express the target, else a checkpoint of ours. A checkpoint's
    optimizer state and averaged weights grow with it; guides of self-guided training do not.

    Args:
        to: a spec file or a config.json.
        text: a file to compare logits on beside random tokens.
        measure: compare logits, liveness and one update, where the models fit into memory.

    Raises:
        InputError: the target cannot be reached exactly, the source is damaged, or `out` exists.
        RunError: the disk is full or not writable; nothing half-written stays.
    """
    given = opened(source)
    target = load_spec(to)
    steps = list(path(given.spec, target, policy))
    grown = applied(given.weights, steps, policy)
    ids = None if text is None else _ids(given, text)
    found = measured(given.spec, steps, given.weights, policy, ids) if measure else not_measured("not asked for")
    config, why = None, None
    if given.config is not None:
        try:
            config = stock_config(target, given.config)
        except InputError as error:
            why = str(error)
    receipt = receipt_of(
        str(source),
        str(out),
        given.spec,
        steps,
        found,
        optimizer=_optimizer_text(given, policy),
        format="hugging_face" if config is not None else "scantling",
        why_own_format=why,
    )
    if config is not None:
        files = [path for path in given.files if path.name != CONFIG]
        write_stock(out, target, grown, config, files, {RECEIPT: receipt.to_json()})
    else:
        _write_checkpoint(given, target, steps, grown, out, policy, receipt)
    return receipt


def _ids(given: Source, text: Path) -> Tensor:
    """Ids of the first tokens of a file: the folder's tokenizer, or its bytes."""
    content = text.read_bytes()[:4096]
    tokenizer = imported_tokenizer(given.folder) if (given.folder / FILES).is_dir() else None
    ids = tokenizer.encode(content.decode(errors="replace")) if tokenizer else list(content)
    return torch.tensor(ids)[None, :256].remainder(given.spec.vocab_size)


def _optimizer_text(given: Source, policy: Policy) -> str | None:
    if not (given.folder / f"{checkpoint.OPTIMIZER}.safetensors").is_file():
        return None
    return f"moments grown with the weights; second moments of new entries start at {policy.moments}"


def _write_checkpoint(
    given: Source, target: ModelSpec, steps: list[Step], grown: Tensors, out: Path, policy: Policy, receipt: Receipt
) -> None:
    """A checkpoint of ours with its receipt and its parents."""
    state: dict[str, Any] = {"step": 0}
    if given.config is None:
        state = load(given.folder / STATE).value
    kept = {key: value for key, value in state.items() if key != "sha256"}
    state = {**kept, "parents": ancestry(state, str(given.folder), given.spec), "stages": []}
    groups = _other_groups(given, steps, policy)
    write_checkpoint(out, target, grown, state, given.files, groups, {RECEIPT: receipt.to_json()})


def _other_groups(given: Source, steps: list[Step], policy: Policy) -> dict[str, dict[str, Tensor]]:
    """Averaged weights and optimizer state, grown."""
    groups: dict[str, dict[str, Tensor]] = {}
    average = given.folder / f"{checkpoint.AVERAGE}.safetensors"
    if average.is_file():
        tensors = applied(open_tensors(average), steps, policy)
        groups[checkpoint.AVERAGE] = {name: tensors.tensor(name).clone() for name in tensors.names}
    optimizer = given.folder / f"{checkpoint.OPTIMIZER}.safetensors"
    if optimizer.is_file():
        state = open_tensors(optimizer)
        groups[checkpoint.OPTIMIZER] = grown_state({name: state.tensor(name) for name in state.names}, steps, policy)
    return groups


def grown_state(state: Mapping[str, Tensor], steps: list[Step], policy: Policy = USUAL) -> dict[str, Tensor]:
    """Optimizer state `<key>.<parameter>` after a growth: moments on the weights' map, step counts as they were.

    A tensor with no ancestor has no state: its optimizer starts it afresh.
    """
    grown: dict[str, Tensor] = {}
    for key in dict.fromkeys(name.partition(".")[0] for name in state):
        own = {name.partition(".")[2]: value for name, value in state.items() if name.partition(".")[0] == key}
        if all(value.ndim == 0 for value in own.values()):
            counted = applied(Held({name: torch.zeros(1) for name in own}), steps, policy, "first")
            grown |= {f"{key}.{name}": own[_origin(name, steps)].clone() for name in counted.names}
            continue
        tensors = applied(Held(own), steps, policy, MOMENTS[key])
        grown |= {f"{key}.{name}": tensors.tensor(name).clone() for name in tensors.names}  # copied layers share
    return grown


def _origin(name: str, steps: list[Step]) -> str:
    """The source's tensor that a grown one descends from."""
    for step in reversed(steps):
        source = step.sources.get(name)
        if isinstance(source, Moved):
            name = source.name
        elif isinstance(source, Computed):
            name = source.names[0]
    return name
