"""The plan that the page starts from, and what of it the page can change."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from scantling.errors import InputError
from scantling.hardware import Device, load_hardware
from scantling.laws.published import load_published, published_names
from scantling.planning import PlanConfig, load_plan, plan_from
from scantling.planning.loss import read_law
from scantling.yamlio import load, loads


@dataclass(frozen=True, eq=False)
class Base:
    """A plan file as it was written, with `--set` applied.

    Attributes:
        name: the file as it was given, or None for the plan that `scantling init plan` writes.
        source: what relative paths of the plan start from.
        mapping: its keys.
        config: the same, validated.
        devices: by key: the shipped table and the plan's own.
        least: irreducible loss of the plan's own law.
        laws: published laws that the planner reads, with their irreducible losses.
    """

    name: str | None
    source: str
    mapping: Mapping[str, Any]
    config: PlanConfig
    devices: Mapping[str, Device]
    least: float
    laws: Mapping[str, float]

    @property
    def goal(self) -> tuple[str, float]:
        """The key of the plan's goal, such as `budget.training_flops`, and its amount."""
        config = self.config
        if config.target is not None:
            key = "loss" if config.target.loss is not None else "error"
            return f"target.{key}", float(getattr(config.target, key))
        assert config.budget is not None
        return f"budget.{config.budget.limit}", float(getattr(config.budget, config.budget.limit))

    @property
    def law(self) -> str:
        """The plan's own law in a few words."""
        law = self.config.law
        return law if isinstance(law, str) else law.kind.replace("_", " ")


def read_base(path: Path | None = None, overrides: Sequence[str] = ()) -> Base:
    """The plan to start from.

    Args:
        path: a plan YAML; None for the plan that `scantling init plan` writes.
        overrides: `key=value`, as `--set` takes them.

    Raises:
        InputError: every fault of the plan, with its line; or its law cannot be read.
    """
    if path is None:
        text = (files("scantling") / "templates" / "plan.yaml").read_text(encoding="utf-8")
        document = loads(text, "plan.yaml", overrides)
        config = plan_from(dict(document.value), "plan.yaml")
    else:
        document, config = load(path, overrides), load_plan(path, overrides)
    table = config.hardware.table if config.hardware else None
    return Base(
        name=None if path is None else str(path),
        source=document.source,
        mapping=document.value,
        config=config,
        devices=load_hardware(config.folder / table if table else None),
        least=read_law(config).E,
        laws=dict(_planned_laws()),
    )


def _planned_laws() -> Iterator[tuple[str, float]]:
    for name in published_names():
        if "N" not in load_published(name).formula.columns:  # it chooses heads at one size
            continue
        with suppress(InputError):  # a law of something else than the loss of a shape
            yield name, read_law(plan_from({"budget": {"training_flops": 1e20}, "law": name})).E
