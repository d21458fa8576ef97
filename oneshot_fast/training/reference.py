"""The generator as it was before training, for losses that hold on to it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from oneshot_fast.generators.base import Generator


class Reference:
    """What the base generator was.

    Where an adapter is trained it is the same network with the adapter off; where all weights are,
    it has a second denoiser.
    """

    def __init__(self, generator: Generator, adapts: bool) -> None:
        """Take ``generator`` as it is now, before it is trained; ``adapts``: an adapter is."""
        self._adapts, self._generator = adapts, generator
        if not adapts:
            others = [*generator.networks.values()][1:]
            shared: dict[int, Any] = {id(network): network for network in others}
            decoder = getattr(generator, "decoder", None)
            shared |= {id(decoder): decoder}
            self._generator = copy.deepcopy(generator, shared)
            self._generator.denoiser.requires_grad_(False)

    @contextmanager
    def generator(self) -> Iterator[Generator]:
        """The base generator, meanwhile."""
        denoiser: Any = self._generator.denoiser
        with adapter_off(denoiser) if self._adapts else nullcontext():
            yield self._generator


@contextmanager
def adapter_off(denoiser: Any) -> Iterator[None]:
    """The network is what it is without the adapter that is being trained, if it has one yet."""
    adapted = hasattr(denoiser, "peft_config")
    if adapted:
        denoiser.disable_adapters()
    try:
        yield
    finally:
        if adapted:
            denoiser.enable_adapters()
