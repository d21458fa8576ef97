"""How a training goes: the flags of every command that trains weights."""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tyro.conf import UseAppendAction

from oneshot_fast.errors import need_package, require
from oneshot_fast.generators.lora_files import lora_sha256, weights_of

_LAST_RATE = 1e-7  # of diffusers' polynomial schedule


@functools.lru_cache
def _schedule(
    name: str, lr: float, warmup: int, steps: int, cycles: int, power: float
) -> Callable[[int], float]:
    """Factor of the learning rate by step, from 0."""
    from diffusers.optimization import get_scheduler

    name = "constant_with_warmup" if name == "constant" else name
    unused = torch.optim.SGD([torch.zeros(1)], lr=lr)
    made = get_scheduler(name, unused, None, warmup, steps, cycles, power)
    factor: Callable[[int], float] = made.lr_lambdas[0]
    return factor


@dataclass(frozen=True)
class TrainOptions:
    """Schedule, optimiser, memory, what is trained, and how much it may drift."""

    epochs: int = 10
    """Passes over the matched pairs."""
    max_steps: int | None = None
    """End after so many steps, instead of epochs: in the middle of an epoch, or after more."""
    batch_size: int = 4
    """Matched pairs per step."""
    lr: float = 1e-5
    """AdamW's learning rate."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """How the learning rate goes on after lr_warmup_steps: as it is, or to 0 at the last step; by
    diffusers' get_scheduler. Both constants warm up."""
    lr_num_cycles: int = 1
    """For --lr_scheduler cosine_with_restarts: falls to 0."""
    lr_power: float = 1.0
    """For --lr_scheduler polynomial, which ends at 1e-7."""
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
    """Also write each model as one file in the layout of its release, checkpoint-final.safetensors,
    for ComfyUI and A1111: SDXL, SD1, SD2 and SD3 whole, of FLUX and Z-Image the transformer."""
    validation_steps: int = 0
    """Make images after every so many steps, always on the same noises: validation/STEP.png, which
    --report_to shows, too; 0: never."""
    validation_prompt: UseAppendAction[tuple[str, ...]] = ()
    """For --validation_steps, may be given several times; by default the first 4 of the training's.
    """
    use_ema: bool = False
    """End with an exponential moving average of the weights."""
    ema_decay: float = 0.9999
    """For --use_ema; it rises to this value over the first steps."""

    def steps(self, per_epoch: int) -> int:
        """Steps in all, where an epoch has so many."""
        return self.max_steps or self.epochs * per_epoch

    def passes(self, per_epoch: int) -> int:
        """Epochs in all, the last of which may be cut, where an epoch has so many steps."""
        return math.ceil(self.steps(per_epoch) / per_epoch)

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of a step, from 0, of ``steps`` in all.

        The warm-up begins one step later in diffusers, whose first step has a rate of 0.
        """
        name, warmup = self.lr_scheduler, self.lr_warmup_steps
        factor = _schedule(name, self.lr, warmup, steps, self.lr_num_cycles, self.lr_power)
        return self.lr * factor(step + 1 if step < warmup else step)

    def check(self) -> None:
        """Raise UserError for values that make no sense."""
        for name in (
            "epochs", "batch_size", "preserve_pool_size", "gradient_accumulation_steps",
            "lr_num_cycles",
        ):  # fmt: skip
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}; give at least 1")
        require(self.max_steps is None or self.max_steps >= 1, "max_steps must be at least 1")
        self._check_schedule()
        require(0 < self.lr < math.inf, f"lr is {self.lr}; give a positive number")
        require(self.max_grad_norm > 0, "max_grad_norm must be positive")
        require(self.validation_steps >= 0, "validation_steps must not be negative; 0: never")
        require(
            not self.validation_prompt or self.validation_steps > 0,
            "validation_prompt has no effect without --validation_steps; give it, too",
        )
        require(0 < self.ema_decay < 1, "ema_decay must be between 0 and 1")
        preserved = self.preserve_batch_size
        require(preserved is None or preserved >= 1, "preserve_batch_size must be at least 1")
        require(
            all(0 <= weight < math.inf for weight in self.weights),
            "weights must be finite and not negative",
        )
        self._check_memory_options()

    def _check_schedule(self) -> None:
        require(self.lr_warmup_steps >= 0, "lr_warmup_steps must not be negative")
        for name, needed in (("lr_num_cycles", "cosine_with_restarts"), ("lr_power", "polynomial")):
            require(
                self.lr_scheduler == needed or getattr(self, name) == getattr(TrainOptions, name),
                f"{name} has no effect without --lr_scheduler {needed}; give it, too",
            )
        require(0 < self.lr_power < math.inf, "lr_power must be positive")
        require(
            self.lr_scheduler != "polynomial" or self.lr > _LAST_RATE,
            f"lr_scheduler polynomial ends at {_LAST_RATE:g}; give a larger lr",
        )

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
        for name in ("validation_steps", "validation_prompt"):  # only shown
            noted.pop(name)
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
        """Whether a loss is in pixels, or images are shown."""
        return self.preserve_pixel_weight > 0 or self.validation_steps > 0


def check_keeping(save_minutes: float, keep_checkpoints: int = 0) -> None:
    """Raise UserError for what a training cannot do with its states, or epochs' checkpoints."""
    require(save_minutes >= 0, f"save_minutes is {save_minutes}; give 0 or a positive number")
    require(keep_checkpoints >= 0, "keep_checkpoints must not be negative")


@dataclass(frozen=True)
class KeepOptions:
    """What is kept of a training as it goes, and where."""

    save_minutes: float = 5.0
    """Minutes between saved training states; 0 saves after every step."""
    keep_checkpoints: int = 0
    """Also keep checkpoint-<step> of the newest so many epochs; 0 keeps none."""
    offload_encoders: bool | None = None
    """Move text encoders and image encoder to the CPU while training, and the decoder where nothing
    needs it; by default on a GPU."""

    def arguments(self, device: torch.device, planned: bool) -> dict[str, Any]:
        """Those of every ``TrainingRun`` on ``device``.

        Raises:
            UserError: If networks are to wait on the CPU, are there anyway, and this is no plan.
        """
        found = dataclasses.asdict(self)
        require(
            planned or device.type != "cpu" or not found.get("offload"),
            "--offload has no effect on the CPU, where all networks are anyway; leave it out",
        )
        return found


@dataclass(frozen=True)
class RolesKeepOptions(KeepOptions):
    """What is kept of a training beside a teacher, and where."""

    offload: bool = False
    """Keep teacher and fake, where they are networks of their own, and the optimisers' moments on
    the CPU while they are idle: less memory, for the time that moving them takes."""
