"""A growth step as plain data: the spec before and after, and where every entry of every tensor comes from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from scantling.growth.axes import Dim
from scantling.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

Fill = Literal["free", "zero", "mean"]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Change:
    """How one dimension grows.

    Attributes:
        index: for every new coordinate the old one whose place it takes, -1 where it is new. A repeated one is a copy.
        fill: what tensors hold at new coordinates: `free` (any value preserves the function: random weights, zero biases,
            gains of 1), `zero`, or the `mean` over the old coordinates.
        spread: of random new weights, as a multiple of the usual.
        copies: what copies of a coordinate hold, each coordinate having equally many: `whole`, each the old slice, or
            `shares`, which add up to it. None is `whole` where copies do not get equal gradients.
    """

    index: Index
    fill: Fill = "free"
    spread: float = 1.0
    copies: Literal["whole", "shares"] | None = None

    @property
    def times(self) -> int:
        """How many copies there are of each coordinate."""
        return 1 if self.copies is None else len(self.index) // (int(self.index.max()) + 1)


@dataclass(frozen=True)
class Moved:
    """A tensor that comes from another one.

    Attributes:
        zeroed: its shape and nothing else; all zeros.
    """

    name: str
    zeroed: bool = False


@dataclass(frozen=True)
class Made:
    """A tensor that has no ancestor: the initialiser's, or zeros.

    Attributes:
        repeats: so many rows in a row are equal.
    """

    fill: Literal["free", "zero"]
    repeats: int = 1


@dataclass(frozen=True)
class Computed:
    """A tensor computed from several, or from one in a way that is no gather.

    Attributes:
        linear: in the entries and without mixing them, so that an optimizer's moments go the same way; else they restart.
    """

    names: tuple[str, ...]
    compute: "Callable[[Sequence[Tensor]], Tensor]"
    linear: bool = False


Source = Moved | Made | Computed


@dataclass(frozen=True)
class Step:
    """One expansion of one dimension, or one structural change.

    Attributes:
        rule: the expansion's name.
        text: what grows, for people.
        before, after: the specs.
        changes: by dimension; a tensor changes along each of its axes that lies on one of these.
        scales: what old entries are multiplied by, by the name of the tensor in `after`.
        sources: tensors of `after` that do not come from their namesake.
        snr_db: signal-to-noise ratio of the noise that makes shares differ and cancels in their sum; None is no noise.
        broken: why the function is not preserved; None when it is.
        warning: what to know although it is.
    """

    rule: str
    text: str
    before: ModelSpec
    after: ModelSpec
    changes: Mapping[Dim, Change] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, Source] = field(default_factory=dict)
    snr_db: float | None = None
    broken: str | None = None
    warning: str | None = None


class Inexact(Exception):
    """A dimension that cannot grow exactly; the message says why, and names the nearest target that can."""


def appended(old: int, new: int) -> Index:
    """Old coordinates first, new ones after them."""
    return np.concatenate([np.arange(old), np.full(new - old, -1)])


def inserted(count: int, old: int, new: int) -> Index:
    """`count` blocks of `old` coordinates, each with new ones at its end."""
    blocks = np.full((count, new), -1)
    blocks[:, :old] = np.arange(count * old).reshape(count, old)
    return blocks.reshape(-1)


def in_blocks(index: Index, size: int) -> Index:
    """A map of blocks as a map of their coordinates, `size` each."""
    grown = index[:, None] * size + np.arange(size)
    return np.where(index[:, None] < 0, -1, grown).reshape(-1)


def in_every(count: int, inner: Index, size: int) -> Index:
    """`count` blocks of `size` old coordinates, each with the same map inside."""
    grown = np.arange(count)[:, None] * size + inner
    return np.where(inner < 0, -1, grown).reshape(-1)


def copied(size: int, times: int, blocks: int = 1) -> Index:
    """Every block of old coordinates `times` in a row: all of them again and again, or with `size` blocks each beside itself."""
    return np.tile(np.arange(size).reshape(blocks, -1), (1, times)).reshape(-1)


def with_layer(spec: ModelSpec, index: int, **changes: object) -> ModelSpec:
    """The spec with one layer changed, in every branch alike."""
    depth = len(spec.stacks[0])
    layers = [
        layer.replace(**changes) if at % depth == index % depth else layer for at, layer in enumerate(spec.layers)
    ]
    return spec.replace(layers=tuple(layers))


def twins(spec: ModelSpec, index: int) -> list[int]:
    """The layers at the same place in every branch; equal by the spec's own rule."""
    depth = len(spec.stacks[0])
    return [at for at in range(len(spec.layers)) if at % depth == index % depth]


def notes(steps: Sequence[Step]) -> list[str]:
    """Why steps are not exact, and what else to know before training."""
    return [note for step in steps for note in (step.broken, step.warning) if note is not None]
