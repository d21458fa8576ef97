"""How a training goes: the flags of every command that trains weights."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from oneshot_fast.errors import need_package, require
from oneshot_fast.generators.lora_files import lora_sha256, weights_of


@dataclass(frozen=True)
class TrainOptions:
    """Schedule, optimiser, memory, what is trained, and how much it may drift."""

    epochs: int = 10
    """Passes over the matched pairs."""
    batch_size: int = 4
    """Matched pairs per step."""
    lr: float = 1e-5
    """AdamW's learning rate."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on after lr_warmup_steps: as it is, or to 0 at the last step."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm: all together, with --optimizer_in_backward the
    gradient of each weight tensor for itself; inf never scales."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
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
    """Recompute the denoiser's activations in the backward pass: less memory, the same gradient."""
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
    """Train only a LoRA adapter of this rank on the attention projections (to_q, to_k, to_v,
    to_out, and in SD3 and FLUX those of the text) of the denoiser; 0 trains all of its weights.
    PixArt's is read by neither diffusers nor --lora: take checkpoint-final, which has it merged
    in."""
    lora_alpha: float | None = None
    """The adapter is scaled by lora_alpha / lora_rank; by default lora_alpha is lora_rank."""
    lora_from: Path | None = None
    """Go on training the denoiser's adapter in this LoRA file, of any format that --lora reads,
    with its rank, alpha and modules. The loss before, and what the preserve losses hold on to, are
    still those of the model without it."""
    lora_format: Literal["diffusers", "kohya"] = "diffusers"
    """Names in the adapter's file: peft's, which diffusers writes, or kohya's with alpha, which
    ComfyUI and A1111 read, and diffusers, too; of SD, SDXL, LCM and FLUX.1."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the trained weights in checkpoints; auto: as the model's files have them. All else of
    a checkpoint is as it came."""
    save_single_file: bool = False
    """Also write each whole model as one file, checkpoint-final.safetensors, which ComfyUI and
    A1111 read; of SDXL's shape."""
    use_ema: bool = False
    """End with an exponential moving average of the weights."""
    ema_decay: float = 0.9999
    """For --use_ema; it rises to this value over the first steps."""

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of a step, from 0, of ``steps`` in all."""
        warmup = self.lr_warmup_steps
        if step < warmup or self.lr_scheduler == "constant":
            return self.lr * min(1.0, (step + 1) / max(1, warmup))
        left = (steps - step) / max(1, steps - warmup)
        return self.lr * (
            left if self.lr_scheduler == "linear" else math.sin(math.pi / 2 * left) ** 2
        )

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
        preserved = self.preserve_batch_size
        require(preserved is None or preserved >= 1, "preserve_batch_size must be at least 1")
        require(
            all(0 <= weight < math.inf for weight in self.weights),
            "weights must be finite and not negative",
        )
        self._check_memory_options()

    def _check_memory_options(self) -> None:
        require(
            not (self.gradient_checkpointing and self.selective_checkpointing),
            "gradient_checkpointing recomputes all that selective_checkpointing does; give one",
        )
        adapts = self.lora_rank > 0 or self.lora_from is not None
        if adapts:
            need_package("peft", "--lora_rank")
        if self.optimizer == "adamw8bit":
            need_package("torchao", "--optimizer adamw8bit")
        require(self.lora_rank >= 0, "lora_rank must not be negative; 0 trains all weights")
        require(
            self.lora_alpha is None or (adapts and 0 < self.lora_alpha < math.inf),
            "lora_alpha must be positive, and needs --lora_rank",
        )
        require(
            self.lora_format == "diffusers" or adapts,
            "lora_format kohya is of an adapter's file, and needs --lora_rank",
        )
        require(
            self.weights_dtype == "float32" or self.optimizer == "adamw8bit" or adapts,
            "weights_dtype bfloat16 needs stochastic rounding; add --optimizer adamw8bit",
        )
        require(
            not self.optimizer_in_backward or self.gradient_accumulation_steps == 1,
            "optimizer_in_backward keeps no gradient to add to; leave it or "
            "gradient_accumulation_steps out",
        )

    def settings(self) -> dict[str, Any]:
        """What a run notes of them, as JSON values."""
        noted = dataclasses.asdict(self)
        path = noted.pop("lora_from")
        if path is None:
            return noted
        file = weights_of(path, f"--lora_from {path}")
        return {**noted, "lora_from": lora_sha256(file)}

    @property
    def weights(self) -> tuple[float, ...]:
        """All weights of losses, and the weight decay."""
        return self.preserve_latent_weight, self.preserve_pixel_weight, self.weight_decay

    @property
    def preserves(self) -> bool:
        """Whether there is a preserve loss."""
        return self.preserve_latent_weight + self.preserve_pixel_weight > 0

    @property
    def decodes(self) -> bool:
        """Whether a loss is in pixels."""
        return self.preserve_pixel_weight > 0
