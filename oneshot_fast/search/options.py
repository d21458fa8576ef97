"""How a noise is searched, by any objective; what each job adds is in its own options.py."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from oneshot_fast.errors import require

CHOICES = ("best_of_n", "pool")  # among random noises; by gradients: search/movers
DRAWS = 32  # random noises where their number is not given
FREE_PRIOR = 0.01  # weight of the norm's prior, by Eyring et al. 2024 (ReNO, arXiv 2406.04312)


@dataclass(frozen=True)
class SearchOptions:
    """How a noise is searched."""

    method: Annotated[str, arg(aliases=["--assign_method"])] = "sphere"
    """How noises are found. best_of_n (or search): the best of --candidates random noises, by
    forward passes alone. By gradients from a random noise: sphere (free at constant energy), white
    (the energy of each part of its spectrum is constant, too), rotation of its patches, free (no
    constraint, a prior on its norm). best_of_n+sphere and the like start the gradients at the noise
    that was chosen."""
    candidates: int | None = None
    """Random noises to choose from, or to choose the start from; by default 32 for best_of_n and
    pool, else 1."""
    steps: int = 40
    """Gradient steps."""
    lr: float | Literal["auto"] = "auto"
    """Step size: radians by which a step turns the noise, where auto finds it while searching; of
    SGD its own, where auto is ReNO's 5."""
    lr_unit: Literal["radians", "matrix"] = "radians"
    """matrix: lr is that of Adam on the elements of a rotation's matrix, as usual workflows give it
    (--rotation_optimizer raw_adam); radians are 2 sqrt(D - 1) times that, with patches of D
    elements: 5e-4 and D = 16 are 0.0039 radians."""
    max_angle: float | None = None
    """Keep the noise within so many radians of its base noise; uncorrelated noises are pi/2 apart.
    For rotations, the RMS of the angles by which they turn."""
    sphere_optimizer: Literal["lbfgs", "adam"] = "lbfgs"
    """sphere and white: L-BFGS, whose steps are at most lr long, or Adam."""
    rotation_optimizer: Literal["riemannian", "raw_adam"] = "riemannian"
    """rotation: Adam on the rotations themselves, or on a matrix whose exponential they are."""
    free_optimizer: Literal["adam", "sgd"] = "adam"
    """free: Adam, or as ReNO does SGD with Nesterov momentum on clipped gradients."""
    patch_size: int = 2
    """rotation: side of the rotated patches in latent pixels; it divides the latent."""
    rotation_groups: int = 1
    """rotation: G; the latent is cut into G x G tiles with a rotation each."""
    noise_l2_weight: Annotated[float, arg(aliases=["--drift_reg_weight"])] = 0.0
    """Weight of the mean squared distance between the noise and its base noise."""
    prior_weight: float | None = None
    """free: weight of the negative log density of the noise's norm, 0.5 |z|^2 - (d - 1) ln |z|; by
    default ReNO's 0.01. All other methods keep the norm."""
    stop_loss: float | None = None
    """End a search once its loss is this low; its place goes to the next one."""
    stop_patience: int = 0
    """End it once its loss has not fallen by stop_improvement for so many steps; 0: never."""
    stop_improvement: float = 0.01
    """Fall of the loss that counts for stop_patience, relative to the loss."""

    def __post_init__(self) -> None:
        """Give the method that was once called search its name."""
        parts = ("best_of_n" if part == "search" else part for part in self.method.split("+"))
        object.__setattr__(self, "method", "+".join(parts))

    @property
    def choice(self) -> str | None:
        """How random noises are chosen first: best_of_n, pool or None."""
        first = self.method.split("+")[0]
        if first in CHOICES:
            return first
        return "best_of_n" if self.draws > 1 else None

    @property
    def draws(self) -> int:
        """Random noises per search."""
        return self.candidates or (DRAWS if self.method.startswith(CHOICES) else 1)

    @property
    def mover(self) -> str | None:
        """How gradients move the noise then: a name of search/movers, or None."""
        last = self.method.split("+")[-1]
        return None if last in CHOICES else last

    @property
    def gradient_steps(self) -> int:
        """Steps that follow a gradient, 0 without any."""
        return 0 if self.mover is None else self.steps

    @property
    def turns_a_matrix(self) -> bool:
        """Whether Adam moves the elements of a matrix whose exponential rotates."""
        return self.mover == "rotation" and self.rotation_optimizer == "raw_adam"

    @property
    def norm_weight(self) -> float:
        """Weight of the prior on the norm."""
        if self.prior_weight is None:
            return FREE_PRIOR if self.mover == "free" else 0.0
        return self.prior_weight

    @property
    def stops_early(self) -> bool:
        """Whether a search can end before the last step.

        Then a result depends, to rounding, on the searches beside it; without it an interrupted run
        that was resumed equals an uninterrupted one bit by bit.
        """
        return self.stop_loss is not None or self.stop_patience > 0

    def check(self) -> None:
        """Raise UserError for values that make no sense."""
        require(
            self.method.count("+") <= (self.method.split("+")[0] in CHOICES),
            f"method is '{self.method}'; only best_of_n and pool go on with another, as in "
            "best_of_n+sphere",
        )
        lr, stop = self.lr, self.stop_loss
        for name, fits, advice in (
            ("candidates", self.candidates is None or self.candidates >= 1, "give at least 1"),
            ("steps", self.steps >= 1, "give at least 1"),
            ("lr", lr == "auto" or 0 < lr < math.inf, "give a positive number or auto"),
            ("max_angle", self.max_angle is None or self.max_angle > 0, "give radians above 0"),
            ("stop_loss", stop is None or math.isfinite(stop), "give a finite loss"),
            ("stop_patience", self.stop_patience >= 0, "give 0 or more steps"),
            ("stop_improvement", 0 <= self.stop_improvement < 1, "give a number from 0 to below 1"),
        ):
            require(fits, f"{name} is {getattr(self, name)}; {advice}")
        require(
            self.lr_unit == "radians" or (self.turns_a_matrix and lr != "auto"),
            "lr_unit matrix is for the method rotation with rotation_optimizer raw_adam, and needs "
            "a number as lr",
        )
        for name, value in vars(self).items():
            require(
                not name.endswith("_weight") or 0 <= (value or 0) < math.inf,
                f"{name} is {value}; loss weights must be finite and not negative",
            )
        require(
            not self.prior_weight or self.mover == "free",
            f"prior_weight is for the method free; {self.method} keeps the norm",
        )
