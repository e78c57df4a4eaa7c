"""The plan file: what is minimised, for which target or budget, within which limits, under which law, over which space."""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, PrivateAttr, model_validator

from scantling.config import validated
from scantling.errors import InputError
from scantling.hardware import find_device, load_hardware
from scantling.parts import Frozen, Size
from scantling.planning.costs import NEEDS_DEVICE, NEEDS_PRICE, NEEDS_SERVED_TOKENS, OF_TOKENS, CostName, Site
from scantling.planning.limits import DEVICE, Constraints, Limit
from scantling.planning.price import Convention, ParameterCount
from scantling.planning.sections import (
    Budget,
    Hardware,
    LawKeys,
    Next,
    Serving,
    Target,
    Training,
    Weights,
)
from scantling.planning.space import Space
from scantling.yamlio import Document, KeyPath, dotted, from_mapping, load

Objective = CostName | Literal["loss"]
COSTS: tuple[CostName, ...] = get_args(CostName)


class PlanConfig(Frozen):
    """A plan file.

    Attributes:
        minimize: a cost by name (see `costs`), a weighted sum `{name: weight}`, or loss. Default `loss` with a budget; with a
            target `lifetime_flops` when tokens are served, else `training_flops`.
        target, budget: one of them.
        constraints: upper limits on any of the costs, and what sizes must divide by.
        hardware: the device, for costs in seconds, device-hours and money.
        law: a published name, the path of a law JSON (relative to this file), or an inline mapping.
        evidence: what is known of the families' losses: shipped evidence by name, or the JSON of `fit --compare --out`.
        parameters: which count is the law's N; default what the law says, else total.
        cost_convention: how FLOPs and memory are counted; default `full`, for z `paper-figure-2`.
        candidates: how many to return.
        next: asks which runs to train next, within a budget of FLOPs.
        study: data, train and learning_rate of the studies the plan writes, as in a study YAML.
    """

    minimize: Objective | Weights | None = None
    target: Target | None = None
    budget: Budget | None = None
    constraints: Constraints = Constraints()
    hardware: Hardware | None = None
    law: LawKeys
    evidence: str | None = None
    parameters: ParameterCount | None = None
    cost_convention: Convention | None = None
    serving: Serving = Serving()
    training: Training = Training()
    space: Space = Space()
    candidates: Size = 10
    next: Next | None = None
    study: dict[str, Any] = Field(default_factory=dict)
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
        if unknown := set(self.study) - {"data", "train", "learning_rate"}:
            raise ValueError(f"study takes data, train and learning_rate, got {min(unknown)}")
        asked = {*self.weights, *(name for name in COSTS if self._limits(name))}
        for name in sorted(asked & set(NEEDS_SERVED_TOKENS)):
            if self.serving.tokens is None:
                raise ValueError(f"{name} needs serving.tokens: the tokens processed over the model's life")
        for name in sorted(asked & set(NEEDS_DEVICE)):
            if self.hardware is None:
                raise ValueError(f"{name} needs hardware: {{device: ...}}, such as h100-sxm")
        if self.constraints.memory_bytes == DEVICE and self.hardware is None:
            raise ValueError("constraints.memory_bytes: device needs hardware: {device: ...}, such as h100-sxm")
        if "z" in self.weights and self.convention != "paper-figure-2":
            raise ValueError(
                "minimize: z is tuned to bytes and FLOPs as paper-figure-2 counts them, and any other unit changes the "
                "winner; remove cost_convention"
            )
        if self.space.real_valued and (self.space.hidden_size or self.space.num_hidden_layers):
            raise ValueError("space.real_valued takes aspect, not lists of hidden_size or num_hidden_layers")
        return self

    @property
    def objective(self) -> str:
        """What is minimised: the name of a cost or `loss`, or a weighted sum in words."""
        if isinstance(self.minimize, dict):
            return " + ".join(f"{weight:g} {name}" for name, weight in self.minimize.items())
        if self.minimize is not None:
            return self.minimize
        return "loss" if self.budget else "lifetime_flops" if self.serving.tokens else "training_flops"

    @property
    def weights(self) -> dict[CostName, float]:
        """The costs minimised, with their weights; empty where the loss is."""
        if isinstance(self.minimize, dict):
            return dict(self.minimize)
        name: Any = self.objective
        return {} if name == "loss" else {name: 1.0}

    @property
    def limits(self) -> tuple[Limit, ...]:
        """Every upper limit: what the budget names first, then the rest of it, then the constraints."""
        found: list[Limit] = []
        if self.budget is not None:
            names: tuple[CostName, ...] = (self.budget.limit, "memory_bytes")
            for name in dict.fromkeys(names):
                if (most := getattr(self.budget, name)) is not None:
                    found.append(Limit(name, most, ("budget", name)))
        for key in type(self.constraints).model_fields:
            most = getattr(self.constraints, key)
            if key == "unique_tokens" and most is not None:
                found.append(Limit("tokens", most * self.constraints.max_epochs, ("constraints", key)))
            elif key in COSTS and most is not None:
                held = self.site.device.memory_bytes * self.serving.devices if most == DEVICE and self.site else most
                found.append(Limit(key, held, ("constraints", key)))
        return tuple(found)

    @property
    def limits_tokens(self) -> bool:
        """Whether a limit bounds the training tokens."""
        return self.constraints.unique_tokens is not None or any(self._limits(name) for name in OF_TOKENS)

    @cached_property
    def site(self) -> Site | None:
        """The devices, or None where the plan names none.

        Raises:
            InputError: an unknown device, or no price where money is asked for.
        """
        if self.hardware is None:
            return None
        keys = self.hardware
        try:
            device = find_device(keys.device, load_hardware(self.folder / keys.table if keys.table else None))
            device.peak(keys.training_dtype)
            device.peak(self.serving.dtype)
        except InputError as error:
            message = "; ".join(fault.removeprefix("device: ") for fault in error.faults)
            raise self.fault(("hardware", "device"), message) from None
        price = keys.usd_per_hour or (device.price.usd_per_hour if device.price else None)
        money = {*self.weights, *(name for name in NEEDS_PRICE if self._limits(name))} & set(NEEDS_PRICE)
        if money and price is None:
            raise self.fault(("hardware",), f"{device.name} has no price in the table; give usd_per_hour")
        return Site(device, price, keys.mfu, keys.mbu, self.training.devices, self.serving.devices, keys.training_dtype)

    def _limits(self, name: str) -> bool:
        given = (self.budget, self.constraints)
        return any(getattr(section, name, None) is not None for section in given)

    @property
    def convention(self) -> Convention:
        """How costs are counted."""
        return self.cost_convention or ("paper-figure-2" if "z" in self.weights else "full")

    @property
    def contexts(self) -> dict[int, float]:
        """Positions the served tokens attend to, with their shares."""
        return dict(self.serving.context or ((self.training.sequence_length, 1.0),))

    @property
    def context(self) -> int:
        """The largest context served: what memory and latency are measured at."""
        return max(self.contexts)

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
