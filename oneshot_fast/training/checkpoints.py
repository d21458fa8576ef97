"""What a training leaves for others: whole pipelines, adapters, and some on the way."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from oneshot_fast.generators.adapters import merge_adapter
from oneshot_fast.runtime.files import TEMPORARY
from oneshot_fast.runtime.processes import is_main

if TYPE_CHECKING:
    from oneshot_fast.generators.base import Generator
    from oneshot_fast.training.trainer import Trainer

_STEP = re.compile(r"checkpoint-(\d+)")


class Checkpoints:
    """The checkpoints of one run, written by the main process.

    A training of all weights leaves pipelines: checkpoint-best, checkpoint-final. That of an
    adapter leaves adapters, lora-best and lora-final, for the generator it began with, and the
    pipeline checkpoint-final that has lora-final merged in. On the way there is checkpoint-<step>
    after an epoch, a pipeline or an adapter.
    """

    def __init__(self, generator: Generator, folder: Path, keep: int = 0) -> None:
        """Describe what is kept.

        Args:
            generator: The trained generator.
            folder: Where the checkpoints are.
            keep: How many of those on the way; the oldest go first.
        """
        self._generator, self._folder, self._keep = generator, folder, keep

    def intermediate(self) -> list[str]:
        """Names of the checkpoints on the way, oldest first; half-written ones count."""
        found = (_STEP.search(path.name) for path in self._folder.glob("*checkpoint-*"))
        return sorted({match[0] for match in found if match}, key=_step)

    def keep(self, trainer: Trainer) -> None:
        """Write checkpoint-<step> of the weights as they would end now, and remove the oldest."""
        if not self._keep or not is_main():
            return
        path = self._folder / f"checkpoint-{trainer.step}"
        if trainer.options.lora_rank:
            self._generator.save_adapter(trainer.final(), path)
        else:
            with ended(trainer):
                self._generator.save(path)
        for name in self.intermediate()[: -self._keep]:
            doomed = self._folder / (TEMPORARY + name)  # a kill leaves nothing half removed
            shutil.rmtree(doomed, ignore_errors=True)
            (self._folder / name).rename(doomed)
            shutil.rmtree(doomed)

    def finish(self, trainer: Trainer, dtype: torch.dtype) -> None:
        """Write the best and the final weights; the generator ends with the final ones, frozen.

        Args:
            trainer: The finished training.
            dtype: Type that the weights have afterwards.
        """
        generator, unet, home = self._generator, self._generator.denoiser, self._generator.device
        final = {name: p.clone() for name, p in trainer.final().items()}
        if trainer.options.lora_rank:
            if is_main():
                generator.save_adapter(trainer.best, self._folder / "lora-best")
                generator.save_adapter(final, self._folder / "lora-final")
            trainer.load_weights(final)
            # in full precision, for which a GPU that holds the rounded weights may be too small
            merge_adapter(unet.to("cpu", torch.float32))
        else:
            if is_main():
                trainer.load_weights(trainer.best)
                generator.save(self._folder / "checkpoint-best")
            trainer.load_weights(final)
        if is_main():
            generator.save(self._folder / "checkpoint-final")
        unet.requires_grad_(False).to(home, dtype)


@contextmanager
def ended(trainer: Trainer) -> Iterator[None]:
    """The UNet has, for a while, the weights that the training would end with now."""
    if trainer.ema is None:
        yield
        return
    # beside weights, moments and average a GPU may have no room for them
    now = {name: p.detach().to("cpu", copy=True) for name, p in trainer.parameters.items()}
    trainer.load_weights(trainer.final())
    try:
        yield
    finally:
        trainer.load_weights(now)


def _step(name: str) -> int:
    match = _STEP.fullmatch(name)
    assert match is not None
    return int(match[1])
