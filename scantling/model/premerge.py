"""Decoding with structured feed-forward linears: both forms kept, the faster one chosen by the number of tokens.

Between the two factors of a structured linear there is no non-linearity, so one dense matrix does the same (arXiv
2406.16450, section 2.2). With few tokens a call is bound by overhead or by reading weights, with many by arithmetic; where
one form overtakes the other depends on the device and the shape. It is timed once and remembered in a file.
"""

import copy
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from scantling.data.preparing import cache_root
from scantling.measured import remembered
from scantling.model.decoder import Decoder
from scantling.model.ffn import BlockDenseLinear, BlockShuffleLinear, LowRankLinear

Structured = LowRankLinear | BlockShuffleLinear | BlockDenseLinear

FILE = "premerge.json"
TOKEN_COUNTS = tuple(2**power for power in range(13))  # 1 to 4096
WORTH = 0.95  # the merged form must take at most this share of the structured one's time, as it costs memory
ROUNDS, SAMPLE_SECONDS, COUNT_SECONDS = 9, 2e-4, 0.3


@torch.no_grad()
def merged_weight(linear: Structured) -> Float[Tensor, "width_out width_in"]:
    """The one dense matrix of a structured linear, multiplied in float32 (float64 for float64), in its own dtype."""
    dtype = linear.down.weight.dtype
    exact = torch.promote_types(dtype, torch.float32)
    factors = linear if dtype == exact else copy.deepcopy(linear).to(exact)
    return factors.merge().to(dtype).contiguous()


def bias_of(linear: Structured) -> Tensor | None:
    """The one bias of a structured linear."""
    return linear.bias if isinstance(linear, BlockShuffleLinear) else linear.up.bias


class PremergedLinear(nn.Module):
    """A structured linear together with its merged form, which serves calls of at most `most_tokens` tokens."""

    merged: Tensor

    def __init__(self, structured: Structured, merged: Tensor, most_tokens: int) -> None:
        super().__init__()
        self.structured, self.most_tokens = structured, most_tokens
        self.register_buffer("merged", merged, persistent=False)

    def forward(self, x: Float[Tensor, "*batch width_in"]) -> Float[Tensor, "*batch width_out"]:
        if x.numel() > self.most_tokens * x.shape[-1]:
            return self.structured(x)
        return F.linear(x, self.merged, bias_of(self.structured))


def prepare_for_decoding(
    model: Decoder, threshold: int | None = None, processor: str | None = None, cache_dir: Path | None = None
) -> Decoder:
    """A model in eval mode that shares all weights with `model` and decodes with the faster form of each linear.

    `model` itself, its modules and the names in its state dict stay as they are: load and train that one, and prepare
    again when its weights have changed, because merged matrices are products taken now.

    Args:
        threshold: most tokens per call for which the merged form serves, for every linear; 0 keeps none. None: as measured
            on this device for each structure and shape.
        processor: the name under which measurements on a CPU are remembered.
        cache_dir: where they are; default `$SCANTLING_CACHE` or `~/.cache/scantling`.
    """
    known = Thresholds((cache_dir or cache_root()) / FILE, processor) if threshold is None else None

    def convert(module: nn.Module) -> nn.Module:
        twin = _twin(module, {name: convert(child) for name, child in module.named_children()})
        if not isinstance(twin, Structured):
            return twin
        if threshold == 0:
            return twin
        merged = merged_weight(twin)
        most = known.most_tokens(twin, merged) if known is not None else threshold
        return PremergedLinear(twin, merged, most) if most else twin

    prepared = convert(model).eval()
    assert isinstance(prepared, Decoder)
    return prepared


def _twin(module: nn.Module, children: dict[str, nn.Module]) -> nn.Module:
    """The same module with the same parameters and other children."""
    twin = copy.copy(module)
    twin._parameters = dict(module._parameters)
    twin._buffers = dict(module._buffers)
    twin._modules = dict(children)
    return twin


# --- which form is faster ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thresholds:
    """Measured thresholds, remembered in a JSON file: key -> {"most_tokens", "merged_over_structured"}."""

    path: Path
    processor: str | None = None

    def most_tokens(self, linear: Structured, merged: Tensor) -> int:
        """Most tokens per call for which the merged form is worth having here; 0 for never."""

        def measure() -> dict[str, Any]:
            most, ratios = measured(linear, merged)
            return {"most_tokens": most, "merged_over_structured": {str(n): round(r, 3) for n, r in ratios.items()}}

        most: int = remembered(self.path, self.key(linear), measure, _usable)["most_tokens"]
        return most

    def key(self, linear: Structured) -> str:
        """What the answer depends on: device, threads, dtype (with the back end of float32 products) and shape."""
        weight = linear.down.weight
        if weight.device.type == "cuda":
            where = torch.cuda.get_device_name(weight.device)
        else:
            where = self.processor or platform.processor() or platform.machine()
        dtype = str(weight.dtype).removeprefix("torch.")
        if weight.dtype == torch.float32:
            dtype += f" ({torch.get_float32_matmul_precision()})"
        return f"{where}, {torch.get_num_threads()} threads, {dtype}, {shape(linear)}"


def _usable(entry: Any) -> bool:
    most = entry.get("most_tokens") if isinstance(entry, dict) else None
    return isinstance(most, int) and not isinstance(most, bool) and most >= 0


def shape(linear: Structured) -> str:
    """Structure and sizes in words."""
    down, up = linear.down.weight, linear.up.weight
    match linear:
        case LowRankLinear():
            return f"low_rank {down.shape[1]} to {up.shape[0]}, rank {down.shape[0]}"
        case BlockShuffleLinear():
            blocks = linear.num_blocks
            return f"block_shuffle {blocks * down.shape[2]} to {blocks * up.shape[1]}, {blocks} blocks"
    blocks, rank, into = down.shape
    return f"block_dense {blocks * into} to {up.shape[0]}, rank {blocks * rank}, {blocks} blocks"


@torch.inference_mode()
def measured(linear: Structured, merged: Tensor) -> tuple[int, dict[int, float]]:
    """Time both forms at 1, 2, 4, ... 4096 tokens, up to the first count at which the merged form is not worth it.

    Returns:
        The last count at which it was (0 for none), and merged / structured time by count.
    """
    most, bias = 0, bias_of(linear)
    ratios: dict[int, float] = {}
    for tokens in TOKEN_COUNTS:
        x = torch.randn(tokens, merged.shape[1], device=merged.device).to(merged.dtype)
        ratios[tokens] = time_ratio(lambda x=x: F.linear(x, merged, bias), lambda x=x: linear(x), merged.device)
        if ratios[tokens] > WORTH:
            break
        most = tokens
    return most, ratios


def time_ratio(first: Callable[[], object], second: Callable[[], object], device: torch.device) -> float:
    """Median of (seconds of first / seconds of second) over rounds in which both are timed, one right after the other."""

    def seconds(call: Callable[[], object], repeats: int) -> float:
        _synchronise(device)
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        _synchronise(device)
        return time.perf_counter() - started

    seconds(first, 2)
    once = min(seconds(second, 1) for _ in range(3))
    repeats = max(1, round(SAMPLE_SECONDS / max(once, 1e-9)))
    ratios: list[float] = []
    started = time.perf_counter()
    while len(ratios) < ROUNDS and (len(ratios) < 3 or time.perf_counter() - started < COUNT_SECONDS):
        ratios.append(seconds(first, repeats) / seconds(second, repeats))
    return statistics.median(ratios)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
