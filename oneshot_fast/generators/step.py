"""How a scheduler takes its steps, read by asking it for them.

Each step is linear in its sample x, the network's output and fresh noise z in N(0, 1):

    x0 = skip x - sigma output(scale x),   x' = keep x + change output + noise z

so that all is as ``pipe(...)`` has it, whatever the scheduler's settings.
"""

import copy
import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, TCDScheduler
from torch import Tensor

from oneshot_fast.errors import ModelError, refused

# keys of a scheduler's config that make its step what is refused
_CAUSES = {
    "linear": ("clip_sample", "thresholding"),
    "finite": ("rescale_betas_zero_snr", "shift_terminal"),
    "noise": ("variance_type",),
}


@dataclass(frozen=True)
class Step:
    """One step of a scheduler; see the formula above. The first takes N(0, 1) noise as x.

    Attributes:
        timestep: Where it begins, as the denoiser is told.
        scale: Factor from x to the denoiser's input.
        skip: Factor of x in the estimate of the clean latents.
        sigma: Factor of the output in it, with a minus.
        keep: Factor of x in the next sample, after the last step the clean latents.
        change: Factor of the output in it.
        noise: Factor of the fresh noise in it.
    """

    timestep: Tensor
    scale: float
    skip: float
    sigma: float
    keep: float
    change: float
    noise: float

    def __str__(self) -> str:
        """Where it leads, as run folders hash it."""
        return (
            f"Step(timestep={self.timestep!r}, scale={self.scale!r}, skip={self.keep!r}, "
            f"sigma={0.0 - self.change!r})"
        )

    def is_close(self, other: "Step") -> bool:
        """Whether it leads where ``other`` does, to 1e-4."""
        numbers = [(step.timestep, step.scale, step.keep, step.change) for step in (self, other)]
        return all(
            math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4) for a, b in zip(*numbers, strict=True)
        )


