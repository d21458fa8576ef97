"""Options of the main job: how the two steps alternate, and how each works."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from tyro.conf import arg

from oneshot_fast.errors import require
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.optimize.options import OptimizeOptions
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.runtime.options import pick
from oneshot_fast.search.options import SearchOptions

Search = TypeVar("Search", bound=SearchOptions)
_OF_TARGETS = (
    "recipe", "patience", "assign_fraction", "warm_start", "pool_matching", "pool_window",
    "pool_reject_below", "feature_weight", "features",
)  # fmt: skip
_NOT_TRIED = "em_schedule", "warm_start", "assign_candidates", "assign_fraction"
_BESIDE_RECIPE = (  # how names of options begin, train_lr aside, that recipe auto leaves alone
    "train_", "preserve_", "save_", "latent_", "pixel_", "feature", "patience", "assign_batch_size",
)  # fmt: skip


@dataclass(frozen=True)
class EmOptions:
    """How often and how thoroughly the two steps alternate."""

    num_cycles: int | None = None
    """Cycles of one E-step and one M-step; by default 4, for the embedded data and with --reward 2.
    """
    em_schedule: str | None = None
    """Instead of num_cycles, assign_steps and train_epochs: E:M of every cycle, as in
    "40:10,20:5,20:5", with E the gradient steps (best_of_n, pool: candidates) and M the epochs."""
    recipe: Literal["auto", "none"] | None = None
    """auto: first short trainings of assign_method and of best_of_n (or sphere), then of the better
    one with other learning rates, on two thirds of the targets at most. The rest and the held-out
    pairs judge them; another than your own is followed where it beats yours and the base by more
    than its error, and what a cheaper method saves goes into more cycles. Trials take a third of
    what E- and M-steps take in all; their measuring comes on top. By default the command does so
    for your own data, if they are enough and no flag says how noises are found, how large the steps
    are or how many cycles there are; none: it does not."""
    patience: int = 0
    """Stop when random noises' images have come no nearer to the held-out ones (by the energy
    score, see docs/evaluate.md) for so many cycles; 0: never."""
    assign_fraction: float = 1.0
    """E-step: share of the targets that get a new noise in a cycle, in turns; the others keep
    theirs. In the first cycle all do."""
    pool_refresh: int = 1
    """E-step: draw new random noises every so many cycles; 0: the same ones in all cycles."""
    warm_start: bool = False
    """E-step: begin at the noise of the last cycle; best_of_n and pool have it among their
    candidates. Not for rotations."""
    assign_method: str | None = None
    """E-step: best_of_n (or search) or pool choose among random noises; rotation, sphere, white or
    free move a noise by gradients; best_of_n+sphere and the like do one after the other. See assign
    --help. By default sphere, or what --recipe auto finds better."""
    assign_candidates: int | None = None
    """E-step: random noises to choose from, or to choose the start from; by default 32 for
    best_of_n and pool, else 1."""
    pool_matching: Literal["one_to_one", "nearest"] = "one_to_one"
    """E-step: whether a noise of a pool serves at most once."""
    pool_window: int = 1024
    """E-step: targets whose noises are in one pool; bounds the memory."""
    pool_reject_below: float = 0.0
    """E-step: drop a pool's noises that are nearer than this loss to any target."""
    assign_steps: int | None = None
    """E-step: gradient steps per target; by default 20, for the embedded data and with --reward 40.
    """
    assign_lr: float | Literal["auto"] = "auto"
    """E-step: radians by which a gradient step turns the noise; auto: found on the way."""
    assign_lr_unit: Literal["radians", "matrix"] = "radians"
    """E-step: matrix takes assign_lr as Adam's on the elements of a rotation's matrix, see assign
    --help; the usual script has no --max_angle (None), either."""
    max_angle: float | None = 0.6
    """E-step: keep noises within so many radians of their random base noises (None: anywhere). A
    noise that is pushed far is rare under the Gaussian, and what is learnt there does not reach
    ordinary noise: see docs/study.md."""
    assign_batch_size: int = 16
    """E-step: targets solved at once."""
    sphere_optimizer: Literal["adam", "lbfgs"] = "adam"
    """E-step: how noises move on the sphere, and with white; lbfgs reaches lower losses, which
    makes no better generator: see docs/study.md."""
    rotation_optimizer: Literal["riemannian", "raw_adam"] = "riemannian"
    """E-step: how rotations are optimised."""
    patch_size: int = 2
    """E-step: side of the rotated patches in latent pixels."""
    rotation_groups: int = 1
    """E-step: G x G tiles of the latent with a rotation each."""
    feature_weight: float = 0.0
    """E-step: weight of the mean squared error between the images' --features; decodes."""
    features: str | None = None
    """What images are compared by when the generator is measured: clip, dinov2, vae or
    python:module.function, see evaluate --help; such a function also gives the E-step's
    --feature_weight its features."""
    noise_l2_weight: Annotated[float, arg(aliases=["--drift_reg_weight"])] = 0.0
    """E-step: weight of the mean squared distance between the noise and its base noise."""
    prior_weight: float | None = None
    """E-step, free: weight of the prior on the noise's norm; by default 0.01."""
    stop_loss: float | None = None
    """E-step: end the search of a target once its loss is this low."""
    stop_patience: int = 0
    """E-step: end it once its loss has not fallen for so many steps; 0: never."""
    stop_improvement: float = 0.01
    """E-step: fall of the loss that counts for stop_patience, relative to the loss."""
    train_epochs: int | None = None
    """M-step: passes over the matched pairs per cycle; by default 20, for the embedded data and
    with --reward 10."""
    train_batch_size: int = 8
    """M-step: matched pairs per step."""
    train_lr: float | None = None
    """M-step: AdamW's learning rate; by default 0.0064 over the denoiser's width: 1e-4 for the
    embedded model's 64 channels, 2e-5 for SDXL's 320; with --train_lora_rank 10 times that."""
    train_lr_scheduler: Literal["constant", "linear", "cosine"] | None = None
    """M-step: how the learning rate goes on after train_lr_warmup_steps: as it is, or to 0 at the
    last step of the cycle; by default linear, for the embedded data constant."""
    train_weight_decay: float = 0.01
    """M-step: AdamW's decoupled weight decay."""
    train_max_grad_norm: float = 1.0
    """M-step: gradients are scaled down to this norm: all together, with
    --train_optimizer_in_backward the gradient of each weight tensor for itself."""
    train_lr_warmup_steps: int = 0
    """M-step: steps over which the learning rate rises from 0."""
    train_gradient_accumulation_steps: int = 1
    """M-step: parts that every batch is computed in: less memory; the same gradient to rounding,
    which AdamW can magnify."""
    train_gradient_checkpointing: bool = False
    """M-step: recompute activations in the backward pass: less memory, the same gradient."""
    train_selective_checkpointing: bool = False
    """M-step: recompute only what is cheap: between the two, in memory and in time."""
    train_optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """M-step: adamw8bit keeps the moments in 8 bits (torchao: pip install torchao)."""
    train_weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """M-step: type of the weights; bfloat16 rounds stochastically, and needs adamw8bit, or with
    --train_lora_rank is the type of the frozen weights."""
    train_optimizer_in_backward: bool = False
    """M-step: apply and free each weight's gradient as soon as the backward pass has it."""
    train_lora_rank: int = 0
    """M-step: train only a LoRA adapter of this rank on the denoiser's attention projections, a new
    one in every cycle, merged into the generator at its end; 0 trains all weights. The adapters are
    in cycle-XX/sft/lora-final; all together, each with weight 1, make the initial model the final
    one."""
    train_lora_alpha: float | None = None
    """M-step: the adapter is scaled by train_lora_alpha / train_lora_rank; by default 1."""
    train_lora_format: Annotated[Literal["diffusers", "kohya"], arg(aliases=["--lora_format"])] = (
        "diffusers"
    )
    """M-step: names in the adapters' files; kohya's for ComfyUI and A1111."""
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """M-step: type of the trained weights in checkpoints; auto: as the model's files have them. The
    next cycle goes on with what is saved."""
    save_single_file: bool = False
    """Also write the best and the final model as one file in the layout of its release,
    checkpoint-final.safetensors, for ComfyUI and A1111: SDXL, SD1, SD2 and SD3 whole, of FLUX and
    Z-Image the transformer."""
    train_caption_dropout: Annotated[float, arg(aliases=["--caption_dropout"])] = 0.0
    """M-step: probability, for each pair in each epoch, that the empty prompt replaces its own; the
    E-step keeps all prompts."""
    train_use_ema: bool = False
    """M-step: end with an exponential moving average of the weights."""
    train_ema_decay: float = 0.9999
    """M-step: for train_use_ema."""
    latent_loss_weight: float = 1.0
    """Both steps: weight of the mean squared error between the latents."""
    pixel_l1_weight: float = 0.0
    """Both steps: weight of the mean absolute error between the images; 0 never decodes."""
    preserve_latent_weight: float | None = None
    """M-step: weight of the latent distance to the initial generator on random noise, against
    drift; by default 0, as matched noises drift little and it takes most of the gain, see
    docs/study.md; with --reward 0.5, as rewards run away."""
    preserve_pixel_weight: float | None = None
    """M-step: the same in pixels, by default 0, with --reward 0.05; 0 never decodes."""
    preserve_batch_size: int | None = None
    """M-step: random noises per step for the preserve losses; by default train_batch_size."""
    preserve_pool_size: int = 512
    """M-step: random noises whose initial outputs are computed once."""

    def resolve(self, width: int, embedded: bool = False, by_reward: bool = False) -> "EmOptions":
        """Fill in the defaults that depend on the model and the data.

        Large steps are as safe in wide networks as small ones divided by the width (Yang et al.
        2022, arXiv:2203.03466).

        Args:
            width: Of the denoiser, see ``Generator.width``.
            embedded: Whether the data are the embedded ones.
            by_reward: Whether there are rewards in place of targets.
        """
        own_targets = not (embedded or by_reward)
        defaults = {
            "assign_method": "sphere",
            "num_cycles": 4 if own_targets else 2,
            "assign_steps": 20 if own_targets else 40,
            "train_epochs": 20 if own_targets else 10,
            "train_lr": 0.0064 / width * (10 if self.train_lora_rank else 1),
            "train_lr_scheduler": "constant" if embedded else "linear",
            "preserve_latent_weight": 0.5 if by_reward else 0.0,
            "preserve_pixel_weight": 0.05 if by_reward else 0.0,
        }
        missing: dict[str, Any] = {k: v for k, v in defaults.items() if getattr(self, k) is None}
        if self.recipe == "none":
            missing["recipe"] = None
        return dataclasses.replace(self, **missing)

    @property
    def methods(self) -> tuple[str, str]:
        """assign_method, and what recipe auto tries beside it: one that chooses, or that moves."""
        assert self.assign_method is not None
        return self.assign_method, "best_of_n" if self.assign().mover else "sphere"

    def schedule(self) -> list[tuple[int, int]]:
        """Gradient steps or candidates of the E-step, and epochs of the M-step, of every cycle.

        Raises:
            UserError: If em_schedule is no such list.
        """
        if self.em_schedule is None:
            assert self.num_cycles is not None and self.assign_steps is not None
            assert self.train_epochs is not None and self.assign_method is not None
            plain = AssignOptions(self.assign_method, self.assign_candidates)
            effort = self.assign_steps if plain.mover else plain.draws
            return [(effort, self.train_epochs)] * self.num_cycles
        cycles = [re.fullmatch(r"(\d+):(\d+)", part) for part in self.em_schedule.split(",")]
        numbers = [(int(m[1]), int(m[2])) for m in cycles if m]
        require(
            len(numbers) == len(cycles) and all(min(pair) >= 1 for pair in numbers),
            f'em_schedule is "{self.em_schedule}"; give numbers above 0, as in 40:10,20:5',
        )
        return numbers

    @property
    def leaves_recipe(self) -> bool:
        """Whether nothing is said, before ``resolve``, of what --recipe auto decides."""
        names = [field.name for field in dataclasses.fields(self)]
        told = [k for k in names if k == "train_lr" or not k.startswith(_BESIDE_RECIPE)]
        return all(getattr(self, name) == getattr(EmOptions, name) for name in told)

    def check(self) -> None:
        """Raise UserError for values that make no sense."""
        require(self.num_cycles is None or self.num_cycles >= 1, "num_cycles must be at least 1")
        require(0 < self.assign_fraction <= 1, "assign_fraction must be above 0 and at most 1")
        require(self.patience >= 0, "patience must not be negative")
        require(self.pool_refresh >= 0, "pool_refresh must not be negative")
        for name in _NOT_TRIED if self.recipe else ():
            require(
                getattr(self, name) == getattr(EmOptions, name),
                f"--{name} does not fit all that --recipe auto tries; leave one of the two out",
            )
        if self.recipe:
            dataclasses.replace(self, recipe=None, assign_method=self.methods[1]).check()
        for cycle in range(1, len(self.schedule()) + 1):
            self.assign(cycle).check()
            self.sft(cycles=[cycle]).check()
        require(
            not (self.warm_start and self.assign().mover == "rotation"),
            "warm_start does not work with rotations; use another method",
        )

    def assign(self, cycle: int = 1) -> AssignOptions:
        """Options of the E-step of a cycle, from 1."""
        found = self._search(AssignOptions, cycle)
        return found if self.feature_weight else dataclasses.replace(found, features=None)

    def optimize(self, cycle: int = 1) -> OptimizeOptions:
        """Options of the E-step of a cycle, from 1, by rewards.

        Raises:
            UserError: If an option has no meaning without targets.
        """
        for name in _OF_TARGETS:
            require(
                getattr(self, name) == getattr(EmOptions, name),
                f"{name} is for assigning noises to targets; leave it out with --reward",
            )
        return self._search(OptimizeOptions, cycle)

    def _search(self, kind: type[Search], cycle: int) -> Search:
        effort = self.schedule()[cycle - 1][0]
        plain = pick(kind, self, "assign_", steps=effort)
        return plain if plain.mover else dataclasses.replace(plain, candidates=effort)

    def sft(
        self, noise: Literal["matched", "random"] = "matched", cycles: Sequence[int] = (1,)
    ) -> SftOptions:
        """Options of the M-steps of ``cycles``, from 1, all in one; resolved."""
        epochs = sum(self.schedule()[cycle - 1][1] for cycle in cycles)
        given: dict[str, Any] = {"epochs": epochs, "noise": noise, "save_single_file": False}
        return pick(SftOptions, self, "train_", **given)
