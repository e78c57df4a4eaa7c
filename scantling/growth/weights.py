"""A step applied to tensors: weights, and an optimizer's moments on the same map.

Everything is lazy: rows of a grown tensor are made when asked for, from rows of the tensor it comes from.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from scantling.growth.axes import Axes, Axis, axes
from scantling.growth.noise import Noise
from scantling.growth.steps import Change, Computed, Index, Made, Moved, Source, Step
from scantling.lineage import USUAL, Policy
from scantling.model import build_meta
from scantling.model.init import spreads
from scantling.tensor_files import Rows, Shape, Tensors, row_blocks, rows_of

DRAWN_AT_ONCE = 2**16  # random numbers of one seed

Role = Literal["weight", "first", "second"]  # a weight; a moment linear in the gradient; one in its square


@dataclass(frozen=True)
class Grown(Tensors):
    """The tensors after a step, made from those before it.

    Attributes:
        role: weights, or moments of an optimizer by the names of their weights.
    """

    source: Tensors
    step: Step
    policy: Policy = USUAL
    role: Role = "weight"

    @cached_property
    def _axes(self) -> dict[str, Axes]:
        return axes(self.step.after)

    @cached_property
    def _old_axes(self) -> dict[str, Axes]:
        return axes(self.step.before)

    @cached_property
    def _spreads(self) -> dict[str, float]:
        return spreads(build_meta(self.step.after), self.step.after)

    @cached_property
    def names(self) -> tuple[str, ...]:
        if self.role == "weight":
            return tuple(self._axes)
        have = set(self.source.names)
        return tuple(name for name in self._axes if self._ancestors(name) and have.issuperset(self._ancestors(name)))

    def _source(self, name: str) -> Source:
        return self.step.sources.get(name, Moved(name))

    def _ancestors(self, name: str) -> tuple[str, ...]:
        """Tensors that this one is made from; for moments, none where they restart."""
        match self._source(name):
            case Moved(old, zeroed):
                return () if zeroed and self.role != "weight" else (old,)
            case Computed(names, _, linear):
                return names if linear or self.role == "weight" else ()
        return ()

    def shape(self, name: str) -> Shape:
        return tuple(axis.size for axis in self._axes[name])

    def dtype(self, name: str) -> torch.dtype:
        ancestors = self._ancestors(name)
        return self.source.dtype(ancestors[0] if ancestors else self.source.names[0])

    def _unchanged(self, name: str) -> str | None:
        """The tensor before that this one is, as it is."""
        source = self._source(name)
        if not isinstance(source, Moved) or source.zeroed or name in self.step.scales:
            return None
        return None if any(map(self._change, self._old_axes[source.name])) else source.name

    def tensor(self, name: str) -> Tensor:
        if (old := self._unchanged(name)) is not None:
            return self.source.tensor(old)
        rows, tensor = self.rows(name), torch.empty(self.shape(name), dtype=self.dtype(name))
        for start, end in row_blocks(self.shape(name), self.dtype(name)):
            tensor[start:end] = rows(start, end)
        return tensor

    def rows(self, name: str) -> Rows:
        if (unchanged := self._unchanged(name)) is not None:
            return self.source.rows(unchanged)
        shape, dtype = self.shape(name), self.dtype(name)

        def empty(count: int) -> Tensor:
            return torch.empty((count, *shape[1:]), dtype=dtype)

        match self._source(name):
            case Made("zero") | Moved(_, True):
                return lambda start, end: empty(end - start).zero_()
            case Made(_, 1):
                return lambda start, end: self._draw(empty(end - start), name, name, start, None)
            case Made(_, repeats):
                drawn = self._draw(empty(shape[0] // repeats), name, name, 0, None)
                return rows_of(drawn.repeat_interleave(repeats, 0))
            case Moved(before, _):
                rows, places, old_shape = self.source.rows(before), self._old_axes[before], self.source.shape(before)
            case Computed(names, compute, _):
                tensor = compute([self.source.tensor(each) for each in names])
                rows, places, old_shape = rows_of(tensor), self._axes[name], tuple(tensor.shape)
        old = _Old(rows, old_shape, dtype, self._factor(name, places))
        snr_db = self.step.snr_db if self.role == "weight" else None
        noise = None if snr_db is None else self._noise(name, old, places, snr_db)
        return lambda start, end: self._grown(name, old, places, start, end, noise)

    def _factor(self, name: str, places: Axes) -> float:
        """What old entries are multiplied by: weights as the step says, moments as the gradient changes with that.

        Copies share the gradient of what they are copies of.
        """
        scale, copies = self.step.scales.get(name, 1.0), 1
        for change in filter(None, map(self._change, places)):
            copies *= change.times
            scale /= change.times if change.copies == "shares" else 1
        return {"weight": scale, "first": 1 / (scale * copies), "second": (scale * copies) ** -2}[self.role]

    def _noise(self, name: str, old: "_Old", places: Axes, snr_db: float) -> Callable[[Tensor, int], None] | None:
        """What tells apart the shares of copied inputs (a matrix's last axis)."""
        shares = self._change(places[-1])
        if shares is None or shares.copies != "shares":
            return None
        out, into = places[-2:]
        rows, columns = self._change(out), old_places(into, shares.index, into.size)
        outputs = np.arange(out.size) if rows is None else rows.index

        def matrix(inputs: Index, block: str) -> Noise:
            def draw(copy: int, pair: int, first: int, last: int) -> Tensor:
                new = torch.empty(last - first, int(inputs.max()) + 1)
                return self._normal(new, f"{name} noise {copy} {pair}{block}", first, 1.0)

            return Noise(outputs, inputs, old.power, snr_db, draw)

        if columns.ndim == 1:
            return matrix(columns, "").add
        each = [matrix(inputs, f" of {block}") for block, inputs in enumerate(columns)]

        def add(blocks: Tensor, first: int) -> None:
            for block, noise in zip(blocks, each[first:], strict=False):
                noise.add(block, 0)

        return add

    def _grown(
        self,
        name: str,
        old: "_Old",
        places: Axes,
        start: int,
        end: int,
        noise: Callable[[Tensor, int], None] | None,
    ) -> Tensor:
        """Rows of a tensor that changes: old ones scaled and in their places along every axis, new ones filled."""
        change = self._change(places[0])
        if change is None:
            grown = old.rows(start, end)
        else:
            index = change.index[start:end]
            grown = _gathered(old.rows, (len(index), *old.shape[1:]), old.dtype, 0, index)
            for a, b in _runs(index < 0):
                self._fill(grown[a:b], change, name, "0", start + a, old, lambda: old.mean_row)
        for at, axis in enumerate(places[1:], 1):
            if (change := self._change(axis)) is not None:
                grown = self._along(grown, at, axis, change, name, old, start)
        if noise is not None:
            noise(grown, start)
        assert tuple(grown.shape[1:]) == self.shape(name)[1:], f"{name}: {tuple(grown.shape)} of {self.shape(name)}"
        return grown

    def _change(self, axis: Axis) -> Change | None:
        return None if axis.dim is None else self.step.changes.get(axis.dim)

    def _along(self, rows: Tensor, at: int, axis: Axis, change: Change, name: str, old: "_Old", first: int) -> Tensor:
        """Old columns where the index says, new ones filled, of rows from `first` on."""
        places = old_places(axis, change.index, rows.shape[at])
        if places.ndim == 1:
            return self._placed(rows, at, places, change, name, f"{at}", old, first)
        blocks = range(first, first + len(rows))  # each has its own places
        return torch.stack(
            [
                self._placed(row, at - 1, places[block], change, name, f"{at} of {block}", old, 0)
                for row, block in zip(rows, blocks, strict=True)
            ]
        )

    def _placed(
        self, rows: Tensor, at: int, places: Index, change: Change, name: str, key: str, old: "_Old", first: int
    ) -> Tensor:
        shape = (*rows.shape[:at], len(places), *rows.shape[at + 1 :])
        grown = _gathered(lambda start, end: rows.narrow(at, start, end - start), shape, rows.dtype, at, places)
        for start, end in _runs(places < 0):
            new = grown.narrow(at, start, end - start)
            self._fill(new, change, name, f"{key} {start}", first, old, lambda: rows.double().mean(at, keepdim=True))
        return grown

    def _fill(
        self, new: Tensor, change: Change, name: str, key: str, first: int, old: "_Old", mean: Callable[[], Tensor]
    ) -> None:
        """Set new entries, in place."""
        if self.role == "second" and self.policy.moments == "mean":
            new.fill_(old.mean)
        elif self.role != "weight" or change.fill == "zero":
            new.zero_()
        elif change.fill == "mean":
            new.copy_(mean())
        else:
            self._draw(new, name, f"{name} {key}", first, old, change.spread)

    def _draw(self, new: Tensor, name: str, key: str, first: int, old: "_Old | None", share: float = 1.0) -> Tensor:
        """Free entries of rows from `first` on, in place: random weights, zero biases, gains of 1."""
        if name.endswith("bias"):
            return new.zero_()
        if "norm" in name.split(".")[-2]:
            return new.fill_(1.0)
        spread = self._spreads.get(name)
        if spread is None or (self.policy.free == "matching" and old is not None):
            spread = old.spread if old is not None else float(new.shape[-1]) ** -0.5
        return self._normal(new, key, first, spread * share)

    def _normal(self, new: Tensor, key: str, first: int, spread: float) -> Tensor:
        """Random numbers of rows from `first` on, in place; a row is the same in any company."""
        each = max(1, DRAWN_AT_ONCE // max(1, math.prod(new.shape[1:])))
        last = first + len(new)
        for block in range(first // each, -(-last // each)):  # whole blocks
            digest = hashlib.sha256(f"{self.policy.seed} {self.step.text} {key} {block}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            drawn = torch.empty((each, *new.shape[1:])).normal_(0.0, spread, generator=generator)
            start, end = max(first, block * each), min(last, (block + 1) * each)
            new[start - first : end - first] = drawn[start - block * each : end - block * each]
        return new


@dataclass(frozen=True)
class _Old:
    """The tensor that a grown one comes from, times a factor, and what new entries ask of all of it.

    Attributes:
        read: its rows without the factor.
    """

    read: Rows
    shape: Shape
    dtype: torch.dtype
    factor: float

    def rows(self, start: int, end: int) -> Tensor:
        """Its rows; a product in float16 or bfloat16 is rounded once."""
        rows = self.read(start, end)
        return rows if self.factor == 1.0 else rows * self.factor

    @cached_property
    def mean(self) -> float:
        return float(self.mean_row.mean())

    @cached_property
    def mean_row(self) -> Tensor:
        """In float64."""
        return self._sum(lambda rows: rows.sum(0, keepdim=True)) / self.shape[0]

    @cached_property
    def power(self) -> float:
        """Mean square."""
        return float(self._sum(lambda rows: rows.square().sum())) / math.prod(self.shape)

    @cached_property
    def spread(self) -> float:
        """Standard deviation."""
        square = self._sum(lambda rows: (rows - self.mean).square().sum())
        return math.sqrt(square / (math.prod(self.shape) - 1))

    def _sum(self, part: Callable[[Tensor], Tensor]) -> Tensor:
        blocks = row_blocks(self.shape, torch.float64)
        return torch.stack([part(self.rows(start, end).double()) for start, end in blocks]).sum(0)


def old_places(axis: Axis, index: Index, size: int) -> Index:
    """Of every new place along an axis the old one, -1 where new; one row per block where blocks differ.

    Args:
        index: of the whole dimension.
        size: the axis's old size.
    """
    if axis.form == "flat":
        return index
    if axis.form == "lanes":
        lanes = index.reshape(-1, axis.blocks).T
        return np.where(lanes < 0, -1, lanes // axis.blocks)
    rows = index.reshape(axis.blocks, -1)
    return np.where(rows < 0, -1, rows - np.arange(axis.blocks)[:, None] * size)


def _runs(flags: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> list[tuple[int, int]]:
    """Start and end of every run of true flags."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _gathered(old: Rows, shape: Shape, dtype: torch.dtype, at: int, places: Index) -> Tensor:
    """A tensor with old slices along an axis in their new places, run by run; the rest is not set."""
    edges = np.flatnonzero((np.diff(places) != 1) | (places[:-1] < 0)) + 1
    starts = np.concatenate([[0], edges, [len(places)]])
    grown = torch.empty(shape, dtype=dtype)
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        if (place := int(places[start])) >= 0:
            grown.narrow(at, start, end - start).copy_(old(place, place + end - start))
    return grown


def applied(tensors: Tensors, steps: "list[Step]", policy: Policy = USUAL, role: Role = "weight") -> Tensors:
    """All steps in order, lazily."""
    for step in steps:
        tensors = Grown(tensors, step, policy, role)
    return tensors
