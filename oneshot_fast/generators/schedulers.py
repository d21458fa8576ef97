"""Coefficients-preserving sampling: stochastic steps that keep the variance of every noise level.

    x0 and e from the network's output;   x' = mean'(x0) + s' (cos(eta pi/2) e + sin(eta pi/2) z)

with fresh z in N(0, 1): eta 0 is the Euler step, eta 1 noises x0 anew as LCM does, and what
k-diffusion calls ancestral is one eta per step (Wang et al. 2025, arXiv 2509.05952). For a flow
mean'(x0) = (1 - s') x0, in sigma space it is x0. Both are schedulers of diffusers, for any of its
pipelines: ``pipe.scheduler = CPSScheduler.from_config(pipe.scheduler.config, eta=0.9)``.
"""

import inspect
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

Eta = float | Sequence[float] | str
Draw = torch.Generator | list[torch.Generator] | None


@dataclass
class CPSOutput(BaseOutput):
    """What a step gives.

    Attributes:
        prev_sample: The next sample, [B, ...].
        pred_original_sample: Estimate of the clean one, [B, ...].
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


def check_eta(eta: Eta) -> None:
    """Raise ValueError if it is neither numbers from 0 to 1 nor "ancestral"."""
    numbers = [eta] if isinstance(eta, int | float) else eta
    if eta != "ancestral" and (
        isinstance(numbers, str) or not all(0 <= value <= 1 for value in numbers)
    ):
        raise ValueError(f'eta is {eta}; give numbers from 0 to 1, or "ancestral"')


class _CPS:
    """What both schedulers share; they give ``_estimates`` and ``_next``."""

    config: Any
    sigmas: Tensor
    timesteps: Tensor
    order = 1
    index_for_timestep: Any
    _init_step_index: Any
    _step_index: Any

    def __init__(self, *args: Any, eta: Eta = 0.9, **kwargs: Any) -> None:
        """A scheduler of diffusers with one more setting, which its configuration keeps.

        Args:
            *args: Those of the parent.
            eta: 0 to 1, how much of the noise is fresh in a step; a number, one per step, or
                "ancestral".
            **kwargs: Those of the parent.

        Raises:
            ValueError: If ``eta`` is none of these.
        """
        check_eta(eta)
        super().__init__(*args, **kwargs)
        self.register_to_config(eta=eta)  # type: ignore[attr-defined]

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Draw = None,
        return_dict: bool = True,
    ) -> CPSOutput | tuple[Tensor, Tensor]:
        """One step, in float32.

        Args:
            model_output: Of the network, [B, ...].
            timestep: Where the sample is; or [B], where each one is.
            sample: Noisy samples, [B, ...].
            generator: Draws z; a list has one for each sample.
            return_dict: Return a ``CPSOutput`` instead of its fields.

        Returns:
            In the type of ``sample``.

        Raises:
            ValueError: If there are not as many numbers in ``eta`` as steps.
        """
        times = torch.as_tensor(timestep)
        if times.numel() > 1:
            index = torch.tensor([self.index_for_timestep(t) for t in times.to(self.timesteps)])
        else:
            if self._step_index is None:
                self._init_step_index(timestep)
            index = torch.tensor([self._step_index])
            self._step_index += 1
        shape = (-1, *[1] * (sample.ndim - 1))
        s, after = (self.sigmas.to(sample.device, torch.float32)[index + k] for k in (0, 1))
        angle = self._eta(index, s, after).view(shape) * (math.pi / 2)
        s, after = s.view(shape), after.view(shape)
        x, output = sample.float(), model_output.float()
        x0, noise = self._estimates(x, output, s)
        mixed = angle.cos() * noise
        if bool(((after > 0) & (angle > 0)).any()):
            z = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            mixed = mixed + angle.sin() * z
        found = self._mean(x0, after) + after * mixed
        found, x0 = found.to(sample.dtype), x0.to(sample.dtype)
        return CPSOutput(found, x0) if return_dict else (found, x0)

    def _eta(self, index: Tensor, s: Tensor, after: Tensor) -> Tensor:
        """That of each sample's step, [B]."""
        eta = self.config.eta
        if eta == "ancestral":
            ratio = self._level(after) / self._level(s)  # of sigmas
            return (1 - ratio.nan_to_num(0.0).square()).clamp(0, 1).sqrt().asin() / (math.pi / 2)
        if isinstance(eta, int | float):
            return torch.full_like(s, float(eta))
        if len(eta) != len(self.timesteps):
            raise ValueError(f"eta has {len(eta)} numbers for {len(self.timesteps)} steps")
        return torch.tensor(eta, device=s.device, dtype=s.dtype)[index.to(s.device)]

    def _estimates(self, x: Tensor, output: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Clean sample and noise."""
        raise NotImplementedError

    def _mean(self, x0: Tensor, s: Tensor) -> Tensor:
        raise NotImplementedError

    def _level(self, s: Tensor) -> Tensor:
        """Sigma of a noise level."""
        return s


def _signature(parent: type[Any]) -> inspect.Signature:
    """The parent's settings and eta: diffusers reads from it what a configuration may have."""
    known = inspect.signature(parent.__init__)
    eta = inspect.Parameter("eta", inspect.Parameter.KEYWORD_ONLY, default=0.9)
    return known.replace(parameters=[*known.parameters.values(), eta])


class CPSScheduler(_CPS, FlowMatchEulerDiscreteScheduler):
    """For flows (SD3.x, FLUX.1): x = (1 - s) x0 + s e, the network gives e - x0."""

    def __init__(self, *args: Any, eta: Eta = 0.9, **kwargs: Any) -> None:
        """See ``FlowMatchEulerDiscreteScheduler``, and ``step`` for eta."""
        super().__init__(*args, eta=eta, **kwargs)

    __init__.__signature__ = _signature(FlowMatchEulerDiscreteScheduler)  # type: ignore[attr-defined]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """As the parent; but sigmas that are given are used as they are, and 0 follows them.

        Raises:
            ValueError: If they do not fall from at most 1 to above 0.
        """
        if sigmas is None:
            super().set_timesteps(num_inference_steps, device, mu=mu, timesteps=timesteps)
            return
        values = torch.as_tensor(sigmas, dtype=torch.float32, device=device)
        if not (
            len(values) and values[-1] > 0 and values[0] <= 1 and bool((values.diff() < 0).all())
        ):
            raise ValueError(f"sigmas are {list(sigmas)}; give falling ones, in (0, 1]")
        self.num_inference_steps = len(values)
        self.timesteps = values * self.config.num_train_timesteps
        self.sigmas = torch.cat([values, values.new_zeros(1)])
        self._step_index = self._begin_index = None

    def _estimates(self, x: Tensor, output: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return x - s * output, x + (1 - s) * output

    def _mean(self, x0: Tensor, s: Tensor) -> Tensor:
        return (1 - s) * x0

    def _level(self, s: Tensor) -> Tensor:
        return s / (1 - s)


class CPSEulerScheduler(_CPS, EulerDiscreteScheduler):
    """For SDXL and its like: x = x0 + sigma e, the network gives e, v or x0."""

    def __init__(self, *args: Any, eta: Eta = 0.9, **kwargs: Any) -> None:
        """See ``EulerDiscreteScheduler``, and ``step`` for eta."""
        super().__init__(*args, eta=eta, **kwargs)

    __init__.__signature__ = _signature(EulerDiscreteScheduler)  # type: ignore[attr-defined]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """As the parent; 0 follows sigmas that are given.

        Raises:
            ValueError: If they do not fall to above 0, or to it.
        """
        if sigmas is None:
            super().set_timesteps(num_inference_steps, device, timesteps)
            return
        values = [*sigmas, *([] if len(sigmas) and sigmas[-1] == 0 else [0.0])]
        if len(values) == 1 or not all(map(operator.gt, values, values[1:])):
            raise ValueError(f"sigmas are {list(sigmas)}; give falling ones, above 0")
        super().set_timesteps(num_inference_steps, device, timesteps, values)

    def _estimates(self, x: Tensor, output: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        kind = self.config.prediction_type
        if kind == "epsilon":
            return x - s * output, output
        x0 = output if kind == "sample" else x / (s**2 + 1) - output * s / (s**2 + 1).sqrt()
        return x0, (x - x0) / s

    def _mean(self, x0: Tensor, s: Tensor) -> Tensor:
        return x0
