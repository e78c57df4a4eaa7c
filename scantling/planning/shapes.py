"""The space of a plan, and its candidate shapes as arrays.

Nothing here knows a formula for parameters or FLOPs: shapes become the rows of a `costing.Stack`, so that the code which
prices one spec prices thousands of shapes. `real_shapes` rounds nothing; `whole_shapes` are the ones that can be built.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BeforeValidator, field_validator

from scantling.parts import Activation, Frozen, Positive, Size
from scantling.resolve import MAX_LAYERS
from scantling.rows import Row, Stack, StackFFN, StackLayer, rows
from scantling.yamlio import show

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

DEFAULT_ASPECT = (128.0, 128.0)
WIDTH_STEP = 64  # of hidden_size where it need not be a multiple of head_dim
MAX_SHAPES = 50_000_000
CHUNK = 200_000  # shapes priced at a time


# --- the file form -----------------------------------------------------------------------------------------------------


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
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf for x in value)
    )


def _bounds(value: object) -> object:
    """A ratio, or its `[lowest, highest]`."""
    pair = value if isinstance(value, list | tuple) else (value, value)
    if not two_positive(pair) or pair[0] > pair[1]:
        raise ValueError(f"expected a ratio such as 128, or [lowest, highest], got {show(value)}")
    return pair


Sizes = Annotated[tuple[int, ...], BeforeValidator(_sizes)]
Bounds = Annotated[tuple[float, float], BeforeValidator(_bounds)]


class FFNShape(Frozen):
    """The feed-forward of every candidate: intermediate_size = expansion x hidden_size, to the closest multiple_of.

    Attributes:
        expansion: a ratio, or `eight_thirds` (8/3: a gated feed-forward of 8 d^2 weights).
        multiple_of: intermediate_size is a multiple of this (32 in arXiv 2503.09579, appendix D).
    """

    kind: Literal["dense"] = "dense"
    gated: bool = True
    hidden_act: Activation = "silu"
    expansion: Positive = 8 / 3
    multiple_of: Size = 32

    @field_validator("expansion", mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        return 8 / 3 if value == "eight_thirds" else value


class Space(Frozen):
    """The shapes to enumerate; every key takes one value, a list, or `{min, max, step}` unless it says otherwise.

    Attributes:
        vocab_size, tie_word_embeddings: of every candidate.
        hidden_size: default every multiple of head_dim around the real-valued optimum.
        num_hidden_layers: default what `aspect` says.
        aspect: hidden_size / num_hidden_layers, one ratio (the two nearest depths) or [lowest, highest] (every depth between);
            default 128 where only one of hidden_size and num_hidden_layers, or none, is given.
        head_dim: keys and values alike.
        num_attention_heads: default hidden_size / head_dim; a law per head configuration brings its own.
        num_key_value_heads: default num_attention_heads.
        ffn: `eight_thirds`, or the keys of `FFNShape`.
        real_valued: leave depth, width and feed-forward size real numbers (to compare with published optima).
        width: refused; no law the planner reads says what a width profile does to the loss.
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
    def _no_evidence(cls, value: object) -> object:
        if value is not None:
            raise ValueError(
                "no law the planner reads says what a width profile does to the loss; remove this key, train matched "
                "ladders with `scantling study`, and compare the families with `scantling fit --compare`"
            )
        return value

    @property
    def aspects(self) -> tuple[float, float]:
        """Lowest and highest hidden_size / num_hidden_layers."""
        return self.aspect or DEFAULT_ASPECT


