"""Candidate shapes as arrays: the families of head configuration and architecture, and what is built of them.

Nothing here knows a formula for parameters or FLOPs: shapes become the rows of a `costing.Stack`, so that the code which
prices one spec prices millions of shapes. `real_shapes` rounds nothing; `whole_shapes` are the ones that can be built.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from scantling.planning.space import Space
from scantling.planning.variants import Array, Floats, Variant, multiple
from scantling.resolve import MAX_LAYERS
from scantling.rows import Row, Stack, rows

WIDTH_STEP = 64  # of hidden_size where it need not be a multiple of head_dim
CHUNK = 20_000  # shapes priced at a time: their arrays stay in the cache


@dataclass(frozen=True)
class Shapes:
    """Candidate shapes, one per entry of arrays that are all of one form.

    Attributes:
        hidden_size: of a family with a width profile that of the uniform model it is matched to; so head_dim and
            intermediate_size.
        intermediate_size: of an expert, where there are experts.
        family: place of the head configuration and architecture among `families`.
        variant: place of the architecture in `Space.variants`.
    """

    hidden_size: Array
    num_hidden_layers: Array
    num_attention_heads: Array
    num_key_value_heads: Array
    head_dim: Array
    intermediate_size: Array
    family: Array
    variant: Array

    def __len__(self) -> int:
        return int(self.hidden_size.size)

    def take(self, index: Any) -> "Shapes":
        """The shapes at a NumPy index."""
        return Shapes(*(getattr(self, field.name)[index] for field in fields(self)))

    def rows(self, space: Space) -> list[Row]:
        """Cost rows whose counts are arrays: `costing.rows` of a `Stack`."""
        return rows(self.stack(space, self.one_variant(space)))

    def one_variant(self, space: Space) -> Variant:
        """The architecture that all of these shapes have."""
        first: Variant = space.variants[int(self.variant.flat[0]) if len(self) else 0]
        return first

    def stack(self, space: Space, variant: Variant) -> Stack:
        """The shapes as one model whose sizes are arrays, all of one architecture."""
        sizes = {field.name: getattr(self, field.name) for field in fields(self)[:6]}
        layers = variant.layers(sizes)
        return Stack(space.vocab_size, self.hidden_size, self.hidden_size, space.tie_word_embeddings, layers)

    def mapping(self, index: int, space: Space, positions: int) -> dict[str, Any]:
        """One shape as a spec mapping that `resolve.spec_from` reads."""
        variant = space.variants[int(self.variant[index])]
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        sizes = {name: int(getattr(self, name)[index]) for name in (*names, "head_dim", "intermediate_size")}
        return {
            "vocab_size": space.vocab_size,
            "max_position_embeddings": positions,
            "tie_word_embeddings": space.tie_word_embeddings,
            **{name: sizes[name] for name in names},
            **variant.mapping(sizes["hidden_size"], sizes["head_dim"], sizes["intermediate_size"]),
        }


@dataclass(frozen=True)
class Family:
    """One head configuration (None follows: heads = hidden_size / head_dim, key/value heads = heads) of one architecture.

    Attributes:
        variant: place of the architecture in `Space.variants`.
    """

    head_dim: int
    heads: int | None
    kv_heads: int | None
    variant: int = 0


def families(space: Space, known: Sequence[tuple[int, int]] | None) -> list[Family]:
    """Every head configuration whose heads divide, of every architecture; only those in `known` (query, key/value), when
    given."""
    found = []
    for number, variant in enumerate(space.variants):
        heads = (variant.heads,) if variant.heads else space.num_attention_heads
        kv_heads = (variant.kv_heads,) if variant.kv_heads else space.num_key_value_heads
        pairs: list[tuple[int | None, int | None]]
        if known is not None:
            pairs = [(h, k) for h, k in known if (heads is None or h in heads) and (kv_heads is None or k in kv_heads)]
        else:
            pairs = [
                (h, k) for h in heads or (None,) for k in kv_heads or (None,) if h is None or k is None or h % k == 0
            ]
        found += [Family(head_dim, h, k, number) for head_dim in space.head_dim for h, k in pairs]
    return found


def real_shapes(space: Space, kinds: Sequence[Family], depth: Floats, aspect: Floats | None = None) -> Shapes:
    """Real-valued shapes, hidden_size = aspect x depth, nothing rounded.

    Args:
        space: gives feed-forward and architectures, and the aspect where none is given: the geometric mean of its two.
        kinds: one family per row of `depth`.
        depth: (families, points) num_hidden_layers.
        aspect: (families, 1) hidden_size / num_hidden_layers.
    """
    low, high = space.aspects
    width = (math.sqrt(low * high) if aspect is None else aspect) * depth

    def column(values: Sequence[float]) -> Floats:
        return np.broadcast_to(np.array(values, dtype=np.float64).reshape(-1, 1), depth.shape)

    heads = np.stack(
        [np.full_like(row, k.heads) if k.heads else row / k.head_dim for k, row in zip(kinds, width, strict=True)]
    )
    kv_heads = np.stack(
        [np.full_like(row, k.kv_heads) if k.kv_heads else row for k, row in zip(kinds, heads, strict=True)]
    )
    inner = column([space.variants[kind.variant].ffn.expansion for kind in kinds]) * width
    family = np.broadcast_to(np.arange(len(kinds))[:, None], depth.shape)
    variant = np.broadcast_to(np.array([kind.variant for kind in kinds])[:, None], depth.shape)
    return Shapes(width, depth, heads, kv_heads, column([k.head_dim for k in kinds]), inner, family, variant)


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
    variant = space.variants[kind.variant]
    inner = variant.ffn.inner(width)
    keep &= variant.buildable(width, depth, inner)
    head_dim, family = np.full_like(width, kind.head_dim), np.full_like(width, number)
    return Shapes(width, depth, heads, kv_heads, head_dim, inner, family, np.full_like(width, kind.variant)).take(keep)


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
        return multiple(low * depths, step), depths
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
