"""What the M-step computes: its losses, the preserve pool, the order of the pairs.

All randomness is a function of the seed and the step, so that a state needs no generator state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from oneshot_fast import ops
from oneshot_fast.errors import require
from oneshot_fast.runtime.files import read_metadata, write_safetensors
from oneshot_fast.runtime.processes import is_main, map_over_processes
from oneshot_fast.runtime.seeds import derived_seed, gaussian

if TYPE_CHECKING:
    from oneshot_fast.generators.base import Conditioning, Generator, Prediction

_ROWS = 16  # of the preserve pool, computed at once


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
    """Gradients are scaled down to this norm: all together, with --optimizer_in_backward the
    gradient of each weight tensor for itself; inf never scales."""
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
    gradient_accumulation_steps: int = 1
    """Parts that every batch is computed in, one after the other: less memory; the same gradient to
    rounding, which AdamW can magnify."""
    gradient_checkpointing: bool = False
    """Recompute the UNet's activations in the backward pass: less memory, the same gradient."""
    selective_checkpointing: bool = False
    """Recompute only what is cheap, and keep the results of convolutions, matrix products and
    attention: saves less memory than --gradient_checkpointing, and costs less time."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps the moments in 8 bits (torchao: pip install torchao)."""
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights: bfloat16 rounds updates stochastically, and needs adamw8bit; with
    --lora_rank it is the type of the frozen weights, and the adapter is float32."""
    optimizer_in_backward: bool = False
    """Apply and free each weight's gradient as soon as the backward pass has it: gradients take
    almost no memory. One process and one part per batch; a bad gradient skips its own weight."""
    lora_rank: int = 0
    """Train only a LoRA adapter of this rank on the UNet's attention projections (to_q, to_k, to_v,
    to_out); 0 trains all weights of the UNet."""
    lora_alpha: float | None = None
    """The adapter is scaled by lora_alpha / lora_rank; by default lora_alpha is lora_rank."""
    use_ema: bool = False
    """End with an exponential moving average of the weights."""
    ema_decay: float = 0.9999
    """For --use_ema; it rises to this value over the first steps."""
    noise: Literal["matched", "random"] = "matched"
    """Train on the matched noises, or (baseline: direct SFT) on new random noise at every step."""

    def check(self) -> None:
        """Raise UserError for values that make no sense."""
        for name in (
            "epochs", "batch_size", "preserve_pool_size", "gradient_accumulation_steps"
        ):  # fmt: skip
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}; give at least 1")
        require(0 < self.lr < math.inf, f"lr is {self.lr}; give a positive number")
        require(self.max_grad_norm > 0, "max_grad_norm must be positive")
        require(self.lr_warmup_steps >= 0, "lr_warmup_steps must not be negative")
        require(0 < self.ema_decay < 1, "ema_decay must be between 0 and 1")
        self._check_memory_options()
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

    def _check_memory_options(self) -> None:
        require(
            not (self.gradient_checkpointing and self.selective_checkpointing),
            "gradient_checkpointing recomputes all that selective_checkpointing does; give one",
        )
        require(self.lora_rank >= 0, "lora_rank must not be negative; 0 trains all weights")
        require(
            self.lora_alpha is None or (self.lora_rank > 0 and 0 < self.lora_alpha < math.inf),
            "lora_alpha must be positive, and needs --lora_rank",
        )
        require(
            self.weights_dtype == "float32" or self.optimizer == "adamw8bit" or self.lora_rank > 0,
            "weights_dtype bfloat16 needs stochastic rounding; add --optimizer adamw8bit",
        )
        require(
            not self.optimizer_in_backward or self.gradient_accumulation_steps == 1,
            "optimizer_in_backward keeps no gradient to add to; leave it or "
            "gradient_accumulation_steps out",
        )

    @property
    def preserves(self) -> bool:
        """Whether there is a preserve loss."""
        return self.preserve_latent_weight + self.preserve_pixel_weight > 0

    @property
    def decodes(self) -> bool:
        """Whether a loss is in pixels."""
        return self.pixel_l1_weight + self.preserve_pixel_weight > 0


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
        cls, generator: Generator, prompts: Sequence[str], shape: Sequence[int],
        size: int, seed: int, path: Path,
    ) -> PreservePool:  # fmt: skip
        """Read the pool from ``path``, or compute it with the generator as it is now.

        Each process computes its part; the main one writes the file.

        Args:
            generator: The base generator.
            prompts: Prompts to draw from.
            shape: [C, h, w] of a noise.
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

        def latents(k: int) -> Tensor:
            part = slice(_ROWS * k, _ROWS * (k + 1))
            eps = gaussian(seeds[part], shape).to(generator.device)
            return generator.latents(eps, generator.encode_prompts(pool_prompts[part])).cpu()

        pool = cls(
            pool_prompts, seeds, torch.cat(map_over_processes(latents, math.ceil(size / _ROWS)))
        )
        if is_main():
            kept = {"prompts": pool_prompts, "seeds": seeds}
            write_safetensors(path, {"latents": pool.latents}, {"pool": kept})
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
        texts: The ``matched`` prompts themselves, where a loss reads them.
    """

    noise: Tensor
    prompts: Conditioning
    latents: Tensor
    images: Tensor | None
    matched: int
    texts: Sequence[str] = ()

    def split(self, parts: int) -> Iterator[tuple[Batch, float, float]]:
        """At most ``parts`` batches, with their shares of the pairs and of the other rows."""
        n, m = self.matched, len(self.noise) - self.matched
        rows = torch.arange(len(self.noise), device=self.noise.device)
        texts = list(self.texts)
        for pairs, others in zip(
            rows[:n].tensor_split(parts), rows[n:].tensor_split(parts), strict=True
        ):
            chosen = torch.cat((pairs, others))
            if len(chosen):
                prompts = self.prompts.select(chosen)
                images = None if self.images is None else self.images[pairs]
                its_texts, texts = texts[: len(pairs)], texts[len(pairs) :]
                part = Batch(
                    self.noise[chosen], prompts, self.latents[chosen], images, len(pairs), its_texts
                )
                yield part, len(pairs) / max(1, n), len(others) / max(1, m)


def sft_losses(generator: Generator, batch: Batch, options: SftOptions) -> tuple[Tensor, Tensor]:
    """Matching and preserve loss of one step, from one UNet evaluation of all rows.

    Returns:
        Two scalars, weighted, differentiable with respect to the UNet; their sum is the loss.
    """
    made, n = generator.predict(batch.noise, batch.prompts), batch.matched
    pairs = made.select(slice(n))
    latent = ops.latent_mse(pairs.output, pairs.x, batch.latents[:n], pairs.sigma)
    match = options.latent_loss_weight * latent.sum() / max(1, n)
    if options.pixel_l1_weight and n:
        assert batch.images is not None
        raw = generator.decode_raw(pairs.latents)
        match = match + options.pixel_l1_weight * ops.pixel_l1(raw, batch.images).mean()
    return match, preserve_loss(generator, batch, made, options)


def preserve_loss(
    generator: Generator, batch: Batch, made: Prediction, options: SftOptions
) -> Tensor:
    """Distance to the base generator on the rows of ``batch`` that preserve, weighted.

    Args:
        generator: The trained generator.
        batch: Whose latents are the base's in these rows.
        made: What it predicts for all B rows.
        options: The weights.

    Returns:
        A scalar, 0 without such rows.
    """
    others, targets = made.select(slice(batch.matched, None)), batch.latents[batch.matched :]
    latent = ops.latent_mse(others.output, others.x, targets, others.sigma)
    keep = options.preserve_latent_weight * latent.sum() / max(1, len(latent))
    if options.preserve_pixel_weight and len(latent):
        raw = generator.decode_raw(others.latents)
        pixel = ops.pixel_l1(raw, generator.decode(targets)).mean()
        keep = keep + options.preserve_pixel_weight * pixel
    return keep


def batches(count: int, batch_size: int, seed: int, start: int, end: int) -> Iterator[list[int]]:
    """Positions of the pairs of steps ``start`` to ``end``; every epoch is a seeded permutation."""
    per_epoch = math.ceil(count / batch_size)
    for step in range(start, end):
        epoch, k = divmod(step, per_epoch)
        draw = torch.Generator().manual_seed(derived_seed(seed, "epoch", epoch))
        order = torch.randperm(count, generator=draw)
        yield order[k * batch_size : (k + 1) * batch_size].tolist()
