"""The single step that a one-step pipeline takes, read from its scheduler."""

import math
from dataclasses import dataclass

from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from torch import Tensor

from oneshot_fast.errors import ModelError

_OTHER_FORM = (
    "this model's step is not of this form, one of Euler or EulerAncestral with prediction type "
    "epsilon or v_prediction; another scheduler would not make it one"
)


@dataclass(frozen=True)
class Step:
    """The scheduler's single step: x0 = ``skip`` * eps - ``sigma`` * output(``scale`` * eps).

    Attributes:
        timestep: Training timestep the denoiser is evaluated at.
        scale: Factor from N(0, 1) noise to the denoiser's input.
        skip: Factor from N(0, 1) noise to the step's first term.
        sigma: Factor of the denoiser's output.
    """

    timestep: Tensor
    scale: float
    skip: float
    sigma: float

    @classmethod
    def from_scheduler(cls, scheduler: object) -> "Step":
        """Read the step that ``pipe(num_inference_steps=1)`` takes.

        Source: Karras et al. 2022 (arXiv 2206.00364), with the last sigma 0, where the ancestral
        and the plain Euler step are the same.

        Raises:
            ModelError: For a scheduler or prediction type whose single step is not of this form.
        """
        if not isinstance(scheduler, EulerAncestralDiscreteScheduler | EulerDiscreteScheduler):
            raise ModelError(f"the scheduler is {type(scheduler).__name__}: {_OTHER_FORM}")
        prediction = scheduler.config.prediction_type
        if prediction not in ("epsilon", "v_prediction"):
            raise ModelError(f"the prediction type is {prediction!r}: {_OTHER_FORM}")
        scheduler.set_timesteps(1)
        if scheduler.sigmas[-1] != 0:
            raise ModelError(f"its single step ends at a sigma above 0: {_OTHER_FORM}")
        timestep = scheduler.timesteps[0]
        if timestep < 0.9 * (scheduler.config.num_train_timesteps - 1):
            raise ModelError(
                f"its single step starts at timestep {int(timestep)}, not at the noisiest one; "
                'set "timestep_spacing": "trailing" in scheduler/scheduler_config.json'
            )
        init, sigma = float(scheduler.init_noise_sigma), float(scheduler.sigmas[0])
        norm = math.sqrt(sigma**2 + 1)
        if prediction == "epsilon":
            return cls(timestep, init / norm, init, sigma)
        return cls(timestep, init / norm, init / norm**2, sigma / norm)
