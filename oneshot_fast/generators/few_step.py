"""Several denoising steps instead of one: the sampler of the pipeline's scheduler, differentiably.

What each step is, ``step.py`` asks the scheduler; which one that is, ``samplers.py`` says.
"""

import contextlib
import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler, TCDScheduler
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils.checkpoint import checkpoint

from oneshot_fast.data.sizes import Size
from oneshot_fast.errors import ModelError, UserError, refused, require
from oneshot_fast.generators.base import Conditioning, Prediction
from oneshot_fast.generators.pipeline import PipelineGenerator
from oneshot_fast.generators.samplers import check_known, trailing, with_cps, without_memory
from oneshot_fast.generators.schedulers import Eta, check_eta
from oneshot_fast.generators.step import Step
from oneshot_fast.runtime.seeds import derived_seed, gaussian


@dataclass(frozen=True)
class Transition:
    """What one step of a sampler draws: mean + std z with z in N(0, 1).

    Attributes:
        mean: [B, C, h, w] float32.
        std: The same for all; 0 for a step that draws nothing.
    """

    mean: Tensor
    std: float

    def log_probability(self, found: Tensor) -> Tensor:
        """Of samples [B, C, h, w] that were drawn, in nats, [B], without its constants.

            -sum (found - mean)^2 / (2 std^2)

        Raises:
            ValueError: If the step draws nothing, and so has no probability.
        """
        if self.std == 0:
            raise ValueError("a step that draws nothing has no log-probability")
        return -((found - self.mean) / self.std).square().flatten(1).sum(1) / 2


