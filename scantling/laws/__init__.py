"""Scaling laws: closed forms, fits with uncertainty, loss-matched savings, published laws. No torch.

Names load their module on first use: a prediction needs no pandas, and only a fit needs scipy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scantling.laws.downstream import fit_downstream
    from scantling.laws.fitting import fit
    from scantling.laws.forms import (
        Chinchilla,
        Downstream,
        InferenceOptimum,
        Optimum,
        from_overtraining,
        to_overtraining,
    )
    from scantling.laws.lawfit import Certificate, Estimate, HoldOut, LawFit, OptimumEstimate, Prediction
    from scantling.laws.published import load_law, load_published, published_names
    from scantling.laws.savings import Saving, SavingAt, saving
    from scantling.laws.tables import read_table

_HOMES = {
    "Certificate": "scantling.laws.lawfit",
    "Chinchilla": "scantling.laws.forms",
    "Downstream": "scantling.laws.forms",
    "Estimate": "scantling.laws.lawfit",
    "HoldOut": "scantling.laws.lawfit",
    "InferenceOptimum": "scantling.laws.forms",
    "LawFit": "scantling.laws.lawfit",
    "Optimum": "scantling.laws.forms",
    "OptimumEstimate": "scantling.laws.lawfit",
    "Prediction": "scantling.laws.lawfit",
    "Saving": "scantling.laws.savings",
    "SavingAt": "scantling.laws.savings",
    "fit": "scantling.laws.fitting",
    "fit_downstream": "scantling.laws.downstream",
    "from_overtraining": "scantling.laws.forms",
    "load_law": "scantling.laws.published",
    "load_published": "scantling.laws.published",
    "published_names": "scantling.laws.published",
    "read_table": "scantling.laws.tables",
    "saving": "scantling.laws.savings",
    "to_overtraining": "scantling.laws.forms",
}
__all__ = [
    "Certificate",
    "Chinchilla",
    "Downstream",
    "Estimate",
    "HoldOut",
    "InferenceOptimum",
    "LawFit",
    "Optimum",
    "OptimumEstimate",
    "Prediction",
    "Saving",
    "SavingAt",
    "fit",
    "fit_downstream",
    "from_overtraining",
    "load_law",
    "load_published",
    "published_names",
    "read_table",
    "saving",
    "to_overtraining",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its home module."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'scantling.laws' has no attribute {name!r}")