# --- shapes as arrays --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shapes:
    """Candidate shapes, one per entry of arrays that are all of one form; `family` numbers their head configuration."""

    hidden_size: Array
    num_hidden_layers: Array
    num_attention_heads: Array
    num_key_value_heads: Array
    head_dim: Array
    intermediate_size: Array
    family: Array

    def __len__(self) -> int:
        return int(self.hidden_size.size)

    def take(self, index: Any) -> "Shapes":
        """The shapes at a NumPy index."""
        return Shapes(*(getattr(self, field.name)[index] for field in fields(self)))

    def rows(self, space: Space) -> list[Row]:
        """Cost rows whose counts are arrays: `costing.rows` of a `Stack`."""
        return rows(self.stack(space))

    def stack(self, space: Space) -> Stack:
        """The shapes as one model whose sizes are arrays."""
        layer = StackLayer(
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            v_head_dim=self.head_dim,
            ffn=StackFFN(self.intermediate_size, space.ffn.kind, space.ffn.gated),
            repeat=self.num_hidden_layers,
        )
        return Stack(space.vocab_size, self.hidden_size, self.hidden_size, space.tie_word_embeddings, (layer,))

    def mapping(self, index: int, space: Space, positions: int) -> dict[str, Any]:
        """One shape as a spec mapping that `resolve.spec_from` reads."""
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
        ffn = {"kind": space.ffn.kind, "gated": space.ffn.gated, "hidden_act": space.ffn.hidden_act}
        return {
            "vocab_size": space.vocab_size,
            "max_position_embeddings": positions,
            "tie_word_embeddings": space.tie_word_embeddings,
            **{name: int(getattr(self, name)[index]) for name in names},
            "ffn": {**ffn, "intermediate_size": int(self.intermediate_size[index])},
        }


@dataclass(frozen=True)
class Family:
    """One head configuration; None follows: heads = hidden_size / head_dim, key/value heads = heads."""

    head_dim: int
    heads: int | None
    kv_heads: int | None


def families(space: Space, known: Sequence[tuple[int, int]] | None) -> list[Family]:
    """Every head configuration of the space whose heads divide; only those in `known` (query, key/value), when given."""
    heads, kv_heads = space.num_attention_heads, space.num_key_value_heads
    pairs: list[tuple[int | None, int | None]]
    if known is not None:
        pairs = [(h, k) for h, k in known if (heads is None or h in heads) and (kv_heads is None or k in kv_heads)]
    else:
        pairs = [(h, k) for h in heads or (None,) for k in kv_heads or (None,) if h is None or k is None or h % k == 0]
    return [Family(head_dim, h, k) for head_dim in space.head_dim for h, k in pairs]


def real_shapes(space: Space, kinds: Sequence[Family], depth: Floats) -> Shapes:
    """Real-valued shapes, hidden_size = aspect x depth (the geometric mean of two aspects), nothing rounded.

    Args:
        space: gives aspect and feed-forward.
        kinds: one family per row of `depth`.
        depth: (families, points) num_hidden_layers.
    """
    low, high = space.aspects
    width = math.sqrt(low * high) * depth
    head_dim = np.stack([np.full_like(row, k.head_dim) for k, row in zip(kinds, width, strict=True)])
    heads = np.stack(
        [np.full_like(row, k.heads) if k.heads else row / k.head_dim for k, row in zip(kinds, width, strict=True)]
    )
    kv_heads = np.stack(
        [np.full_like(row, k.kv_heads) if k.kv_heads else row for k, row in zip(kinds, heads, strict=True)]
    )
    family = np.broadcast_to(np.arange(len(kinds))[:, None], depth.shape)
    return Shapes(width, depth, heads, kv_heads, head_dim, space.ffn.expansion * width, family)


def whole_shapes(space: Space, kinds: Sequence[Family], around: tuple[float, float]) -> Shapes:
    """Every buildable shape of the space, as flat arrays of integers.

    Args:
        space: the sizes listed.
        kinds: the families, numbered in `Shapes.family`.
        around: lowest and highest hidden_size where the space lists none.
    """
    return joined(list(shape_chunks(space, kinds, around)))


