"""What a run, a study and their parts are, as files say it: validated, immutable, hashed."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from scantling.costing import train_flops
from scantling.data.corpus import DataConfig
from scantling.errors import InputError, suggest
from scantling.guidance import Guidance, guidance
from scantling.parts import Frozen, Positive, Real, Size
from scantling.recipe import UNHASHED, TrainConfig
from scantling.resolve import plain_message, resolve, to_mapping
from scantling.spec import ModelSpec
from scantling.yamlio import Document, canonical_json, from_mapping, load, show


@dataclass(frozen=True)
class RunConfig:
    """A resolved run: what `scantling train` executes and what a record repeats.

    `labels` are what a study calls this run (family, size, ...); they travel into the record and decide nothing.
    """

    name: str
    spec: ModelSpec
    data: DataConfig
    train: TrainConfig
    labels: dict[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """SHA-256 of everything that decides the resulting weights. The name and the checkpoint rhythm do not."""
        train = self.train.model_dump(mode="json", exclude=set(UNHASHED))
        data = self.data.model_dump(mode="json")
        return hashlib.sha256(
            canonical_json({"model": self.spec.dump(), "data": data, "train": train}).encode()
        ).hexdigest()

    @cached_property
    def guidance(self) -> Guidance | None:
        """The plan of its guided phase; None for a run without guides."""
        return guidance(self.spec, self.train)

    @property
    def steps(self) -> int:
        """All optimizer steps: those through the token budget, and those that repeat data (`fixed_flops` guidance)."""
        return self.guidance.steps if self.guidance else self.train.steps

    @property
    def tokens(self) -> int:
        """Tokens trained on, repeats included."""
        return self.tokens_after(self.steps)

    @property
    def train_flops(self) -> float:
        """FLOPs the whole run performs, see `train_flops_after`."""
        return self.train_flops_after(self.steps)

    def sequences(self, step: int) -> tuple[int, int]:
        """The numbered sequences that a 0-based step trains on: (first, count)."""
        if self.guidance:
            return self.guidance.sequences(step)
        before = self.train.sequences_before
        return before[step], before[step + 1] - before[step]

    def tokens_after(self, steps: int) -> int:
        """Tokens trained on in the first `steps` steps."""
        if self.guidance:
            return self.guidance.tokens(steps)
        return self.train.sequences_before[steps] * self.train.sequence_length

    def train_flops_after(self, steps: int) -> float:
        """FLOPs performed in the first `steps` steps: 3 x forward with full attention, guides included."""
        if self.guidance:
            return self.guidance.train_flops(steps)
        return train_flops(self.spec, self.train.sequence_length, self.tokens_after(steps))

    def to_mapping(self) -> dict[str, Any]:
        """The file form, resolved; `resolve_run` reads it back."""
        return {
            "name": self.name,
            "model": to_mapping(self.spec),
            "data": self.data.model_dump(mode="json"),
            "train": self.train.model_dump(mode="json"),
            **({"labels": self.labels} if self.labels else {}),
        }


class LearningRate(Frozen):
    """The peak learning rate of each size: base x (hidden_size / reference_hidden_size)^exponent, the same for all families."""

    base: Positive
    reference_hidden_size: Size = 64
    exponent: Real = -0.5


class StudyConfig(Frozen):
    """A grid of runs: families x sizes x tokens per parameter x seeds.

    Attributes:
        model: keys that every model shares.
        families: name -> model keys of that family. The first is the baseline: all families of a cell get its tokens.
        sizes: model keys of each size, as a rule hidden_size and num_hidden_layers.
        tokens_per_parameter: M = D/N, with the N that `parameters` names, of the baseline family.
        learning_rate: a rule over sizes; without it, train.optimizer.learning_rate for all.
        train: as in a run, without `tokens`.
        workers: runs side by side, each a process with its share of the cores; default one per core.
    """

    name: str = Field(min_length=1, pattern=r"^[\w.-]+$")
    model: dict[str, Any]
    families: dict[str, dict[str, Any]] = Field(min_length=1)
    sizes: list[dict[str, Any]] = Field(min_length=1)
    tokens_per_parameter: list[Positive] = Field(min_length=1)
    parameters: Literal["total", "non_embedding"] = "total"
    seeds: list[int] = Field(default=[0], min_length=1)
    learning_rate: LearningRate | None = None
    data: dict[str, Any]
    train: dict[str, Any]
    workers: Size | None = None


Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], document: Document) -> Model:
    """The document as `model`, or InputError with every fault at its line."""
    known = model.model_fields.keys()
    try:
        return model.model_validate(document.value)
    except ValidationError as error:
        faults = []
        for item in error.errors(include_url=False):
            path = _real_path(item["loc"], document)
            hint = (
                suggest(str(item["loc"][-1]), known)
                if item["type"] == "extra_forbidden" and len(item["loc"]) == 1
                else ""
            )
            faults.append(document.fault(path, plain_message(item) + hint))
        raise InputError(*dict.fromkeys(faults)) from None


def _real_path(loc: tuple[int | str, ...], document: Document) -> tuple[int | str, ...]:
    """A pydantic location without the union tags, which are not keys of the file."""
    path: list[int | str] = []
    at: Any = document.value
    for part in loc:
        if isinstance(at, dict) and part == at.get("kind"):
            continue
        path.append(part)
        at = _inside(at, part)
    return tuple(path)


def _inside(value: Any, part: int | str) -> Any:
    """The item of a mapping or list, or None."""
    if isinstance(value, dict):
        return value.get(part)
    return value[part] if isinstance(value, list) and isinstance(part, int) and part < len(value) else None


def load_run(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """A run YAML, resolved.

    Raises:
        InputError: every fault of every section, with its line.
    """
    return resolve_run(load(path, overrides))


def resolve_run(document: Document) -> RunConfig:
    """The run a document describes."""
    faults: list[str] = []
    known = ("name", "model", "data", "train", "labels")
    for key in document.value:
        if key not in known:
            faults.append(document.fault((key,), f"unknown key{suggest(str(key), known)}"))
    name = document.value.get("name")
    if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
        faults.append(document.fault(("name",), f"expected a name without slashes, got {show(name)}"))
    parts: dict[str, Any] = {}
    readers: dict[str, Callable[[Document], Any]] = {
        "model": resolve,
        "data": lambda part: validated(DataConfig, part),
        "train": lambda part: validated(TrainConfig, part),
    }
    for key, reader in readers.items():
        try:
            if key not in document.value:
                raise InputError(document.fault((), f"required section {key} is missing"))
            parts[key] = reader(document.section(key))
        except InputError as error:
            faults += error.faults
    labels = document.value.get("labels", {})
    if not isinstance(labels, dict):
        faults.append(document.fault(("labels",), f"expected a mapping, got {show(labels)}"))
    if "model" in parts and "train" in parts:
        spec, train = parts["model"], parts["train"]
        if train.sequence_length > spec.max_position_embeddings:
            faults.append(
                document.fault(
                    ("train", "sequence_length"),
                    f"expected at most max_position_embeddings {spec.max_position_embeddings}, got {train.sequence_length}",
                )
            )
        try:
            guidance(spec, train)
        except InputError as error:
            faults += [document.fault(("train",), fault) for fault in error.faults]
    if faults:
        raise InputError(*dict.fromkeys(faults))
    return RunConfig(str(name), parts["model"], parts["data"], parts["train"], labels)


def load_study(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> StudyConfig:
    """A study YAML, validated (its cells are made by `study.cells`)."""
    return validated(StudyConfig, load(path, overrides))


def run_from(mapping: dict[str, Any], source: str) -> RunConfig:
    """A run from a mapping made in Python."""
    return resolve_run(from_mapping(mapping, source))
