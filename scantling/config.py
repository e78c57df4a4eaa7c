"""What a run, a study and their parts are, as files say it: validated, immutable, hashed."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from scantling.costing import param_counts, train_flops
from scantling.data.corpus import DataConfig
from scantling.errors import InputError, suggest
from scantling.guidance import Guidance, guidance
from scantling.lineage import GrowthEntry, Stage, Start, StartEntry, find_start, learning_rate_factor, stages
from scantling.parts import Frozen, Positive, Real, Size
from scantling.recipe import UNHASHED, TrainConfig
from scantling.resolve import load_spec, plain_message, resolve, spec_from, to_mapping
from scantling.rows import rows
from scantling.spec import ModelSpec
from scantling.yamlio import Document, canonical_json, from_mapping, load, show


@dataclass(frozen=True)
class RunConfig:
    """A resolved run: what `scantling train` executes and what a record repeats.

    Attributes:
        spec: the model it begins with.
        labels: what a study calls this run (family, size, ...); they travel into the record and decide nothing.
        growth: the larger models it becomes, each with how; see `lineage.GrowthEntry`.
        start: the checkpoint whose weights it begins with, if any.
    """

    name: str
    spec: ModelSpec
    data: DataConfig
    train: TrainConfig
    labels: dict[str, Any] = field(default_factory=dict)
    growth: tuple[tuple[GrowthEntry, ModelSpec], ...] = ()
    start: Start | None = None

    @property
    def hash(self) -> str:
        """SHA-256 of everything that decides the resulting weights. The name and the checkpoint rhythm do not."""
        parts: dict[str, Any] = {
            "model": self.spec.dump(),
            "data": self.data.model_dump(mode="json"),
            "train": self.train.model_dump(mode="json", exclude=set(UNHASHED)),
        }
        if self.growth:
            parts["growth"] = [stage.dump() for stage in self.stages[1:]]
        if self.start is not None:
            parts["start"] = [self.start.identity, self.start.optimizer]
        return hashlib.sha256(canonical_json(parts).encode()).hexdigest()

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The models it trains, in order, each with its first step."""
        if not self.growth:
            return (Stage(0, self.spec),)
        return stages(self.spec, self.growth, [self.tokens_after(step) for step in range(self.steps + 1)])

    def stage(self, step: int) -> Stage:
        """The stage that a 0-based step belongs to; after the last step, the last."""
        return next(stage for stage in reversed(self.stages) if stage.first <= step)

    @property
    def final_spec(self) -> ModelSpec:
        """The model it ends with, the largest."""
        return self.growth[-1][1] if self.growth else self.spec

    def growth_factor(self, step: int) -> float:
        """What growth does to the schedule's learning rates at a 0-based step."""
        return learning_rate_factor(self.stages, step, self.steps) if self.growth else 1.0

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
        """FLOPs performed in the first `steps` steps: 3 x forward with full attention, guides included, summed over stages."""
        if self.guidance:
            return self.guidance.train_flops(steps)
        length = self.train.sequence_length
        return sum(train_flops(stage.spec, length, tokens) for stage, tokens in self.stage_tokens(steps))

    def stage_tokens(self, steps: int) -> list[tuple[Stage, int]]:
        """The stages begun in the first `steps` steps (the first in any case), each with the tokens trained on in it."""
        begun = [stage for stage in self.stages if stage.first < steps] or [self.stages[0]]
        ends = [*(stage.first for stage in begun[1:]), steps]
        return [
            (stage, self.tokens_after(end) - self.tokens_after(stage.first))
            for stage, end in zip(begun, ends, strict=True)
        ]

    def history(self, steps: int) -> list[dict[str, Any]]:
        """The stages of the first `steps` steps: what each trained, on how many tokens, for how many FLOPs."""
        parts = self.stage_tokens(steps)
        ends = [*(stage.first for stage, _ in parts[1:]), steps]
        return [
            {
                "run_hash": self.hash,
                "spec_hash": stage.spec.hash,
                "params": param_counts(rows(stage.spec))["total"],
                "first_step": stage.first,
                "steps": end - stage.first,
                "tokens": tokens,
                "train_flops": self.train_flops_after(end) - self.train_flops_after(stage.first),
            }
            for (stage, tokens), end in zip(parts, ends, strict=True)
        ]

    def to_mapping(self) -> dict[str, Any]:
        """The file form, resolved; `resolve_run` reads it back."""
        return {
            "name": self.name,
            "model": to_mapping(self.spec),
            "data": self.data.model_dump(mode="json"),
            "train": self.train.model_dump(mode="json"),
            **({"growth": [_growth_mapping(*each) for each in self.growth]} if self.growth else {}),
            **({"start": self.start.dump()} if self.start is not None else {}),
            **({"labels": self.labels} if self.labels else {}),
        }


