"""A study with known losses, a plan, and names that try to be markup: what the pages under test are made from."""

from pathlib import Path
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from scantling.config import RunConfig
from scantling.costing import flops_per_token, param_counts
from scantling.record import RunRecord
from scantling.rows import rows

EVIL = "<script>alert('x')</script>&amp;</script>"
STUDY: dict[str, Any] = {
    "name": "widths",
    "model": {
        "vocab_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "ffn": {"kind": "dense", "expansion": 4},
    },
    "families": {
        "uniform": {},
        "bowtie": {
            "width": {"profile": "geometric", "bottleneck_ratio": 0.3, "turn_layer": 6, "match": "allocated"},
            "transition": "carry_forward",
        },
    },
    "sizes": [{"hidden_size": width} for width in (16, 24, 40, 64)],
    "tokens_per_parameter": [8, 16, 48],
    "learning_rate": {"base": 6e-3, "reference_hidden_size": 40},
    "data": {"source": "python-stdlib"},
    "train": {"batch_tokens": 4096, "sequence_length": 128},
}
SETTINGS: dict[str, Any] = {"law": "chinchilla", "loss": "loss", "resamples": 100, "seed": 0}


def synthetic_record(cell: RunConfig, number: int) -> RunRecord:
    """A finished run whose loss is a known law, 2 % better per parameter for the second family, with 0.3 % noise."""
    table = rows(cell.spec)
    counts, per_token = param_counts(table), flops_per_token(table, cell.train.sequence_length)
    tokens = cell.train.steps * cell.train.batch_tokens
    better = 0.985 if cell.labels["family"] == "bowtie" else 1.0
    noise = np.random.default_rng(number).normal(0, 0.003)
    loss = float((1.2 + better * (30 * counts["total"] ** -0.35 + 90 * tokens**-0.37)) * np.exp(noise))
    diverged = number == 4
    return RunRecord(
        name=cell.name,
        status="diverged" if diverged else "done",
        run_hash=cell.hash,
        spec_hash=cell.spec.hash,
        config=cell.to_mapping(),
        params=counts,
        flops={name: float(per_token[name]) * tokens for name in ("train", "train_causal", "chinchilla_6nd")},
        tokens=tokens,
        steps=cell.train.steps,
        seed=cell.train.seed,
        final={} if diverged else {"train_loss": loss, "validation_loss": loss, "validation_std_error": 0.004},
        data={
            "fingerprint": "ab" * 32,
            "vocab_size": 256,
            "train_tokens": 10**7,
            "validation_tokens": 10**5,
            "epochs": tokens / 1e7,
        },
        performance={"seconds": 30.0 + number, "tokens_per_second": 1e5, "mfu": 0.2, "ceiling_flops_per_second": 1e11},
        environment={
            "device": "a processor",
            "threads": 1,
            "precision": "float32",
            "python": "3.11",
            "torch": "2.13.0",
            "numpy": "2.4",
            "scantling": "0.1.0",
        },
        labels=cell.labels,
        warnings=("the training text was seen 1.25 times",) if number == 7 else (),
    )


def synthetic_plan() -> dict[str, Any]:
    """A plan as its verb writes it."""
    candidates = []
    shapes = [(12, 768, 2), (14, 704, 1), (10, 832, 1), (12, 768, 4), (12, 768, 12), (16, 640, 10)]
    for number, (depth, width, kv) in enumerate(shapes):
        n = 12.0 * depth * width**2
        loss = 3.1 + 0.004 * number + 0.001 * number**2
        sizes = {
            "num_hidden_layers": depth,
            "hidden_size": width,
            "num_attention_heads": width // 64,
            "num_key_value_heads": kv,
        }
        spec = {**sizes, "vocab_size": 32000, "head_dim": 64, "intermediate_size": 4 * width}
        training = 1e19 * (1 - 0.02 * number)
        candidates.append(
            {
                **sizes,
                "training_flops": training,
                "serving_flops": 2 * n * 1e9,
                "lifetime_flops": training + 2 * n * 1e9,
                "flops": 2 * n * 2048,
                "memory_bytes": 2 * n + kv * 256.0 * depth * 2048,
                "z": None,
                "parameters": n,
                "tokens": 1e19 / 6 / n,
                "loss": loss,
                "loss_low": loss - 0.02,
                "loss_high": loss + 0.025,
                "no_interval": None,
                "objective": loss,
                "binding": "training_flops",
                "extrapolated": True,
                "extrapolation": ["N = 8.5e7 is 40 times above the fitted range 1e5 to 2e6"],
                "margin_percent": 0.16 if number < 5 else None,
                "probability_best": (0.5, 0.2, 0.1, 0.1, 0.1, 0.0)[number],
                "expected_regret": 0.0004 * (number + 1),
                "probability_reached": 0.9,
                "spec": spec,
            }
        )
    shape = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 2}
    other = {**shape, "num_hidden_layers": 14, "hidden_size": 896}
    front = [{**shape, "cost": 10.0 ** (18 + k / 4), "loss": 1.8 + 1.3 * 10 ** (-(k - 4) * 0.04)} for k in range(9)]
    trade = [
        {**shape, "memory_bytes": 1.6e8 * 1.1**k, "flops": candidates[0]["lifetime_flops"] / 1.02**k} for k in range(5)
    ]
    turned = [
        {"key": "serving.context", "factor": 0.5, "value": 1024, **shape, "same_heads": True, "regret_percent": 0.0},
        {"key": "serving.tokens", "factor": 2.0, "value": 2e9, **other, "same_heads": True, "regret_percent": 3.217},
        {"key": "serving.batch", "factor": 2.0, "value": 2, **other, "same_heads": True, "regret_percent": None},
    ]
    run = {**shape, "parameters": 1e6, "tokens": 2e7, "tokens_per_parameter": 20.0, "training_flops": 1.2e14}
    following = {
        "runs": [run, {**run, "tokens": 8e7, "tokens_per_parameter": 80.0, "training_flops": 4.8e14}],
        "training_flops": 6e14,
        "expected_regret": 0.0123,
        "expected_regret_after": 0.0045,
        "noise": 0.01,
        "draws": 150,
        "study": "name: plan-next\nfamilies: {plan: {}}\n",
    }
    return {
        "schema": "scantling.plan/1",
        "minimize": "loss",
        "cost_convention": "full",
        "parameters": "total",
        "law": "chinchilla-epoch",
        "candidates": candidates,
        "law_optimum": None,
        "front_cost": "training_flops",
        "front": front,
        "memory_front": trade,
        "sensitivity": turned,
        "next": following,
        "study": "name: plan-ladder\n",
        "screened": 4123,
        "notes": ["The tokens are free: the law chooses D."],
    }


def own_text(path: Path) -> str:
    """The page without plotly.js."""
    text = path.read_text(encoding="utf-8")
    assert text.count(get_plotlyjs()) <= 1
    return text.replace(get_plotlyjs(), "")
