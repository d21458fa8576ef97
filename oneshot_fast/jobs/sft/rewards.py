"""Train a one-step generator on rewards, through its single step.

A reward that is only raised is over-optimised: images drift away, grow alike, and other judges like
them less. So the distance to the base generator is weighed (the preserve losses), and drift,
diversity and independent judges are measured at every epoch. The loss and its sources are in
training/losses/reward.py.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oneshot_fast.errors import require
from oneshot_fast.evaluation.random_noise import RandomNoiseMeasure, all_scores, classifier_for
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.sft.plan import sft_plan
from oneshot_fast.planning.timing import Plan
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.runtime.processes import main_first
from oneshot_fast.runtime.seeds import content_id, derived_seed, gaussian
from oneshot_fast.training.batch import Batch, Rows
from oneshot_fast.training.checkpoints import STUDENT, ended
from oneshot_fast.training.run import TrainingRun


class RewardRun(TrainingRun):
    """Training on rewards of random noises' images, into one folder.

    The summary's ``base`` and ``final`` hold what was measured before and at the end: ``reward``,
    every reward's mean by name, those of the judges as ``judge NAME``, ``drift`` (RMS latent
    distance to the base) and ``diversity`` (mean pixel distance within a prompt). The rows of
    history.jsonl have the same of every epoch.
    """

    outputs = (*TrainingRun.outputs, "eval", "curves.png")
    options: SftOptions

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[str],
        folder: Path,
        options: SftOptions,
        *,
        rewards: WeightedRewards,
        judge: WeightedRewards | None = None,
        resolution: int | None = None,
        images_per_prompt: int = 8,
        eval_samples: int = 64,
        names: Sequence[str] = (),
        **more: Any,
    ) -> None:
        """Describe the run.

        Args:
            generator: The generator to train, in place; float32 weights.
            prompts: Of the images.
            folder: Where everything is written.
            options: Preserve losses and schedule.
            rewards: What is raised; differentiable.
            judge: Rewards that are measured, too, but not trained on.
            resolution: Image side in pixels; by default the generator's own.
            images_per_prompt: New random noises of each prompt in an epoch.
            eval_samples: Other noises, on which all is measured before training and after every
                epoch.
            names: How rewards and judges were named, for the run's settings.
            **more: As for ``TrainingRun``.

        Raises:
            UserError: If an option makes no sense, or a reward has no gradient.
        """
        side = TargetImages(generator, resolution).resolution  # checks it
        super().__init__(generator, options.loss(rewards), side, folder, options, **more)
        require(bool(prompts), "there is no prompt")
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
        require(eval_samples >= 10, "eval_samples must be at least 10")
        self.prompts, self.rewards, self.judge, self.names = prompts, rewards, judge, list(names)
        self.images_per_prompt, self.eval_samples = images_per_prompt, eval_samples
        self._examples = [prompt for prompt in prompts for _ in range(images_per_prompt)]

    def settings(self) -> dict[str, Any]:
        return {
            "command": "sft",
            "rewards": self.names,
            **self.options.settings(),
            "seed": self.seed,
            **self.generator.settings(self.resolution),
            "images_per_prompt": self.images_per_prompt,
            "eval_samples": self.eval_samples,
            "samples": len(self.prompts),
            "prompts": content_id(*self.prompts),
        }

    def plan(self) -> Plan:
        """What the run will need; does nothing of it."""
        return sft_plan(
            self.generator,
            self.options,
            resolution=self.resolution,
            samples=len(self._examples),
            offload_encoders=self.offloads,
            by_reward=(self.rewards, self.prompts[0]),
        )

    def learn(self) -> dict[str, Any]:
        self.make_pool(self.prompts)
        for rewards in filter(None, (self.rewards, self.judge)):
            rewards.warn_of_cut(self.prompts)
        base = self._measured("base")
        self.tracker.log(base, step=0)
        return {"base": base, **self.train(len(self._examples), self.prompts), "failed": 0}

    @functools.cached_property
    def _measure(self) -> RandomNoiseMeasure:
        return RandomNoiseMeasure(
            self.prompts,
            self.noise_shape,
            samples=self.eval_samples,
            seed=self.seed,
            classifier=classifier_for(self.generator, self.prompts),
            scores=all_scores(self.rewards, self.judge),
        )

    def batch(self, rows: list[int], step: int) -> Batch:
        texts = [self._examples[k] for k in rows]
        seeds = [derived_seed(self.seed, "reward", step, k) for k in rows]
        noise = gaussian(seeds, self.noise_shape).to(self.generator.device)
        made = Rows(noise, self.generator.told(texts, seeds), {"texts": texts})
        return Batch(matching=made, **self.preserved(step))

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        with ended(self.trainers[STUDENT]):
            return self._measured(f"epoch-{epoch:03d}")

    def at_end(self) -> dict[str, Any]:
        last = self.trainers[STUDENT].history[-1]["epoch"]
        return {"final": self._measured(f"epoch-{last:03d}")}

    @property
    def decodes(self) -> bool:
        return True  # rewards see images

    def _measured(self, name: str) -> dict[str, float]:
        """Of the generator as it is now, unless it was measured before."""
        path = self.folder / "eval" / name
        found = main_first(lambda: self._measure.measure(self.generator, path))
        trainer = self.trainers.get(STUDENT)
        step = trainer.step if trainer else 0
        self.tracker.images([path.with_name(f"{name}.png")], step)
        return {key: value for key, value in found.items() if key not in ("samples", "errors")}
