"""One step of the M-step on one batch, in as many parts as processes and memory ask for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from oneshot_fast.errors import UserError
from oneshot_fast.runtime.processes import all_reduce, processes
from oneshot_fast.training.batch import Batch, SftOptions, sft_losses

if TYPE_CHECKING:
    from oneshot_fast.generators.base import Generator
    from oneshot_fast.training.trainer import Trainer

# of generator, batch and options: matching and preserve loss, two scalars
Losses = Callable[["Generator", Batch, SftOptions], tuple[Tensor, Tensor]]


class TrainingStep:
    """Gradients and update of a batch; where memory runs out, once, the parts are halved."""

    def __init__(self, generator: Generator, trainer: Trainer, losses: Losses = sft_losses) -> None:
        """Start with the parts of ``trainer.options``."""
        self._generator, self._trainer, self._losses = generator, trainer, losses
        self._parts = trainer.options.gradient_accumulation_steps
        self._halved = False

    def __call__(self, batch: Batch) -> None:
        """Update the weights with the gradient of the whole batch.

        Raises:
            UserError: If memory runs out although the parts were halved, or cannot be.
            BadStepsError: See ``Trainer.update``.
        """
        while not self._backward(batch):
            self._trainer.forget()
            whole = self._trainer.options.optimizer_in_backward
            if whole or self._halved or self._parts >= len(batch.noise):
                raise UserError(
                    "out of memory; try --gradient_checkpointing, a smaller --batch_size, "
                    "--optimizer adamw8bit or --lora_rank 16"
                )
            self._halved, self._parts = True, 2 * self._parts
            print(
                f"out of memory: from now on a batch is computed in {self._parts} parts, as with "
                f"--gradient_accumulation_steps {self._parts}",
                file=sys.stderr,
            )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if processes().num_processes > 1:
            all_reduce(self._trainer.gradients())
        self._trainer.update()

    def _backward(self, batch: Batch) -> bool:
        """Add the gradients of all parts; False if memory ran out.

        The tensors of a failed attempt live as long as its exception, so that ends here.
        """
        options, here = self._trainer.options, processes()
        # by process first: where memory ran out in one of them, only its parts are smaller
        mine = _split(batch, here.num_processes)[here.process_index : here.process_index + 1]
        try:
            for rows, all_pairs, all_others in mine:
                for part, pairs, others in _split(rows, self._parts):
                    match, keep = self._losses(self._generator, part, options)
                    self._trainer.add(match * all_pairs * pairs, keep * all_others * others)
        except torch.OutOfMemoryError:
            return False
        return True


def _split(batch: Batch, parts: int) -> list[tuple[Batch, float, float]]:
    return [(batch, 1.0, 1.0)] if parts == 1 else list(batch.split(parts))
