"""Steps on the weights of one module: gradients, bad steps, averages, a state to resume from."""

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from oneshot_fast.errors import UserError
from oneshot_fast.generators.adapters import add_adapter, cast_base
from oneshot_fast.generators.lora_files import Adapter
from oneshot_fast.runtime.processes import all_reduce, is_main, processes
from oneshot_fast.runtime.seeds import derived_seed
from oneshot_fast.runtime.sharded import (
    device_of,
    is_sharded,
    join_like,
    own_part,
    shard_like,
    whole,
)
from oneshot_fast.training.batch import Batch
from oneshot_fast.training.losses.base import Loss, total
from oneshot_fast.training.memory import checkpoint_activations
from oneshot_fast.training.options import TrainOptions
from oneshot_fast.training.zero import make_engine

BAD_IN_A_ROW = 3  # bad steps that end a training


class BadStepsError(UserError):
    """Losses or gradients were not finite too often; the weights are still the last good ones."""


class Trainee(Protocol):
    """What is trained: a generator, a reward, a critic."""

    @property
    def module(self) -> nn.Module:
        """Whose weights are trained."""

    @property
    def save_dtype(self) -> torch.dtype | None:
        """Type of the weights that ``save`` writes; None: that of their files."""

    def replace_module(self, module: nn.Module) -> None:
        """Take another in the place of ``module``, of the same architecture."""

    def save(self, folder: Path) -> None:
        """Write everything that ``load_weights``, or a user, needs, atomically."""

    def save_single_file(self, folder: Path) -> None:
        """Write what ``save`` wrote to ``folder`` as one file beside it."""

    def load_weights(self, folder: Path) -> None:
        """Take over the weights of ``module`` from a folder of ``save``."""

    def originals(self) -> dict[str, Tensor]:
        """Weights of ``module`` by name, on the CPU, as they were before they were rounded."""

    def save_adapter(
        self, weights: Mapping[str, Tensor], folder: Path, kohya: bool = False
    ) -> None:
        """Write an adapter of ``module``, by its weights' names there, atomically."""

    def read_adapter(self, path: Path) -> Adapter:
        """The adapter of ``module`` in a LoRA file, to go on training it."""

    def fingerprint(self) -> str:
        """Changes when anything changes that results depend on."""