def _growth_mapping(entry: GrowthEntry, target: ModelSpec) -> dict[str, Any]:
    return {**entry.model_dump(mode="json"), "to": to_mapping(target)}


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
    known = ("name", "model", "data", "train", "growth", "start", "labels")
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
    start: Start | None = None
    base = Path(document.source).parent
    if "start" in document.value:
        try:
            start = find_start(validated(StartEntry, document.section("start")), base)
            if start.spec is not None and "model" not in document.value:
                parts["model"] = spec_from(start.spec, f"{start.folder}: spec")
        except InputError as error:
            faults += error.faults
    if "model" in parts:
        del readers["model"]  # the checkpoint's
    for key, reader in readers.items():
        try:
            if key not in document.value:
                raise InputError(document.fault((), f"required section {key} is missing"))
            parts[key] = reader(document.section(key))
        except InputError as error:
            faults += error.faults
    if start is not None and start.spec and "model" in parts and to_mapping(parts["model"]) != start.spec:
        faults.append(
            document.fault(
                ("model",),
                f"is not the model of {start.folder}; leave model out, or grow the checkpoint first: scantling grow "
                f"{start.folder} --to SPEC --out DIR",
            )
        )
    growth: list[tuple[GrowthEntry, ModelSpec]] = []
    try:
        growth = _growth(document, base)
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
        if growth and train.guide is not None:
            faults.append(document.fault(("growth",), "guided runs cannot grow; leave train.guide or growth out"))
    if faults:
        raise InputError(*dict.fromkeys(faults))
    config = RunConfig(str(name), parts["model"], parts["data"], parts["train"], labels, tuple(growth), start)
    try:
        _ = config.stages
    except InputError as error:
        raise InputError(*(document.fault(("growth",), fault) for fault in error.faults)) from None
    return config


def _growth(document: Document, base: Path) -> list[tuple[GrowthEntry, ModelSpec]]:
    """The entries under `growth`, each with its resolved target."""
    entries = document.value.get("growth", [])
    if not isinstance(entries, list):
        raise InputError(
            document.fault(("growth",), f"expected a list of steps with `at` and `to`, got {show(entries)}")
        )
    found, faults = [], []
    for index, value in enumerate(entries):
        places = {path[2:]: place for path, place in document.places.items() if path[:2] == ("growth", index)}
        if not isinstance(value, dict):
            faults.append(document.fault(("growth", index), f"expected `at` and `to`, got {show(value)}"))
            continue
        part = Document(value, document.source, places)
        try:
            entry = validated(GrowthEntry, part)
            target = load_spec(base / entry.to) if isinstance(entry.to, str) else resolve(part.section("to"))
            found.append((entry, target))
        except InputError as error:
            faults += error.faults
    if faults:
        raise InputError(*faults)
    return found


def load_study(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> StudyConfig:
    """A study YAML, validated (its cells are made by `study.cells`)."""
    return validated(StudyConfig, load(path, overrides))


def run_from(mapping: dict[str, Any], source: str) -> RunConfig:
    """A run from a mapping made in Python."""
    return resolve_run(from_mapping(mapping, source))
