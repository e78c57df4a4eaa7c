"""What a run, a study and their parts are, as files say it: validated, immutable, hashed."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from scantling.corpus import DataConfig
from scantling.errors import InputError, suggest
from scantling.parts import Fraction, Frozen, Positive, Real, Size
from scantling.resolve import plain_message, resolve, to_mapping
from scantling.spec import ModelSpec
from scantling.units import parse_count
from scantling.yamlio import Document, canonical_json, from_mapping, load, show


def _count(value: object) -> object:
    """A count as people write it: 400000, 4e5, "300M"."""
    if isinstance(value, str):
        try:
            return parse_count(value)
        except InputError as error:
            raise ValueError(f"expected a count such as 4e5 or 300M, got {show(value)}") from error
    if isinstance(value, bool):
        raise ValueError(f"expected a count, got {show(value)}")
    return value


Count = Annotated[float, BeforeValidator(_count), Field(gt=0, allow_inf_nan=False)]


class AdamW(Frozen):
    """Decoupled weight decay on matrices (not on gains and biases); torch's fused implementation."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: Positive = 3e-3
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: Real = Field(default=0.1, ge=0)


class Cosine(Frozen):
    """Linear warm-up over `warmup` of the steps, then a cosine to `final` of the peak."""

    kind: Literal["cosine"]
    warmup: Fraction = 0.05
    final: Fraction = 0.1


class WSD(Frozen):
    """Linear warm-up, constant, then a cosine decay over the last `decay` of the steps to `final` of the peak.

    arXiv 2503.09579, appendix D (defaults are theirs).
    """

    kind: Literal["wsd"]
    warmup: Fraction = 0.1
    decay: Fraction = 0.2
    final: Fraction = 0.1


class Constant(Frozen):
    """Linear warm-up over `warmup` of the steps, then constant."""

    kind: Literal["constant"]
    warmup: Fraction = 0.0


class Power(Frozen):
    """Linear warm-up over `warmup` of the steps, then min(peak, a x (tokens so far)^exponent).

    The warm-up rises to the power law's value at its end. Defaults: the authors' for batches of 524288 tokens; they take a =
    batch_tokens / 1024 (arXiv 2606.18246, section 3.1).
    """

    kind: Literal["power"]
    warmup: Fraction = 0.08
    a: Positive = 512.0
    exponent: Real = Field(default=-0.566, le=0)


Schedule = Annotated[Cosine | WSD | Constant | Power, Field(discriminator="kind")]


class TrainConfig(Frozen):
    """One training run beside its model and data.

    Attributes:
        tokens: training budget; rounded to whole steps.
        batch_tokens: tokens per optimizer step: sequences x sequence_length.
        sequence_length: tokens per sequence.
        gradient_accumulation_steps: micro-batches that make up one step.
        max_grad_norm: global gradient norm is clipped to this; 0 does not clip.
        precision: `float32`, or `bfloat16` (autocast; weights and optimizer stay float32).
        checkpoint_every: steps between checkpoints; keep_last of them stay.
        evaluate_every: steps between validation losses; the final one is always taken.
        validation_tokens: at most this many tokens of the validation split per evaluation.
    """

    tokens: Count
    batch_tokens: Size = 8192
    sequence_length: Size = 256
    gradient_accumulation_steps: Size = 1
    optimizer: AdamW = AdamW()
    schedule: Schedule = Cosine(kind="cosine")
    max_grad_norm: Real = Field(default=1.0, ge=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = Field(default=0, ge=0, lt=2**63)
    checkpoint_every: Size = 500
    keep_last: Size = 2
    evaluate_every: Size | None = None
    validation_tokens: Count = 262144

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        unit = self.sequence_length * self.gradient_accumulation_steps
        if self.batch_tokens % unit:
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is not a multiple of sequence_length x gradient_accumulation_steps = {unit}"
            )
        return self

    @property
    def steps(self) -> int:
        """Optimizer steps: tokens / batch_tokens, rounded, at least one."""
        return max(1, round(self.tokens / self.batch_tokens))


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
        train = self.train.model_dump(mode="json", exclude={"checkpoint_every", "keep_last"})
        data = self.data.model_dump(mode="json")
        return hashlib.sha256(
            canonical_json({"model": self.spec.dump(), "data": data, "train": train}).encode()
        ).hexdigest()

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
    if faults:
        raise InputError(*dict.fromkeys(faults))
    return RunConfig(str(name), parts["model"], parts["data"], parts["train"], labels)


def load_study(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> StudyConfig:
    """A study YAML, validated (its cells are made by `study.cells`)."""
    return validated(StudyConfig, load(path, overrides))


def run_from(mapping: dict[str, Any], source: str) -> RunConfig:
    """A run from a mapping made in Python."""
    return resolve_run(from_mapping(mapping, source))
