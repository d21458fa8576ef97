"""Noise levels between those of a sampler's steps: x = signal x0 + noise e, and estimates there.

A flow has signal 1 - s and noise s, and its network gives e - x0; in sigma space (SDXL) signal is 1
and noise sigma, and the network gives e or v. One becomes the other by x_flow = x / (1 + sigma).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from oneshot_fast.errors import ModelError
from oneshot_fast.generators.base import Conditioning
from oneshot_fast.generators.few_step import FewStepGenerator

_KNOWN = (
    FlowMatchEulerDiscreteScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler
)  # fmt: skip
Estimates = tuple[Tensor, Tensor]  # of x0 and of e, [B, C, h, w] float32 each


class Level(NamedTuple):
    """How much of x0 and e samples have, [B, 1, 1, 1] each."""

    signal: Tensor
    noise: Tensor


class Levels:
    """The noise levels of a few-step generator's model, at any timestep.

    Attributes:
        is_flow: Whether it is a flow; else it is in sigma space.
        timesteps: Those that the sampler's steps begin at, and 0.
        last: The largest timestep there is.
    """

    def __init__(self, generator: FewStepGenerator, shape: Sequence[int]) -> None:
        """Of latents [C, h, w].

        Raises:
            ModelError: If the sampler's samples are neither a flow's nor in sigma space.
        """
        sampler = generator.scheduler_set(shape)
        kind, form = type(sampler).__name__, sampler.config.get("prediction_type", "epsilon")
        if not isinstance(sampler, _KNOWN):
            known = ", ".join(one.__name__ for one in _KNOWN)
            raise ModelError(f"the scheduler is {kind}; this needs {known}, or --cps_eta")
        self.is_flow = isinstance(sampler, FlowMatchEulerDiscreteScheduler)
        if not self.is_flow and form not in ("epsilon", "v_prediction"):
            raise ModelError(f"the scheduler's prediction_type is {form}, which is not known here")
        self._form = form
        with unset_fake_temporarily():  # of a plan
            self.timesteps = [*sampler.timesteps.tolist(), 0.0]
            self._noise = sampler.sigmas.tolist()
        self.last = float(sampler.config.num_train_timesteps - (0 if self.is_flow else 1))
        if not self.is_flow:
            with unset_fake_temporarily():  # of a plan
                alphas = sampler.alphas_cumprod.double()
                self._sigmas = ((1 - alphas) / alphas).sqrt().float()

    @property
    def kind(self) -> str:
        """What its networks give and what timesteps mean, in words."""
        if self.is_flow:
            return f"a flow of {self.last:g} timesteps"
        ends = f"{self._sigmas[0]:.4g} to {self._sigmas[-1]:.4g}"
        return f"{self._form} of {len(self._sigmas)} timesteps with noise {ends}"

    def at(self, timestep: Tensor) -> Level:
        """That of timesteps [B]; in sigma space whole numbers."""
        if self.is_flow:
            return self._level(timestep.float() / self.last)
        return self._level(self._sigmas.to(timestep.device)[timestep.long()])

    def of_step(self, k: int, count: int, like: Tensor) -> Level:
        """That of ``count`` samples before step ``k``, from 0; after the last there is no noise."""
        return self._level(like.new_full((count,), self._noise[k]))

    def estimates(
        self,
        generator: FewStepGenerator,
        x: Tensor,
        timestep: Tensor,
        told: Conditioning,
        guidance: float = 1.0,
    ) -> Estimates:
        """What the network says of x0 and e in samples, differentiable.

        Args:
            generator: Whose network it is.
            x: [B, C, h, w] float32, at ``at(timestep)``.
            timestep: [B].
            told: Conditioning of B prompts.
            guidance: Classifier-free guidance, 1 is none; of a model that embeds it, what it is
                told instead.
        """
        if generator.embeds_guidance:
            told = replace(told, guidance=x.new_full((len(x),), guidance))
            guidance = 1.0
        level = self.at(timestep)
        if self.is_flow:
            output = generator.output_at(x, timestep, told, guidance)
            return x - level.noise * output, x + level.signal * output
        size = (level.noise**2 + 1).sqrt()
        output = generator.output_at(x / size, timestep, told, guidance)
        if self._form == "epsilon":
            return x - level.noise * output, output
        x0 = x / size**2 - output * level.noise / size
        return x0, (x - x0) / level.noise

    def _level(self, noise: Tensor) -> Level:
        noise = noise.view(-1, 1, 1, 1)
        return Level(1 - noise if self.is_flow else torch.ones_like(noise), noise)
