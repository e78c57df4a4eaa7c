"""The space of a plan as its file states it: sizes by key, and architecture families by name, as a study states them."""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from scantling.parts import Activation, Frozen, Positive, Size
from scantling.planning.variants import PLAIN, Variant, variant_from
from scantling.yamlio import show

DEFAULT_ASPECT = (128.0, 128.0)
MAX_SHAPES = 50_000_000


def _sizes(value: object) -> object:
    """One whole number, a list of them, or `{min, max, step}`, as a tuple without repeats."""
    if isinstance(value, dict):
        if unknown := set(value) - {"min", "max", "step"}:
            raise ValueError(f"expected keys min, max and step, got {show(str(min(unknown, key=str)))}")
        low, high, step = (_whole(value.get(key)) for key in ("min", "max", "step"))
        if high < low:
            raise ValueError(f"expected max of at least min = {low}, got {high}")
        if (high - low) // step > MAX_SHAPES:
            raise ValueError(f"expected at most {MAX_SHAPES:,} values, got {(high - low) // step + 1:,}; raise step")
        return tuple(range(low, high + 1, step))
    items = value if isinstance(value, list | tuple) else [value]
    if not items:
        raise ValueError("expected at least one value, got an empty list")
    return tuple(dict.fromkeys(_whole(item) for item in items))


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1 or value != int(value):
        raise ValueError(f"expected a whole number above 0, a list of them, or {{min, max, step}}, got {show(value)}")
    return int(value)


def two_positive(value: object) -> bool:
    """Whether a value is a pair of finite numbers above 0."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_positive, value))


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _bounds(value: object) -> object:
    """A ratio, or its `[lowest, highest]`."""
    pair = value if isinstance(value, list | tuple) else (value, value)
    if not two_positive(pair) or pair[0] > pair[1]:
        raise ValueError(f"expected a ratio such as 128, or [lowest, highest], got {show(value)}")
    return pair


def _expansions(value: object) -> object:
    """One ratio or a list of them; `eight_thirds` is 8/3."""
    items = value if isinstance(value, list | tuple) else [value]
    found = [8 / 3 if item == "eight_thirds" else item for item in items]
    if not found or not all(map(_positive, found)):
        raise ValueError(f"expected a ratio above 0 such as 4, eight_thirds, or a list of them, got {show(value)}")
    return tuple(dict.fromkeys(float(item) for item in found))  # type: ignore[arg-type]


Sizes = Annotated[tuple[int, ...], BeforeValidator(_sizes)]
Bounds = Annotated[tuple[float, float], BeforeValidator(_bounds)]


class FFNShape(Frozen):
    """The feed-forward of every candidate: intermediate_size = expansion x hidden_size, to the closest multiple_of.

    Attributes:
        expansion: a ratio, or `eight_thirds` (8/3: a gated feed-forward of 8 d^2 weights), or several, which only a law
            with the column ffn_ratio can tell apart.
        multiple_of: intermediate_size is a multiple of this (32 in arXiv 2503.09579, appendix D).
    """

    kind: Literal["dense"] = "dense"
    gated: bool = True
    hidden_act: Activation = "silu"
    expansion: Annotated[tuple[Positive, ...], BeforeValidator(_expansions)] = (8 / 3,)
    multiple_of: Size = 32


class Space(Frozen):
    """The shapes to enumerate; every key takes one value, a list, or `{min, max, step}` unless it says otherwise.

    Attributes:
        vocab_size, tie_word_embeddings: of every candidate.
        hidden_size: default every multiple of head_dim around the real-valued optimum.
        num_hidden_layers: default what `aspect` says.
        aspect: hidden_size / num_hidden_layers, one ratio (the two nearest depths) or [lowest, highest] (every depth between);
            default 128 where only one of hidden_size and num_hidden_layers, or none, is given, and 16 to 256 where the law
            knows width or depth.
        head_dim: keys and values alike.
        num_attention_heads: default hidden_size / head_dim; a law per head configuration brings its own.
        num_key_value_heads: default num_attention_heads.
        ffn: `eight_thirds`, or the keys of `FFNShape`.
        families: architectures by name, `{name: keys}` as in a study (feed-forward structure, experts, width profile, heads),
            or names that a published evidence defines; each needs evidence about its loss.
        real_valued: leave depth, width and feed-forward size real numbers (to compare with published optima).
        width: refused; a width profile belongs to a family.
    """

    vocab_size: Size = 32000
    tie_word_embeddings: bool = False
    hidden_size: Sizes | None = None
    num_hidden_layers: Sizes | None = None
    aspect: Bounds | None = None
    head_dim: Sizes = (128,)
    num_attention_heads: Sizes | None = None
    num_key_value_heads: Sizes | None = None
    ffn: FFNShape = FFNShape()
    families: dict[str, dict[str, Any]] | tuple[str, ...] = Field(default_factory=dict)
    real_valued: bool = False
    width: dict[str, Any] | None = None

    @field_validator("ffn", mode="before")
    @classmethod
    def _ffn_word(cls, value: object) -> object:
        return {"expansion": value} if isinstance(value, str) else value

    @field_validator("head_dim")
    @classmethod
    def _even(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if odd := [value for value in values if value % 2]:
            raise ValueError(f"rotary positions need an even head_dim, got {odd[0]}")
        return values

    @field_validator("width")
    @classmethod
    def _in_a_family(cls, value: object) -> object:
        if value is not None:
            raise ValueError(
                "a width profile is a family, because its effect on the loss needs evidence: write space.families: "
                "{bowtie: {width: ..., transition: carry_forward}} and evidence: bowtie, or the comparison that "
                "`scantling fit --compare` wrote of your own study"
            )
        return value

    @model_validator(mode="after")
    def _families_are_variants(self) -> Self:
        if isinstance(self.families, dict):
            for name, keys in self.families.items():
                variant_from(name, keys, self.ffn, self.num_hidden_layers)
        return self

    @property
    def aspects(self) -> tuple[float, float]:
        """Lowest and highest hidden_size / num_hidden_layers."""
        return self.aspect or DEFAULT_ASPECT

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """Every family, each with every expansion; without families the plain decoder."""
        named: Mapping[str, Mapping[str, Any]] = self.families if isinstance(self.families, dict) else {}
        return tuple(
            variant_from(name, keys, self.ffn.model_copy(update={"expansion": (ratio,)}), self.num_hidden_layers)
            for name, keys in (named or {PLAIN: {}}).items()
            for ratio in self.ffn.expansion
        )
