"""Does growing pay at equal training FLOPs? Final validation losses of a model from scratch and of the same one grown on the way.

Every side ends as the same model and spends the same FLOPs: what a smaller beginning saves buys more tokens. Sides: `scratch`;
`deeper` (half the layers first; new layers copied with a zero output, random with a zero output, or stacked), `wider` (two
thirds of the width first), and both at once. Finished runs are skipped, interrupted ones go on.
"""

import argparse
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
from guided_ablation import interval, loss, trained

from scantling.config import RunConfig, run_from
from scantling.costing import param_counts, train_flops
from scantling.record import RunRecord
from scantling.resolve import spec_from
from scantling.rows import rows

SIDES: dict[str, tuple[float, float, str]] = {  # shares of width and depth at the beginning, what new layers hold
    "deeper, copied": (1, 0.5, "copy"),
    "deeper, random": (1, 0.5, "random"),
    "deeper, stacked": (1, 0.5, "stack"),
    "wider": (2 / 3, 1, "copy"),
    "wider and deeper": (2 / 3, 0.5, "copy"),
}


def model(options: argparse.Namespace, width: float = 1, depth: float = 1) -> dict[str, Any]:
    """Llama-style layers over bytes, heads of 16."""
    size = round(options.width * width / 16) * 16
    return {
        "vocab_size": 256,
        "hidden_size": size,
        "num_hidden_layers": round(options.layers * depth),
        "num_attention_heads": size // 16,
        "head_dim": 16,
        "intermediate_size": 3 * size,
        "max_position_embeddings": options.context,
    }


def runs(options: argparse.Namespace) -> Iterator[RunConfig]:
    """Every run: from scratch, and each side grown at each share of its tokens, per seed."""
    batch = options.batch * options.context
    whole = spec_from(model(options))
    tokens = round(options.tokens_per_parameter * param_counts(rows(whole))["total"] / batch) * batch
    cost = train_flops(whole, options.context, 1)
    for seed in range(options.seeds):
        train = {
            "batch_tokens": batch,
            "sequence_length": options.context,
            "optimizer": {"learning_rate": options.rate},
            "schedule": {"kind": "wsd", "warmup": 0.02, "decay": 0.2, "final": 0.0},
            "seed": seed,
            "validation_tokens": options.validation_tokens,
        }
        base = {"data": {"source": options.source}}
        name = f"scratch-s{seed}"
        labels = {"side": "scratch", "at": 0.0, "seed": seed}
        yield run_from(
            {"name": name, "model": model(options), "train": {**train, "tokens": tokens}, "labels": labels, **base},
            name,
        )
        for side, (width, depth, new_layers) in SIDES.items():
            small = model(options, width, depth)
            first = train_flops(spec_from(small), options.context, 1)
            for at in options.at:
                more = math.floor(tokens * cost / (at * first + (1 - at) * cost) / batch) * batch
                name = f"{side.replace(', ', '-').replace(' ', '-')}-{at:g}-s{seed}"
                yield run_from(
                    {
                        "name": name,
                        "model": small,
                        "train": {**train, "tokens": more},
                        "growth": [{"at": at, "to": model(options), "new_layers": new_layers}],
                        "labels": {"side": side, "at": at, "seed": seed},
                        **base,
                    },
                    name,
                )


def table(records: list[RunRecord]) -> list[dict[str, Any]]:
    """Losses of every side, and their paired differences to the model from scratch."""
    sides: dict[tuple[str, float], dict[int, RunRecord]] = {}
    for record in records:
        sides.setdefault((record.labels["side"], record.labels["at"]), {})[record.seed] = record
    scratch = sides["scratch", 0.0]
    found = []
    for (side, at), mine in sides.items():
        one = next(iter(mine.values()))
        differences = [loss(mine[seed]) - loss(scratch[seed]) for seed in sorted(mine)]
        found.append(
            {
                "side": side,
                "grown after": f"{at:.0%} of tokens" if at else "",
                "parameters": " to ".join(f"{stage['params']:,}" for stage in one.stages),
                "tokens": one.tokens,
                "FLOPs / scratch": round(one.flops["train"] / scratch[one.seed].flops["train"], 4),
                "loss": f"{statistics.fmean(loss(record) for record in mine.values()):.4f}",
                "minus scratch": f"{statistics.fmean(differences):+.4f}" if at else "",
                "95 %": interval(differences) if at else "",
                "seeds": len(mine),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32, help="sequences of a step")
    parser.add_argument("--tokens-per-parameter", type=float, default=8.0)
    parser.add_argument("--at", type=float, nargs="+", default=[0.3], help="shares of the tokens before growing")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--source", default="python-stdlib")
    parser.add_argument("--validation-tokens", type=int, default=300_000)
    parser.add_argument("--out", type=Path, default=Path("growth_training_runs"))
    options = parser.parse_args()

    records = trained(list(runs(options)), options.out)
    harness.report(
        "growth_training",
        "Growing on the way against training from scratch, at equal FLOPs",
        {"Final validation loss, nats per byte": table(records)},
        ["Matched: training FLOPs (3 x forward, full attention, summed over stages), final model, batch, schedule, data order "
         "per seed (tokens differ: that is the point).",
         "One learning rate for all; a rate tuned per side may move differences of this size."],
    )  # fmt: skip


if __name__ == "__main__":
    main()
