"""Scaling laws: closed forms, fits with uncertainty, loss-matched savings, published laws. No torch."""

from scantling.laws.downstream import fit_downstream
from scantling.laws.fit import fit
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
from scantling.laws.saving import Saving, SavingAt, saving
from scantling.laws.tables import read_table

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
