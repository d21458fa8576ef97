"""The optimiser's side of the M-step: steps, bad steps, averages, and a state to resume from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from oneshot_fast.errors import UserError
from oneshot_fast.generators.adapters import add_adapter
from oneshot_fast.runtime.files import read_metadata, write_safetensors
from oneshot_fast.runtime.seeds import derived_seed
from oneshot_fast.training.batch import SftOptions
from oneshot_fast.training.optimizer import WeightOptimizer

BAD_IN_A_ROW = 3  # bad steps that end a training


class BadStepsError(UserError):
    """Losses or gradients were not finite too often; the weights are still the last good ones."""


class Trainer:
    """AdamW on the UNet with warm-up, clipping, the best weights and a file to resume from.

    A step whose loss or gradient is NaN or infinite leaves weights and moments as they are; with
    ``optimizer_in_backward`` only the weights whose own gradient is, since others are updated then.
    """

    def __init__(self, unet: nn.Module, options: SftOptions, seed: int = 0) -> None:
        """Unfreeze ``unet``, or add an adapter to it, and make the optimiser.

        Args:
            unet: The trained module; its weights are cast to ``options.weights_dtype``.
            options: How it is trained.
            seed: Of the adapter and of the stochastic rounding.

        Raises:
            UserError: If the optimiser is not installed, or the module takes no adapter.
        """
        unet.to(getattr(torch, options.weights_dtype)).requires_grad_(not options.lora_rank)
        if options.lora_rank:
            add_adapter(unet, options.lora_rank, options.lora_alpha, derived_seed(seed, "lora"))
        self.options = options
        self.parameters = {k: p for k, p in unet.named_parameters() if p.requires_grad}
        self.optimizer = WeightOptimizer(self.parameters, options, seed)
        self.step = self.skipped = self.bad_in_a_row = self.good_in_epoch = 0
        device = next(unet.parameters()).device
        self.sums = torch.zeros(3, device=device)
        self.losses = torch.zeros(2, device=device)
        self.history: list[dict[str, Any]] = []
        self.best_loss = math.inf
        self.best: dict[str, Tensor] = {}
        self.ema: Any = None
        if options.use_ema:
            from diffusers.training_utils import EMAModel

            float_weights = [p.detach().float() for p in self.parameters.values()]
            self.ema = EMAModel(float_weights, decay=options.ema_decay)

    def add(self, match: Tensor, keep: Tensor) -> None:
        """Add the gradients of a batch, or of a part of it, to those of this step."""
        loss = match + keep
        self.losses = self.losses + torch.stack((match.detach(), keep.detach()))
        if self.options.optimizer_in_backward:
            if not torch.isfinite(loss):
                return
            self.optimizer.begin(self.step)
        loss.backward()

    def forget(self) -> None:
        """Drop what ``add`` added to this step."""
        self.optimizer.forget()
        self.losses = torch.zeros_like(self.losses)

    def close(self) -> None:
        """End the training; the weights stay as they are."""
        self.optimizer.close()

    def gradients(self) -> list[Tensor]:
        """What ``add`` summed up: the gradient of every weight, zero if it has none, and losses."""
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [*(p.grad for p in self.parameters.values() if p.grad is not None), self.losses]

    def update(self) -> None:
        """One optimiser step on what was added.

        Raises:
            BadStepsError: After the third step in a row without a finite loss and gradient.
        """
        self.optimizer.begin(self.step)
        seen = torch.cat((self.losses, self.optimizer.clip()[None]))
        # The one wait for the device in a step. The next batch would wait for it, too: it is
        # copied there from memory that is not pinned.
        if torch.isfinite(seen).all():
            self.optimizer.apply()
            self.sums += seen
            self.good_in_epoch += 1
            self.bad_in_a_row = 0
            if self.ema is not None:
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

    def final(self) -> dict[str, Tensor]:
        """The weights that the training ends with, as it stands: the average or the last ones."""
        average = None if self.ema is None else self.ema.shadow_params
        weights = self.parameters.values() if average is None else average
        return {k: v.detach() for k, v in zip(self.parameters, weights, strict=True)}

    def end_epoch(self, epoch: int) -> dict[str, Any] | None:
        """Add the epoch's row to the history and keep the best weights; None if all was bad."""
        good, self.good_in_epoch = self.good_in_epoch, 0
        if not good:
            return None
        match, keep, norm = (self.sums / good).tolist()
        self.sums.zero_()
        row = {"epoch": epoch, "step": self.step, "loss": match + keep}
        row |= {"matching": match, "preserve": keep, "gradient_norm": norm}
        self.history.append(row)
        if row["loss"] < self.best_loss:
            self.best_loss = row["loss"]
            self.best = {name: p.cpu().clone() for name, p in self.final().items()}
        return row

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Copy ``weights``, the trained ones by name, into the UNet."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def save(self, path: Path) -> None:
        """Write weights, moments, averages, best weights, step and history as safetensors."""
        tensors = {f"best/{name}": value for name, value in self.best.items()}
        tensors |= {"sums": self.sums, **self.optimizer.tensors()}
        for name, parameter in self.parameters.items():
            tensors[f"weight/{name}"] = parameter
        if self.ema is not None:
            tensors |= {f"ema/{name}": value for name, value in self.final().items()}
        position = {
            "step": self.step,
            "skipped": self.skipped,
            "bad_in_a_row": self.bad_in_a_row,
            "good_in_epoch": self.good_in_epoch,
            "history": self.history,
            "best_loss": self.best_loss if self.best else None,
        }
        write_safetensors(path, tensors, {"position": position})

    def load(self, path: Path) -> None:
        """Continue from a file of ``save``."""
        position = read_metadata(path, "position")
        tensors = load_file(path)
        for key in ("step", "skipped", "bad_in_a_row", "good_in_epoch", "history"):
            setattr(self, key, position[key])
        self.best_loss = math.inf if position["best_loss"] is None else position["best_loss"]
        self.load_weights(_named(tensors, "weight/"))
        self.sums.copy_(tensors["sums"])
        self.best = _named(tensors, "best/")
        self.optimizer.load(tensors)
        if self.ema is not None:
            self.ema.optimization_step = self.step - self.skipped
            for shadow, name in zip(self.ema.shadow_params, self.parameters, strict=True):
                shadow.copy_(tensors[f"ema/{name}"])


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
