"""How a noise is searched for a reward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from oneshot_fast.errors import require
from oneshot_fast.jobs.assign.objective import AssignOptions
from oneshot_fast.search.movers import free as free_noise

OptimizeMethod = Literal["sphere", "rotation", "white", "free", "best_of_n"]


@dataclass(frozen=True)
class OptimizeOptions:
    """How a noise is searched."""

    method: OptimizeMethod = "sphere"
    """sphere (free at constant energy), white (the energy of each part of its spectrum is constant,
    too) and rotation of its patches keep the noise on the Gaussian shell; free follows ReNO: SGD
    with Nesterov momentum, clipped gradients and a prior on the norm; best_of_n draws
    --candidates noises and needs no gradient."""
    steps: int = 50
    """Gradient steps."""
    lr: float | Literal["auto"] = "auto"
    """Step size: radians by which a step turns the noise, where auto finds it while searching; for
    free, SGD's, where auto is ReNO's 5."""
    candidates: int | None = None
    """Random noises to choose the start from; by default 1, and 32 for best_of_n."""
    max_angle: float | None = None
    """Keep the noise within so many radians of its start; not for free. For rotations, the RMS of
    the angles by which they turn."""
    patch_size: int = 2
    """rotation: side of the rotated patches in latent pixels; it divides the latent."""
    rotation_groups: int = 1
    """rotation: G; the latent is cut into G x G tiles with a rotation each."""
    noise_l2_weight: float = 0.0
    """Weight of the mean squared distance between the noise and its start."""
    prior_weight: float | None = None
    """Weight of the negative log density of the noise's norm; by default 0, and ReNO's 0.01 for
    free. The other methods keep the norm."""

    @property
    def gradient_steps(self) -> int:
        """Steps that follow a gradient."""
        return 0 if self.method == "best_of_n" else self.steps

    @property
    def draws(self) -> int:
        """Random noises per image."""
        return self.candidates or (32 if self.method == "best_of_n" else 1)

    @property
    def norm_weight(self) -> float:
        """Weight of the prior on the norm."""
        default = free_noise.PRIOR_WEIGHT if self.method == "free" else 0.0
        return default if self.prior_weight is None else self.prior_weight

    def check(self) -> None:
        """Raise UserError for values that make no sense."""
        require(
            self.candidates is None or self.candidates >= 1,
            f"candidates is {self.candidates}; give at least 1",
        )
        require(
            self.method != "free" or self.max_angle is None,
            "max_angle is not for free; weigh the distance by --noise_l2_weight",
        )
        for name in ("noise_l2_weight", "prior_weight"):
            value = getattr(self, name) or 0.0
            require(0 <= value < math.inf, f"{name} is {value}; give a number, 0 or more")
        self.search().check()

    def search(self) -> AssignOptions:
        """The same for ``Search``."""
        kept = {"free": "sphere", "best_of_n": "search"}.get(self.method, self.method)
        lr = free_noise.LR if self.lr == "auto" and self.method == "free" else self.lr
        return AssignOptions(
            assign_method=kept,  # type: ignore[arg-type]
            steps=self.steps,
            lr=lr,
            max_angle=self.max_angle,
            sphere_optimizer="adam",
            patch_size=self.patch_size,
            rotation_groups=self.rotation_groups,
        )
