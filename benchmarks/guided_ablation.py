"""Does self-guided training pay at equal FLOPs? Final validation losses of small models with and without dense guides.

Four sides, all with the first feed-forward dense, as in arXiv 2406.16450 (section 4.4): the `dense` model, whose training
FLOPs are the budget; a structured one on the same tokens (`same tokens`, cheaper), on as many tokens as the budget buys
(`more tokens`), and `guided` by fixed_flops within the budget. Finished runs are skipped, interrupted ones go on.
"""

import argparse
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness

from scantling.config import RunConfig, run_from
from scantling.costing import param_counts, train_flops
from scantling.record import RunRecord
from scantling.resolve import spec_from
from scantling.rows import rows

SIDES = ("same tokens", "more tokens", "guided")
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # two-sided quantiles of Student's t for so many seeds


def structures(width: int) -> dict[str, dict[str, Any]]:
    """About 32 % of a dense feed-forward each (sheet 1.5), ranks in multiples of the blocks."""
    return {
        "low_rank": {"kind": "low_rank", "rank": width // 4},
        "block_dense": {"kind": "block_dense", "rank": int(0.4 * width) // 4 * 4, "num_blocks": 4},
        "block_shuffle": {"kind": "block_shuffle", "num_blocks": 4},
    }


def model(options: argparse.Namespace, structure: dict[str, Any]) -> dict[str, Any]:
    """GPT-2 style layers over bytes; the first feed-forward dense."""
    rest = {"gated": False, "hidden_act": "gelu_pytorch_tanh", "intermediate_size": 4 * options.width, "bias": True}
    return {
        "vocab_size": 256,
        "hidden_size": options.width,
        "num_hidden_layers": options.layers,
        "num_attention_heads": max(1, options.width // 32),
        "max_position_embeddings": options.context,
        "tie_word_embeddings": True,
        "ffn": {**structure, **rest},
        "per_layer_config": {0: {"ffn": {"kind": "dense", **rest}}},
    }


def runs(options: argparse.Namespace) -> Iterator[RunConfig]:
    """Every run: the dense model and three sides of each structure, per learning rate and seed."""
    batch = options.batch * options.context
    dense = spec_from(model(options, {"kind": "dense"}))
    tokens = round(options.tokens_per_parameter * param_counts(rows(dense))["total"] / batch) * batch
    budget = train_flops(dense, options.context, tokens)
    for name in ("dense", *options.kinds):
        mapping = model(options, {"kind": "dense"} if name == "dense" else structures(options.width)[name])
        cost = train_flops(spec_from(mapping), options.context, 1)
        plans: dict[str, dict[str, Any]] = {"dense": {"tokens": tokens}}
        if name != "dense":
            plans = {
                "same tokens": {"tokens": tokens},
                "more tokens": {"tokens": math.floor(budget / cost / batch) * batch},
                "guided": {"tokens": tokens, "guide": {"mode": "fixed_flops"}},
            }
        for side, plan in plans.items():
            for rate in options.rates:
                for seed in range(options.seeds):
                    train = {
                        "batch_tokens": batch,
                        "sequence_length": options.context,
                        "optimizer": {"learning_rate": rate},
                        "seed": seed,
                        "validation_tokens": options.validation_tokens,
                        **plan,
                    }
                    labels = {"structure": name, "side": side, "rate": rate, "seed": seed}
                    title = f"{name}-{side.replace(' ', '-')}-{rate:g}-s{seed}"
                    data = {"source": options.source}
                    yield run_from(
                        {"name": title, "model": mapping, "data": data, "train": train, "labels": labels}, title
                    )


def trained(planned: list[RunConfig], out: Path) -> list[RunRecord]:
    """The records of all runs, each in its folder below `out`; finished ones are skipped, interrupted ones go on."""
    from scantling.training import train

    total, done, records = sum(run.train_flops for run in planned), 0.0, []
    for run in planned:
        records.append(train(run, out / run.name, quiet=True))
        done += run.train_flops
        print(f"[{done / total:4.0%}] {run.name}: {loss(records[-1]):.4f}", flush=True)
    return records


def best(records: list[RunRecord], structure: str, side: str) -> dict[int, RunRecord]:
    """The records by seed, at the learning rate with the lowest mean loss; diverged runs count as infinitely bad."""
    mine = [record for record in records if (record.labels["structure"], record.labels["side"]) == (structure, side)]
    rates: dict[float, dict[int, RunRecord]] = {}
    for record in mine:
        rates.setdefault(record.labels["rate"], {})[record.labels["seed"]] = record
    return min(rates.values(), key=lambda by_seed: statistics.fmean(loss(record) for record in by_seed.values()))


def loss(record: RunRecord) -> float:
    return record.final.get("validation_loss", math.inf)


def interval(differences: list[float]) -> list[float]:
    """95 % interval of the mean over seeds, paired."""
    if len(differences) < 2:
        return [-math.inf, math.inf]
    half = T_95.get(len(differences), 2.6) * statistics.stdev(differences) / math.sqrt(len(differences))
    mean = statistics.fmean(differences)
    return [round(mean - half, 4), round(mean + half, 4)]


def tables(records: list[RunRecord], kinds: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Losses of every side, and paired differences at equal FLOPs."""
    budget = best(records, "dense", "dense")
    losses, differences = [], []
    for structure, side in [("dense", "dense"), *((kind, side) for kind in kinds for side in SIDES)]:
        found = best(records, structure, side)
        one = next(iter(found.values()))
        losses.append(
            {
                "structure": structure,
                "side": side,
                "parameters": one.params["total"],
                "tokens": one.tokens,
                "FLOPs / dense": round(one.flops["train"] / budget[one.seed].flops["train"], 4),
                "learning rate": one.labels["rate"],
                "loss": f"{statistics.fmean(loss(record) for record in found.values()):.4f}",
                "seeds": [f"{loss(record):.4f}" for _, record in sorted(found.items())],
            }
        )
    for kind in kinds:
        guided, more, plain = (best(records, kind, side) for side in ("guided", "more tokens", "same tokens"))
        for name, other in (("more tokens", more), ("same tokens", plain), ("dense", budget)):
            found = [loss(guided[seed]) - loss(other[seed]) for seed in sorted(guided)]
            differences.append(
                {
                    "structure": kind,
                    "guided minus": name,
                    "nats": f"{statistics.fmean(found):+.4f}",
                    "95 %": interval(found),
                    "seeds": len(found),
                }
            )
    return {
        "Final validation loss, nats per byte": losses,
        "Difference, paired by seed (negative: guides help)": differences,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=["low_rank", "block_dense", "block_shuffle"])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32, help="sequences of a step")
    parser.add_argument("--tokens-per-parameter", type=float, default=20.0, help="of the dense model")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3], help="every side takes its best")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--source", default="python-stdlib")
    parser.add_argument("--validation-tokens", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("guided_ablation_runs"))
    options = parser.parse_args()

    records = trained(list(runs(options)), options.out)
    harness.report(
        "guided_ablation",
        "Self-guided training of structured feed-forwards at equal FLOPs",
        tables(records, options.kinds),
        ["Matched: training FLOPs of `dense`, `more tokens` and `guided` (3 x forward, full attention; guides at their mean "
         "use), data order per seed, batch, schedule. `same tokens` costs less.",
         "Learning rates: every side the best of those tried (see the command), by mean loss over seeds.",
         "FLOPs of guided runs are the plan's; the draws of a run scatter around them."],
    )  # fmt: skip


if __name__ == "__main__":
    main()