class Sampler:
    """A scheduler set to its steps, each of which can be taken any number of times, in float64.

    Attributes:
        config: The scheduler's.
        timesteps: Where the steps begin, as the denoiser is told.
    """

    def __init__(
        self,
        scheduler: Any,
        count: int,
        schedule: Mapping[str, Any],
        *,
        by_estimate: bool = False,
        eta: float = 0.0,
    ) -> None:
        """Set a copy of ``scheduler``, by ``set_timesteps(**schedule)``.

        Args:
            scheduler: Of diffusers.
            count: Steps that it is set to.
            schedule: How.
            by_estimate: The last step ends at the scheduler's estimate.
            eta: What its steps are told, if they take one, as pipelines do.

        Raises:
            ModelError: If it refuses that, or evaluates the denoiser more often.
        """
        self._scheduler = scheduler = copy.deepcopy(scheduler)
        self._count, self._by_estimate, self.config = count, by_estimate, scheduler.config
        with self._named(), refused(ModelError, "cannot be set: "):
            scheduler.set_timesteps(**schedule)
            self.timesteps: list[Tensor] = [t.clone() for t in self._begin(scheduler.timesteps)]
            if len(self.timesteps) != count:
                raise ModelError(
                    f"{'is' if count == 1 else 'are'} {len(self.timesteps)} evaluations"
                )
            if not all(t.isfinite() for t in self.timesteps):
                raise ModelError("is not finite")
        self._init = float(getattr(scheduler, "init_noise_sigma", 1.0))
        for name, value in vars(scheduler).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(scheduler, name, value.double())
        takes = inspect.signature(scheduler.step).parameters
        self._more = {"eta": eta} if "eta" in takes else {}

    def _begin(self, timesteps: Tensor) -> Tensor:
        """Where steps begin, of the scheduler's timesteps."""
        return timesteps

    def __call__(self, k: int, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The denoiser's input, what step ``k``, from 0, gives, and the scheduler's estimate.

        The noise that it draws is that of torch's seed 0.
        """
        scheduler = copy.deepcopy(self._scheduler)
        time = scheduler.timesteps[k]
        x = given = x * self._init if k == 0 else x
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(k)
        if hasattr(scheduler, "scale_model_input"):
            given = scheduler.scale_model_input(x, time)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            found, *others = scheduler.step(output, time, x, **self._more, return_dict=False)
            estimate = others[0] if others else found
            # where the step ends at its estimate, that has been rounded less
            is_end = abs(found - estimate).max() <= 1e-9 * abs(x).max().clamp(min=1)
            if is_end or (self._by_estimate and k == self._count - 1):
                found = estimate
            if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):  # it gives none
                estimate = x - scheduler.sigmas[k] * output
            elif isinstance(scheduler, TCDScheduler):  # its own is of a lower noise level, not of 0
                scheduler.alphas_cumprod[0] = 1
                scheduler._step_index = k
                estimate = scheduler.step(output, time, x, eta=1.0, return_dict=False)[1]
        return given, found, estimate

    def single(self) -> Step:
        """The only step.

        Raises:
            ModelError: If it is random, or not of the form above.
        """
        (step,) = self.steps()
        with self._named():
            if abs(step.noise) > 1e-6 * (abs(step.scale) + abs(step.keep) + abs(step.change)):
                raise ModelError("adds noise at its end")
        return step

    def steps(self) -> list[Step]:
        """All of them.

        Raises:
            ModelError: If one is not of the form above.
        """
        return [self._step(k) for k in range(self._count)]

    def _step(self, k: int) -> Step:
        def at(x: float, output: float) -> Tensor:
            """Its input, and what the step and the estimate give, [3] float64."""
            numbers = (torch.full((1, 1, 1, 1), v, dtype=torch.float64) for v in (x, output))
            found = self(k, *(value.as_subclass(_Exact) for value in numbers))
            return torch.tensor([float(value) for value in found], dtype=torch.float64)

        z = torch.randn(1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        with self._named(k), refused(ModelError, "cannot be taken: "):
            rest = at(0, 0)
            of_x, of_output = at(1, 0) - rest, at(0, 1) - rest
            far = at(1e3, -2e3) - rest
            if not all(v.isfinite().all() for v in (of_x, of_output, far)):
                raise ModelError("is not finite")
            size = of_x[:2].abs().sum() + of_output[1].abs()
            if (far - 1e3 * of_x + 2e3 * of_output).abs().max() > 1e-3 * size:
                raise ModelError("is not linear in noise and output")
        (scale, keep, skip), (_, change, slope) = of_x.tolist(), of_output.tolist()
        noise = float(rest[1] / z)
        return Step(self.timesteps[k], scale, skip, 0.0 - slope, keep, change, noise)

    @contextmanager
    def _named(self, k: int | None = None) -> Iterator[None]:
        """Say of what scheduler and step an error is, and which key of its config makes it."""
        try:
            yield
        except ModelError as error:
            keys = next((keys for what, keys in _CAUSES.items() if what in str(error)), ())
            found = [f'"{key}": {self.config[key]}' for key in keys if self.config.get(key)]
            hint = f" ({', '.join(found)} in scheduler/scheduler_config.json)" if found else ""
            what = f"{self._count} steps" if k is None else f"step {k + 1} of {self._count}"
            what = "single step" if self._count == 1 else what
            name = type(self._scheduler).__name__
            raise ModelError(f"the scheduler is {name}, whose {what} {error}{hint}") from None


class _Exact(Tensor):
    """Numbers that a scheduler does not round to float32."""

    def to(self, *_: Any, **__: Any) -> "_Exact":
        return self


def single_step(scheduler: Any, start: float | None = None, *, by_estimate: bool = False) -> Step:
    """The step of ``pipe(num_inference_steps=1)``, or of ``pipe(timesteps=[start])``.

    Args:
        scheduler: The pipeline's.
        start: Timestep at which the step begins.
        by_estimate: The pipeline decodes the scheduler's estimate, not where the step ends.

    Raises:
        ModelError: If that step is not of this form, or does not begin at ``start``, or at the
            noisiest timestep where that is None.
    """
    noisiest = scheduler.config["num_train_timesteps"] - 1
    if start == noisiest and not _takes_timesteps(scheduler):
        start = None
    sampler = Sampler(scheduler, 1, _schedule(scheduler, start), by_estimate=by_estimate)
    begins = float(sampler.timesteps[0])
    if start is not None and begins != start:
        name = type(scheduler).__name__
        raise ModelError(f"--timestep {start:g}: the scheduler {name} begins at {begins:g} instead")
    if start is None and begins < 0.9 * noisiest:
        raise ModelError(
            f"its single step starts at timestep {int(begins)}, not at the noisiest "
            'one; set "timestep_spacing": "trailing" in scheduler/scheduler_config.json, or '
            "name the timestep that it was distilled for with --timestep"
        )
    return sampler.single()


def _takes_timesteps(scheduler: Any) -> bool:
    return "timesteps" in inspect.signature(scheduler.set_timesteps).parameters


def _schedule(scheduler: Any, start: float | None) -> dict[str, Any]:
    """How the step is set: at the noisiest timestep, or at ``start``."""
    if start is None:
        takes = inspect.signature(scheduler.set_timesteps).parameters
        # at sigma 1, where a flow starts, every shift is the same
        shifts = "mu" in takes and scheduler.config.get("use_dynamic_shifting")
        return {"num_inference_steps": 1, **({"mu": 1.0} if shifts else {})}
    count = scheduler.config.num_train_timesteps
    if not 0 < start < count:
        raise ModelError(f"--timestep {start:g} is not between 0 and {count}")
    if not _takes_timesteps(scheduler):
        raise ModelError(
            f"--timestep {start:g}: the scheduler {type(scheduler).__name__} takes none; name "
            "another one, such as LCMScheduler, in model_index.json"
        )
    return {"timesteps": [int(start) if start.is_integer() else start]}
