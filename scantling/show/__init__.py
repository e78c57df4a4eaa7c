"""What a person sees in the terminal, and the JSON of verbs whose answer is not already a plain object."""

from scantling.show.coordinate_check import coordinates
from scantling.show.costs import cost_json, cost_tables, memory_json
from scantling.show.growth import growth
from scantling.show.laws import (
    comparison,
    errors_json,
    law,
    law_json,
    optimum_json,
    prediction,
    prediction_json,
    value_json,
)
from scantling.show.plans import plan
from scantling.show.runs import run_table
from scantling.show.timing import timing

__all__ = [
    "comparison", "coordinates", "cost_json", "cost_tables", "errors_json", "growth", "law", "law_json", "memory_json",
    "optimum_json", "plan", "prediction", "prediction_json", "run_table", "timing", "value_json",
]  # fmt: skip