class Trainer:
    """AdamW on one module with warm-up, clipping, the best weights and a state to resume from.

    A step whose loss or gradient is NaN or infinite leaves weights and moments as they are; with
    ``optimizer_in_backward`` only the weights whose own gradient is, since others are updated then.
    Where memory runs out, once, the parts that a batch is computed in are halved.
    """

    def __init__(
        self,
        trainee: Trainee,
        loss: Loss,
        options: TrainOptions,
        steps: int,
        seed: int = 0,
        adapter: str = "default",
    ) -> None:
        """Unfreeze the module, or add an adapter to it, and make the optimiser.

        Args:
            trainee: Its module's weights are cast to ``options.weights_dtype``.
            loss: What is lowered; it is given the trainee.
            options: How it is trained.
            steps: Of the whole training, over which the learning rate falls.
            seed: Of the adapter and of the stochastic rounding.
            adapter: Its name: one beside that of another trainer of the same module, which goes on
                computing.

        Raises:
            UserError: If the optimiser is not installed, or the module takes no adapter.
        """
        module = trainee.module
        self.trainee, self.loss, self.options = trainee, loss, options
        self.initial_dtype = next(module.parameters()).dtype
        is_second = adapter != "default"
        self.originals = trainee.originals() if options.lora_rank and not is_second else {}
        if not is_second:
            cast_base(module, getattr(torch, options.weights_dtype))
            module.requires_grad_(not options.lora_rank)
        if options.lora_rank:
            start = trainee.read_adapter(options.lora_from) if options.lora_from else None
            drawn = derived_seed(seed, "lora", *([adapter] if is_second else []))
            add_adapter(module, options.lora_rank, options.lora_alpha, drawn, start, adapter)
        checkpoint_activations(module, options)
        self.engine = make_engine(trainee, loss)
        self.parameters = {k: p for k, p in module.named_parameters() if p.requires_grad}
        self.optimizer = self.engine.make_optimizer(self.parameters, options, steps, seed)
        self.step = self.skipped = self.good_in_epoch = 0
        self.bad_in_a_row = self.empty_in_a_row = 0
        device = device_of(next(module.parameters()))
        self.columns = (*loss.parts, *getattr(loss, "measures", ()))
        self.sums = torch.zeros(len(self.columns) + 1, device=device)  # and the gradient's norm
        self.losses = torch.zeros(len(self.columns), device=device)
        self.last: dict[str, float] = {}  # parts and measures of the last good step
        self.history: list[dict[str, Any]] = []
        self.best_loss = math.inf
        self.best: dict[str, Tensor] = {}
        self.chooses = True  # the best epoch, by its loss
        self.ema: Any = None
        if options.use_ema:
            from diffusers.training_utils import EMAModel

            weights = [parameter.float() for parameter in self.parameters.values()]
            self.ema = EMAModel(weights, options.ema_decay)
        self._parts, self._halved = options.gradient_accumulation_steps, False
        module.requires_grad_(False)

    def __call__(self, batch: Batch) -> None:
        """Update the weights with the gradient of the whole batch.

        Raises:
            UserError: If memory runs out although the parts were halved, or cannot be.
            BadStepsError: See ``update``.
        """
        while not self._backward(batch):
            self.forget()
            whole = self.options.optimizer_in_backward or self.engine.count > 1
            if whole or self._halved or self._parts >= batch.size:
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
        all_reduce(self.losses)
        self.update()

    def _backward(self, batch: Batch) -> bool:
        """Add the gradients of all parts; False if memory ran out.

        The tensors of a failed attempt live as long as its exception, so that ends here.
        """
        parts, engine = batch.split(self._parts), self.engine
        try:
            with self.unfrozen():
                for k, part in enumerate(parts, 1):
                    mine = part.of_process(processes().process_index, engine.count)
                    with engine.part(is_last=k == len(parts)):
                        self.add(engine(mine))
        except torch.OutOfMemoryError:
            return False
        return True

    @contextmanager
    def unfrozen(self) -> Iterator[None]:
        """Let the weights have gradients; the steps of other trainees leave them alone."""
        for parameter in self.parameters.values():
            parameter.requires_grad_()
        try:
            yield
        finally:
            self.trainee.module.requires_grad_(False)

    def add(self, losses: dict[str, Tensor]) -> None:
        """Add the gradients of a batch, or of a part of it, to those of this step."""
        found = dict.fromkeys(self.columns, self.losses.new_zeros(())) | losses
        loss = total({name: found[name] for name in self.loss.parts})
        values = torch.stack([found[name].detach() for name in self.columns])
        self.losses = self.losses + values
        if self.options.optimizer_in_backward:
            if not torch.isfinite(loss):
                return
            self.optimizer.begin(self.step)
        self.engine.backward(loss, values)

    def forget(self) -> None:
        """Drop what ``add`` added to this step."""
        self.optimizer.forget()
        self.losses = torch.zeros_like(self.losses)

    def close(self) -> None:
        """End the training; the weights stay as they are."""
        self.optimizer.close()
        self.engine.close()
        if self.options.gradient_checkpointing or self.options.selective_checkpointing:
            module: Any = self.trainee.module
            module.disable_gradient_checkpointing()

    def update(self) -> None:
        """One optimiser step on what was added.

        Raises:
            BadStepsError: After the third step in a row without a finite loss and gradient.
        """
        self.optimizer.begin(self.step)
        self.empty_in_a_row = 0
        norm = self.optimizer.clip().to(self.losses.device)
        seen = torch.cat((self.losses, norm[None]))
        # The one wait for the device in a step. The next batch would wait for it, too: it is
        # copied there from memory that is not pinned.
        if torch.isfinite(seen).all():
            self.optimizer.apply()
            self.sums += seen
            self.last = dict(zip(self.columns, seen.tolist(), strict=False))
            self.good_in_epoch += 1
            self.bad_in_a_row = 0
            if self.ema is not None:
                with self.unfrozen():  # others are copied
                    self.ema.step(self.parameters.values())
        else:
            self.skipped += 1
            self.bad_in_a_row += 1
        self.step += 1
        self.forget()
        if self.bad_in_a_row == BAD_IN_A_ROW:
            self.bad_in_a_row = 0
            raise BadStepsError(
                f"loss or gradient was NaN or infinite in {BAD_IN_A_ROW} steps in a row, the last "
                f"of them step {self.step}; the weights before them are kept in state.safetensors: "
                "repeat the command to go on with the next step, or start anew with a lower lr "
                "and --overwrite"
            )

    def skip(self) -> None:
        """Take a step that nothing can be learnt from: weights and moments stay as they are."""
        self.step += 1
        self.skipped += 1
        self.empty_in_a_row += 1

    @contextmanager
    def ended(self) -> Iterator[None]:
        """The trainee has, for a while, the weights that the training would end with now.

        All processes ask together; then each can evaluate for itself.
        """
        if self.engine.is_sharded:
            self.trainee.replace_module(self.engine.whole(self.final()))
            try:
                yield
            finally:
                self.trainee.replace_module(self.engine.module)
        elif self.ema is None:
            yield
        else:
            # beside weights, moments and average a GPU may have no room for them
            now = {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}
            self.load_weights(self.final())
            try:
                yield
            finally:
                self.load_weights(now)

    def gather(self) -> None:
        """After the last step: every process has all weights, those the training ends with."""
        if self.engine.is_sharded:
            best = {k: whole(join_like(p, self.parameters[k])) for k, p in self.best.items()}
            self.best = _to_keep(best)
            module = self.engine.whole(self.final())
            self.ema = None  # it is what they end with
            self.trainee.replace_module(module)
            weights = dict(module.named_parameters())
            self.parameters = {name: weights[name] for name in self.parameters}
            self.close()  # of this module, too
        self.load_weights(self.final())

    def final(self) -> dict[str, Tensor]:
        """The weights that the training ends with, as it stands: the average or the last ones."""
        if self.ema is None:
            return {k: self.engine.full(p).detach() for k, p in self.parameters.items()}
        weights = self.ema.shadow_params
        return {k: v.detach() for k, v in zip(self.parameters, weights, strict=True)}

    def end_epoch(self, epoch: int) -> dict[str, Any] | None:
        """Add the epoch's row to the history and keep the best weights; None if all was bad."""
        good, self.good_in_epoch = self.good_in_epoch, 0
        if not good:
            return None
        *means, norm = (self.sums / good).tolist()
        self.sums.zero_()
        found = dict(zip(self.columns, means, strict=True))
        row = {"epoch": epoch, "step": self.step}
        row["loss"] = sum(found[name] for name in self.loss.parts)
        row |= found | {"gradient_norm": norm}
        self.history.append(row)
        if self.chooses and row["loss"] < self.best_loss:
            self.keep_best(row["loss"])
        return row

    def keep_best(self, loss: float) -> None:
        """Keep the weights as they would end now; ``loss`` says how good they are."""
        self.best_loss = loss
        self.best = _to_keep(self.final())

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy ``weights``, the trained ones by name, into the module."""
        for name, parameter in self.parameters.items():
            parameter.copy_(shard_like(weights[name], parameter))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights, moments, averages and best weights by name; step and history as JSON values."""
        best = {k: join_like(p, self.parameters[k]) for k, p in self.best.items()}
        tensors = {f"best/{name}": value for name, value in best.items()}
        with self.unfrozen():  # DeepSpeed knows of moments of these alone
            tensors |= {"sums": self.sums, **self.optimizer.tensors()}
        tensors |= {f"weight/{k}": self.engine.full(p) for k, p in self.parameters.items()}
        if self.ema is not None:
            tensors |= {f"ema/{name}": value for name, value in self.final().items()}
        return tensors, {
            "step": self.step,
            "skipped": self.skipped,
            "bad_in_a_row": self.bad_in_a_row,
            "empty_in_a_row": self.empty_in_a_row,
            "good_in_epoch": self.good_in_epoch,
            "history": self.history,
            "best_loss": self.best_loss if self.best else None,
        }

    def resume(self, tensors: dict[str, Tensor], position: dict[str, Any]) -> None:
        """Continue from what ``state`` gave."""
        counts = "step", "skipped", "bad_in_a_row", "empty_in_a_row", "good_in_epoch"
        for key in (*counts, "history"):
            setattr(self, key, position[key])
        self.best_loss = math.inf if position["best_loss"] is None else position["best_loss"]
        self.load_weights(below(tensors, "weight/"))
        self.sums.copy_(tensors["sums"])
        best = below(tensors, "best/")
        self.best = _to_keep({k: shard_like(p, self.parameters[k]) for k, p in best.items()})
        self.optimizer.load(tensors)
        if self.ema is not None:
            self.ema.optimization_step = self.step - self.skipped
            averages = below(tensors, "ema/")
            for name, average in zip(self.parameters, self.ema.shadow_params, strict=True):
                average.copy_(shard_like(averages[name], average))


def _to_keep(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy on the CPU: this process's part of what is sharded, else all in the main one alone."""
    kept = {k: p for k, p in weights.items() if is_main() or is_sharded(p)}
    return {k: own_part(p).to("cpu", copy=True) for k, p in kept.items()}


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, by the rest of it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