class FewStepGenerator(PipelineGenerator):
    """A pipeline's generator that takes several steps; made by ``over``.

    The noise that it is given is the first one. What a sampler draws later is a function of the
    seeds in the conditioning and of the step, so that an image never depends on its batch.

    Attributes:
        num_inference_steps: How many.
        guidance_scale: Of classifier-free guidance; 1 does without.
        backprop_steps: The last so many evaluations are differentiated.
        eta: Of CPS; None: the steps are those of the pipeline's scheduler.
        scheduler_eta: That its own scheduler is told.
        step_list: Timesteps that the steps begin at; empty for the scheduler's own.
    """

    num_inference_steps: int
    guidance_scale: float
    backprop_steps: int
    eta: Eta | None
    scheduler_eta: float
    step_list: tuple[float, ...]
    _scheduler: Any  # that takes the steps
    _steps: dict[tuple[int, ...], list[Step]]

    @classmethod
    def over(
        cls,
        generator: PipelineGenerator,
        num_inference_steps: int,
        *,
        guidance_scale: float = 1.0,
        backprop_steps: int | None = None,
        eta: Eta | None = None,
        scheduler_eta: float = 0.0,
        step_list: Sequence[float] = (),
        student: bool = False,
    ) -> "FewStepGenerator":
        """The same generator, networks and all, with more steps.

        Args:
            generator: With one step.
            num_inference_steps: How many denoising steps.
            guidance_scale: Above 1: output = without + scale (with - without the prompt), both in
                one batch.
            backprop_steps: Differentiate only the last so many evaluations. The gradient passes
                through the others as if their output were given; by default all.
            eta: Sample with ``CPSScheduler``, by this eta, at the scheduler's noise levels.
            scheduler_eta: 0 to 1, what ``pipe(eta=...)`` tells a scheduler that takes it, DDIM's
                or TCD's: how much noise it draws.
            step_list: Timesteps that the steps begin at, falling, of a flow before its scheduler
                shifts them; of a longer list the first. Empty for the scheduler's own.
            student: Its few steps have to begin at the noisiest timestep: in sigma space they are
                Euler's with trailing spacing, whatever the scheduler. The pipeline that is saved
                has this scheduler. A model that embeds its guidance is told 1.

        Raises:
            UserError: If a number makes no sense, or the scheduler's steps have another form.
        """
        count, last = num_inference_steps, backprop_steps
        check_steps(count, guidance_scale, last, eta, scheduler_eta, step_list)
        own, most = generator.pipe.scheduler, generator.last_timestep
        require(
            all(t <= most for t in step_list),
            f"step_list is {_listed(step_list)}; give falling timesteps, from {most} to above 0",
        )
        start = generator.start
        require(
            start is None or (count == 1 and not student),
            f"its one step begins at timestep {start}; leave num_inference_steps or timestep out",
        )
        takes_eta = "eta" in generator._defaults and "eta" in signature(own.step).parameters
        require(
            scheduler_eta == 0 or (takes_eta and eta is None),
            f"--scheduler_eta: the steps of a {type(own).__name__} take none here; leave it out",
        )
        require(
            guidance_scale == 1 or generator.takes_cfg,
            f"a {generator.pipeline.__name__} of this network has no guidance_scale of this kind: "
            "the network is told of it; give --embedded_guidance instead",
        )
        kind = type(generator)
        other: Any = copy.copy(generator)
        other.__class__ = type(f"FewStep{kind.__name__}", (cls, kind), {})
        other.num_inference_steps, other.guidance_scale = count, guidance_scale
        other.backprop_steps = count if last is None else last
        scheduler = trailing(own) if student else without_memory(own)
        if scheduler is not own:
            other.pipe = copy.copy(generator.pipe)
            other.pipe.scheduler = scheduler
            vars(other).pop("step", None)
        other.eta, other.scheduler_eta = eta, scheduler_eta
        other._scheduler = scheduler if eta is None else with_cps(scheduler, eta)
        if student and other.embeds_guidance:
            other.embedded_guidance = 1.0
        other.step_list, other._steps = tuple(step_list[:count]), {}
        other._forget()
        other.draws_noise  # noqa: B018 (refuses what it cannot take)
        return other

    def with_denoiser(self, of: PipelineGenerator) -> "FewStepGenerator":
        """This one with the denoiser of another, such as its teacher; all else is shared."""
        other = copy.copy(self)
        other.pipe = copy.copy(self.pipe)
        setattr(other.pipe, self.parts[0], of.denoiser)
        other.autocast, other._compiled, other.is_compiled = of.autocast, None, False
        other._forget()
        return other

    def steps(self, shape: Sequence[int]) -> list[Step]:
        """The steps for latents of ``shape`` [C, h, w]: some schedulers shift by the size."""
        key = tuple(shape)
        if key not in self._steps:
            check_known(self._scheduler)
            with unset_fake_temporarily():  # of a plan
                count, schedule = self.num_inference_steps, self._sampler_schedule(shape)
                sampler = self._set(self._scheduler, count, schedule, self.scheduler_eta)
                self._check_levels(sampler.timesteps, shape)
                self._steps[key] = sampler.steps()
        return self._steps[key]

    def scheduler_set(self, shape: Sequence[int]) -> Any:
        """A copy of the scheduler that takes the steps, set to them for latents of ``shape``."""
        with unset_fake_temporarily():  # of a plan
            scheduler = copy.deepcopy(self._scheduler)
            scheduler.set_timesteps(**self._sampler_schedule(shape))
        return scheduler

    def _own_schedule(self, shape: Sequence[int]) -> dict[str, Any]:
        """What the pipeline's scheduler is told."""
        if self.step_list:
            return self._schedule_at(self.step_list, shape)
        return self._schedule(self.num_inference_steps, shape)

    def _sampler_schedule(self, shape: Sequence[int]) -> Mapping[str, Any]:
        """What the scheduler that takes the steps is told: to be at the noise levels of the own."""
        schedule, own = self._own_schedule(shape), copy.deepcopy(self.pipe.scheduler)
        is_flow = isinstance(own, FlowMatchEulerDiscreteScheduler)
        if self.eta is None or not (is_flow or isinstance(own, LCMScheduler | TCDScheduler)):
            return schedule
        own.set_timesteps(**schedule)
        return {"sigmas": own.sigmas[:-1]} if is_flow else {"timesteps": own.timesteps.tolist()}

    def _check_levels(self, timesteps: Sequence[Tensor], shape: Sequence[int]) -> None:
        """Raise UserError unless they are those of the pipeline's own scheduler."""
        if self.eta is None:
            return
        own, count = self.pipe.scheduler, self.num_inference_steps
        expected = [float(t) for t in self._set(own, count, self._own_schedule(shape)).timesteps]
        found = [float(t) for t in timesteps]
        require(
            found == expected,
            f"--cps_eta: with it the {len(found)} steps are at {_listed(found)}, and those of its "
            f"{type(own).__name__} at {_listed(expected)}; leave --cps_eta out",
        )

    @property
    def draws_noise(self) -> bool:
        shape = self.latent_shape(self.image_size, self.image_size)
        return any(step.noise for step in self.steps(shape))

    def blank_prompts(self, count: int) -> Conditioning:
        found = super().blank_prompts(count)  # type: ignore[safe-super]
        return replace(found, seeds=torch.zeros(count, dtype=torch.int64))

    def told(self, prompts: Sequence[str], seeds: Sequence[int]) -> Conditioning:
        found = self.encode_prompts(prompts)
        return replace(found, seeds=torch.tensor([*seeds], device=self.device))

    def predict(self, eps: Tensor, conditioning: Conditioning) -> Prediction:
        """The last evaluation, after the others; its ``latents`` are what the sampler gives."""
        if self.num_inference_steps == 1 and self.guidance_scale == 1:
            return super().predict(eps, conditioning)
        first = self.steps(eps.shape[1:])[:-1]
        x = eps
        for k, step in enumerate(first):
            x = self._kept(k, x, conditioning) + step.change * self._output(k, x, conditioning)
        return self.evaluate(len(first), x, conditioning)

    def evaluate(self, k: int, x: Tensor, conditioning: Conditioning) -> Prediction:
        steps = self.steps(x.shape[1:])
        output = self._guided(k, x, conditioning)
        if k == len(steps) - 1:
            return Prediction(output, self._kept(k, x, conditioning), -steps[k].change)
        return Prediction(output, steps[k].skip * x, steps[k].sigma)

    def advance(self, k: int, x: Tensor, output: Tensor, conditioning: Conditioning) -> Tensor:
        return self._kept(k, x, conditioning) + self.steps(x.shape[1:])[k].change * output

    def estimates(self, eps: Tensor, conditioning: Conditioning) -> list[Tensor]:
        """What each evaluation says of the clean latents: [B, C, h, w] float32, one per step.

        The arguments are those of ``predict``; the mean of the clean latents given x, by Tweedie.
        """
        found, x = [], eps
        for k, step in enumerate(self.steps(eps.shape[1:])):
            output = self._guided(k, x, conditioning)
            found.append(step.skip * x - step.sigma * output)
            x = self._kept(k, x, conditioning) + step.change * output
        return found

    def estimate(self, k: int, x: Tensor, told: Conditioning) -> Tensor:
        """What step ``k``, from 0, says of the clean latents of samples x [B, C, h, w]."""
        step = self.steps(x.shape[1:])[k]
        return step.skip * x - step.sigma * self._guided(k, x, told)

    def transition(self, k: int, x: Tensor, told: Conditioning) -> Transition:
        """What step ``k``, from 0, draws of samples x [B, C, h, w], differentiable."""
        step = self.steps(x.shape[1:])[k]
        return Transition(step.keep * x + step.change * self._guided(k, x, told), step.noise)

    @torch.no_grad()
    def rollout(
        self,
        eps: Tensor,
        told: Conditioning,
        draw: Callable[[int, Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """All samples of a run of the sampler, from the first noise to the clean latents.

        Args:
            eps: [B, C, h, w] float32, N(0, 1).
            told: Conditioning of B prompts, with the seeds of later noises.
            draw: Gives the noise of a step, from 0, for samples like its second argument, instead
                of the one of the seeds.

        Returns:
            One more than steps, [B, C, h, w] float32 each.
        """
        found = [eps]
        for k in range(self.num_inference_steps):
            found.append(self.next_sample(k, found[-1], told, draw))
        return found

    def next_sample(
        self,
        k: int,
        x: Tensor,
        told: Conditioning,
        draw: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """What follows samples x [B, C, h, w] by step ``k``, from 0, differentiable.

        The other arguments are those of ``rollout``.
        """
        made = self.transition(k, x, told)
        if made.std == 0:
            return made.mean
        return made.mean + made.std * (_later_noise(told, k, x) if draw is None else draw(k, x))

    def _output(self, k: int, x: Tensor, told: Conditioning) -> Tensor:
        """The output in step k; its activations are computed again in the backward pass."""
        if k < self.num_inference_steps - self.backprop_steps:
            with torch.no_grad():
                return self._guided(k, x, told)
        if not torch.is_grad_enabled():
            return self._guided(k, x, told)
        return checkpoint(self._guided, k, x, told, use_reentrant=False, preserve_rng_state=False)

    def _kept(self, k: int, x: Tensor, told: Conditioning) -> Tensor:
        """What comes after step k, without the part of the output: of x, and fresh noise."""
        step = self.steps(x.shape[1:])[k]
        found = step.keep * x
        return found if step.noise == 0 else found + step.noise * _later_noise(told, k, x)

    def _guided(self, k: int, x: Tensor, told: Conditioning) -> Tensor:
        """The denoiser's output [B, C, h, w] float32 in step k, with guidance."""
        step = self.steps(x.shape[1:])[k]
        key = ("timestep", k, *x.shape[1:], x.device)
        timestep = self._constant(key, lambda: step.timestep.to(x.device))
        return self.output_at(x * step.scale, timestep, told, self.guidance_scale)

    def output_at(
        self, x: Tensor, timestep: Tensor, told: Conditioning, guidance: float = 1.0
    ) -> Tensor:
        """The denoiser's output [B, C, h, w] float32 for inputs like it.

        Args:
            x: Input, as the denoiser takes it.
            timestep: One for all, or [B].
            told: Conditioning of B prompts.
            guidance: Classifier-free guidance, both halves in one batch; 1 does without.
        """
        if guidance == 1:
            return self._denoise(x, timestep, told)
        both = Conditioning.cat([self._unconditional(told), told])
        times = timestep if timestep.ndim == 0 else timestep.repeat(2)
        off, on = self._denoise(torch.cat([x, x]), times, both).chunk(2)
        return off + (guidance + self.guidance_from) * (on - off)

    def _unconditional(self, told: Conditioning) -> Conditioning:
        """That of no prompt, as the pipeline has it, for as many rows."""
        if isinstance(told.embeds, FakeTensor):  # of a plan, where nothing is encoded
            return told
        if self._blank is None:
            self._blank = self._encode_blank()
        rows, count = self._blank.to(self.device).tensors(), len(told.embeds)
        rows.pop("seeds", None)
        return replace(told, **{k: v.expand(count, *v.shape[1:]) for k, v in rows.items()})

    def _step_text(self) -> str:
        with contextlib.suppress(ModelError):  # that of many steps may have none
            return super()._step_text()
        return ""

    def fingerprint(self) -> str:
        digest = hashlib.sha256(super().fingerprint().encode())
        # not diffusers' own notes, such as a list of defaults, whose order is of a set
        config = sorted((k, v) for k, v in self._scheduler.config.items() if not k.startswith("_"))
        sampler = type(self._scheduler).__name__, config
        digest.update(repr((self.num_inference_steps, self.guidance_scale, sampler)).encode())
        for more in filter(None, (self.step_list, self.scheduler_eta)):
            digest.update(repr(more).encode())
        return digest.hexdigest()[:16]

    def settings(self, size: Size) -> dict[str, Any]:
        return super().settings(size) | {
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "backprop_steps": self.backprop_steps,
            "cps_eta": self.eta,
            **({"scheduler_eta": self.scheduler_eta} if self.scheduler_eta else {}),
            **({"step_list": self.step_list} if self.step_list else {}),
            **({"embedded_guidance": told} if (told := self.embedded_guidance) is not None else {}),
        }


def check_steps(
    count: int,
    guidance_scale: float,
    backprop_steps: int | None,
    eta: Eta | None,
    scheduler_eta: float,
    step_list: Sequence[float],
) -> None:
    """Raise UserError for what makes no sense for any model; see ``FewStepGenerator.over``."""
    require(count >= 1, f"num_inference_steps is {count}; give at least 1")
    require(
        backprop_steps is None or 1 <= backprop_steps <= count,
        f"backprop_steps is {backprop_steps}; give 1 to {count}, the num_inference_steps",
    )
    require(
        1 <= guidance_scale < math.inf,
        f"guidance_scale is {guidance_scale}; give a number from 1, which is none",
    )
    if eta is not None:
        with refused(UserError, "--cps_eta: "):
            check_eta(eta)
    require(0 <= scheduler_eta <= 1, f"scheduler_eta is {scheduler_eta}; give a number from 0 to 1")
    require(
        all(a > b for a, b in zip(step_list, [*step_list[1:], 0], strict=False)),
        f"step_list is {_listed(step_list)}; give falling timesteps, all above 0",
    )
    require(
        not step_list or count <= len(step_list),
        f"num_inference_steps is {count}, but step_list has {len(step_list)} timesteps",
    )


def _listed(numbers: Sequence[float]) -> str:
    """Numbers in a message."""
    return ", ".join(f"{number:g}" for number in numbers)


def _later_noise(told: Conditioning, k: int, like: Tensor) -> Tensor:
    """What is drawn in step k, N(0, 1), for each row."""
    if isinstance(like, FakeTensor):  # of a plan
        return torch.zeros_like(like)
    if told.seeds is None:
        raise UserError("this sampler draws noise in its steps; tell the seeds (Generator.told)")
    seeds = [derived_seed(seed, "step", k) for seed in told.seeds.tolist()]
    return gaussian(seeds, like.shape[1:]).to(like)
