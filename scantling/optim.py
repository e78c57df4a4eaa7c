"""Optimizers and learning-rate schedules: torch's own, set up from a run's configuration."""

import math

import torch

from scantling.config import WSD, AdamW, Constant, Cosine, TrainConfig
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


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """The schedule's factor on the peak learning rate at 0-based `step` of `config.steps`.

    Warm-up is linear: (step + 1)/W over the first W = ceil(warmup x steps) steps. Cosine and WSD reach `final` on the
    last step.
    """
    schedule, steps = config.schedule, config.steps
    warm = math.ceil(schedule.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    match schedule:
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
