"""The single step that a one-step pipeline takes, read by asking its scheduler for it."""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
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
    """The scheduler's single step: x0 = ``skip`` * eps - ``sigma`` * output(``scale`` * eps).

    Attributes:
        timestep: Where the step begins, as the scheduler has it.
        scale: Factor from N(0, 1) noise to the denoiser's input.
        skip: Factor from N(0, 1) noise to the step's first term.
        sigma: Factor of the denoiser's output.
    """

    timestep: Tensor
    scale: float
    skip: float
    sigma: float

    def is_close(self, other: "Step") -> bool:
        """Whether all numbers are those of ``other``, to 1e-4."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return all(math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-4) for a, b in pairs)

    @classmethod
    def of(
        cls, timestep: Tensor, evaluate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> "Step":
        """The coefficients of a step.

        Args:
            timestep: Where it begins.
            evaluate: Gives its input and the clean latents for a noise and its output, each
                [1, 1, 1, 1].

        Raises:
            ModelError: If the step is random, or not of this form.
        """

        def at(eps: float, output: float) -> tuple[float, float]:
            numbers = (torch.full((1, 1, 1, 1), v, dtype=torch.float64) for v in (eps, output))
            given, latents = evaluate(*(value.as_subclass(_Exact) for value in numbers))
            return float(given), float(latents)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            (scale, skip), (_, slope), (_, rest) = at(1, 0), at(0, 1), at(0, 0)
            far_scale, far = at(1e3, -2e3)
        if not all(map(math.isfinite, (scale, skip, slope, far))):
            raise ModelError("is not finite")
        size = abs(scale) + abs(skip) + abs(slope)
        if abs(rest) > 1e-6 * size:
            raise ModelError("adds noise at its end")
        off = far_scale - 1e3 * scale, far - 1e3 * skip + 2e3 * slope
        if max(map(abs, off)) > 1e-3 * size:
            raise ModelError("is not linear in noise and output")
        return cls(timestep, scale, skip, 0.0 - slope)

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, start: float | None = None, *, by_estimate: bool = False
    ) -> "Step":
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
        trial = Trial(scheduler, _schedule(scheduler, start))
        if start is not None and trial.timestep != start:
            begins = f"{type(scheduler).__name__} begins at {float(trial.timestep):g} instead"
            raise ModelError(f"--timestep {start:g}: the scheduler {begins}")
        if start is None and trial.timestep < 0.9 * noisiest:
            raise ModelError(
                f"its single step starts at timestep {int(trial.timestep)}, not at the noisiest "
                'one; set "timestep_spacing": "trailing" in scheduler/scheduler_config.json, or '
                "name the timestep that it was distilled for with --timestep"
            )
        end = 2 if by_estimate else 1

        def evaluate(eps: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
            found = trial(eps * trial.init, output)
            return found[0], found[end]

        return trial.step(trial.timestep, evaluate)


class Trial:
    """A scheduler set to one step, which can be taken any number of times, in float64.

    Attributes:
        config: The scheduler's.
        timestep: Where the step begins, as the scheduler has it.
        init: Factor from N(0, 1) noise to the pipeline's first latents.
    """

    def __init__(self, scheduler: Any, schedule: Mapping[str, Any]) -> None:
        """Set a copy of ``scheduler``, by ``set_timesteps(**schedule)``.

        Raises:
            ModelError: If it refuses that, or takes several steps.
        """
        self._scheduler = scheduler = copy.deepcopy(scheduler)
        self.config = scheduler.config
        with self._named(), refused(ModelError, "cannot be set: "):
            scheduler.set_timesteps(**schedule)
            ends_at_zero = len(scheduler.timesteps) == 2 and scheduler.timesteps[1] == 0
            if len(scheduler.timesteps) != 1 and not ends_at_zero:
                raise ModelError(f"is {len(scheduler.timesteps)} evaluations")
            self.timestep: Tensor = scheduler.timesteps[0].clone()
            if not self.timestep.isfinite():
                raise ModelError("is not finite")
        self.init = float(getattr(scheduler, "init_noise_sigma", 1.0))
        for name, value in vars(scheduler).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                setattr(scheduler, name, value.double())
        takes = inspect.signature(scheduler.step).parameters
        self._more = {"eta": 0.0} if "eta" in takes else {}  # as pipelines do

    def __call__(self, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The denoiser's input, what the step gives, and the scheduler's estimate beside it."""
        scheduler = copy.deepcopy(self._scheduler)
        time, given = scheduler.timesteps[0], x
        if hasattr(scheduler, "scale_model_input"):
            given = scheduler.scale_model_input(x, time)
        found, *others = scheduler.step(output, time, x, **self._more, return_dict=False)
        estimate = others[0] if others else found
        # where the step ends at its estimate, that has been rounded less
        is_end = abs(found - estimate).max() <= 1e-9 * abs(x).max().clamp(min=1)
        return given, estimate if is_end else found, estimate

    def step(
        self, timestep: Tensor, evaluate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ) -> Step:
        """As ``Step.of``; what is refused is said of this scheduler."""
        with self._named(), refused(ModelError, "cannot be taken: "):
            return Step.of(timestep, evaluate)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Say of what scheduler an error is, and which key of its config makes it."""
        try:
            yield
        except ModelError as error:
            keys = next((keys for what, keys in _CAUSES.items() if what in str(error)), ())
            found = [f'"{key}": {self.config[key]}' for key in keys if self.config.get(key)]
            hint = f" ({', '.join(found)} in scheduler/scheduler_config.json)" if found else ""
            name = type(self._scheduler).__name__
            raise ModelError(f"the scheduler is {name}, whose single step {error}{hint}") from None


class _Exact(Tensor):
    """Numbers that a scheduler does not round to float32."""

    def to(self, *_: Any, **__: Any) -> "_Exact":
        return self


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
