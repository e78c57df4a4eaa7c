"""The sections of a plan file: goal, serving, training, hardware and law."""

import math
from typing import Annotated, Literal, Self, cast

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from scantling.hardware import MBU, MFU
from scantling.parts import Frozen, Positive, Size
from scantling.planning.costs import CostName
from scantling.planning.space import two_positive
from scantling.recipe import Count as Amount
from scantling.units import DTYPE_BYTES, dtype_bytes
from scantling.yamlio import show


class Target(Frozen):
    """Reach this loss, nats per token; or this mean task `error`, through the law's own law from loss to error of `task`."""

    loss: Positive | None = None
    error: Positive | None = None
    task: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.loss is None) == (self.error is None):
            raise ValueError(
                "expected a loss or an error, " + ("both are given; keep one" if self.loss else "got neither")
            )
        return self


class Budget(Frozen):
    """Spend at most this: one of training_flops, lifetime_flops, device_hours, usd and training_days; and memory_bytes."""

    training_flops: Amount | None = None
    lifetime_flops: Amount | None = None
    device_hours: Amount | None = None
    usd: Amount | None = None
    training_days: Positive | None = None
    memory_bytes: Amount | None = None

    @model_validator(mode="after")
    def _one_flops(self) -> Self:
        if len(self._spent) > 1:
            raise ValueError(f"expected {' or '.join(self._spent)}, both are given; keep one")
        if not self._spent and self.memory_bytes is None:
            raise ValueError("expected training_flops, lifetime_flops or memory_bytes, got none of them")
        return self

    @property
    def _spent(self) -> list[CostName]:
        names: tuple[CostName, ...] = ("training_flops", "lifetime_flops", "device_hours", "usd", "training_days")
        return [name for name in names if getattr(self, name) is not None]

    @property
    def limit(self) -> CostName:
        """What is spent: the cost of training where one is given, else the memory."""
        return (*self._spent, "memory_bytes")[0]


def _dtype(value: object) -> object:
    if value not in DTYPE_BYTES:
        raise ValueError(f"expected one of {', '.join(DTYPE_BYTES)}, got {show(value)}")
    return value


def _contexts(value: object) -> object:
    """One context, or `{context: share of the served tokens}`, as pairs in order of context with shares that sum to 1."""
    if value is None:
        return None
    given = value if isinstance(value, dict) else {value: 1.0}
    for length, share in given.items():
        if isinstance(length, bool) or not isinstance(length, int | float) or length < 1 or length != int(length):
            raise ValueError(f"expected a whole number above 0 or {{context: share}}, got {show(length)}")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < math.inf:
            raise ValueError(f"expected a share above 0 of the tokens at context {length}, got {show(share)}")
    if not given:
        raise ValueError("expected a context, got an empty mapping")
    whole = sum(given.values())
    return tuple(sorted((int(cast(float, length)), share / whole) for length, share in given.items()))


class Serving(Frozen):
    """How the model is used.

    Attributes:
        context: positions each token attends to; or `{context: share of the tokens}`. Memory and latency are at the largest.
        tokens: processed over the model's life.
        batch: sequences that share the weights.
        dtype: of weights, cache and arithmetic.
        devices: that share one model (tensor parallel); heads and key/value heads must be multiples of it.
    """

    context: Annotated[tuple[tuple[int, float], ...] | None, BeforeValidator(_contexts)] = None
    tokens: Amount | None = None
    batch: Size = 1
    dtype: Annotated[str, BeforeValidator(_dtype)] = "bf16"
    devices: Size = 1

    @property
    def bytes_per_value(self) -> int:
        """Bytes of one weight and of one cached value."""
        return dtype_bytes(self.dtype)


def _ratio(value: object) -> object:
    if value == "free":
        return None
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"expected a number of tokens per parameter, or free, got {show(value)}")
    return value


