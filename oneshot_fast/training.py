"""What the M-step computes: its losses, the preserve pool, a training state to resume from.

All randomness is a function of the seed and the step, so that a state needs no generator state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from oneshot_fast import ops
from oneshot_fast.errors import require
from oneshot_fast.runs import read_metadata, write_safetensors
from oneshot_fast.seeds import derived_seed, gaussian

if TYPE_CHECKING:
    from oneshot_fast.generator import OneStepGenerator, PromptEncoding


@dataclass(frozen=True)
class SftOptions:
    """How the generator is trained."""

    epochs: int = 10
    """Passes over the matched pairs."""
    batch_size: int = 4
    """Matched pairs per step."""
    lr: float = 1e-5
    """AdamW's learning rate."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    latent_loss_weight: float = 1.0
    """Weight of the mean squared error between the latents."""
    pixel_l1_weight: float = 0.0
    """Weight of the mean absolute error between the images ([0, 1] RGB); 0 never decodes."""
    preserve_latent_weight: float = 0.5
    """Weight of the latent distance to the base generator on random noise, against drift."""
    preserve_pixel_weight: float = 0.05
    """The same in pixels ([0, 1] RGB); 0 never decodes."""
    preserve_batch_size: int | None = None
    """Random noises per step for the preserve losses; by default batch_size."""
    preserve_pool_size: int = 512
    """Random noises whose base outputs are computed once, before training; steps draw from them."""
    noise: Literal["matched", "random"] = "matched"
    """Train on the matched noises, or (baseline: direct SFT) on new random noise at every step."""

    def check(self) -> None:
        """Raise UserError for values that make no sense."""
        for name in ("epochs", "batch_size", "preserve_pool_size"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}; give at least 1")
        require(0 < self.lr < math.inf, f"lr is {self.lr}; give a positive number")
        require(self.max_grad_norm > 0, "max_grad_norm must be positive")
        require(self.lr_warmup_steps >= 0, "lr_warmup_steps must not be negative")
        preserved = self.preserve_batch_size
        require(preserved is None or preserved >= 1, "preserve_batch_size must be at least 1")
        weights = (
            self.latent_loss_weight,
            self.pixel_l1_weight,
            self.preserve_latent_weight,
            self.preserve_pixel_weight,
            self.weight_decay,
        )
        require(
            all(0 <= weight < math.inf for weight in weights),
            "weights must be finite and not negative",
        )
        require(
            self.latent_loss_weight + self.pixel_l1_weight > 0,
            "both latent_loss_weight and pixel_l1_weight are 0; there is nothing to learn",
        )

    @property
    def preserves(self) -> bool:
        """Whether there is a preserve loss."""
        return self.preserve_latent_weight + self.preserve_pixel_weight > 0


@dataclass(frozen=True)
class PreservePool:
    """Random noises and what the base generator makes of them, computed once.

    Attributes:
        prompts: M prompts.
        seeds: M seeds of the noises.
        latents: Base latents, [M, C, h, w] float32, on the CPU.
    """

    prompts: list[str]
    seeds: list[int]
    latents: Tensor

    @classmethod
    @torch.no_grad()
    def build(
        cls, generator: OneStepGenerator, prompts: Sequence[str], shape: Sequence[int],
        size: int, seed: int, path: Path,
    ) -> PreservePool:  # fmt: skip
        """Read the pool from ``path`` or compute it with the generator as it is now.

        Args:
            generator: The base generator.
            prompts: Prompts to draw from.
            shape: [C, h, w] of a latent.
            size: M.
            seed: Seed of the run.
            path: Safetensors file that keeps the pool, so that a resumed run has the same.
        """
        if path.exists():
            kept = read_metadata(path, "pool")
            return cls(kept["prompts"], kept["seeds"], load_file(path)["latents"])
        draw = torch.Generator().manual_seed(derived_seed(seed, "preserve prompts"))
        chosen = torch.randint(len(prompts), (size,), generator=draw).tolist()
        pool_prompts = [prompts[k] for k in chosen]
        seeds = [derived_seed(seed, "preserve", k) for k in range(size)]
        parts = []
        for start in range(0, size, 16):
            part = slice(start, start + 16)
            eps = gaussian(seeds[part], shape).to(generator.device)
            encoding = generator.encode_prompts(pool_prompts[part])
            parts.append(generator.latents(eps, encoding).cpu())
        pool = cls(pool_prompts, seeds, torch.cat(parts))
        write_safetensors(
            path, {"latents": pool.latents}, {"pool": {"prompts": pool_prompts, "seeds": seeds}}
        )
        return pool

    def draw(self, count: int, seed: int) -> list[int]:
        """Positions of ``count`` different noises, or of all if there are fewer."""
        order = torch.randperm(len(self.seeds), generator=torch.Generator().manual_seed(seed))
        return order[:count].tolist()


