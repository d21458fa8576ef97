"""A training on images of prompts that is measured by rewards and judges as it goes.

A reward that is only raised is over-optimised: images drift away, grow alike, and other judges like
them less. So drift, diversity and independent judges are measured at every epoch.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oneshot_fast.data.sizes import Resolution
from oneshot_fast.errors import require
from oneshot_fast.evaluation.random_noise import RandomNoiseMeasure, all_scores, classifier_for
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.runtime.ledger import say
from oneshot_fast.runtime.processes import is_main, main_first
from oneshot_fast.runtime.seeds import content_id
from oneshot_fast.training.checkpoints import STUDENT
from oneshot_fast.training.losses.base import Loss
from oneshot_fast.training.options import TrainOptions
from oneshot_fast.training.run import TrainingRun
from oneshot_fast.training.trainer import BadStepsError

FLAT = 20  # steps in a row whose rewards say nothing, which end the training


class JudgedRun(TrainingRun):
    """Training on images of prompts, into one folder.

    The summary's ``base`` and ``final`` hold what was measured before and at the end: ``reward``,
    every reward's mean by name, those of the judges as ``judge NAME``, ``drift`` (RMS latent
    distance to the base) and ``diversity`` (mean pixel distance within a prompt). The rows of
    history.jsonl have the same of every epoch.
    """

    outputs = (*TrainingRun.outputs, "eval", "curves.png")

    def __init__(
        self,
        generator: Generator,
        loss: Loss,
        prompts: Sequence[str],
        folder: Path,
        options: TrainOptions,
        *,
        rewards: WeightedRewards | None = None,
        judge: WeightedRewards | None = None,
        resolution: Resolution | None = None,
        eval_samples: int = 64,
        names: Sequence[str] = (),
        **more: Any,
    ) -> None:
        """Describe the run.

        Args:
            generator: The generator to train, in place; float32 weights.
            loss: What it lowers.
            prompts: Of the images.
            folder: Where everything is written.
            options: Schedule.
            rewards: What is raised.
            judge: Rewards that are measured, too, but not trained on.
            resolution: Image side in pixels, or height and width; by default the generator's own.
            eval_samples: Noises that are not trained on, on which all is measured before training
                and after every epoch.
            names: How rewards and judges were named, for the run's settings.
            **more: As for ``TrainingRun``.

        Raises:
            UserError: If an option makes no sense.
        """
        size = TargetImages(generator, resolution).size  # checks it
        super().__init__(generator, loss, size, folder, options, **more)
        require(bool(prompts), "there is no prompt")
        require(eval_samples >= 10, "eval_samples must be at least 10")
        self.prompts, self.rewards, self.judge, self.names = prompts, rewards, judge, list(names)
        self.eval_samples = eval_samples

    def settings(self) -> dict[str, Any]:
        return {
            **self.options.settings(),
            "seed": self.seed,
            **self.generator.settings(self.size),
            "eval_samples": self.eval_samples,
            "samples": len(self.prompts),
            "prompts": content_id(*self.prompts),
        }

    def skip_flat(self, begins: bool = True, every: int = 1) -> None:
        """Take no step, as the rewards tell no images of a prompt apart.

        Args:
            begins: Whether new images were made; else only the student's turn it is.
            every: Steps that learn from the same images.

        Raises:
            BadStepsError: After ``FLAT`` such rollouts in a row.
        """
        for name, trainer in self.trainers.items():
            if begins or name == STUDENT:
                trainer.skip()
        student, names = self.trainers[STUDENT], ", ".join(self.names)
        if student.empty_in_a_row == FLAT * every:
            student.empty_in_a_row = 0
            raise BadStepsError(
                f"in {FLAT} steps in a row the rewards of a prompt's images were all equal, or not "
                f"finite: {names} says nothing of them; name another --reward, or repeat the "
                "command to go on with the next step"
            )
        if begins and is_main():
            say(
                f"step {student.step} is skipped: the rewards of each prompt's images are equal, "
                "or not finite"
            )

    def learn_from(self, count: int) -> dict[str, Any]:
        """Measure the base and train on ``count`` examples an epoch; returns the summary."""
        self.make_pool(self.prompts)
        for rewards in filter(None, (self.rewards, self.judge)):
            rewards.warn_of_cut(self.prompts)
        base = self._measured("base")
        self.tracker.log(base, step=0)
        return {"base": base, **self.train(count, self.prompts), "failed": 0}

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

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        with self.trainers[STUDENT].ended():
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
