"""Train a one-step generator on rewards, through its single step.

The distance to the base generator is weighed against them (the preserve losses). The loss and its
sources are in training/losses/reward.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oneshot_fast.errors import require
from oneshot_fast.generators.base import Generator
from oneshot_fast.jobs.judged import JudgedRun
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.sft.plan import sft_plan
from oneshot_fast.planning.timing import Plan
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.runtime.seeds import derived_seed, gaussian
from oneshot_fast.training.batch import Batch, Rows


class RewardRun(JudgedRun):
    """Training on rewards of random noises' images, into one folder; measured as ``JudgedRun``."""

    shards = True
    options: SftOptions
    rewards: WeightedRewards

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[str],
        folder: Path,
        options: SftOptions,
        *,
        rewards: WeightedRewards,
        images_per_prompt: int = 8,
        **more: Any,
    ) -> None:
        """Describe the run.

        Args:
            generator: The generator to train, in place; float32 weights.
            prompts: Of the images.
            folder: Where everything is written.
            options: Preserve losses and schedule.
            rewards: What is raised; differentiable.
            images_per_prompt: New random noises of each prompt in an epoch.
            **more: As for ``JudgedRun``.

        Raises:
            UserError: If an option makes no sense, or a reward has no gradient.
        """
        loss = options.loss(rewards)
        super().__init__(generator, loss, prompts, folder, options, rewards=rewards, **more)
        require(
            rewards.differentiable,
            "training needs rewards with a gradient; for the others, train on the images that "
            "python -m oneshot_fast.optimize --method best_of_n finds",
        )
        require(
            (options.latent_loss_weight, options.pixel_l1_weight, options.noise)
            == (SftOptions.latent_loss_weight, 0.0, "matched"),
            "rewards have no targets; leave latent_loss_weight, pixel_l1_weight and noise out",
        )
        require(not options.caption_dropout, "rewards need prompts; leave caption_dropout out")
        require(images_per_prompt >= 1, "images_per_prompt must be at least 1")
        self.images_per_prompt = images_per_prompt
        self._examples = [prompt for prompt in prompts for _ in range(images_per_prompt)]

    def settings(self) -> dict[str, Any]:
        return {
            "command": "sft",
            "rewards": self.names,
            **super().settings(),
            "images_per_prompt": self.images_per_prompt,
        }

    def plan(self) -> Plan:
        """What the run will need; does nothing of it."""
        return sft_plan(
            self.generator,
            self.options,
            resolution=self.size,
            samples=len(self._examples),
            offload_encoders=self.offloads,
            by_reward=(self.rewards, self.prompts[0]),
        )

    def learn(self) -> dict[str, Any]:
        return self.learn_from(len(self._examples))

    def batch(self, rows: list[int], step: int) -> Batch:
        texts = [self._examples[k] for k in rows]
        seeds = [derived_seed(self.seed, "reward", step, k) for k in rows]
        noise = gaussian(seeds, self.noise_shape).to(self.generator.device)
        made = Rows(noise, self.generator.told(texts, seeds), {"texts": texts})
        return Batch(matching=made, **self.preserved(step))
