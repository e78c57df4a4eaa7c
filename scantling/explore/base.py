"""The plan that the page starts from, and what of it the page can change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from scantling.hardware import Device, load_hardware
from scantling.laws.published import load_published, published_names
from scantling.planning import PlanConfig, load_plan, plan_from
from scantling.yamlio import load, loads

PLANNED_LAWS = ("chinchilla", "overtraining", "head-configurations")  # those the planner reads


@dataclass(frozen=True, eq=False)
class Base:
    """A plan file as it was written, with `--set` applied.

    Attributes:
        name: the file as it was given, or None for the plan that `scantling init plan` writes.
        source: what relative paths of the plan start from.
        mapping: its keys.
        config: the same, validated.
        devices: by key: the shipped table and the plan's own.
        laws: published laws that the planner reads.
    """

    name: str | None
    source: str
    mapping: Mapping[str, Any]
    config: PlanConfig
    devices: Mapping[str, Device]
    laws: tuple[str, ...]

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
        return law if isinstance(law, str) else f"{law.kind} (inline)"


def read_base(path: Path | None = None, overrides: Sequence[str] = ()) -> Base:
    """The plan to start from.

    Args:
        path: a plan YAML; None for the plan that `scantling init plan` writes.
        overrides: `key=value`, as `--set` takes them.

    Raises:
        InputError: every fault of the plan, with its line.
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
        laws=tuple(name for name in published_names() if load_published(name).law in PLANNED_LAWS),
    )
