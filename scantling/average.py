"""An exponential moving average of the weights, kept beside them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from scantling.errors import InputError
from scantling.placement import local, placed


class Average:
    """average <- decay x average + (1 - decay) x weights after every step, from the weights it starts with.

    After t steps from weights w_0: decay^t w_0 + (1 - decay) sum_i decay^(t - i) w_i.

    Args:
        model: its parameters by name; a tied table counts once.
        decay: per step, between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, skip: Shaped[Tensor, ""]) -> None:
        """Take the weights after one step in; a skipped step changes nothing. The host waits for nothing.

        Args:
            skip: 0-d, on the parameters' device; non-zero (NaN included) skips.
        """
        share = torch.where(skip == 0, 1 - self.decay, 0.0)
        weights = [local(weight) for weight in self._weights(model)]
        averages = [local(average) for average in self._average.values()]
        torch._foreach_lerp_(averages, weights, [share.to(weight.dtype) for weight in weights])

    def tensors(self) -> dict[str, Tensor]:
        """The average by parameter name: the tensors themselves, not copies. Not to be asked for inside `swapped`."""
        return dict(self._average)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put a saved average back.

        Raises:
            InputError: names or shapes are not this model's.
        """
        if odd := sorted(self._average.keys() ^ tensors.keys()):
            raise InputError(f"the saved average is not of this model; first difference: {odd[0]}")
        for name, average in self._average.items():
            if average.shape != tensors[name].shape:
                raise InputError(
                    f"average of {name}: expected shape {tuple(average.shape)}, got {tuple(tensors[name].shape)}"
                )
            average.copy_(placed(tensors[name], average))

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """The model with averaged weights inside the block; afterwards both are what they were, bit for bit.

        Values change places and storages stay, so compiled and sharded models work; the extra memory is one parameter's.
        """
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for average, weight in zip(self._average.values(), self._weights(model), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def _weights(self, model: nn.Module) -> list[Tensor]:
        """The parameters in the average's order."""
        found = dict(model.named_parameters())
        return [found[name] for name in self._average]
