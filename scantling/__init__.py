"""scantling: sizes every part of a decoder-only language model.

Everything is a function of an immutable `ModelSpec`. Names that need torch load it on first use.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ModelSpec": "scantling.spec",
    "load_spec": "scantling.resolve",
    "cost": "scantling.costing",
    "build": "scantling.model",
    "train": "scantling.training",
    "grow": "scantling.growth",
    "fit": "scantling.laws",
    "load_law": "scantling.laws",
    "plan": "scantling.planning",
    "report": "scantling.reporting",
}
__all__ = ["ModelSpec", "build", "cost", "fit", "grow", "load_law", "load_spec", "plan", "report", "train"]


def __getattr__(name: str) -> Any:
    """Load a public name from its home module."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'scantling' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