class Training(Frozen):
    """`tokens_per_parameter`: a fixed D/N, or `free` (the default, where the law knows D)."""

    sequence_length: Size = 2048
    tokens_per_parameter: Annotated[Positive | None, BeforeValidator(_ratio)] = None
    devices: Size = 1


def _share(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"expected a share above 0 and at most 1, got {show(value)}")
    return value


Share = Annotated[float, BeforeValidator(_share)]


class Hardware(Frozen):
    """The device of training and serving: a key of the shipped table, or of `table`, a YAML merged over it.

    Attributes:
        device: such as h100-sxm.
        usd_per_hour: of one device; default the table's indicative rate.
        mfu, mbu: assumed shares of peak FLOP/s and of memory bandwidth.
        training_dtype: whose peak FLOP/s training reaches a share of.
    """

    device: str
    table: str | None = None
    usd_per_hour: Positive | None = None
    mfu: Share = MFU
    mbu: Share = MBU
    training_dtype: Annotated[str, BeforeValidator(_dtype)] = "bf16"


def _pair(value: object) -> object:
    if not two_positive(value):
        raise ValueError(f"expected two numbers above 0, got {show(value)}")
    return value


Pair = Annotated[tuple[float, float], BeforeValidator(_pair)]


class Next(Frozen):
    """Which runs next?

    Attributes:
        training_flops: to be spent on them together.
        noise: standard deviation of a run's log loss between seeds; default the fit's residuals, else 0.01.
        tokens_per_parameter: to choose from.
    """

    training_flops: Amount
    noise: Positive | None = None
    tokens_per_parameter: tuple[Positive, ...] | None = None


class HeadLawKeys(Frozen):
    """`kind: loss_per_head_configuration`.

    Attributes:
        E: irreducible loss, shared.
        coefficients: "n_h,n_kv": [a, b].
        ranges: {N: [lowest, highest]} trained, for all head configurations.
    """

    kind: Literal["loss_per_head_configuration"]
    E: float = Field(ge=0, allow_inf_nan=False)
    coefficients: dict[str, Pair] = Field(min_length=1)
    ranges: dict[Literal["N"], Pair] = Field(default_factory=dict)

    @field_validator("coefficients")
    @classmethod
    def _pairs_divide(cls, value: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        for key in value:
            parts = [part.strip() for part in key.split(",")]
            if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
                raise ValueError(f'expected keys "query heads,key/value heads" such as "8,1", got {show(key)}')
            if int(parts[0]) % int(parts[1]):
                raise ValueError(f"{parts[0]} query heads cannot share {parts[1]} key/value heads ({show(key)})")
        return value

    @property
    def by_heads(self) -> dict[tuple[int, int], tuple[float, float]]:
        """Coefficients by (query heads, key/value heads)."""
        split = {key: key.split(",") for key in self.coefficients}
        return {(int(split[key][0]), int(split[key][1])): pair for key, pair in self.coefficients.items()}


class ChinchillaKeys(Frozen):
    """`kind: chinchilla`: L = E + A N^-alpha + B D^-beta, with the ranges of N, D and M = D/N fitted, where known."""

    kind: Literal["chinchilla"]
    A: Positive
    B: Positive
    E: float = Field(ge=0, allow_inf_nan=False)
    alpha: Positive
    beta: Positive
    ranges: dict[Literal["N", "D", "M"], Pair] = Field(default_factory=dict)


def _law_tag(value: object) -> str:
    if isinstance(value, str):
        return "name or path"
    return str(value.get("kind", "no kind") if isinstance(value, dict) else getattr(value, "kind", value))


LawKeys = Annotated[
    Annotated[str, Tag("name or path")]
    | Annotated[HeadLawKeys, Tag("loss_per_head_configuration")]
    | Annotated[ChinchillaKeys, Tag("chinchilla")],
    Discriminator(_law_tag),
]


Weights = Annotated[dict[CostName, Positive], Field(min_length=1)]
