"""Do our fast paths train like the plain loop? Loss curves over 2,000 steps, 3 seeds, float32 and bfloat16.

Real text (the standard library's sources as bytes), identical shape, batch, context, optimizer, schedule and initial spreads;
each side draws its own weights and batches, so the curves of equal training differ as much as those of two seeds.

    python benchmarks/loss_curves.py [--steps 2000] [--work FOLDER]     (finished runs in FOLDER are kept)
"""

import argparse
import json
import math
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from gpt_reference import GPT, Loop
from training_speed import Shape, gpt_spec

from scantling.config import run_from
from scantling.data import prepare
from scantling.data.dataset import Dataset
from scantling.files import write_json
from scantling.optim import learning_rate_factor
from scantling.resolve import to_mapping
from scantling.training import train

SHAPE = Shape(4, 128, 4, 256, 64, 16, 1)
SEEDS = (0, 1, 2)
SIDES = ("plain float32", "ours float32", "plain bfloat16", "ours bfloat16")
PIECES = 8  # the curve is compared as means over so many equal pieces
VALIDATION_TOKENS = 262144


def run_config(steps: int, seed: int, precision: str) -> Any:
    """Our side's run; the plain loop takes its schedule."""
    batch = SHAPE.sequences * SHAPE.context
    return run_from(
        {
            "name": "curve", "model": to_mapping(gpt_spec(SHAPE)), "data": {"source": "python-stdlib"},
            "train": {
                "tokens": steps * batch, "batch_tokens": batch, "sequence_length": SHAPE.context, "precision": precision,
                "optimizer": {"learning_rate": 2e-3}, "schedule": {"kind": "cosine", "warmup": 0.05}, "seed": seed,
                "validation_tokens": VALIDATION_TOKENS,
            },
        },
        "benchmark",
    )  # fmt: skip


def plain(dataset: Dataset, steps: int, seed: int, precision: str) -> dict[str, Any]:
    """The plain loop's curve and validation loss."""
    torch.manual_seed(seed)
    config = run_config(steps, seed, precision)
    model = GPT(SHAPE.vocabulary, SHAPE.context, SHAPE.layers, SHAPE.width, SHAPE.heads)
    text = dataset.sources[0].streams["train"].gather(np.zeros(1, np.int64), dataset.tokens("train"))[0]
    loop = Loop(model, text, SHAPE.sequences, SHAPE.context, precision == "bfloat16", 2e-3)
    losses = []
    for step in range(steps):
        for group in loop.optimizer.param_groups:
            group["lr"] = 2e-3 * learning_rate_factor(config.train, step)
        losses.append(loop.step())
    total, count = 0.0, 0
    with torch.no_grad(), loop.autocast:
        for batch in dataset.validation_batches(SHAPE.context, 128, VALIDATION_TOKENS):
            ids, labels = torch.from_numpy(batch.inputs), torch.from_numpy(batch.labels)
            total, count = total + model(ids, labels).item() * labels.numel(), count + labels.numel()
    return {"losses": losses, "validation": total / count}


def ours(folder: Path, steps: int, seed: int, precision: str) -> dict[str, Any]:
    """Our curve (every noted step) and validation loss."""
    record = train(run_config(steps, seed, precision), folder, quiet=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"losses": [row["train/loss"] for row in rows], "validation": record.final["validation_loss"]}


def found(work: Path, dataset: Dataset, side: str, steps: int, seed: int) -> dict[str, Any]:
    """One run's outcome, kept in a file."""
    who, precision = side.split()
    path = work / f"{who}-{precision}-{seed}-{steps}.json"
    if not path.exists():
        folder = path.with_suffix("")
        write_json(
            path, plain(dataset, steps, seed, precision) if who == "plain" else ours(folder, steps, seed, precision)
        )
        print(path.name, flush=True)
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def pieces(losses: list[float]) -> list[float]:
    """Means over equal pieces of a curve."""
    edges = [round(piece * len(losses) / PIECES) for piece in range(PIECES + 1)]
    return [statistics.fmean(losses[a:b]) for a, b in pairwise(edges)]


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--steps", type=int, default=2000)
    arguments.add_argument("--work", type=Path, default=Path("runs/loss_curves"))
    chosen = arguments.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    dataset = prepare(run_config(chosen.steps, 0, "float32").data)
    runs = {side: [found(chosen.work, dataset, side, chosen.steps, seed) for seed in SEEDS] for side in SIDES}
    ends = [
        {
            "side": side,
            "validation loss": f"{statistics.fmean(values):.4f}",
            "standard deviation over seeds": f"{statistics.stdev(values):.4f}",
        }
        for side in SIDES
        for values in [[run["validation"] for run in runs[side]]]
    ]
    compared = []
    for one, other in (
        ("ours float32", "plain float32"),
        ("ours bfloat16", "plain bfloat16"),
        ("ours bfloat16", "ours float32"),
    ):
        curves = {side: [[*pieces(run["losses"]), run["validation"]] for run in runs[side]] for side in (one, other)}
        for place in range(PIECES + 1):
            a, b = ([curve[place] for curve in curves[side]] for side in (one, other))
            noise = math.sqrt((statistics.variance(a) + statistics.variance(b)) / len(SEEDS))
            difference = statistics.fmean(a) - statistics.fmean(b)
            where = f"{place + 1}/{PIECES} of the curve" if place < PIECES else "validation"
            compared.append(
                {
                    "pair": f"{one} - {other}", "where": where, "difference": f"{difference:+.4f}",
                    "its standard error over seeds": f"{noise:.4f}", "in standard errors": difference / noise,
                    "within 2.78 (95 %, 4 degrees of freedom)": "yes" if abs(difference) <= 2.776 * noise else "no",
                }
            )  # fmt: skip
    harness.report(
        "loss_curves", "Loss curves beside the plain loop's", {"End": ends, "Differences": compared},
        [
            f"{chosen.steps} steps of {SHAPE.sequences} x {SHAPE.context} tokens, {len(SEEDS)} seeds",
            "of 27 comparisons one or two fall outside 95 % by chance",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
