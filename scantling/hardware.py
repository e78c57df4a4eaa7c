"""Seconds and money on a device: a table of published peaks, and the roofline max(FLOPs / (peak x mfu), bytes / bandwidth).

Plain arithmetic on numbers and NumPy arrays alike. Assumed utilisations are arguments with stated defaults, never hidden.
One device, no communication, no latency of launching kernels: a lower bound at the stated utilisation.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from scantling.costing import Cost
from scantling.errors import InputError, suggest
from scantling.parts import Frozen, Positive
from scantling.rows import Number
from scantling.units import dtype_bytes
from scantling.yamlio import Document, load, loads

Precision = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "int8"]
ALIASES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

MFU = 0.4  # share of peak FLOP/s reached: large dense training runs report 0.35 to 0.5
MBU = 0.7  # share of peak memory bandwidth reached by streaming reads

CONVENTIONS = {
    "seconds": "max(FLOPs / (peak dense FLOP/s x mfu), bytes / (memory bandwidth x mbu)); one device, no communication",
    "prefill": "seconds for the prompts of the whole batch, `context` tokens each; bytes: all weights once, the cache once",
    "decode_token": "seconds of one step: one new token for every sequence of the batch at full context",
    "train_token": "seconds of one step on the micro-batch / its tokens; bytes: weights three times, gradients and optimizer "
    "state read and written once, kept activations written and read once; with checkpointing a second forward pass",
    "usd_per_million_tokens": "seconds x price / tokens; decode: the step shared by the batch; the price is indicative",
}


class Price(Frozen):
    """A rate for one device; always indicative: rates change and differ by provider."""

    usd_per_hour: Positive
    source: str = Field(min_length=1)
    date: str = Field(min_length=1)
    indicative: Literal[True] = True


class Device(Frozen):
    """One accelerator (or processor).

    Attributes:
        peak_flops: dense FLOP/s by precision, without sparsity.
        memory_bandwidth: bytes/s; memory_bytes: bytes.
        source, date: where the numbers are published, and of when.
    """

    name: str = Field(min_length=1)
    peak_flops: dict[Precision, Positive] = Field(min_length=1)
    memory_bandwidth: Positive
    memory_bytes: Positive
    source: str = Field(min_length=1)
    date: str = Field(min_length=1)
    price: Price | None = None

    def peak(self, dtype: str) -> float:
        """Dense FLOP/s in a precision named as people name it.

        Raises:
            InputError: the device has no published peak in it.
        """
        found = {str(name): value for name, value in self.peak_flops.items()}.get(ALIASES.get(dtype, dtype))
        if found is None:
            raise InputError(
                f"{self.name}: no peak FLOP/s for dtype {dtype!r}; expected one of {', '.join(self.peak_flops)}"
            )
        return found

    def usd(self, seconds: Number) -> Number:
        """What so many seconds cost; None without a price."""
        return None if self.price is None else seconds * self.price.usd_per_hour / 3600


def load_hardware(path: str | os.PathLike[str] | None = None) -> dict[str, Device]:
    """The device table; with `path`, a YAML of the same form merged over it, key by key.

    A file may change single fields of a known device (`h100-sxm: {price: {usd_per_hour: 2, source: mine, date: "2026"}}`)
    or add whole devices.

    Raises:
        InputError: every fault found, with file and line.
    """
    table = loads((files("scantling") / "hardware.yaml").read_text(encoding="utf-8"), "hardware.yaml")
    if path is None:
        return _validated(table)
    mine = load(path)
    faults = [
        mine.fault((key,), "expected a mapping") for key, value in mine.value.items() if not isinstance(value, dict)
    ]
    if faults:
        raise InputError(*faults)
    merged = {
        key: {**table.value.get(key, {}), **mine.value.get(key, {})}
        for key in dict.fromkeys([*table.value, *mine.value])
    }
    return _validated(Document(merged, mine.source, mine.places))


def _validated(document: Document) -> dict[str, Device]:
    devices, faults = {}, []
    for key, value in document.value.items():
        try:
            devices[str(key)] = Device.model_validate(value)
        except ValidationError as error:
            for item in error.errors():
                at = tuple(part for part in item["loc"] if part != "[key]")
                faults.append(document.fault((key, *at), item["msg"].removeprefix("Value error, ")))
    if faults:
        raise InputError(*faults)
    return devices


def find_device(name: str, table: Mapping[str, Device] | None = None) -> Device:
    """The device of that key.

    Raises:
        InputError: unknown; the nearest name, and all of them.
    """
    known = load_hardware() if table is None else table
    if name not in known:
        near = suggest(name, known)
        every = "" if near.startswith("; expected") else f"; known: {', '.join(sorted(known))}"
        raise InputError(f"device: unknown {name!r}{near}{every}")
    return known[name]


# --- the roofline ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roofline:
    """Time of one piece of work.

    Attributes:
        compute_seconds: FLOPs / (peak x mfu); memory_seconds: bytes / (bandwidth x mbu).
        seconds: the larger; bound: `compute` or `memory`, whichever it is (`compute` when equal).
    """

    compute_seconds: Number
    memory_seconds: Number

    @property
    def seconds(self) -> Number:
        return _plain(np.maximum(self.compute_seconds, self.memory_seconds))

    @property
    def bound(self) -> Any:
        return _plain(np.where(np.asarray(self.compute_seconds) >= self.memory_seconds, "compute", "memory"))


def _plain(value: Any) -> Any:
    """Arrays as they are, single values as Python's."""
    return value.item() if np.ndim(value) == 0 and hasattr(value, "item") else value