@dataclass(frozen=True)
class Batch:
    """Noises with the latents (and images) that the generator should make of them.

    Attributes:
        noise: [B, C, h, w] float32.
        prompts: Encoding of B prompts.
        latents: [B, C, h, w] float32.
        images: [B, 3, H, W] in [0, 1], or None without a pixel loss.
        matched: The first ``matched`` rows are pairs, the others preserve.
    """

    noise: Tensor
    prompts: PromptEncoding
    latents: Tensor
    images: Tensor | None
    matched: int


def sft_losses(
    generator: OneStepGenerator, batch: Batch, options: SftOptions
) -> tuple[Tensor, Tensor]:
    """Matching and preserve loss of one step, from one UNet evaluation of all rows.

    Returns:
        Two scalars, weighted, differentiable with respect to the UNet; their sum is the loss.
    """
    eps_hat, x = generator.predict(batch.noise, batch.prompts)
    sigma, n = generator.step.sigma, batch.matched
    latent = ops.latent_mse(eps_hat, x, batch.latents, sigma)
    match = options.latent_loss_weight * latent[:n].mean()
    keep = options.preserve_latent_weight * latent[n:].sum() / max(1, len(latent) - n)
    if options.pixel_l1_weight:
        assert batch.images is not None
        raw = generator.decode_raw((x - sigma * eps_hat)[:n])
        match = match + options.pixel_l1_weight * ops.pixel_l1(raw, batch.images).mean()
    if options.preserve_pixel_weight and len(latent) > n:
        raw = generator.decode_raw((x - sigma * eps_hat)[n:])
        base = generator.decode(batch.latents[n:])
        keep = keep + options.preserve_pixel_weight * ops.pixel_l1(raw, base).mean()
    return match, keep


class Trainer:
    """AdamW on the UNet with warm-up, clipping, the best weights and a file to resume from."""

    def __init__(self, unet: nn.Module, options: SftOptions) -> None:
        """Unfreeze ``unet`` and make the optimiser."""
        unet.requires_grad_(True)
        self.options = options
        self.parameters = dict(unet.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=options.lr, weight_decay=options.weight_decay
        )
        self.step = 0
        self.sums = torch.zeros(3, device=next(unet.parameters()).device)
        self.history: list[dict[str, Any]] = []
        self.best_loss = math.inf
        self.best: dict[str, Tensor] = {}

    def update(self, match: Tensor, keep: Tensor) -> None:
        """One optimiser step on the sum of both losses."""
        warmup = min(1.0, (self.step + 1) / max(1, self.options.lr_warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * warmup
        self.optimizer.zero_grad(set_to_none=True)
        (match + keep).backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.options.max_grad_norm)
        self.optimizer.step()
        self.step += 1
        self.sums += torch.stack((match.detach(), keep.detach(), norm))

    def end_epoch(self, epoch: int, steps: int) -> dict[str, Any]:
        """Close an epoch of ``steps`` steps: add its row to the history, keep the best weights."""
        match, keep, norm = (self.sums / steps).tolist()
        self.sums.zero_()
        row = {"epoch": epoch, "step": self.step, "loss": match + keep}
        row |= {"matching": match, "preserve": keep, "gradient_norm": norm}
        require(
            math.isfinite(row["loss"]),
            f"the loss is {row['loss']} in epoch {epoch}; start anew with a lower lr: --overwrite",
        )
        self.history.append(row)
        if row["loss"] < self.best_loss:
            self.best_loss = row["loss"]
            self.best = {name: p.detach().cpu().clone() for name, p in self.parameters.items()}
        return row

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Copy ``weights`` into the UNet."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    def save(self, path: Path) -> None:
        """Write weights, moments, best weights, step and history as one safetensors file."""
        tensors = {f"best/{name}": value for name, value in self.best.items()}
        tensors["sums"] = self.sums
        for name, parameter in self.parameters.items():
            tensors[f"weight/{name}"] = parameter
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}/{name}"] = self.optimizer.state[parameter][moment]
        best_loss = self.best_loss if self.best else None
        position = {"step": self.step, "history": self.history, "best_loss": best_loss}
        write_safetensors(path, tensors, {"position": position})

    def load(self, path: Path) -> None:
        """Continue from a file of ``save``."""
        position = read_metadata(path, "position")
        self.step, self.history = position["step"], position["history"]
        self.best_loss = position["best_loss"] or math.inf
        tensors = load_file(path)
        self.load_weights(_named(tensors, "weight/"))
        self.sums.copy_(tensors["sums"])
        self.best = _named(tensors, "best/")
        for name, parameter in self.parameters.items():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": tensors[f"exp_avg/{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"exp_avg_sq/{name}"].to(parameter.device),
            }


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def batches(count: int, batch_size: int, seed: int, start: int, end: int) -> Iterator[list[int]]:
    """Positions of the pairs of steps ``start`` to ``end``; every epoch is a seeded permutation."""
    per_epoch = math.ceil(count / batch_size)
    for step in range(start, end):
        epoch, k = divmod(step, per_epoch)
        draw = torch.Generator().manual_seed(derived_seed(seed, "epoch", epoch))
        order = torch.randperm(count, generator=draw)
        yield order[k * batch_size : (k + 1) * batch_size].tolist()
