"""Parallel stacks: layer i of all of them as one batched computation, against one stack after the other."""

from collections.abc import Callable

import harness
import torch

from scantling.model import Cache, build
from scantling.resolve import spec_from
from scantling.spec import ModelSpec

SIZES = [  # stacks, layers per stack, width, heads, context, sequences
    (2, 4, 64, 2, 64, 4),
    (4, 4, 64, 2, 64, 4),
    (2, 4, 128, 4, 128, 8),
    (4, 4, 128, 4, 128, 8),
    (2, 6, 384, 6, 256, 4),
    (4, 6, 384, 6, 256, 4),
]
ROUNDS = {64: 41, 128: 21, 384: 9}
DECODED = 32


def spec(size: tuple[int, ...]) -> ModelSpec:
    stacks, depth, width, heads, context, _ = size
    return spec_from(
        {
            "vocab_size": 256,
            "max_position_embeddings": context,
            "num_hidden_layers": stacks * depth,
            "hidden_size": width,
            "num_attention_heads": heads,
            "ffn": {"kind": "dense", "expansion": 4},
            "branches": {"count": stacks, "entry": "projection", "mixing": "softmax"},
        }
    )


def training(model_spec: ModelSpec, context: int, sequences: int, grouped: bool) -> Callable[[], None]:
    """One optimizer step."""
    model = build(model_spec)
    model.grouped_branches = grouped
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, model_spec.vocab_size, (sequences, context))
    labels = ids.roll(-1, 1)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        model.loss(ids, labels).backward()
        optimizer.step()

    return run


def decoding(model_spec: ModelSpec, grouped: bool) -> Callable[[], None]:
    """DECODED single tokens with a cache."""
    model = build(model_spec).eval()
    model.grouped_branches = grouped
    token = torch.zeros(1, 1, dtype=torch.long)

    def run() -> None:
        cache = Cache(model_spec, 1, DECODED)
        with torch.inference_mode():
            for _ in range(DECODED):
                model(token, cache)

    return run


def main() -> None:
    harness.prepare_torch()
    found = []
    for size in SIZES:
        stacks, depth, width, _, context, sequences = size
        one = spec(size)
        steps = {str(grouped): training(one, context, sequences, grouped) for grouped in (False, True)}
        seconds = harness.interleaved(steps, ROUNDS[width], limit=12)
        tokens = {str(grouped): decoding(one, grouped) for grouped in (False, True)}
        decode = harness.interleaved(tokens, 9, limit=5)
        speed = harness.ratio(seconds["False"], seconds["True"])
        found.append(
            {
                "stacks": stacks,
                "each": f"{depth}x{width}",
                "batch": f"{sequences} x {context}",
                "training: grouped speed / looped": speed,
                "rounds": len(seconds["True"]),
                "quartiles": harness.spread(seconds["False"], seconds["True"]),
                "faster in training": "grouped" if speed > 1 else "loop",
                "decoding: grouped speed / looped": harness.ratio(decode["False"], decode["True"]),
            }
        )
    harness.report(
        "grouped_branches",
        "Parallel stacks: grouped against looped",
        {"Training step (AdamW included) and single-token decoding": found},
        [f"float32, medians of interleaved rounds; decoding {DECODED} tokens "
         "of one sequence with a cache. Weights are stacked anew in every pass."],
    )  # fmt: skip


if __name__ == "__main__":
    main()
