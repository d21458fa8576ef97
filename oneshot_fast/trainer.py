"""The optimiser's side of the M-step: steps, bad steps, averages, and a state to resume from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from oneshot_fast.errors import UserError
from oneshot_fast.runs import read_metadata, write_safetensors
from oneshot_fast.seeds import derived_seed
from oneshot_fast.training import SftOptions

MOMENTS = ("exp_avg", "exp_avg_sq")
BAD_IN_A_ROW = 3  # bad steps that end a training


class BadStepsError(UserError):
    """Losses or gradients were not finite too often; the weights are still the last good ones."""


class Trainer:
    """AdamW on the UNet with warm-up, clipping, the best weights and a file to resume from.

    A step whose loss or gradient is NaN or infinite leaves weights and moments as they are.
    """

    def __init__(self, unet: nn.Module, options: SftOptions, seed: int = 0) -> None:
        """Unfreeze ``unet`` and make the optimiser.

        Args:
            unet: The trained module; its weights are cast to ``options.weights_dtype``.
            options: How it is trained.
            seed: Of the stochastic rounding.

        Raises:
            UserError: If the optimiser is not installed.
        """
        unet.to(getattr(torch, options.weights_dtype)).requires_grad_(True)
        self.options, self.seed = options, seed
        self.parameters = dict(unet.named_parameters())
        self.optimizer = _make_optimizer(list(self.parameters.values()), options)
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
        (match + keep).backward()
        self.losses = self.losses + torch.stack((match.detach(), keep.detach()))

    def forget(self) -> None:
        """Drop what ``add`` added to this step."""
        self.optimizer.zero_grad(set_to_none=True)
        self.losses = torch.zeros_like(self.losses)

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
        warmup = min(1.0, (self.step + 1) / max(1, self.options.lr_warmup_steps))
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.options.lr * warmup)
            else:
                group["lr"] = self.options.lr * warmup
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.options.max_grad_norm)
        seen = torch.cat((self.losses, norm.float()[None]))
        # The one wait for the device in a step. The next batch would wait for it, too: it is
        # copied there from memory that is not pinned.
        if torch.isfinite(seen).all():
            self._optimizer_step()
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

    def _optimizer_step(self) -> None:
        if self.options.optimizer == "adamw":
            self.optimizer.step()
            return
        # Stochastic rounding draws from the global generator: a seed per step makes it resumable.
        # torchao compiles its step; on the CPU, where memory is no concern, that takes minutes.
        stance = "force_eager" if self.sums.device.type == "cpu" else "default"
        with torch.random.fork_rng(), torch.compiler.set_stance(stance):
            torch.manual_seed(derived_seed(self.seed, "rounding", self.step))
            self.optimizer.step()

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
        """Copy ``weights`` into the UNet."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def save(self, path: Path) -> None:
        """Write weights, moments, averages, best weights, step and history as safetensors."""
        tensors = {f"best/{name}": value for name, value in self.best.items()}
        tensors["sums"] = self.sums
        for name, parameter in self.parameters.items():
            tensors[f"weight/{name}"] = parameter
            for moment in MOMENTS:
                value = self.optimizer.state[parameter].get(moment)
                if value is not None:
                    tensors |= {f"{moment}{k}/{name}": v for k, v in _stored(value).items()}
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
        updates = self.step - self.skipped
        if updates:
            self._load_moments(tensors, updates)
        if self.ema is not None:
            self.ema.optimization_step = updates
            for shadow, name in zip(self.ema.shadow_params, self.parameters, strict=True):
                shadow.copy_(tensors[f"ema/{name}"])

    def _load_moments(self, tensors: dict[str, Tensor], updates: int) -> None:
        for name, parameter in self.parameters.items():
            state: dict[str, Tensor] = {"step": torch.tensor(float(updates))}
            for moment in MOMENTS:
                if self.options.optimizer == "adamw":
                    state[moment] = torch.zeros_like(parameter)
                else:  # torchao decides by size which moments have 8 bits
                    signed = moment == "exp_avg"
                    state[moment] = self.optimizer._new_buffer(parameter, signed)  # type: ignore
                for key, value in _stored(state[moment]).items():
                    value.copy_(tensors[f"{moment}{key}/{name}"])
            self.optimizer.state[parameter] = state


def _make_optimizer(parameters: list[nn.Parameter], options: SftOptions) -> torch.optim.Optimizer:
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay)
    try:
        from torchao.optim import AdamW8bit  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise UserError("--optimizer adamw8bit needs torchao: pip install torchao") from None
    optimizer: torch.optim.Optimizer = AdamW8bit(
        parameters,
        lr=options.lr,
        weight_decay=options.weight_decay,
        bf16_stochastic_round=options.weights_dtype == "bfloat16",
    )
    return optimizer


def _stored(moment: Tensor) -> dict[str, Tensor]:
    """What a moment consists of: itself, or the codes and scales of 8-bit blocks."""
    parts = {f".{key}": getattr(moment, key, None) for key in ("codes", "scale")}
    return {key: v for key, v in parts.items() if v is not None} or {"": moment}


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
