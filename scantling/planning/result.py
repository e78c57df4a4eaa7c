"""The answer of a plan, as data: candidates best first, the optimum of the law alone, the front, and the notes."""

import dataclasses
from dataclasses import dataclass
from typing import Any

SCHEMA = "scantling.plan/1"


@dataclass(frozen=True)
class Candidate:
    """One shape with its predicted loss and its costs in the plan's convention.

    Attributes:
        parameters: N in the law's count; `params` holds the named counts of the built spec.
        n_star: the real-valued N at which the law reaches the target with these heads; head-configuration laws only.
        tokens: D.
        loss_low, loss_high: 95% interval of the law, or None for the reason in `no_interval`.
        flops: of all tokens of one context.
        costs: every cost of `costs.CostName` that the plan says enough for.
        family: of architecture, by the plan's name; empty in a plan without families.
        errors: task error by task, from the law's own law from loss to error.
        margin_percent: how much worse the next candidate's objective is.
        binding: the constraint that keeps the objective from improving.
        probability_best: share of the law's draws in which it is the best of these candidates.
        expected_regret: mean over the draws of its objective less the best of the screened pool's, in the objective's unit.
        probability_reached: share of the draws in which it reaches the target within the limits.
        extrapolation: one sentence for each quantity outside the fitted range.
        spec, yaml, hash: the buildable spec; None for real-valued shapes.
    """

    num_attention_heads: float
    num_key_value_heads: float
    hidden_size: float
    num_hidden_layers: float
    head_dim: float
    intermediate_size: float
    parameters: float
    n_star: float | None
    tokens: float
    tokens_per_parameter: float
    loss: float
    loss_low: float | None
    loss_high: float | None
    no_interval: str | None
    training_flops: float
    serving_flops: float
    lifetime_flops: float
    flops: float
    weight_bytes: float
    kv_cache_bytes: float
    memory_bytes: float
    z: float | None
    objective: float
    binding: str
    extrapolated: bool
    extrapolation: tuple[str, ...]
    params: dict[str, int] | None
    spec: dict[str, Any] | None
    yaml: str | None
    hash: str | None
    costs: dict[str, float]
    family: str = ""
    errors: dict[str, float] | None = None
    margin_percent: float | None = None
    probability_best: float | None = None
    expected_regret: float | None = None
    probability_reached: float | None = None


@dataclass(frozen=True)
class LawOptimum:
    """The real-valued optimum of the law alone: 6 N D to train, 2 N per served token, no shape.

    Attributes:
        compute_optimal_parameters, compute_optimal_tokens: the model of the same loss that is cheapest to train.
        saving_flops, saving_percent: what the optimum saves over it in training plus serving.
        intervals: 95% of N, D, M and loss over the law's draws, for a budget of training FLOPs.
    """

    parameters: float
    tokens: float
    tokens_per_parameter: float
    loss: float
    training_flops: float
    lifetime_flops: float
    compute_optimal_parameters: float
    compute_optimal_tokens: float
    saving_flops: float
    saving_percent: float
    intervals: dict[str, tuple[float, float]] | None
    convention: str = "6 N D to train, 2 N per served token"


@dataclass(frozen=True)
class Sensitivity:
    """What would be best if one number of the plan were other.

    Attributes:
        key: of the plan; `factor` and `value`: what it is multiplied by and becomes.
        num_attention_heads ... : the best shape then.
        same_heads: whether its heads are those of the plan's choice.
        regret_percent: how much worse the plan's choice is there than the best; None where the choice becomes impossible.
    """

    key: str
    factor: float
    value: float
    num_attention_heads: float
    num_key_value_heads: float
    hidden_size: float
    num_hidden_layers: float
    same_heads: bool
    regret_percent: float | None
    family: str = ""


@dataclass(frozen=True)
class MemoryPoint:
    """A candidate that no other beats in both memory and FLOPs."""

    memory_bytes: float
    flops: float
    hidden_size: float
    num_hidden_layers: float
    num_attention_heads: float
    num_key_value_heads: float


@dataclass(frozen=True)
class NextRun:
    """One run to train next."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    parameters: float
    tokens: float
    tokens_per_parameter: float
    training_flops: float
    family: str = ""


@dataclass(frozen=True)
class NextRuns:
    """The runs that most lower the expected regret of the choice.

    Attributes:
        training_flops: of all of them.
        expected_regret, expected_regret_after: before and after them, in the objective's unit.
        noise: standard deviation assumed of a run's log loss.
        draws: of the law.
        grid: sizes and columns considered.
        study: YAML; None where no run is worth its compute.
    """

    runs: tuple[NextRun, ...]
    training_flops: float
    expected_regret: float
    expected_regret_after: float
    regret_removed_per_flop: float
    noise: float
    draws: int
    grid: tuple[int, int]
    study: str | None


@dataclass(frozen=True)
class FrontPoint:
    """The best loss for a cost, or the least cost for a loss."""

    cost: float
    loss: float
    parameters: float
    tokens: float
    hidden_size: float
    num_hidden_layers: float
    num_attention_heads: float
    num_key_value_heads: float
    family: str = ""


@dataclass(frozen=True)
class Plan:
    """The answer of `plan`: candidates best first, the optimum of the law alone and of real-valued shapes, the front.

    Attributes:
        front: the plan solved again for other targets or budgets; `front_cost` names its cost axis.
        screened: whole-number shapes priced.
        notes: conventions, what was held fixed, extrapolation, near-ties.
        serving: context (the largest), contexts with shares, batch, dtype, devices and tokens.
        sensitivity: the choice at half and double the context, served tokens, batch and price.
        memory_front: memory against FLOPs, over all shapes that will do; `memory_front_cost` says which: lifetime_flops, or
            flops of one context.
        no_probability: why no candidate has a probability of being best.
        next: the runs to train next, where the plan asks.
        study: YAML of a study that would put the choice to the test.
    """

    minimize: str
    cost_convention: str
    parameters: str
    law: str
    candidates: tuple[Candidate, ...]
    law_optimum: LawOptimum | None
    real_optimum: Candidate
    front_cost: str
    front: tuple[FrontPoint, ...]
    screened: int
    notes: tuple[str, ...]
    serving: dict[str, Any]
    sensitivity: tuple[Sensitivity, ...] = ()
    memory_front: tuple[MemoryPoint, ...] = ()
    memory_front_cost: str = "lifetime_flops"
    no_probability: str | None = None
    study: str | None = None
    next: NextRuns | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, in JSON types."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}
