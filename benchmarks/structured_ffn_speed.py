"""Structured feed-forward layers against the dense one: a training step, and one token with each form of the weights."""

from collections.abc import Callable
from typing import Any

import harness
import torch
from pydantic import TypeAdapter
from torch import nn

from scantling.model.ffn import BlockDenseLinear, BlockShuffleLinear, FeedForward, LowRankLinear
from scantling.model.premerge import PremergedLinear, merged_weight
from scantling.parts import FFN, ExpertFFN
from scantling.rows import ffn_weights

WIDTHS = (512, 1024, 2048)
TOKENS = 1024
ROUNDS = {512: 21, 1024: 13, 2048: 7}
DECODE_ROUNDS, DECODE_REPEATS = 15, {512: 20, 1024: 10, 2048: 4}


def kinds(width: int) -> dict[str, dict[str, Any]]:
    """Ranks and blocks of the paper's two sizes (62.5 % and 31.25 % of a dense FFN), ranks in multiples of 16."""
    return {
        "low_rank 32 %": {"kind": "low_rank", "rank": width // 4},
        "low_rank 63 %": {"kind": "low_rank", "rank": width // 2},
        "block_shuffle 32 %": {"kind": "block_shuffle", "num_blocks": 4},
        "block_shuffle 63 %": {"kind": "block_shuffle", "num_blocks": 2},
        "block_dense 32 %": {"kind": "block_dense", "rank": int(0.4 * width) // 16 * 16, "num_blocks": 4},
        "block_dense 63 %": {"kind": "block_dense", "rank": int(0.8 * width) // 16 * 16, "num_blocks": 4},
    }


def part(width: int, structure: dict[str, Any]) -> ExpertFFN:
    rest = {"gated": False, "hidden_act": "gelu_pytorch_tanh", "intermediate_size": 4 * width}
    found: ExpertFFN = TypeAdapter(FFN).validate_python({**structure, **rest})
    return found


def module(spec: ExpertFFN, width: int) -> FeedForward:
    built = FeedForward(spec, width, width)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return built


def training(layer: nn.Module, width: int) -> Callable[[], None]:
    x, gradient = torch.randn(TOKENS, width, requires_grad=True), torch.randn(TOKENS, width)

    def run() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).backward(gradient)

    return run


def decoding(layer: nn.Module, width: int) -> Callable[[], None]:
    x = torch.randn(1, width)

    def run() -> None:
        with torch.inference_mode():
            layer(x)

    return run


def premerged(spec: ExpertFFN, width: int) -> nn.Module:
    layer = module(spec, width)
    for name, child in list(layer.named_children()):
        if isinstance(child, LowRankLinear | BlockShuffleLinear | BlockDenseLinear):
            setattr(layer, name, PremergedLinear(child, merged_weight(child), 1))
    return layer


def main() -> None:
    harness.prepare_torch()
    train_rows, decode_rows = [], []
    for width in WIDTHS:
        specs = {name: part(width, structure) for name, structure in kinds(width).items()}
        dense = part(width, {"kind": "dense"})
        share = {name: ffn_weights(spec, width) / ffn_weights(dense, width) for name, spec in specs.items()}
        structured = {name: module(spec, width) for name, spec in specs.items()}
        modules = {"dense": module(dense, width), **structured}
        steps = {name: training(layer, width) for name, layer in modules.items()}
        seconds = harness.interleaved(steps, ROUNDS[width], limit=20)
        calls = {name: decoding(layer, width) for name, layer in modules.items()}
        calls |= {f"{name} merged": decoding(premerged(spec, width), width) for name, spec in specs.items()}
        decode = harness.interleaved(calls, DECODE_ROUNDS, DECODE_REPEATS[width], limit=10)
        for name in specs:
            speed = harness.ratio(seconds["dense"], seconds[name])
            merged, plain = decode[f"{name} merged"], decode[name]
            common = {"width": width, "structure": name, "dense FLOPs / its": 1 / share[name]}
            train_rows.append(
                {
                    **common,
                    "its speed / dense": speed,
                    "rounds": len(seconds[name]),
                    "quartiles": harness.spread(seconds["dense"], seconds[name]),
                    "of the FLOP ratio": speed * share[name],
                }
            )
            decode_rows.append(
                {
                    **common,
                    "rounds": len(plain),
                    "structured speed / dense": harness.ratio(decode["dense"], plain),
                    "merged speed / dense": harness.ratio(decode["dense"], merged),
                    "structured speed / merged": harness.ratio(merged, plain),
                    "faster": "structured" if harness.ratio(merged, plain) > 1 else "merged",
                }
            )
    harness.report(
        "structured_ffn_speed",
        "Structured feed-forward layers against the dense one",
        {f"Training: forward + backward of {TOKENS} tokens": train_rows, "Decoding: one token": decode_rows},
        ["float32, one FFN (up, tanh GELU, down), inner size 4 x width, no biases; medians of interleaved rounds; "
         "decoding makes several calls a round.",
         "In decoding every side has its own weights, read again in turn, so small widths come from the processor's cache."],
    )  # fmt: skip


if __name__ == "__main__":
    main()
