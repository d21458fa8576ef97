"""Reinforce a few-step generator by rewards, into one folder."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oneshot_fast.errors import require
from oneshot_fast.generators.adapters import active_adapters
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.generators.levels import Levels
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.judged import JudgedRun
from oneshot_fast.jobs.reinforce.options import ReinforceOptions
from oneshot_fast.jobs.reinforce.plan import reinforce_plan
from oneshot_fast.planning.timing import Plan
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.runtime.seeds import derived_seed, gaussian
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
from oneshot_fast.training.losses.grpo import (
    ReinforceLoss,
    advantages,
    chosen_steps,
    original_seed,
)  # fmt: skip
from oneshot_fast.training.losses.preserve import Preserve
from oneshot_fast.training.roles import FAKE, Roles, check_offload
from oneshot_fast.training.trainer import Trainer

_AT_ONCE = 16  # images


def losses_of(
    roles: Roles | None,
    generator: FewStepGenerator,
    shape: Sequence[int],
    options: ReinforceOptions,
    rewards: WeightedRewards,
) -> dict[str, Loss]:
    """What the generator lowers, for latents [C, h, w], and with ``roles`` the fake."""
    match, losses = None, dict[str, Loss]()
    if roles is not None:
        levels = Levels(generator, shape)
        match = StudentLoss(roles, levels, "dmd", 0.0, options.teacher_guidance)
        losses[FAKE] = FakeLoss(roles, levels, "dmd", 0.0, "noise", 0.0)
    weights = options.preserve_latent_weight, options.preserve_pixel_weight
    losses[STUDENT] = ReinforceLoss(
        rewards,
        options.policy_weight,
        options.final_reward_weight,
        options.final_reward_margin,
        options.match_weight,
        match,
        Preserve(*weights) if options.preserves else None,
        options.clip_original or options.clip or 0.2,
        options.clip_original is not None,
    )
    return losses


class ReinforceRun(JudgedRun):
    """A few-step generator that learns from rewards of its own images, measured as ``JudgedRun``.

    Its teacher is another network, which the fake begins as; or, where adapters are trained beside
    stacked ones, their base, of which student, fake and teacher are adapters, or none.

    Each rollout makes new images of some prompts, from which ``inner_updates`` steps learn. A state
    to resume from is saved between rollouts.
    """

    passing = frozenset({FAKE})
    options: ReinforceOptions
    generator: FewStepGenerator
    rewards: WeightedRewards

    def __init__(
        self,
        generator: FewStepGenerator,
        prompts: Sequence[str],
        folder: Path,
        options: ReinforceOptions,
        *,
        rewards: WeightedRewards,
        teacher: FewStepGenerator | None = None,
        offload: bool = False,
        **more: Any,
    ) -> None:
        """Describe the run.

        Args:
            generator: What is trained, in place; of several steps that draw noise.
            prompts: Of the images.
            folder: Where everything is written.
            options: Losses and schedule.
            rewards: What is raised.
            teacher: Of the matching term; only its denoiser is kept. None: the base of the
                generator's stacked adapters.
            offload: See ``Roles``; of a teacher that is another network.
            **more: As for ``JudgedRun``.

        Raises:
            UserError: If an option makes no sense, or nothing could be learnt.
        """
        options.check()
        options.check_prompts(prompts)
        self._per_step = options.batch_size // options.images_per_prompt
        matches = options.match_weight > 0
        self._adapts = adapts = matches and teacher is None
        require(
            matches or teacher is None, "--teacher has no effect without --match_weight; give both"
        )
        require(
            matches or not offload, "--offload has no effect without --match_weight; leave it out"
        )
        check_offload(offload, adapts)
        stacked = active_adapters(generator.denoiser)
        require(
            not adapts or bool(stacked and options.lora_rank),
            "--match_weight needs a --teacher; or --lora_rank, and the --lora files that make the "
            "--model_id, which then is the teacher, the generator",
        )
        require(
            options.final_reward_weight == 0 or rewards.differentiable,
            "final_reward_weight needs rewards with a gradient; leave it out for the others",
        )
        require(generator.guidance_scale == 1, "leave guidance_scale out: RL knows no guidance")
        shape = generator.latent_shape(*TargetImages(generator, more.get("resolution")).size)
        steps = generator.steps(shape)
        self._noisy = [k for k, step in enumerate(steps) if step.noise]
        require(
            bool(self._noisy) or options.policy_weight == 0,
            "none of its steps draws noise to learn from: give --num_inference_steps 2 or more "
            "with --cps_eta, or --policy_weight 0; one step is for sft --reward",
        )
        require(
            not options.original_seeds or len(self._noisy) > options.policy_steps,
            f"--original_seeds has no effect: images share no noise, as all {len(self._noisy)} "
            "steps that draw it learn; leave it out, or give a smaller --policy_steps",
        )
        require(steps[-1].noise == 0, "the last step draws noise; take another sampler")
        roles = Roles(generator, True) if adapts else None
        if teacher is not None:
            kinds = [Levels(one, shape).kind for one in (generator, teacher)]
            require(kinds[0] == kinds[1], f"the teacher is {kinds[1]}, the generator {kinds[0]}")
            of = [
                {k: tuple(p.shape) for k, p in one.denoiser.named_parameters()}
                for one in (generator, teacher)
            ]
            require(of[0] == of[1], "the teacher's network is of another shape")
            teacher = generator.with_denoiser(teacher)
            roles = Roles(generator, False, teacher, offload)
        losses = losses_of(roles, generator, shape, options, rewards)
        super().__init__(
            generator, losses[STUDENT], prompts, folder, options, rewards=rewards, **more
        )
        self.teacher, self._roles, self.offload = teacher, roles, offload
        self._rollout: Rows | None = None
        if roles is not None:
            self.trainees[FAKE], self.losses[FAKE] = roles.fake, losses[FAKE]

    def settings(self) -> dict[str, Any]:
        return {
            "command": "reinforce",
            "rewards": self.names,
            **super().settings(),
            "final_reward_margin": str(self.options.final_reward_margin),
            "teacher": "base" if self._adapts else self.teacher and self.teacher.fingerprint(),
        }

    def plan(self) -> Plan:
        """What the run will need; does nothing of it."""
        return reinforce_plan(
            self.generator,
            self.options,
            lambda roles, generator, shape, rewards: losses_of(
                roles, generator, shape, self.options, rewards
            ),
            resolution=self.size,
            samples=self._per_epoch,
            rewards=self.rewards,
            prompt=self.prompts[0],
            learns=self._noisy[: self.options.policy_steps],
            teacher=self.teacher,
            adapts=self._adapts,
            rollout=lambda: self.batch([], 0),
            offload_encoders=self.offloads,
            offload=self.offload,
        )

    @property
    def _per_epoch(self) -> int:
        """Images that an epoch's steps learn from, as often as they do."""
        options = self.options
        return options.steps_per_epoch * options.inner_updates * options.batch_size

    def learn(self) -> dict[str, Any]:
        return self.learn_from(self._per_epoch)

    def trainer(self, name: str, steps: int) -> Trainer:
        if name == STUDENT:
            trainer = super().trainer(name, steps)
            trainer.chooses = False  # its loss says nothing of how good it is
            return trainer
        options, steps = self.options.of_fake(self._adapts), steps // self.options.inner_updates
        adapter = FAKE if self._adapts else "default"
        trainee, loss = self.trainees[name], self.losses[name]
        assert self._roles is not None
        with self._roles.present("fake"):
            return Trainer(trainee, loss, options, steps, self.seed, adapter)

    def is_resumable(self, step: int) -> bool:
        return step % self.options.inner_updates == 0  # what drew a rollout is not kept

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        return {"skipped_steps": self.trainers[STUDENT].skipped, **super().after_epoch(epoch)}

    def take_step(self, rows: list[int], step: int) -> None:
        """One step of the generator; before it, images and a step of the fake if they are due."""
        begins = self._begins(step)
        batch = self.batch(rows, step)
        if self.options.policy_weight and not batch["rollout"].extra["advantage"].any():
            self.skip_flat(begins, self.options.inner_updates)
            return
        if begins and self._roles is not None:
            made = batch["rollout"]
            extra = self._draws(step, "fake", len(made), FAKE_NOISES)
            fakes = Rows(made.noise, made.conditioning, extra | {"sample": made.extra["made"]})
            self._roles.turn("fake", self.optimizers)
            with self._roles("fake"):
                self.trainers[FAKE](Batch(dmd=fakes))
            self._roles.turn("student", self.optimizers)
        self.trainers[STUDENT](batch)

    def _begins(self, step: int) -> bool:
        """Whether new images are due; those of a training that broke off are not there either."""
        return self._rollout is None or self.is_resumable(step)

    def batch(self, rows: list[int], step: int) -> Batch:
        """What a step learns from: its rollout, which draws its prompts itself, or the last one."""
        if self._rollout is None or self._begins(step):
            self._rollout = self._rolled(step // self.options.inner_updates)
        made, extra = self._rollout, dict[str, Any]()
        if self._roles is not None:
            extra = self._draws(step, "match", len(made), STUDENT_NOISES)
            del extra["steps"]
        made = dataclasses.replace(made, extra={**made.extra, **extra})
        return Batch(rollout=made, **self.preserved(step))

    @torch.no_grad()
    def _rolled(self, number: int) -> Rows:
        """The rollout ``number``, from 0: images of some prompts, with all that losses need."""
        K, generator = self.options.images_per_prompt, self.generator
        draw = torch.Generator().manual_seed(derived_seed(self.seed, "rl prompts", number))
        distinct = [*dict.fromkeys(self.prompts)]
        chosen = torch.randperm(len(distinct), generator=draw)[: self._per_step].tolist()
        texts = [distinct[k] for k in chosen for _ in range(K)]
        seeds = [derived_seed(self.seed, "rl", number, k) for k in range(len(texts))]
        told = generator.told(texts, seeds)
        count, most = len(self._noisy), self.options.policy_steps
        learns = [self._noisy[k] for k in chosen_steps(count, most, self.seed, number)]
        shared = {k: self._shared(texts, k, number, told.embeds.device) for k in self._noisy}

        def noise(k: int, x: Tensor) -> Tensor:
            own = [derived_seed(seed, "step", k) for seed in seeds]
            return gaussian(own, x.shape[1:]).to(x) if k in learns else shared[k]

        samples = generator.rollout(
            gaussian(seeds, self.noise_shape).to(generator.device), told, noise
        )
        scores = self._scores(samples[-1], texts)
        advantage = torch.zeros(len(texts), device=generator.device)
        if all(values.isfinite().all() for values in scores.values()):
            advantage = advantages(scores, self.rewards.weights, texts)
        extra: dict[str, Any] = {
            "steps": [learns] * len(texts),
            "before": self._stacked(samples, learns, 0),
            "after": self._stacked(samples, learns, 1),
            "old": torch.full((len(texts), len(learns)), math.nan, device=generator.device),
            "last": samples[-2],
            "made": samples[-1],
            "advantage": advantage,
            "texts": texts,
        }
        return Rows(samples[0], told, extra)

    @staticmethod
    def _stacked(samples: Sequence[Tensor], steps: Sequence[int], further: int) -> Tensor:
        if not steps:
            return samples[0][:, None]
        return torch.stack([samples[k + further] for k in steps], 1)

    def _shared(self, texts: Sequence[str], k: int, number: int, device: torch.device) -> Tensor:
        """Noise of step ``k`` that all images of a prompt share in a rollout, [B, C, h, w]."""
        if self.options.original_seeds:
            seeds = [original_seed(text, k, number) for text in texts]
        else:
            seeds = [derived_seed(self.seed, "shared", number, k, text) for text in texts]
        return gaussian(seeds, self.noise_shape).to(device)

    def _scores(self, latents: Tensor, texts: Sequence[str]) -> dict[str, Tensor]:
        """Rewards of the images by name, [B] each, some images at a time."""
        found: dict[str, list[Tensor]] = {}
        for start in range(0, len(texts), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            images = self.generator.decode(latents[part])
            for name, values in self.rewards.scores(images, texts[part]).items():
                found.setdefault(name, []).append(values)
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _draws(self, step: int, of: str, count: int, names: Sequence[str]) -> dict[str, Any]:
        seeds = [derived_seed(self.seed, of, step, k) for k in range(count)]
        found = Draws(seeds, self.generator.num_inference_steps).extra(self.noise_shape, names)
        device = self.generator.device
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in found.items()}
