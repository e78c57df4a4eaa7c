"""What a plan may not exceed: its budget and its constraints as upper limits on named costs, and what can be built.

Repeated data: the laws were fitted to tokens seen once; up to about four epochs lose little (arXiv 2305.16264).
"""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field

from scantling.parts import Frozen, Positive, Size
from scantling.planning.costs import CostName
from scantling.planning.shapes import WIDTH_STEP, Family, Shapes
from scantling.planning.variants import Array
from scantling.recipe import Count as Amount
from scantling.units import parse_count
from scantling.yamlio import KeyPath, show

DEVICE = -1.0  # what the word `device` becomes: the memory of the serving devices


def _memory(value: object) -> object:
    """Bytes with a unit, or the word `device`."""
    if value in ("device", DEVICE):
        return DEVICE
    found = parse_count(value, "memory") if isinstance(value, str | int | float) else -1
    if found <= 0:
        raise ValueError(f"expected a number of bytes above 0 such as 80GB, or device, got {show(value)}")
    return found


class Multiples(Frozen):
    """Sizes that must be multiples of these."""

    hidden_size: Size = 1
    num_hidden_layers: Size = 1
    num_attention_heads: Size = 1
    num_key_value_heads: Size = 1
    intermediate_size: Size = 1


class Constraints(Frozen):
    """Upper limits that every candidate keeps, and what its sizes must divide by.

    Attributes:
        memory_bytes: weights + KV cache, over all serving devices; `device`: what serving.devices hold.
        kv_cache_bytes, weight_bytes: at the largest context and the batch.
        decode_bytes: moved per decoded token.
        decode_seconds: latency of one token, first_token_seconds: of the first.
        training_flops, lifetime_flops, training_days, device_hours, usd, parameters, tokens: as the costs of that name.
        unique_tokens, max_epochs: the data there is, and how often it may be repeated: tokens <= their product.
        min_key_value_heads: at least so many.
        multiple_of: sizes that must be multiples of a number.
    """

    memory_bytes: Annotated[float, BeforeValidator(_memory)] | None = None
    kv_cache_bytes: Amount | None = None
    weight_bytes: Amount | None = None
    decode_bytes: Amount | None = None
    decode_seconds: Positive | None = None
    first_token_seconds: Positive | None = None
    training_flops: Amount | None = None
    lifetime_flops: Amount | None = None
    training_days: Positive | None = None
    device_hours: Positive | None = None
    usd: Amount | None = None
    parameters: Amount | None = None
    tokens: Amount | None = None
    unique_tokens: Amount | None = None
    max_epochs: Positive = 4.0
    min_key_value_heads: Size = 1
    multiple_of: Multiples = Field(default=Multiples())


@dataclass(frozen=True)
class Limit:
    """A cost that may not exceed `most`; `path` is the key that says so."""

    name: CostName
    most: float
    path: KeyPath


def buildable(constraints: Constraints, serving_devices: int, shapes: Shapes) -> Array:
    """Which whole-number shapes keep the multiples, the fewest key/value heads, and split over the serving devices."""
    rules: dict[str, Any] = constraints.multiple_of.model_dump()
    for name in ("num_attention_heads", "num_key_value_heads"):
        rules[name] = int(np.lcm(rules[name], serving_devices))
    keep: Array = np.asarray(shapes.num_key_value_heads) >= constraints.min_key_value_heads
    for name, multiple in rules.items():
        if multiple > 1:
            keep &= getattr(shapes, name) % multiple == 0
    return keep


def family_allowed(constraints: Constraints, serving_devices: int, family: Family) -> bool:
    """Whether a family's fixed heads keep the constraints; heads that follow the width are judged shape by shape."""
    rules = constraints.multiple_of
    pairs = (
        (family.heads, rules.num_attention_heads, 1),
        (family.kv_heads, rules.num_key_value_heads, constraints.min_key_value_heads),
    )
    return all(
        heads is None or (heads % multiple == 0 and heads % serving_devices == 0 and heads >= least)
        for heads, multiple, least in pairs
    )


def smallest_width(constraints: Constraints, serving_devices: int, family: Family) -> int:
    """The smallest hidden_size at which a family's heads divide and the constraints are kept."""
    rules = constraints.multiple_of
    if family.heads is not None:
        return int(np.lcm(rules.hidden_size, WIDTH_STEP))
    heads = int(np.lcm.reduce([rules.num_attention_heads, serving_devices, family.kv_heads or 1]))
    if family.kv_heads is None:  # as many as query heads
        heads = int(np.lcm(heads, rules.num_key_value_heads))
        heads *= -(-constraints.min_key_value_heads // heads)
    return int(np.lcm(rules.hidden_size, heads * family.head_dim))


def heads_sentence(constraints: Constraints, serving_devices: int) -> str:
    """What the constraints ask of heads, for a refusal; empty where they ask nothing."""
    said = []
    if constraints.min_key_value_heads > 1:
        said.append(f"constraints.min_key_value_heads asks for at least {constraints.min_key_value_heads}")
    if serving_devices > 1:
        said.append(f"serving.devices asks for multiples of {serving_devices}")
    for name in ("num_attention_heads", "num_key_value_heads"):
        if (multiple := getattr(constraints.multiple_of, name)) > 1:
            said.append(f"constraints.multiple_of asks for {name} in multiples of {multiple}")
    return "; ".join(said)
