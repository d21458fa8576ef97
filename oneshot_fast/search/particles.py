"""Steering of particles: which of them go on, by what they promise.

FK steering (Singhal et al. 2025, arXiv 2501.06848) and SVDD (Li et al. 2024, arXiv 2408.08252) as
rules on arrays: P prompts, N particles of each, float64. Weights are kept as logarithms, so no
reward is too large for them, and those of particles that were not resampled go on.
"""

from typing import Literal, get_args

import numpy as np

from oneshot_fast.errors import require
from oneshot_fast.search.pruning import Floats, Ints

Potential = Literal["diff", "max", "add", "rt"]


class Particles:
    """Weights of FK steering's particles.

    After a scored step with rewards r_i a particle's weight takes a factor G: exp(lambda d) with
    d = r_i - r_(i-1) ("diff", r_(-1) = 0), the largest r_j so far ("max"), the sum of them ("add"),
    or r_i ("rt"). The last factor makes the product over a particle's line exp(lambda r(x0)).

    Attributes:
        log_weights: [P, N].
        log_z: [P], estimate of log E exp(lambda r(x0)) over images that were not steered.
    """

    def __init__(self, prompts: int, count: int, potential: Potential, scale: float) -> None:
        """Start with equal weights.

        Args:
            prompts: P.
            count: N.
            potential: What a step's factor is made of.
            scale: lambda, the inverse temperature.
        """
        require(potential in get_args(Potential), f"no potential {potential}")
        self._kind, self._scale = potential, scale
        self.log_weights: Floats = np.zeros((prompts, count))
        self.log_z: Floats = np.zeros(prompts)
        self._last = np.zeros((prompts, count))  # reward before
        self._most = np.full((prompts, count), -np.inf)
        self._sum = np.zeros((prompts, count))
        self._paid = np.zeros((prompts, count))  # sum of log G along the line

    def weigh(self, rewards: Floats, is_last: bool = False) -> Floats:
        """Multiply the weights by this step's factors; returns their logarithms, [P, N].

        A particle whose reward is not finite has no weight from then on.
        """
        with np.errstate(invalid="ignore"):
            self._most = np.maximum(self._most, rewards)
            self._sum = self._sum + rewards
            of = {
                "diff": rewards - self._last, "max": self._most, "add": self._sum, "rt": rewards,
            }  # fmt: skip
            factor = self._scale * of[self._kind]
            if is_last:
                factor = self._scale * rewards - self._paid
            self._paid, self._last = self._paid + factor, rewards
            found = self.log_weights + factor
        self.log_weights = np.where(np.isfinite(found), found, -np.inf)
        return factor

    def ess(self) -> Floats:
        """Effective number of particles, [P]: (sum w)^2 / sum w^2; 0 where none has weight."""
        w = shares(self.log_weights)
        square = (w**2).sum(-1)
        return np.divide(1.0, square, out=np.zeros_like(square), where=square > 0)

    def resample(self, ancestors: Ints, where: np.ndarray) -> None:
        """Let the prompts ``where`` [P] go on with ``ancestors`` [P, N], at equal weights."""
        N = self.log_weights.shape[1]
        rows = np.where(where[:, None], ancestors, np.arange(N))
        for name in ("_last", "_most", "_sum", "_paid"):
            setattr(self, name, np.take_along_axis(getattr(self, name), rows, 1))
        self.log_z = self.log_z + np.where(where, self._log_mean(), 0.0)
        self.log_weights = np.where(where[:, None], 0.0, self.log_weights)

    def finish(self) -> None:
        """Let ``log_z`` take the weights of the end."""
        self.log_z = self.log_z + self._log_mean()

    def _log_mean(self) -> Floats:
        top = self.log_weights.max(-1)
        top = np.where(np.isfinite(top), top, 0.0)
        with np.errstate(divide="ignore"):
            return top + np.log(np.exp(self.log_weights - top[:, None]).mean(-1))


def shares(log_weights: Floats) -> Floats:
    """Weights [..., N] that sum to 1, or zeros where all are exp(-inf)."""
    top = log_weights.max(-1, keepdims=True)
    w = np.exp(log_weights - np.where(np.isfinite(top), top, 0.0))
    total = w.sum(-1, keepdims=True)
    return np.divide(w, total, out=np.zeros_like(w), where=total > 0)


def systematic(log_weights: Floats, uniforms: Floats) -> Ints:
    """Ancestors [P, N], rising, by systematic resampling with one uniform number [P] for each P.

    Particle k has floor or ceil of N w_k copies (Carpenter et al. 1999).
    """
    N = log_weights.shape[-1]
    return _inverse(log_weights, (np.arange(N) + uniforms[:, None]) / N)


def drawn(log_weights: Floats, uniforms: Floats) -> Ints:
    """One particle [...] of each row [..., N], drawn by its weight with uniform numbers [...]."""
    flat = log_weights.reshape(-1, log_weights.shape[-1])
    return _inverse(flat, uniforms.reshape(-1, 1))[:, 0].reshape(uniforms.shape)


def _inverse(log_weights: Floats, places: Floats) -> Ints:
    """Particles [P, m] at ``places`` [P, m] of their cumulated shares."""
    weights = shares(log_weights)
    ends = weights.cumsum(-1)
    found = (ends[:, None] <= (places * ends[:, -1:])[..., None]).sum(-1)
    last = weights.shape[-1] - 1 - (weights[:, ::-1] > 0).argmax(-1)  # that has any weight
    return np.minimum(found, last[:, None])
