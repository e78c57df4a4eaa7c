"""Optimizers and learning-rate schedules: torch's own, set up from a run's configuration."""

import math

import torch
from torch import nn

from scantling.config import WSD, AdamW, Constant, Cosine, Power, TrainConfig
from scantling.model import Decoder


def adamw(model: Decoder, config: AdamW) -> torch.optim.AdamW:
    """Fused AdamW; weight decay acts on matrices and embeddings, not on gains and biases."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def parameter_groups(model: Decoder) -> dict[str, dict[str, nn.Parameter]]:
    """The three groups of the ><former's recipe (arXiv 2606.18246, section 4), parameters by name.

    `mup` (learning rate / m_width, weight decay): the layers' matrices; `normal` (full rate, weight decay): tables, head,
    maps of transitions and branches; `no_weight_decay` (full rate): norm gains and shifts, biases, mixing weights.
    """
    groups: dict[str, dict[str, nn.Parameter]] = {"mup": {}, "normal": {}, "no_weight_decay": {}}
    for name, parameter in model.named_parameters():
        if name.startswith(("resize", "branches.entries")):
            group = "normal"
        elif parameter.ndim < 2:
            group = "no_weight_decay"
        else:
            group = "mup" if name.startswith("layers.") else "normal"
        groups[group][name] = parameter
    return groups


def power_factor(config: TrainConfig, schedule: Power, step: int) -> float:
    """min(1, a (batch_tokens x step)^exponent / peak) at 1-based `step`."""
    rate: float = schedule.a * (config.batch_tokens * step) ** schedule.exponent
    return min(1.0, rate / config.optimizer.learning_rate)


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """The schedule's factor on the peak learning rate at 0-based `step` of `config.steps`.

    Warm-up is linear: (step + 1)/W over the first W = ceil(warmup x steps) steps. Cosine and WSD reach `final` on the
    last step; power depends on the tokens seen, whatever the number of steps.
    """
    schedule, steps = config.schedule, config.steps
    warm = math.ceil(schedule.warmup * steps)
    if step < warm:
        top = power_factor(config, schedule, warm) if isinstance(schedule, Power) else 1.0
        return (step + 1) / warm * top
    match schedule:
        case Power():
            return power_factor(config, schedule, step + 1)
        case Constant():
            return 1.0
        case Cosine():
            start, floor = warm, schedule.final
        case WSD():
            start, floor = max(warm, steps - round(schedule.decay * steps)), schedule.final
    if step < start or steps - 1 <= start:
        return 1.0
    progress = (step - start) / (steps - 1 - start)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
