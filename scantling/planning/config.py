"""The plan file: what is minimised, for which target or budget, under which law, and over which space."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, PrivateAttr, Tag, field_validator, model_validator

from scantling.config import validated
from scantling.errors import InputError
from scantling.parts import Frozen, Positive, Size
from scantling.planning.price import Convention, ParameterCount
from scantling.planning.shapes import Space, two_positive
from scantling.recipe import Count as Amount
from scantling.units import DTYPE_BYTES, dtype_bytes
from scantling.yamlio import Document, KeyPath, dotted, from_mapping, load, show

Objective = Literal["training_flops", "lifetime_flops", "memory_bytes", "z", "loss"]
Limit = Literal["training_flops", "lifetime_flops", "memory_bytes"]


# --- its sections ------------------------------------------------------------------------------------------------------


class Target(Frozen):
    """Reach this loss, nats per token."""

    loss: Positive


class Budget(Frozen):
    """Spend at most this: one of training_flops and lifetime_flops (training plus served tokens), and memory_bytes."""

    training_flops: Amount | None = None
    lifetime_flops: Amount | None = None
    memory_bytes: Amount | None = None

    @model_validator(mode="after")
    def _one_flops(self) -> Self:
        if self.training_flops and self.lifetime_flops:
            raise ValueError("expected training_flops or lifetime_flops, both are given; keep one")
        if not (self.training_flops or self.lifetime_flops or self.memory_bytes):
            raise ValueError("expected training_flops, lifetime_flops or memory_bytes, got none of them")
        return self

    @property
    def limit(self) -> tuple[Limit, float]:
        """What is spent, and how much of it: the FLOPs where they are given, else the memory."""
        if self.training_flops is not None:
            return "training_flops", self.training_flops
        if self.lifetime_flops is not None:
            return "lifetime_flops", self.lifetime_flops
        return "memory_bytes", self.memory_bytes or math.inf


def _dtype(value: object) -> object:
    if value not in DTYPE_BYTES:
        raise ValueError(f"expected one of {', '.join(DTYPE_BYTES)}, got {show(value)}")
    return value


class Serving(Frozen):
    """How the model is used: `tokens` over its life, each at `context` positions; `batch` sequences share the weights."""

    context: Size | None = None
    tokens: Amount | None = None
    batch: Size = 1
    dtype: Annotated[str, BeforeValidator(_dtype)] = "bf16"

    @property
    def bytes_per_value(self) -> int:
        """Bytes of one weight and of one cached value."""
        return dtype_bytes(self.dtype)


def _ratio(value: object) -> object:
    if value == "free":
        return None
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"expected a number of tokens per parameter, or free, got {show(value)}")
    return value


class Training(Frozen):
    """`tokens_per_parameter`: a fixed D/N, or `free` (the default, where the law knows D)."""

    sequence_length: Size = 2048
    tokens_per_parameter: Annotated[Positive | None, BeforeValidator(_ratio)] = None


def _pair(value: object) -> object:
    if not two_positive(value):
        raise ValueError(f"expected two numbers above 0, got {show(value)}")
    return value


Pair = Annotated[tuple[float, float], BeforeValidator(_pair)]


class HeadLawKeys(Frozen):
    """`kind: loss_per_head_configuration`.

    Attributes:
        E: irreducible loss, shared.
        coefficients: "n_h,n_kv": [a, b].
        ranges: {N: [lowest, highest]} trained, for all head configurations.
    """

    kind: Literal["loss_per_head_configuration"]
    E: float = Field(ge=0, allow_inf_nan=False)
    coefficients: dict[str, Pair] = Field(min_length=1)
    ranges: dict[Literal["N"], Pair] = Field(default_factory=dict)

    @field_validator("coefficients")
    @classmethod
    def _pairs_divide(cls, value: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        for key in value:
            parts = [part.strip() for part in key.split(",")]
            if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
                raise ValueError(f'expected keys "query heads,key/value heads" such as "8,1", got {show(key)}')
            if int(parts[0]) % int(parts[1]):
                raise ValueError(f"{parts[0]} query heads cannot share {parts[1]} key/value heads ({show(key)})")
        return value

    @property
    def by_heads(self) -> dict[tuple[int, int], tuple[float, float]]:
        """Coefficients by (query heads, key/value heads)."""
        split = {key: key.split(",") for key in self.coefficients}
        return {(int(split[key][0]), int(split[key][1])): pair for key, pair in self.coefficients.items()}


class ChinchillaKeys(Frozen):
    """`kind: chinchilla`: L = E + A N^-alpha + B D^-beta, with the ranges of N, D and M = D/N fitted, where known."""

    kind: Literal["chinchilla"]
    A: Positive
    B: Positive
    E: float = Field(ge=0, allow_inf_nan=False)
    alpha: Positive
    beta: Positive
    ranges: dict[Literal["N", "D", "M"], Pair] = Field(default_factory=dict)


def _law_tag(value: object) -> str:
    if isinstance(value, str):
        return "name or path"
    return str(value.get("kind", "no kind") if isinstance(value, dict) else getattr(value, "kind", value))


LawKeys = Annotated[
    Annotated[str, Tag("name or path")]
    | Annotated[HeadLawKeys, Tag("loss_per_head_configuration")]
    | Annotated[ChinchillaKeys, Tag("chinchilla")],
    Discriminator(_law_tag),
]


# --- the whole ---------------------------------------------------------------------------------------------------------


class PlanConfig(Frozen):
    """A plan file.

    Attributes:
        minimize: default `loss` with a budget; with a target `lifetime_flops` when tokens are served, else
            `training_flops`. `memory_bytes` is weights + KV cache; `z` is 0.9 sqrt(bytes) + 0.1 cbrt(FLOPs).
        target, budget: one of them.
        law: a published name, the path of a law JSON (relative to this file), or an inline mapping.
        parameters: which count is the law's N; default what the law says, else total.
        cost_convention: how FLOPs and memory are counted; default `full`, for z `paper-figure-2`.
        candidates: how many to return.
    """

    minimize: Objective | None = None
    target: Target | None = None
    budget: Budget | None = None
    law: LawKeys
    parameters: ParameterCount | None = None
    cost_convention: Convention | None = None
    serving: Serving = Serving()
    training: Training = Training()
    space: Space = Space()
    candidates: Size = 10
    _document: Document | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.target is None) == (self.budget is None):
            what = "both are given" if self.target else "neither is given"
            raise ValueError(f"expected a target (loss) or a budget, {what}; keep one")
        if (self.objective == "loss") != (self.budget is not None):
            raise ValueError(
                f"minimize: {self.objective} does not go with {'a budget' if self.budget else 'a target loss'}; "
                + ("with a budget, minimize: loss" if self.budget else "name a cost, or give a budget")
            )
        lifetime = self.objective == "lifetime_flops" or (self.budget is not None and self.budget.lifetime_flops)
        if lifetime and self.serving.tokens is None:
            raise ValueError("lifetime_flops needs serving.tokens: the tokens processed over the model's life")
        if self.objective == "z" and self.convention != "paper-figure-2":
            raise ValueError(
                "minimize: z is tuned to bytes and FLOPs as paper-figure-2 counts them, and any other unit changes the "
                "winner; remove cost_convention"
            )
        if self.space.real_valued and (self.space.hidden_size or self.space.num_hidden_layers):
            raise ValueError("space.real_valued takes aspect, not lists of hidden_size or num_hidden_layers")
        return self

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        if self.minimize is not None:
            return self.minimize
        return "loss" if self.budget else "lifetime_flops" if self.serving.tokens else "training_flops"

    @property
    def convention(self) -> Convention:
        """How costs are counted."""
        return self.cost_convention or ("paper-figure-2" if self.objective == "z" else "full")

    @property
    def context(self) -> int:
        """Positions each served token attends to."""
        return self.serving.context or self.training.sequence_length

    @property
    def folder(self) -> Path:
        """Where relative paths start: the folder of the file, or the working directory."""
        return Path(self._document.source).parent if self._document else Path()

    def fault(self, path: KeyPath, message: str) -> InputError:
        """An error that names the key, and its line where the plan came from a file."""
        return InputError(self._document.fault(path, message) if self._document else f"{dotted(path)}: {message}")


def load_plan(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> PlanConfig:
    """A plan YAML, validated.

    Raises:
        InputError: every fault, with its line.
    """
    return _validated(load(path, overrides))


def plan_from(mapping: dict[str, Any], source: str = "<mapping>") -> PlanConfig:
    """As `load_plan`, from a mapping made in Python."""
    return _validated(from_mapping(mapping, source))


def _validated(document: Document) -> PlanConfig:
    document = _ungrouped(document)
    config = validated(PlanConfig, document)
    config._document = document
    return config


def _ungrouped(document: Document) -> Document:
    """`space.shapes` may group the keys of the shapes: they are read as keys of `space`, keeping their lines."""
    space = document.value.get("space")
    if not isinstance(space, dict) or not isinstance(shapes := space.get("shapes"), dict):
        return document
    if twice := set(shapes) & set(space):
        raise InputError(document.fault(("space", "shapes", min(twice)), "given in space too; keep one"))
    rest = {key: value for key, value in space.items() if key != "shapes"}
    places = {
        ("space", *path[2:]) if path[:2] == ("space", "shapes") and len(path) > 2 else path: place
        for path, place in document.places.items()
    }
    return Document({**document.value, "space": {**rest, **shapes}}, document.source, places)
