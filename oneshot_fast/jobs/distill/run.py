"""Distil a teacher into a student of fewer steps, into one folder."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from oneshot_fast.data.records import Record
from oneshot_fast.errors import require
from oneshot_fast.evaluation.features import load_features
from oneshot_fast.evaluation.heldout import measure_against
from oneshot_fast.evaluation.random_noise import (
    RandomNoiseMeasure,
    all_scores,
    classifier_for,
)  # fmt: skip
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.generators.levels import Levels
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.distill.options import DistillOptions
from oneshot_fast.jobs.distill.plan import distill_plan
from oneshot_fast.jobs.judged import JudgedRun
from oneshot_fast.planning.timing import Plan
from oneshot_fast.rewards import Setup
from oneshot_fast.runtime.seeds import content_id, derived_seed, gaussian
from oneshot_fast.training.batch import Batch, Rows
from oneshot_fast.training.checkpoints import STUDENT
from oneshot_fast.training.losses.base import Loss
from oneshot_fast.training.losses.dmd import (
    FAKE_NOISES,
    STUDENT_NOISES,
    Draws,
    FakeLoss,
    StudentLoss,
)  # fmt: skip
from oneshot_fast.training.roles import FAKE, Roles, check_offload
from oneshot_fast.training.trainer import Trainer


def losses_of(
    roles: Roles, generator: FewStepGenerator, shape: Sequence[int], options: DistillOptions
) -> dict[str, Loss]:
    """What student and fake lower, for latents [C, h, w]."""
    levels = Levels(generator, shape)
    eta = 0.9 if generator.eta is None and generator.num_inference_steps == 1 else generator.eta
    eta = 0.0 if eta is None else eta
    require(
        levels.is_flow or options.fake_space == "auto",
        "fake_space: noise is what auto is for this model, as for all in sigma space; leave it out",
    )
    space = "flow" if levels.is_flow and options.fake_space == "auto" else "noise"
    consistency = options.consistency_weight if options.objective == "ac_dmd" else 0.0
    of = options.objective
    return {
        STUDENT: StudentLoss(roles, levels, of, eta, options.teacher_guidance),
        FAKE: FakeLoss(roles, levels, of, eta, space, consistency),  # type: ignore[arg-type]
    }


class DistillRun(JudgedRun):
    """A student that learns to make in few steps what its teacher makes in many.

    The student begins as the teacher. It is measured as ``JudgedRun`` says, "base" being the
    teacher's network by the student's steps; with held-out images, distances to these, too.
    """

    passing = frozenset({FAKE})
    options: DistillOptions
    generator: FewStepGenerator

    def __init__(
        self,
        generator: FewStepGenerator,
        prompts: Sequence[str],
        folder: Path,
        options: DistillOptions,
        *,
        images_per_prompt: int = 8,
        heldout: Sequence[Record] = (),
        features: str | None = None,
        setup: Setup | None = None,
        offload: bool = False,
        **more: Any,
    ) -> None:
        """Describe the run.

        Args:
            generator: The teacher's networks, by the student's steps; trained in place.
            prompts: Of the images.
            folder: Where everything is written.
            options: Losses and schedule.
            images_per_prompt: New random noises of each prompt in an epoch.
            heldout: Images that the student's are compared with.
            features: What they are compared by, see ``load_features``.
            setup: Where the features' models are.
            offload: See ``Roles``.
            **more: As for ``JudgedRun``.

        Raises:
            UserError: If an option makes no sense, or the sampler is of another form.
        """
        options.check()
        require(images_per_prompt >= 1, "images_per_prompt must be at least 1")
        require(
            generator.guidance_scale == 1,
            "the student learns to do without guidance; leave guidance_scale out",
        )
        shape = generator.latent_shape(*TargetImages(generator, more.get("resolution")).size)
        # all that the losses need of the roles comes later: an adapter is added by its trainer
        adapts = options.lora_rank > 0 or options.lora_from is not None
        check_offload(offload, adapts)
        roles = Roles(generator, adapts, offload=offload)
        losses = losses_of(roles, generator, shape, options)
        super().__init__(generator, losses[STUDENT], prompts, folder, options, **more)
        self.roles, self.offload = roles, offload
        self.images_per_prompt, self.heldout = images_per_prompt, [*heldout]
        self.trainees[FAKE], self.losses[FAKE] = roles.fake, losses[FAKE]
        self._examples = [prompt for prompt in prompts for _ in range(images_per_prompt)]
        self.classifier = classifier_for(generator, prompts)
        self.features = None
        if heldout:
            self.needed_prompts = [record.prompt for record in heldout]
            self.features = load_features(features, generator, self.classifier, setup)
            if self.features.is_weak:
                self.offloads = False  # the VAE encodes what is made

    def settings(self) -> dict[str, Any]:
        return {
            "command": "distill",
            **super().settings(),
            "images_per_prompt": self.images_per_prompt,
            "judge": self.names,
            "features": self.features.name if self.features else None,
            "heldout": content_id(*(record.id for record in self.heldout)),
        }

    def plan(self) -> Plan:
        """What the run will need; does nothing of it."""
        return distill_plan(
            self.generator,
            self.options,
            lambda roles, generator, shape: losses_of(roles, generator, shape, self.options),
            resolution=self.size,
            samples=len(self._examples),
            offload_encoders=self.offloads,
            offload=self.offload,
        )

    def learn(self) -> dict[str, Any]:
        return self.learn_from(len(self._examples))

    @functools.cached_property
    def _measure(self) -> RandomNoiseMeasure:
        if not self.heldout:
            return super()._measure
        measure, _, _ = measure_against(
            self.heldout,
            TargetImages(self.generator, self.size),
            self.generator,
            self.folder / "eval",
            samples=self.eval_samples,
            seed=self.seed,
            classifier=self.classifier,
            features=self.features,
            scores=all_scores(None, self.judge),
        )
        return measure

    def trainer(self, name: str, steps: int) -> Trainer:
        if name == STUDENT:
            trainer = super().trainer(name, steps)
            trainer.chooses = False  # its loss says nothing of how good it is
            return trainer
        options = self.options.of_fake
        adapter = FAKE if options.lora_rank else "default"
        steps *= self.options.ttur
        trainee, loss = self.trainees[name], self.losses[name]
        with self.roles.present("fake"):
            return Trainer(trainee, loss, options, steps, self.seed, adapter)

    def take_step(self, rows: list[int], step: int) -> None:
        """So many steps of the fake, and one of the student."""
        fake = self.trainers[FAKE]
        self.roles.turn("fake", self.optimizers)
        with self.roles("fake"):
            for k in range(self.options.ttur):
                fake(self._batch(self._drawn(len(rows), step, k), "fake", step, k))
        self.roles.turn("student", self.optimizers)
        self.trainers[STUDENT](self.batch(rows, step))

    def batch(self, rows: list[int], step: int) -> Batch:
        return self._batch(rows, "student", step)

    def _drawn(self, count: int, step: int, k: int) -> list[int]:
        """Places of examples for the k-th step of the fake before ``step`` of the student."""
        draw = torch.Generator().manual_seed(derived_seed(self.seed, "fake prompts", step, k))
        return torch.randint(len(self._examples), (count,), generator=draw).tolist()

    def _batch(self, rows: Sequence[int], of: str, *at: int) -> Batch:
        texts, device = [self._examples[k] for k in rows], self.generator.device
        seeds = [derived_seed(self.seed, of, *at, place, k) for place, k in enumerate(rows)]
        count = 1 + derived_seed(self.seed, of, *at, "steps") % self.generator.num_inference_steps
        names = FAKE_NOISES if of == "fake" else STUDENT_NOISES
        told = self.generator.told(texts, seeds)
        drawn = [derived_seed(seed, "losses") for seed in seeds]
        extra = Draws(drawn, count).extra(self.noise_shape, names)
        noise = gaussian(seeds, self.noise_shape).to(device)
        return Batch(dmd=Rows(noise, told, _on(extra, device)))


def _on(extra: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in extra.items()}
