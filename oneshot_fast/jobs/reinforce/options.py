"""How a few-step generator is reinforced."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from oneshot_fast.errors import require
from oneshot_fast.training.options import TrainOptions


@dataclass(frozen=True)
class ReinforceOptions(TrainOptions):
    """How the generator is trained."""

    epochs: int = 10
    """After each of them, of steps_per_epoch rollouts, the generator is measured."""
    batch_size: int = 40
    """Images per step: of each of some prompts images_per_prompt."""
    images_per_prompt: int = 8
    """Images of a prompt that are compared with each other."""
    steps_per_epoch: int = 5
    """Rollouts in an epoch, from each of which inner_updates steps learn."""
    inner_updates: int = 1
    """Steps that learn from the same images. From the second on the policy is another than the one
    that drew them, and the ratio of their likelihoods is clipped (PPO)."""
    lr: float = 2e-5
    """AdamW's learning rate."""
    preserve_latent_weight: float = 0.0
    """Weight of the latent distance to the base generator on random noise, against drift."""
    preserve_pixel_weight: float = 0.0
    """The same in pixels ([0, 1] RGB); 0 never decodes."""
    clip: float | None = None
    """With --inner_updates 2 or more: a ratio of likelihoods that is further from 1 than this, the
    way the rewards want it, learns no more; by default 0.2."""
    clip_original: float | None = None
    """Instead: the clip of RTDMD's code, 1e-5, whose log-probabilities are means of squares: one of
    theirs is D / (2 s^2) nats in a step that draws D elements of standard deviation s."""
    policy_weight: float = 1.0
    """Weight of the policy's loss in the steps that draw noise (SubGRPO)."""
    policy_steps: int = 2
    """Steps that learn from a rollout, of those that draw noise; in the others all images of a
    prompt share their noise."""
    original_seeds: bool = False
    """Draw that noise from the seeds of RTDMD's code, which are of prompt, step and rollout alone,
    and not of --seed."""
    final_reward_weight: float = 0.0
    """Weight of the reward of the last step, whose gradient goes through the decoder; needs
    rewards with a gradient. RTDMD: 1e-4."""
    final_reward_margin: float = math.inf
    """What that reward is raised to, at most; by default there is no end."""
    match_weight: float = 0.0
    """Weight of the matching term towards the --teacher, against over-optimisation. The policy's
    loss is in nats, and its gradient large: see docs/distill.md for how much is felt. RTDMD's 0.001
    is beside means of squares, which are smaller by the size of the latents."""
    teacher_guidance: float = 5.0
    """The teacher's classifier-free guidance, see distill."""
    fake_lr: float | None = None
    """The learning rate of the fake, which follows the samples for the matching term; by default
    twice lr."""

    def check(self) -> None:
        super().check()
        count, size = self.images_per_prompt, self.batch_size
        require(count >= 2, f"images_per_prompt is {count}; give at least 2, which are compared")
        require(
            size % count == 0,
            f"batch_size is {size}; give a multiple of images_per_prompt, {count}",
        )
        require(self.steps_per_epoch >= 1, "steps_per_epoch must be at least 1")
        require(self.inner_updates >= 1, f"inner_updates is {self.inner_updates}; give at least 1")
        require(
            self.inner_updates == 1 or self.policy_weight > 0,
            "--inner_updates has no effect without --policy_weight; leave it out",
        )
        for name in ("clip", "clip_original"):
            value = getattr(self, name)
            require(
                value is None or 0 < value < math.inf, f"{name} is {value}; give a positive number"
            )
            require(
                value is None or self.inner_updates > 1,
                f"--{name} has no effect without --inner_updates 2 or more: the first step from "
                "new images clips nothing; leave it out",
            )
        require(
            self.clip is None or self.clip_original is None,
            "--clip and --clip_original are two clips of one ratio; give one",
        )
        require(self.policy_steps >= 1, "policy_steps must be at least 1")
        for name in ("policy_weight", "final_reward_weight", "match_weight"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} is {value}; give 0 or a positive number")
        require(
            self.policy_weight + self.final_reward_weight > 0,
            "policy_weight and final_reward_weight are 0; there is nothing to learn",
        )
        default = ReinforceOptions
        require(
            self.final_reward_weight > 0 or self.final_reward_margin == default.final_reward_margin,
            "--final_reward_margin has no effect without --final_reward_weight; give it, too",
        )
        margin = self.final_reward_margin
        require(margin > -math.inf, f"final_reward_margin is {margin}; give a number")
        for name in ("teacher_guidance", "fake_lr"):
            require(
                self.match_weight > 0 or getattr(self, name) == getattr(default, name),
                f"--{name} has no effect without --match_weight; give it, too",
            )
        require(
            self.fake_lr is None or self.fake_lr > 0,
            f"fake_lr is {self.fake_lr}; give a positive number",
        )
        TrainOptions.check(self.of_fake(adapts=False))
        require(1 <= self.teacher_guidance < math.inf, "teacher_guidance must be at least 1")
        require(
            not self.optimizer_in_backward,
            "optimizer_in_backward: a step has several backward parts",
        )

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise UserError if a step's prompts cannot be drawn from these."""
        count, distinct = self.batch_size // self.images_per_prompt, len({*prompts})
        require(distinct >= 2, "there is one prompt only; give several, which are drawn from")
        require(
            count <= distinct,
            f"batch_size {self.batch_size} is {count} prompts; there are {distinct}",
        )

    def of_fake(self, adapts: bool) -> TrainOptions:
        """How the fake is trained: an adapter, or all weights of a network of its own."""
        lr = 2 * self.lr if self.fake_lr is None else self.fake_lr
        if adapts:
            return dataclasses.replace(self, lr=lr, use_ema=False, lora_from=None)
        dtype = self.weights_dtype if self.optimizer == "adamw8bit" else "float32"
        return dataclasses.replace(
            self, lr=lr, use_ema=False, lora_from=None, lora_rank=0, lora_alpha=None,
            lora_format="diffusers", weights_dtype=dtype,
        )  # fmt: skip
