"""Train a generator on preferences among its own images, by any objective.

Every step draws groups of images of prompts with the generator as it is, scores them without a
gradient, and moves it towards the better ones by the objective: one file each in training/losses.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from oneshot_fast.data.sizes import Resolution, Size
from oneshot_fast.errors import UserError, one_line, require
from oneshot_fast.evaluation.features import Features
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.judged import JudgedRun
from oneshot_fast.jobs.prefer.options import PreferOptions
from oneshot_fast.jobs.prefer.plan import prefer_plan
from oneshot_fast.jobs.prefer.rollout import Rollout, compared
from oneshot_fast.planning.timing import Plan
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.runtime.processes import map_over_processes
from oneshot_fast.runtime.seeds import derived_seed
from oneshot_fast.training.batch import Batch, Rows
from oneshot_fast.training.checkpoints import STUDENT
from oneshot_fast.training.losses.preference import PreferenceLoss
from oneshot_fast.training.reference import Reference
from oneshot_fast.training.trainer import Trainer


class ComparingRun(JudgedRun):
    """Training on preferences, drawn or given, which ends where it leaves the base too far.

    checkpoint-best is the generator after the epoch with the highest sum of judges, or of rewards
    where there is no judge, or the lowest loss where nothing else is measured.
    """

    options: PreferOptions

    def compare(self, count: int) -> dict[str, Any]:
        """Train on ``count`` examples an epoch; returns the summary."""
        loss = self.losses[STUDENT]
        assert isinstance(loss, PreferenceLoss)
        loss.reference = Reference(self.generator, self.options.lora_rank > 0)
        found = self.learn_from(count)
        if self._is_measured:
            rows = [{"epoch": 0} | found["base"], *self.trainers[STUDENT].history]
            found["best_epoch"] = max(rows, key=self._quality)["epoch"]
        return found | {"stopped": self._stopped()}

    def trainer(self, name: str, steps: int) -> Trainer:
        """One whose best weights are the first ones, until an epoch is better."""
        trainer = super().trainer(name, steps)
        if self._is_measured:
            trainer.keep_best(math.inf)
            trainer.chooses = False
        return trainer

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        found, trainer = super().after_epoch(epoch), self.trainers[STUDENT]
        if self._is_measured:
            before = [self._measured("base"), *trainer.history[:-1]]
            if self._quality(found) > max(map(self._quality, before)):
                trainer.keep_best(-self._quality(found))
        return found

    def is_over(self) -> bool:
        moved = self.trainers[STUDENT].last.get("moved", 0.0)
        return moved > self.options.max_drift

    @property
    def _is_measured(self) -> bool:
        return self.judge is not None or self.rewards is not None

    def _quality(self, found: dict[str, Any]) -> float:
        judged = [value for name, value in found.items() if name.startswith("judge ")]
        return sum(judged) if judged else found["reward"]

    def _stopped(self) -> str | None:
        """Why the training ended early."""
        if not self.is_over():
            return None
        trainer = self.trainers[STUDENT]
        return (
            f"drift {trainer.last['moved']:.3f} after step {trainer.step}, above max_drift "
            f"{self.options.max_drift:g}"
        )


def _check_gradient(features: Features, size: Size, generator: Generator) -> None:
    """Raise UserError if they give none on an image."""
    image = torch.rand(1, 3, *size, device=generator.device).requires_grad_()
    try:
        with torch.enable_grad():
            found = features.of(image)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"features {features.name} cannot be taken: {one_line(error)}") from None
    require(
        found.requires_grad,
        f"features {features.name} carry no gradient, which drpo needs; name others, or "
        "--features latents",
    )


class PreferRun(ComparingRun):
    """Training on preferences among a generator's own images, into one folder.

    Measured as ``JudgedRun``. Its columns of history.jsonl besides: "sampled" and "sampled max",
    mean and largest reward of the groups that were drawn, "ties", "moved" (RMS distance of their
    clean latents to the base's) and what the objective tells.
    """

    rewards: WeightedRewards

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[str],
        folder: Path,
        options: PreferOptions,
        *,
        rewards: WeightedRewards,
        features: Features | None = None,
        resolution: Resolution | None = None,
        **more: Any,
    ) -> None:
        """Describe the run.

        Args:
            generator: The generator to train, in place; float32 weights.
            prompts: Of the images.
            folder: Where everything is written.
            options: Objective and schedule.
            rewards: By which images of a prompt are compared; no gradient is needed.
            features: For drpo: what they are compared by; None: their latents.
            resolution: Image side in pixels, or height and width; by default the generator's own.
            **more: As for ``JudgedRun``.

        Raises:
            UserError: If an option makes no sense.
        """
        options.check_drawn()
        size = TargetImages(generator, resolution).size
        self.features = features

        def of(latents: Any) -> Any:
            assert features is not None
            return features.of(generator.images(latents))

        if features is not None:
            _check_gradient(features, size, generator)
        drawn = options.drawn(generator.latent_shape(*size))
        several = isinstance(generator, FewStepGenerator)
        if several:
            options.check_steps(generator.draws_noise)
        loss = options.loss(drawn, None if features is None else of, several)
        super().__init__(
            generator, loss, prompts, folder, options, rewards=rewards, resolution=size, **more
        )
        self._examples = [text for text in prompts for _ in range(options.groups_per_prompt)]

    def settings(self) -> dict[str, Any]:
        return {
            "command": "prefer",
            "rewards": self.names,
            **super().settings(),
            **({"features": self.features.name} if self.features else {}),
        }

    def plan(self) -> Plan:
        """What the run will need; does nothing of it."""
        return prefer_plan(
            self.generator,
            self.options,
            resolution=self.size,
            samples=len(self._examples),
            offload_encoders=self.offloads,
        )

    def learn(self) -> dict[str, Any]:
        return self.compare(len(self._examples))

    def take_step(self, rows: list[int], step: int) -> None:
        batch = self.batch(rows, step)
        if bool((batch["preference"].extra["ties"] == 1).all()):
            self.skip_flat()
        else:
            self.trainers[STUDENT](batch)

    def batch(self, rows: list[int], step: int) -> Batch:
        texts = [self._examples[k] for k in rows]
        seeds = [derived_seed(self.seed, "rollout", step, k) for k in rows]
        rollout = Rollout(self.generator, self.rewards, self.options, self.noise_shape)
        drawn = [*map_over_processes(lambda k: rollout.group(texts[k], seeds[k]), range(len(rows)))]
        found = compared(drawn, self.options.drawing == "pairs")
        device = self.generator.device
        extra = {name: value.to(device) for name, value in found.items()}
        noise = extra.pop("noise")
        compared_rows = Rows(noise, self.generator.told(texts, seeds), extra)
        return Batch(preference=compared_rows, **self.preserved(step))
