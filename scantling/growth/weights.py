"""A step applied to tensors: weights, and an optimizer's moments on the same map.

Everything is lazy: a grown tensor is made when asked for, from the one or few it comes from.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from scantling.growth.axes import Axes, Axis, axes
from scantling.growth.steps import Change, Computed, Fill, Index, Made, Moved, Source, Step
from scantling.model import build_meta
from scantling.model.init import spreads
from scantling.tensor_files import Shape, Tensors

AT_ONCE = 2**22  # entries worked on in float32, whatever the size of the tensor

Role = Literal["weight", "first", "second"]  # a weight; a moment linear in the gradient; one in its square


@dataclass(frozen=True)
class Policy:
    """Choices that preserve the function whichever way they are made.

    Attributes:
        seed: of random entries; each tensor draws its own numbers, whatever the order.
        free: random entries are the model's own initialiser's (`initializer`), or have the standard deviation of the tensor
            they join (`matching`).
        moments: what second moments of new entries in old tensors start from: `mean` (of the tensor: no overshoot), or
            `zero`, beside which torch's one step count per tensor makes first updates up to 6.6 times too large
            (specs of AdamW with beta2 0.999).
        new_layers: weights of a new layer: a `copy` of the layer before it where shapes agree, or `random`; its output is
            zero either way. `stack` repeats layers verbatim, which does not preserve the function.
    """

    seed: int = 0
    free: Literal["initializer", "matching"] = "initializer"
    moments: Literal["mean", "zero"] = "mean"
    new_layers: Literal["copy", "random", "stack"] = "copy"


@dataclass(frozen=True)
class Grown(Tensors):
    """The tensors after a step, made from those before it.

    Attributes:
        role: weights, or moments of an optimizer by the names of their weights.
        present: for moments, the weights of `source` that have any.
    """

    source: Tensors
    step: Step
    policy: Policy = Policy()
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

    def pieces(self, name: str) -> Iterator[memoryview]:
        source = self._source(name)
        if isinstance(source, Moved) and not source.zeroed and not self._touched(name, source.name):
            return self.source.pieces(source.name)
        return super().pieces(name)

    def _touched(self, name: str, old: str) -> bool:
        return name in self.step.scales or any(axis.dim in self.step.changes for axis in self._old_axes[old])

    def tensor(self, name: str) -> Tensor:
        match self._source(name):
            case Made(fill, repeats):
                shape = self.shape(name)
                made = torch.empty(shape[0] // repeats, *shape[1:], dtype=self.dtype(name))
                made = made.zero_() if fill == "zero" else self._draw(made, name, None)
                return made if repeats == 1 else made.repeat_interleave(repeats, 0)
            case Moved(_, zeroed) if zeroed:
                return torch.zeros(self.shape(name), dtype=self.dtype(name))
            case Moved(old, _):
                tensor, places = self.source.tensor(old), self._old_axes[old]
                if not self._touched(name, old):
                    return tensor
            case Computed(names, compute, _):
                tensor = compute([self.source.tensor(each) for each in names])
                places = self._axes[name]
        tensor = self._scaled(tensor, name)
        for at, axis in enumerate(places):
            if axis.dim is not None and (change := self.step.changes.get(axis.dim)) is not None:
                tensor = self._along(tensor, at, axis, change, name)
        assert tuple(tensor.shape) == self.shape(name), f"{name}: {tuple(tensor.shape)} is not {self.shape(name)}"
        return tensor

    def _scaled(self, tensor: Tensor, name: str) -> Tensor:
        factor = self.step.scales.get(name, 1.0)
        factor = {"weight": factor, "first": 1 / factor, "second": factor**-2}[self.role]
        if factor == 1.0:
            return tensor
        wide = torch.promote_types(tensor.dtype, torch.float32)
        scaled = torch.empty_like(tensor)
        pieces = -(-tensor.numel() // AT_ONCE)
        for new, old in zip(scaled.chunk(pieces), tensor.chunk(pieces), strict=True):
            new.copy_(old.to(wide) * factor)
        return scaled

    def _along(self, tensor: Tensor, at: int, axis: Axis, change: Change, name: str) -> Tensor:
        """Old slices where the index says, new ones filled."""
        old = old_places(axis, change.index, tensor.shape[at])
        if old.ndim == 2:  # every block has its own places
            kept = [_gathered(block, at - 1, places) for block, places in zip(tensor, old, strict=True)]
            grown = torch.stack(kept)
        else:
            grown = _gathered(tensor, at, old)
        self._fill(grown, tensor, at, old, change.fill, name)
        return grown

    def _fill(self, grown: Tensor, old: Tensor, at: int, places: Index, fill: Fill, name: str) -> None:
        """Set new slices of `grown`, in place."""
        for view, axis, rows in (
            [(grown, at, places)] if places.ndim == 1 else zip(grown, [at - 1] * len(grown), places, strict=True)
        ):
            for start, end in _runs(rows < 0):
                new = view.narrow(axis, start, end - start)
                if self.role == "first" or (self.role == "second" and self.policy.moments == "zero"):
                    new.zero_()
                elif self.role == "second":
                    new.fill_(old.mean().item())
                elif fill == "zero":
                    new.zero_()
                elif fill == "mean":
                    new.copy_(old.double().mean(at, keepdim=True).to(old.dtype).expand_as(new))
                else:
                    self._draw(new, f"{name} {at} {start}", old, name)

    def _draw(self, new: Tensor, key: str, old: Tensor | None, name: str | None = None) -> Tensor:
        """Free entries, in place: random weights, zero biases, gains of 1."""
        name = name or key
        if name.endswith("bias"):
            return new.zero_()
        if "norm" in name.split(".")[-2]:
            return new.fill_(1.0)
        spread = self._spreads.get(name)
        if spread is None or (self.policy.free == "matching" and old is not None):
            spread = float(old.float().std()) if old is not None else float(new.shape[-1]) ** -0.5
        digest = hashlib.sha256(f"{self.policy.seed} {self.step.text} {key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        for part in new.chunk(-(-new.numel() // AT_ONCE)):
            part.copy_(torch.empty(part.shape).normal_(0.0, spread, generator=generator))
        return new


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


def _gathered(tensor: Tensor, at: int, places: Index) -> Tensor:
    """A new tensor with old slices in their new places, run by run; the rest is not set."""
    shape = list(tensor.shape)
    shape[at] = len(places)
    grown = torch.empty(shape, dtype=tensor.dtype)
    edges = np.flatnonzero((np.diff(places) != 1) | (places[:-1] < 0)) + 1
    starts = np.concatenate([[0], edges, [len(places)]])
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        if places[start] >= 0:
            grown.narrow(at, start, end - start).copy_(tensor.narrow(at, int(places[start]), end - start))
    return grown


def applied(tensors: Tensors, steps: "list[Step]", policy: Policy = Policy(), role: Role = "weight") -> Tensors:
    """All steps in order, lazily."""
    for step in steps:
        tensors = Grown(tensors, step, policy, role)
    return tensors


def named(mapping: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Entries whose names start with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in mapping.items() if name.startswith(prefix)}
