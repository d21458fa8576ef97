"""Train a one-step generator on rewards, through its single step.

With one step the gradient of the reward is exact and short: image, decoder, UNet. This is DRaFT-1
(Clark et al. 2023, arXiv 2309.17400) and AlignProp (Prabhudesai et al. 2023, arXiv 2310.03739)
where the sampler has no other step. A reward that is only raised is over-optimised: images drift
away, grow alike, and other judges like them less. So the distance to the base generator is weighed
(the preserve losses), and drift, diversity and independent judges are measured at every epoch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oneshot_fast.errors import require
from oneshot_fast.evaluation.random_noise import RandomNoiseMeasure, classifier_for
from oneshot_fast.jobs.optimize.objective import reward_losses
from oneshot_fast.runtime.processes import main_first
from oneshot_fast.runtime.seeds import content_id, derived_seed, gaussian
from oneshot_fast.training.batch import Batch, SftOptions
from oneshot_fast.training.checkpoints import ended
from oneshot_fast.training.run import TrainingRun
from oneshot_fast.training.trainer import Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator

    from oneshot_fast.evaluation.random_noise import Scores
    from oneshot_fast.generators.base import Generator
    from oneshot_fast.rewards import WeightedRewards


def all_scores(rewards: WeightedRewards, judge: WeightedRewards | None = None) -> Scores:
    """What is measured of images: "reward", the weighted sum, every reward's own, every judge's."""

    def scores(images: Tensor, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        found = rewards.scores(images, prompts)
        judged = judge.scores(images, prompts) if judge is not None else {}
        named = {f"judge {name}": values for name, values in judged.items()}
        return {"reward": rewards.total(found), **found, **named}

    return scores


class RewardRun(TrainingRun):
    """Training on rewards of random noises' images, into one folder."""

    outputs = (*TrainingRun.outputs, "eval", "curves.png")

    def __init__(
        self,
        generator: Generator,
        rewards: WeightedRewards,
        folder: Path,
        options: SftOptions,
        *,
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
            rewards: What is raised; differentiable.
            folder: Where everything is written.
            options: Preserve losses and schedule.
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
        super().__init__(generator, resolution or generator.image_size, folder, options, **more)
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
        require(images_per_prompt >= 1, "images_per_prompt must be at least 1")
        require(eval_samples >= 10, "eval_samples must be at least 10")
        self.rewards, self.judge, self.names = rewards, judge, list(names)
        self.images_per_prompt, self.eval_samples = images_per_prompt, eval_samples
        self._prompts: list[str] = []
        self._measure: RandomNoiseMeasure | None = None

    def settings(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Everything the result depends on."""
        return {
            "command": "sft",
            "rewards": self.names,
            **dataclasses.asdict(self.options),
            **self._common_settings(),
            "images_per_prompt": self.images_per_prompt,
            "eval_samples": self.eval_samples,
            "samples": len(prompts),
            "prompts": content_id(*prompts),
        }

    def run(
        self, prompts: Sequence[str], *, overwrite: bool = False, report_to: str = "none"
    ) -> dict[str, Any]:
        """Train, or finish an interrupted training; the generator ends with the final weights.

        Args:
            prompts: Of the images.
            overwrite: Start anew.
            report_to: Tracker.

        Returns:
            The summary, as in summary.json: ``base`` and ``final`` hold what was measured before
            and at the end: ``reward``, every reward's mean by name, those of the judges as ``judge
            NAME``, ``drift`` (RMS latent distance to the base) and ``diversity`` (mean pixel
            distance within a prompt). The rows of history.jsonl have the same of every epoch.

        Raises:
            UserError: If the loss becomes NaN or infinite.
        """
        require(bool(prompts), "there is no prompt")

        def learn(tracker: Accelerator) -> dict[str, Any]:
            self._prompts = [prompt for prompt in prompts for _ in range(self.images_per_prompt)]
            self._make_pool(prompts)
            self._measure = RandomNoiseMeasure(
                prompts,
                self.noise_shape,
                samples=self.eval_samples,
                seed=self.seed,
                classifier=classifier_for(self.generator, prompts),
                scores=all_scores(self.rewards, self.judge),
            )
            base = self._measured("base")
            tracker.log(base, step=0)
            return {"base": base, **self._train(self._prompts, tracker), "failed": 0}

        return self._keep(self.settings(prompts), learn, overwrite, report_to)

    def batch(self, rows: list[int], step: int) -> Batch:
        """New random noises for the prompts at ``rows``, then the preserve noises of this step."""
        prompts = [self._prompts[k] for k in rows]
        seeds = [derived_seed(self.seed, "reward", step, k) for k in rows]
        noise = gaussian(seeds, self.noise_shape)
        # there is no target, so nothing reads these rows' latents
        return self._with_preserve(
            noise, torch.zeros_like(noise), prompts, step, texts=tuple(prompts)
        )

    def losses(
        self, generator: Generator, batch: Batch, options: SftOptions
    ) -> tuple[Tensor, Tensor]:
        """``reward_losses`` of one part of a batch."""
        return reward_losses(self.rewards, generator, batch, options)

    def after_epoch(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Add reward, judges, drift and diversity to ``row``."""
        with ended(trainer):
            row |= self._measured(f"epoch-{row['epoch']:03d}")

    def at_end(self, trainer: Trainer) -> dict[str, Any]:
        """What was measured after the last epoch."""
        return {"final": self._measured(f"epoch-{trainer.history[-1]['epoch']:03d}")}

    @property
    def decodes(self) -> bool:
        """Rewards see images."""
        return True

    def _measured(self, name: str) -> dict[str, float]:
        """Of the generator as it is now, unless it was measured before."""
        measure = self._measure
        assert measure is not None
        path = self.folder / "eval" / name
        found = main_first(lambda: measure.measure(self.generator, path))
        return {key: value for key, value in found.items() if key != "samples"}
