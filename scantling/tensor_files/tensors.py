"""What a model's weights are to the rest of the package: names, shapes and dtypes, and a tensor when asked."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]
Rows = Callable[[int, int], Tensor]  # from a first row to before an end, along the first axis
PIECE_BYTES = 2**20


class Tensors(ABC):
    """Named tensors, each made when asked for and not kept."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Every name, in the order in which they are written."""

    @abstractmethod
    def shape(self, name: str) -> Shape:
        """The shape of a tensor, without making it."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, without making it."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """The tensor, read or computed now; the caller owns it."""

    def rows(self, name: str) -> Rows:
        """What gives rows of a tensor: of one made whole now, unless a source can make them one by one; a number is one row."""
        tensor = self.tensor(name).detach().cpu()
        got, promised = (tuple(tensor.shape), tensor.dtype), (self.shape(name), self.dtype(name))
        assert got == promised, f"{name}: promised {promised}, made {got}"
        return rows_of(tensor)

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor in order, each piece valid until the next is asked for."""
        rows = self.rows(name)
        for start, end in row_blocks(self.shape(name), self.dtype(name)):
            yield as_bytes(rows(start, end))

    def size(self, name: str) -> int:
        """Bytes of a tensor."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize


@dataclass(frozen=True)
class Held(Tensors):
    """Tensors in memory, such as a `state_dict`."""

    held: Mapping[str, Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.held)

    def shape(self, name: str) -> Shape:
        return tuple(self.held[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.held[name].dtype

    def tensor(self, name: str) -> Tensor:
        return self.held[name]


@dataclass(frozen=True)
class Produced(Tensors):
    """Tensors that a function makes.

    Attributes:
        kinds: shape and dtype by name.
        produce: a name's tensor, of that shape and dtype.
    """

    kinds: Mapping[str, tuple[Shape, torch.dtype]]
    produce: Callable[[str], Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.kinds)

    def shape(self, name: str) -> Shape:
        return self.kinds[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self.kinds[name][1]

    def tensor(self, name: str) -> Tensor:
        return self.produce(name)


def rows_of(tensor: Tensor) -> Rows:
    """The rows of a tensor in memory, shared with it."""
    whole = tensor if tensor.ndim else tensor.view(1)
    return lambda start, end: whole[start:end]


def row_blocks(shape: Shape, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Rows in order, so many at a time as make a piece of bytes; one row at least."""
    count, *rest = shape or (1,)
    each = max(1, PIECE_BYTES // max(1, math.prod(rest) * dtype.itemsize))
    for start in range(0, count, each):
        yield start, min(start + each, count)


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, shared with it; those of a copy otherwise."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
