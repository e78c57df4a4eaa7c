"""The costs a plan can minimise or limit, by name: each is a fixed part and a part per training token.

    training_flops, serving_flops, lifetime_flops   FLOPs of training, of all served tokens, of both
    memory_bytes = weight_bytes + kv_cache_bytes    held while serving, at the largest context and the batch
    decode_bytes                                    bytes moved per decoded token, mean over the contexts
    decode_seconds, first_token_seconds             roofline; one decode step, and one prompt, at the largest context
    training_days                                   of training.devices devices
    training_device_hours, serving_device_hours, device_hours; training_usd, serving_usd, usd
    parameters, tokens                              N in the law's count, and D
    z                                               0.9 sqrt(bytes) + 0.1 cbrt(FLOPs) (arXiv 2503.09579, eq. 5)

Every cost is a + b D, so that the tokens that a limit leaves are (limit - a) / b, and any weighted sum is a cost again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from scantling.costing import Cost
from scantling.hardware import Device, decode_time, prefill_time, roofline
from scantling.planning.price import Priced

Floats = npt.NDArray[np.float64]
CostName = Literal[
    "training_flops",
    "serving_flops",
    "lifetime_flops",
    "memory_bytes",
    "weight_bytes",
    "kv_cache_bytes",
    "decode_bytes",
    "decode_seconds",
    "first_token_seconds",
    "training_days",
    "training_device_hours",
    "serving_device_hours",
    "device_hours",
    "training_usd",
    "serving_usd",
    "usd",
    "parameters",
    "tokens",
    "z",
]
TIMED: tuple[CostName, ...] = ("decode_seconds", "first_token_seconds", "serving_device_hours", "device_hours",
    "serving_usd", "usd")  # fmt: skip
NEEDS_DEVICE: tuple[CostName, ...] = (*TIMED, "training_days", "training_device_hours", "training_usd")
NEEDS_PRICE: tuple[CostName, ...] = ("training_usd", "serving_usd", "usd")
NEEDS_SERVED_TOKENS: tuple[CostName, ...] = (
    "serving_flops", "lifetime_flops", "serving_device_hours", "device_hours", "serving_usd", "usd")  # fmt: skip
# those that grow with the training tokens
OF_TOKENS: tuple[CostName, ...] = (
    "training_flops", "lifetime_flops", "training_days", "training_device_hours", "device_hours", "training_usd", "usd",
    "tokens",
)  # fmt: skip
Z_MEMORY_SHARE, Z_MEMORY_POWER, Z_FLOPS_POWER = 0.9, 1 / 2, 1 / 3  # lambda, alpha, beta of arXiv 2503.09579, eq. 5

UNITS: dict[str, str] = {
    **dict.fromkeys(("memory_bytes", "weight_bytes", "kv_cache_bytes", "decode_bytes"), "bytes"),
    **dict.fromkeys(("training_flops", "serving_flops", "lifetime_flops"), "FLOPs"),
    **dict.fromkeys(("decode_seconds", "first_token_seconds"), "seconds"),
    **dict.fromkeys(("training_device_hours", "serving_device_hours", "device_hours"), "device-hours"),
    **dict.fromkeys(NEEDS_PRICE, "USD"),
    "training_days": "days",
    "parameters": "parameters",
    "tokens": "tokens",
}

CONVENTION = (
    "seconds: roofline max(FLOPs / (peak x mfu), bytes / (bandwidth x mbu)), exact FLOPs and bytes, serving.devices share "
    "one model ideally, no communication; training: FLOPs / (peak x mfu) over training.devices; every served token is "
    "charged as a decoded one, its step shared by the batch"
)


@dataclass(frozen=True)
class Site:
    """Where the model trains and serves.

    Attributes:
        device: of both.
        usd_per_hour: of one device, or None.
        mfu, mbu: assumed shares of the peak FLOP/s and bandwidth.
        training_devices, serving_devices: how many work on one model.
        training_dtype: of the arithmetic of training.
    """

    device: Device
    usd_per_hour: float | None
    mfu: float
    mbu: float
    training_devices: int
    serving_devices: int
    training_dtype: str


@dataclass(frozen=True)
class Served:
    """What serving moves and how long it takes; numbers or arrays.

    Attributes:
        decode_bytes: per decoded token, mean over the contexts.
        decode_seconds: one step of the whole batch at the largest context, or None without a device.
        first_token_seconds: one prompt of the largest context.
        device_seconds: of one decoded token, mean over the contexts; all devices of the model together.
    """

    decode_bytes: Any
    decode_seconds: Any = None
    first_token_seconds: Any = None
    device_seconds: Any = None


def serve(
    costs: Mapping[int, Cost], shares: Mapping[int, float], one: Cost | None, site: Site | None, dtype: str
) -> Served:
    """What serving costs at each context.

    Args:
        costs: the model priced at each context, with the batch.
        shares: of the served tokens, by context; they sum to 1.
        one: priced at the largest context with a batch of one, for the first token; needed with a site.
        site: the devices; None for bytes alone.
        dtype: of the arithmetic.
    """
    moved = sum(share * costs[length].decode_bytes_per_token / costs[length].batch for length, share in shares.items())
    if site is None or one is None:
        return Served(moved)
    use = (site.device, dtype, site.mfu, site.mbu)
    steps = {length: decode_time(found, *use).seconds for length, found in costs.items()}
    return Served(
        decode_bytes=moved,
        decode_seconds=steps[max(steps)] / site.serving_devices,
        first_token_seconds=prefill_time(one, *use).seconds / site.serving_devices,
        device_seconds=sum(share * steps[length] / costs[length].batch for length, share in shares.items()),
    )


def parts(name: CostName, priced: Priced, served: Served | None, served_tokens: float, site: Site | None) -> Any:
    """(a, b): the cost is a + b D for D training tokens; see the table above."""
    match name:
        case "training_flops":
            return 0.0, priced.training_flops_per_token
        case "serving_flops":
            return priced.serving_flops_per_token * served_tokens, 0.0
        case "memory_bytes" | "weight_bytes" | "kv_cache_bytes" | "parameters":
            return getattr(priced, name), 0.0
        case "decode_bytes" | "decode_seconds" | "first_token_seconds":
            return getattr(served, name), 0.0
        case "tokens":
            return 0.0, 1.0
        case "z":
            return combined(priced.memory_bytes, priced.flops), 0.0
        case "lifetime_flops":
            return priced.serving_flops_per_token * served_tokens, priced.training_flops_per_token
    assert site is not None  # the plan is refused without a device
    fixed = per_token = 0.0
    work = _floats(priced.training_flops_per_token)
    hours_per_token: Any = roofline(work, 0.0, site.device, site.training_dtype, site.mfu, site.mbu).seconds / 3600
    if name == "training_days":
        return 0.0, hours_per_token / 24 / site.training_devices
    if name.startswith("serving") or name in ("device_hours", "usd"):
        assert served is not None
        fixed = served.device_seconds * served_tokens / 3600
    if not name.startswith("serving"):
        per_token = hours_per_token
    rate = (site.usd_per_hour or 0.0) if name in NEEDS_PRICE else 1.0
    return fixed * rate, per_token * rate


def combined(memory_bytes: Any, flops: Any) -> Floats:
    """Z = 0.9 sqrt(bytes) + 0.1 cbrt(FLOPs) (arXiv 2503.09579, eq. 5)."""
    memory, work = _floats(memory_bytes), _floats(flops)
    return Z_MEMORY_SHARE * memory**Z_MEMORY_POWER + (1 - Z_MEMORY_SHARE) * work**Z_FLOPS_POWER


def _floats(value: Any) -> Floats:
    return np.asarray(value, dtype=np.float64)
