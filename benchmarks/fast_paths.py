"""The written-out fast paths of training on a CPU, forward and backward, against the same with torch's own operations.

Block attention against plain matrix products and torch's fused kernel, at several lengths and block sizes; RMSNorm against
`torch.nn.functional.rms_norm`; rotary positions against slices and products recorded by autograd.
"""

import argparse
from collections.abc import Callable
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import Tensor

import scantling.model.block_attention as blocks
from scantling.model.attention import attend, plain_attention
from scantling.model.norm import Norm
from scantling.model.rotary import rotary_table, rotate
from scantling.parts import RMSNorm, Rope
from scantling.training.engine import keep_freed_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENS, HEADS, HEAD_DIM = 4096, 6, 64  # of one call; 6 heads of 64 are the 6x384 shape of training_speed.py
LENGTHS = (128, 256, 512, 1024, 2048)
BLOCKS, BLOCKS_AT = (32, 64, 128, 256), (256, 1024)
WIDTHS = (128, 384, 768, 2048)
HEAD_DIMS = (32, 64, 128)
REPEATS = 5  # calls in a row of what takes about a millisecond
Call = Callable[[], None]


def passes(function: Callable[..., Tensor], *inputs: Tensor) -> Call:
    """Forward and backward, with gradients of all inputs."""
    with torch.no_grad():
        gradient = torch.randn_like(function(*inputs))

    def run() -> None:
        for tensor in inputs:
            tensor.grad = None
        function(*inputs).backward(gradient)

    return run


def heads(length: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """(batch, heads, length, head_dim), laid out as a projection leaves it."""
    flat = torch.randn(TOKENS // length, length, HEADS, head_dim).to(dtype)
    return flat.transpose(1, 2).requires_grad_()


# --- attention -----------------------------------------------------------------------------------------------------------


def in_blocks_of(size: int, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """Block attention with so many queries a block."""
    run = passes(lambda *inputs: blocks.block_attention(*inputs, scale=HEAD_DIM**-0.5), q, k, v)

    def sized() -> None:
        blocks.BLOCK = size
        run()

    return sized


def attention(rounds: int) -> list[dict[str, Any]]:
    """The block size in use against both other ways of computing the same."""
    found, used = [], blocks.BLOCK
    for name, dtype in DTYPES.items():
        for length in LENGTHS:
            q, k, v = (heads(length, HEAD_DIM, dtype) for _ in range(3))
            scale = HEAD_DIM**-0.5
            sides = {
                "block": in_blocks_of(used, q, k, v),
                "plain": passes(lambda q, k, v, scale=scale: plain_attention(q, k, v, scale), q, k, v),
                "fused": passes(lambda q, k, v, scale=scale: attend(q, k, v, scale, kernel="fused"), q, k, v),
            }
            seconds = harness.interleaved(sides, rounds)
            found.append(
                {
                    "dtype": name,
                    "batch": f"{TOKENS // length} x {length}",
                    "block / plain": harness.ratio(seconds["block"], seconds["plain"]),
                    "quartiles": harness.spread(seconds["block"], seconds["plain"]),
                    "block / fused": harness.ratio(seconds["block"], seconds["fused"]),
                    "quartiles of it": harness.spread(seconds["block"], seconds["fused"]),
                    "rounds": len(seconds["block"]),
                }
            )
    return found


def block_sizes(rounds: int) -> list[dict[str, Any]]:
    """Other block sizes against the one in use."""
    found, used = [], blocks.BLOCK
    for name, dtype in DTYPES.items():
        for length in BLOCKS_AT:
            q, k, v = (heads(length, HEAD_DIM, dtype) for _ in range(3))
            seconds = harness.interleaved({str(size): in_blocks_of(size, q, k, v) for size in BLOCKS}, rounds)
            found.append(
                {
                    "dtype": name,
                    "batch": f"{TOKENS // length} x {length}",
                    **{
                        f"{size} / {used}": harness.ratio(seconds[str(size)], seconds[str(used)])
                        for size in BLOCKS
                        if size != used
                    },
                    "rounds": len(seconds[str(used)]),
                }
            )
    blocks.BLOCK = used
    return found


# --- norm and positions --------------------------------------------------------------------------------------------------


def norm(rounds: int) -> list[dict[str, Any]]:
    """Float32, as under autocast the stream is float32 too."""
    found = []
    for width in WIDTHS:
        ours = Norm(RMSNorm(kind="rms_norm"), width)
        torch.nn.init.ones_(ours.weight)
        x = torch.randn(TOKENS, width, requires_grad=True)

        def torchs(x: Tensor, weight: Tensor, width: int = width, eps: float = ours.spec.eps) -> Tensor:
            return F.rms_norm(x, (width,), weight, eps)

        def written(x: Tensor, weight: Tensor, ours: Norm = ours) -> Tensor:
            return ours(x)

        sides = {"ours": passes(written, x, ours.weight), "torch": passes(torchs, x, ours.weight)}
        found.append({"tokens": TOKENS, "width": width, **compared(sides, rounds)})
    return found


def recorded(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation in slices and products, whose backward pass autograd records."""
    low, high = x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


def positions(rounds: int) -> list[dict[str, Any]]:
    found, length = [], 512
    for name, dtype in DTYPES.items():
        for size in HEAD_DIMS:
            cos, sin = rotary_table(Rope(kind="rope"), size, length, torch.device("cpu"), dtype)
            x = heads(length, size, dtype)
            torch.testing.assert_close(rotate(x, cos, sin), recorded(x, cos, sin), atol=0.05, rtol=0.05)
            sides = {
                "ours": passes(lambda x, cos=cos, sin=sin: rotate(x, cos, sin), x),
                "torch": passes(lambda x, cos=cos, sin=sin: recorded(x, cos, sin), x),
            }
            found.append({"dtype": name, "heads": f"{HEADS} x {size}", **compared(sides, rounds)})
    return found


def compared(sides: dict[str, Call], rounds: int) -> dict[str, Any]:
    seconds = harness.interleaved(sides, rounds, REPEATS)
    return {
        "ours / torch": harness.ratio(seconds["ours"], seconds["torch"]),
        "quartiles": harness.spread(seconds["ours"], seconds["torch"]),
        "rounds": len(seconds["ours"]),
    }


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=31)
    rounds = arguments.parse_args().rounds
    harness.prepare_torch()
    keep_freed_memory()  # as in training; else the time is that of page faults
    used = blocks.BLOCK
    harness.report(
        "fast_paths",
        "The written-out fast paths of training on a CPU",
        {
            f"Attention in blocks of {used}": attention(rounds),
            "Other block sizes": block_sizes(rounds),
            "RMSNorm against torch.nn.functional.rms_norm, float32": norm(rounds),
            "Rotary positions against slices and products recorded by autograd": positions(rounds),
        },
        [
            "Every number is time over time of one forward and backward pass, the median over interleaved rounds: below 1 "
            "the side named first is faster.",
            f"{TOKENS} tokens a call, {HEADS} heads of {HEAD_DIM} and as many key/value heads; plain: all scores by matrix "
            "products, masked; fused: torch's scaled_dot_product_attention with is_causal.",
        ],
    )


if __name__ == "__main__":
    main()