def roofline(
    flops: Number, bytes_moved: Number, device: Device, dtype: str = "bf16", mfu: float = MFU, mbu: float = MBU
) -> Roofline:
    """Time of work that needs `flops` FLOPs and moves `bytes_moved` bytes through the device's memory.

    Args:
        mfu: assumed share of the peak dense FLOP/s in `dtype`; mbu: of the memory bandwidth; both above 0, at most 1.
    """
    for name, share in (("mfu", mfu), ("mbu", mbu)):
        if not 0 < share <= 1:
            raise InputError(f"{name}: expected a share above 0 and at most 1, got {share}")
    return Roofline(flops / (device.peak(dtype) * mfu), bytes_moved / (device.memory_bandwidth * mbu))


def prefill_time(cost: Cost, device: Device, dtype: str = "bf16", mfu: float = MFU, mbu: float = MBU) -> Roofline:
    """The prompts of the whole batch: `cost.context` tokens of each of `cost.batch` sequences.

    FLOPs: `prefill` per token. Bytes: every weight read once (all experts are touched) and the cache written once.
    """
    flops = cost.flops_per_token["prefill"] * cost.context * cost.batch
    return roofline(flops, cost.weight_bytes + cost.kv_cache_bytes, device, dtype, mfu, mbu)


def decode_time(cost: Cost, device: Device, dtype: str = "bf16", mfu: float = MFU, mbu: float = MBU) -> Roofline:
    """One step: a new token for each sequence of the batch at full context.

    Bytes: `decode_bytes_per_token`, the weights in use once and every cache. With experts and a batch above 1 more experts
    are read than one token uses: then a lower bound.
    """
    return roofline(cost.flops_per_token["decode"] * cost.batch, cost.decode_bytes_per_token, device, dtype, mfu, mbu)


def train_time(
    cost: Cost,
    state_bytes: Number,
    kept_bytes: Number,
    tokens: Number,
    device: Device,
    dtype: str = "bf16",
    checkpointing: bool = False,
    mfu: float = MFU,
    mbu: float = MBU,
) -> Roofline:
    """One optimizer step on one micro-batch of `tokens` tokens at `cost.context`.

    FLOPs: `train` per token (3 x forward, full attention), 4 x forward with checkpointing. Bytes: weights read in the
    forward and twice in the backward pass at the compute dtype; weights, gradients and optimizer state read and written
    once by the step; kept activations written and read once.

    Args:
        state_bytes, kept_bytes: of weights, gradients and optimizer, and of kept activations: a `Memory`'s `state`, `kept`.
    """
    passes = (4, 3) if checkpointing else (3, 3)
    flops = cost.flops_per_token["train"] * passes[0] / passes[1] * tokens
    weights = passes[0] * cost.params["total"] * dtype_bytes(dtype)
    return roofline(flops, weights + 2 * state_bytes + 2 * kept_bytes, device, dtype, mfu, mbu)


def priced(
    cost: Cost,
    state_bytes: Number,
    kept_bytes: Number,
    train_tokens: int,
    device: Device,
    dtype: str,
    checkpointing: bool = False,
) -> dict[str, Any]:
    """`seconds`, `bound` and `usd_per_million_tokens` of prefill, decode and training at the default utilisations."""
    prefill, decode = prefill_time(cost, device, dtype), decode_time(cost, device, dtype)
    train = train_time(cost, state_bytes, kept_bytes, train_tokens, device, dtype, checkpointing)
    steps = {
        "prefill": (prefill, cost.context * cost.batch),
        "decode": (decode, cost.batch),
        "train": (train, train_tokens),
    }
    return {
        "seconds": {
            "prefill": prefill.seconds,
            "decode_token": decode.seconds,
            "train_token": train.seconds / train_tokens,
        },
        "bound": {name: step.bound for name, (step, _) in steps.items()},
        "usd_per_million_tokens": {
            name: device.usd(step.seconds / tokens * 1e6) for name, (step, tokens) in steps.items()
        },
        "utilisation": {"mfu": MFU, "mbu": MBU},
    }
