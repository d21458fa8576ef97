"""What a training leaves: a state to resume from, whole pipelines, adapters, some on the way."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from oneshot_fast.generators.adapters import merge_adapter
from oneshot_fast.runtime.files import (
    in_order,
    read_metadata,
    read_safetensors,
    remove,
    write_safetensors,
)
from oneshot_fast.runtime.processes import barrier, is_main
from oneshot_fast.runtime.sharded import whole
from oneshot_fast.training.trainer import Trainer, below

_STEP = re.compile(r"checkpoint-(\d+)")


STUDENT = "student"  # whose files lie in the run's own folder, under their plain names


class Checkpoints:
    """The checkpoints of one trainee, written by the main process.

    A training of all weights leaves what the trainee saves, for a generator pipelines:
    checkpoint-best, checkpoint-final. That of an adapter leaves adapters, lora-best and lora-final,
    for the generator it began with, and the pipeline checkpoint-final that has lora-final merged
    in. One whose trainer keeps no best leaves none. On the way there is checkpoint-<step> after an
    epoch, of either kind.
    """

    def __init__(self, folder: Path, keep: int = 0) -> None:
        """Describe what is kept.

        Args:
            folder: Where the checkpoints are.
            keep: How many of those on the way; the oldest go first.
        """
        self._folder, self._keep = folder, keep

    def intermediate(self) -> list[str]:
        """Names of the checkpoints on the way, oldest first; half-written ones count."""
        found = (_STEP.search(path.name) for path in self._folder.glob("*checkpoint-*"))
        steps = {int(match[1]) for match in found if match}
        return [f"checkpoint-{step}" for step in sorted(steps)]

    def keep(self, trainer: Trainer) -> None:
        """Write checkpoint-<step> of the weights as they would end now, and remove the oldest."""
        if not self._keep:
            return
        path = self._folder / f"checkpoint-{trainer.step}"
        with trainer.ended():
            if not is_main():
                return
            if trainer.options.lora_rank:
                module = dict(trainer.trainee.module.named_parameters())
                _save_adapter(trainer, {name: module[name] for name in trainer.parameters}, path)
            else:
                trainer.trainee.save(path)
        for name in self.intermediate()[: -self._keep]:
            remove(self._folder / name)

    def finish(self, trainer: Trainer) -> None:
        """Write the best weights, if there are any, and the final ones; it ends with these."""
        trainee, module = trainer.trainee, trainer.trainee.module
        home = next(module.parameters()).device
        final = {name: p.clone() for name, p in trainer.final().items()}
        if trainer.options.lora_rank:
            if is_main():
                if trainer.best:
                    _save_adapter(trainer, trainer.best, self._folder / "lora-best")
                _save_adapter(trainer, final, self._folder / "lora-final")
            trainer.load_weights(final)
            # where there is room for the exact weights, which a GPU may not have
            merge_adapter(module, trainer.originals, trainee.save_dtype)
        else:
            if trainer.best and is_main():
                trainer.load_weights(trainer.best)
                self._save(trainer, "checkpoint-best")
            trainer.load_weights(final)
        if is_main():
            self._save(trainer, "checkpoint-final")
        module.requires_grad_(False).to(home, trainer.initial_dtype)
        barrier()  # what follows goes on with the weights in these files, as a resumed run does
        trainee.load_weights(self._folder / "checkpoint-final")

    def _save(self, trainer: Trainer, name: str) -> None:
        trainer.trainee.save(self._folder / name)
        if trainer.options.save_single_file:
            trainer.trainee.save_single_file(self._folder / name)


def _save_adapter(trainer: Trainer, weights: Mapping[str, Tensor], folder: Path) -> None:
    trainer.trainee.save_adapter(weights, folder, trainer.options.lora_format == "kohya")


def save_state(path: Path, trainers: Mapping[str, Trainer]) -> None:
    """Write the states of all trainers to one file, atomically, for ``load_state``.

    Called in every process; the main one writes what is whole, and gathers what is sharded.
    """
    tensors, positions = dict[str, Tensor](), dict[str, Any]()
    for name, trainer in trainers.items():
        found, position = trainer.state()
        tensors |= {_prefix(name) + key: tensor for key, tensor in found.items()}
        positions[_prefix(name) + "position"] = position
    if is_main():
        write_safetensors(path, tensors, positions)
        return
    for key in in_order(tensors):
        whole(tensors[key])


def load_state(path: Path, trainers: Mapping[str, Trainer]) -> None:
    """Let all trainers continue from a file of ``save_state``."""
    tensors = read_safetensors(path)
    for name, trainer in trainers.items():
        prefix = _prefix(name)
        trainer.resume(below(tensors, prefix), read_metadata(path, prefix + "position"))


def _prefix(name: str) -> str:
    return "" if name == STUDENT else f"{name}:"