def shape_chunks(space: Space, kinds: Sequence[Family], around: tuple[float, float]) -> Iterator[Shapes]:
    """As `whole_shapes`, at most `CHUNK` at a time, so that millions of shapes need little memory; at least one chunk."""
    for number, kind in enumerate(kinds):
        step = kind.head_dim if kind.heads is None else WIDTH_STEP
        width, depth = _widths_and_depths(space, step, around)
        for first in range(0, max(1, width.size), CHUNK):
            yield _family_shapes(space, kind, number, width[first : first + CHUNK], depth[first : first + CHUNK])


def joined(parts: Sequence[Shapes]) -> Shapes:
    """The shapes of all parts."""
    return Shapes(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Shapes)))


def shape_count(space: Space, kinds: Sequence[Family], around: tuple[float, float]) -> int:
    """How many shapes `shape_chunks` builds at most, before any that heads or depth rule out."""
    total = 0
    for kind in kinds:
        step = kind.head_dim if kind.heads is None else WIDTH_STEP
        if space.num_hidden_layers is None:
            total += int(_depth_ends(space, _widths(space, step, around))[1].sum())
        elif space.hidden_size is None and space.aspects[0] == space.aspects[1]:
            total += len(space.num_hidden_layers)
        else:
            low, high = space.aspects
            depths = space.num_hidden_layers
            total += _widths(space, step, (low * min(depths), high * max(depths))).size * len(depths)
    return total


def _family_shapes(space: Space, kind: Family, number: int, width: Array, depth: Array) -> Shapes:
    keep = depth <= MAX_LAYERS
    if kind.heads is None:
        keep &= width % kind.head_dim == 0
        heads = width // kind.head_dim
    else:
        heads = np.full_like(width, kind.heads)
    kv_heads = heads if kind.kv_heads is None else np.full_like(width, kind.kv_heads)
    keep &= (heads > 0) & (heads % kv_heads.clip(1) == 0)
    inner = _multiple(space.ffn.expansion * width, space.ffn.multiple_of)
    head_dim, family = np.full_like(width, kind.head_dim), np.full_like(width, number)
    return Shapes(width, depth, heads, kv_heads, head_dim, inner, family).take(keep)


def _depth_ends(space: Space, widths: Array) -> tuple[Array, Array]:
    """The first depth of each width, and how many there are."""
    low, high = space.aspects
    if low == high:  # the two nearest depths
        first, last = np.floor(widths / low), np.ceil(widths / low)
    else:
        first, last = np.ceil(widths / high), np.floor(widths / low)
    first, last = (end.astype(np.int64).clip(1) for end in (first, last))
    return first, (last - first + 1).clip(0)


def _widths_and_depths(space: Space, step: int, around: tuple[float, float]) -> tuple[Array, Array]:
    """(hidden_size, num_hidden_layers) of every shape of one family; widths that are not listed are multiples of `step`."""
    low, high = space.aspects
    if space.num_hidden_layers is None:
        widths = _widths(space, step, around)
        first, number = _depth_ends(space, widths)
        before = np.cumsum(number) - number  # shapes of all earlier widths
        return np.repeat(widths, number), np.arange(number.sum()) + np.repeat(first - before, number)
    depths = np.array(space.num_hidden_layers, dtype=np.int64)
    if space.hidden_size is None and low == high:
        return _multiple(low * depths, step), depths
    widths = _widths(space, step, (low * depths.min(), high * depths.max()))
    width, depth = (grid.ravel() for grid in np.meshgrid(widths, depths, indexing="ij"))
    if space.hidden_size is not None and space.aspect is None:
        return width, depth
    keep = (width >= low * depth) & (width <= high * depth)
    return width[keep], depth[keep]


def _widths(space: Space, step: int, around: tuple[float, float]) -> Array:
    if space.hidden_size is not None:
        return np.array(space.hidden_size, dtype=np.int64)
    first, last = max(1, math.ceil(around[0] / step)), max(1, math.floor(around[1] / step))
    return np.arange(first, max(first, last) + 1, dtype=np.int64) * step


def _multiple(values: Array, step: int) -> Array:
    """The closest multiples of `step`, at least one step."""
    return np.rint(values / step).astype(np.int64).clip(1) * step
