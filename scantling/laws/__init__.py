"""Scaling laws: closed forms, fits with uncertainty, loss-matched savings, published laws. No torch.

Names load their module on first use: a prediction needs no pandas, and only a fit needs scipy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scantling.laws.cleaning import clean
    from scantling.laws.downstream import fit_downstream, with_errors
    from scantling.laws.evidence import (
        Certificate,
        Estimate,
        HoldOut,
        OptimumEstimate,
        Prediction,
        Residuals,
        Sensitivity,
    )
    from scantling.laws.fitting import fit
    from scantling.laws.forms import (
        Chinchilla,
        Downstream,
        InferenceOptimum,
        Optimum,
        from_overtraining,
        to_overtraining,
    )
    from scantling.laws.lawfit import LawFit
    from scantling.laws.published import load_law, load_published, published_names
    from scantling.laws.rule import extrapolate
    from scantling.laws.savings import Saving, SavingAt, saving
    from scantling.laws.tables import read_table

_HOMES = {
    "Certificate": "scantling.laws.evidence",
    "Chinchilla": "scantling.laws.forms",
    "Downstream": "scantling.laws.forms",
    "Estimate": "scantling.laws.evidence",
    "HoldOut": "scantling.laws.evidence",
    "InferenceOptimum": "scantling.laws.forms",
    "LawFit": "scantling.laws.lawfit",
    "Optimum": "scantling.laws.forms",
    "OptimumEstimate": "scantling.laws.evidence",
    "Prediction": "scantling.laws.evidence",
    "Residuals": "scantling.laws.evidence",
    "Saving": "scantling.laws.savings",
    "SavingAt": "scantling.laws.savings",
    "Sensitivity": "scantling.laws.evidence",
    "clean": "scantling.laws.cleaning",
    "extrapolate": "scantling.laws.rule",
    "fit": "scantling.laws.fitting",
    "fit_downstream": "scantling.laws.downstream",
    "from_overtraining": "scantling.laws.forms",
    "load_law": "scantling.laws.published",
    "load_published": "scantling.laws.published",
    "published_names": "scantling.laws.published",
    "read_table": "scantling.laws.tables",
    "saving": "scantling.laws.savings",
    "to_overtraining": "scantling.laws.forms",
    "with_errors": "scantling.laws.downstream",
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
    "Residuals",
    "Saving",
    "SavingAt",
    "Sensitivity",
    "clean",
    "extrapolate",
    "fit",
    "fit_downstream",
    "from_overtraining",
    "load_law",
    "load_published",
    "published_names",
    "read_table",
    "saving",
    "to_overtraining",
    "with_errors",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its home module."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'scantling.laws' has no attribute {name!r}")
