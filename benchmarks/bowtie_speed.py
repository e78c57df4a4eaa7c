"""Does a ><former turn its saved FLOPs into time? Forward + backward tokens/s against its uniform baseline."""

from collections.abc import Callable
from typing import Any

import harness
import torch

from scantling.costing import flops_per_token, param_counts
from scantling.model import build
from scantling.resolve import spec_from
from scantling.rows import rows
from scantling.spec import ModelSpec

SIZES = [  # layers, width, heads, vocabulary, context, sequences
    (8, 256, 4, 256, 256, 4),
    (12, 384, 6, 256, 256, 4),
    (16, 640, 10, 4096, 512, 1),
]
MATCHES = ("allocated", "flops")
ROUNDS = 13
GOAL = 0.95


def spec(size: tuple[int, ...], match: str | None) -> ModelSpec:
    layers, width, heads, vocabulary, context, _ = size
    mapping: dict[str, Any] = {
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "ffn": {"kind": "dense", "expansion": 4},
    }
    if match is not None:
        mapping |= {"width": {"bottleneck_ratio": 0.3, "match": match}, "transition": "carry_forward"}
    return spec_from(mapping)


def step(model_spec: ModelSpec, context: int, sequences: int) -> Callable[[], None]:
    """Forward and backward of one batch."""
    model = build(model_spec)
    ids = torch.randint(0, model_spec.vocab_size, (sequences, context))
    labels = ids.roll(-1, 1)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model.loss(ids, labels).backward()

    return run


def main() -> None:
    harness.prepare_torch()
    found = []
    for size in SIZES:
        layers, width, _, vocabulary, context, sequences = size
        specs = {"uniform": spec(size, None)} | {match: spec(size, match) for match in MATCHES}
        steps = {name: step(one, context, sequences) for name, one in specs.items()}
        seconds = harness.interleaved(steps, ROUNDS, limit=110)
        tables = {name: rows(one) for name, one in specs.items()}
        flops = {name: flops_per_token(one, context)["train"] for name, one in tables.items()}
        for match in MATCHES:
            speed, saved = harness.ratio(seconds["uniform"], seconds[match]), flops["uniform"] / flops[match]
            found.append(
                {
                    "uniform baseline": f"{layers}x{width}, {vocabulary} tokens, context {context} x {sequences}",
                    "match": match,
                    "widths": f"{specs[match].widths[0]} to {min(specs[match].widths)}",
                    "parameters / uniform": param_counts(tables[match])["total"]
                    / param_counts(tables["uniform"])["total"],
                    "uniform FLOPs / its": saved,
                    "its tokens/s / uniform's": speed,
                    "rounds": len(seconds[match]),
                    "quartiles": harness.spread(seconds["uniform"], seconds[match]),
                    "of the FLOP ratio": speed / saved,
                    "goal 0.95": "hit" if speed / saved >= GOAL else "miss",
                }
            )
    harness.report(
        "bowtie_speed",
        "><former against its uniform baseline: forward + backward",
        {"Tokens per second beside FLOPs": found},
        ["float32, medians of interleaved rounds; bottleneck ratio 0.3, turn at 3/4 of the depth, heads as wide "
         "as the layer over the number of heads. FLOPs as performed: full attention, head included."],
    )  # fmt: skip


if __name__ == "__main__":
    main()
