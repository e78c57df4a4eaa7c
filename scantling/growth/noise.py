"""Noise that tells copies apart and changes no output: what one copy's weights gain, the next one's lose (arXiv 2409.12903)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from scantling.growth.steps import Index
from scantling.tensor_files import row_blocks

Draw = Callable[[int, int, int, int], Tensor]


@dataclass(frozen=True)
class Noise:
    """Noise on a matrix (out x in) of copies. Inputs whose copies hold equal values do not see it.

    The first and second copy of every input get N and -N, the third and fourth another N, and a last odd one none. Every copy
    of the outputs has its own, each of exactly the power asked for.

    Attributes:
        outputs, inputs: the old coordinate of every row and of every column, each equally often.
        power: mean square of the matrix; the noise's is this / 10^(snr_db / 10).
        draw: standard normal numbers (rows x old inputs), always the same for the copy of the outputs, the pair of copies of
            the inputs, and the first and last old output.
    """

    outputs: Index
    inputs: Index
    power: float
    snr_db: float
    draw: Draw
    _sizes: dict[tuple[int, int], float] = field(default_factory=dict)

    def add(self, rows: Tensor, first: int) -> None:
        """To rows of the matrix from `first` on, in place."""
        columns = torch.from_numpy(_by_copy(self.inputs))
        places = np.arange(first, first + len(rows))
        for copy, here in enumerate(_by_copy(self.outputs)):
            mine = here[np.isin(here, places)]
            if not len(mine):
                continue
            old, at = self.outputs[mine], torch.from_numpy(mine - first)[:, None]
            for pair, (plus, minus) in enumerate(zip(columns[0:-1:2], columns[1::2], strict=True)):
                drawn = self.draw(copy, pair, int(old.min()), int(old.max()) + 1)[old - old.min()]
                noise = drawn.double() * self._size(copy, pair)
                for sign, column in ((1, plus), (-1, minus)):
                    rows[at, column] = (rows[at, column].double() + sign * noise).to(rows.dtype)

    def _size(self, copy: int, pair: int) -> float:
        """What the numbers drawn for a block are multiplied by."""
        if (copy, pair) not in self._sizes:
            shape = (int(self.outputs.max()) + 1, int(self.inputs.max()) + 1)
            blocks = row_blocks(shape, torch.float64)
            total = sum(self.draw(copy, pair, *block).double().square().sum().item() for block in blocks)
            power = self.power / 10 ** (self.snr_db / 10)
            self._sizes[copy, pair] = (power * shape[0] * shape[1] / total) ** 0.5
        return self._sizes[copy, pair]


def _by_copy(places: Index) -> Index:
    """By copy and old coordinate, where it is."""
    return np.argsort(places, kind="stable").reshape(int(places.max()) + 1, -1).T.copy()
