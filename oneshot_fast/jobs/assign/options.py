"""How the noise of a target is searched."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from oneshot_fast.errors import require
from oneshot_fast.evaluation.features import feature_function
from oneshot_fast.search.movers.registry import mover_of
from oneshot_fast.search.options import SearchOptions


@dataclass(frozen=True)
class AssignOptions(SearchOptions):
    """How a noise is searched."""

    method: Annotated[str, arg(aliases=["--assign_method"])] = "sphere"
    """How noises are found. best_of_n (or search): the best of --candidates random noises of each
    target; pool: the targets of a prompt share their candidates, each gets its own; both only run
    the generator forwards. By gradients from a random noise: sphere (free at constant energy),
    white (the energy of each part of its spectrum is constant, too), rotation of its patches, free
    (no constraint, a prior on its norm: the noise is no longer Gaussian, see docs/noise.md).
    best_of_n+sphere, pool+sphere and the like start the gradients at the noise that was chosen."""
    pool_matching: Literal["one_to_one", "nearest"] = "one_to_one"
    """pool: no noise serves twice and the sum of losses is the smallest, or each target takes its
    nearest."""
    pool_window: int = 1024
    """pool: targets, in the order of the data, that share their noises where their prompts are the
    same; bounds the memory."""
    pool_reject_below: float = 0.0
    """pool: drop noises that are nearer than this loss to any target (RS-IMLE)."""
    latent_loss_weight: float = 1.0
    """Weight of the mean squared error between the latents."""
    pixel_l1_weight: float = 0.0
    """Weight of the mean absolute error between the images ([0, 1] RGB); 0 never decodes."""
    feature_weight: float = 0.0
    """Weight of the mean squared error between the images' --features; decodes."""
    features: str | None = None
    """python:module.function: a differentiable function of yours, from images [B, 3, H, W] in
    [0, 1] RGB, on the generator's device, to features [B, ...]."""

    @property
    def decodes(self) -> bool:
        """Whether a loss needs images."""
        return self.pixel_l1_weight > 0 or self.feature_weight > 0

    def check(self) -> None:
        """Raise UserError for values that make no sense."""
        super().check()
        mover_of(self)
        require(self.pool_window >= 1, f"pool_window is {self.pool_window}; give at least 1")
        require(
            any((self.latent_loss_weight, self.pixel_l1_weight, self.feature_weight)),
            "latent_loss_weight, pixel_l1_weight and feature_weight are 0; there is nothing to "
            "match",
        )
        require(
            (self.features is None) == (self.feature_weight == 0),
            "give --features python:module.function and a --feature_weight above 0 together",
        )
        if self.features is not None:
            feature_function(self.features)
