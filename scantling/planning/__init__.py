"""Which shape should I train? From a loss law and a budget (or a target loss) to ranked, buildable, exactly priced shapes.

`config` reads the plan file, `shapes` holds the candidate shapes as arrays, `price` counts what they cost, `loss` says what
is known about their loss, `outcome` brings the four together for one goal, and `solve` searches, screens and ranks;
`result` is the answer and `notes` its sentences.
"""

from scantling.planning.config import PlanConfig, load_plan, plan_from
from scantling.planning.result import Plan
from scantling.planning.solve import plan

__all__ = ["Plan", "PlanConfig", "load_plan", "plan", "plan_from"]
