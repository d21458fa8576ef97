"""Exponential moving average of weights."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Ema:
    """Moving average of parameters, in float32, whose first steps count less.

    The average keeps min(decay, t / (t + 9)) of itself in update t, nothing in the first, as that
    of diffusers' training scripts does.

    Attributes:
        average: The averages, in the parameters' order.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        """Begin with ``parameters`` as they are."""
        self._parameters, self._decay, self._updates = list(parameters), decay, 0
        self.average = [p.detach().float().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        self._updates += 1
        t = self._updates
        weight = 1 - min(self._decay, t / (t + 9)) if t > 1 else 1.0
        for average, parameter in zip(self.average, self._parameters, strict=True):
            average -= weight * (average - parameter)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Replace the parameters by their averages."""
        torch._foreach_copy_(self._parameters, self.average)

    def load(self, average: Sequence[Tensor], updates: int) -> None:
        """Continue from averages, in the parameters' order, after so many updates."""
        self._updates = updates
        torch._foreach_copy_(self.average, list(average))
