"""Penalties that grow as a noise stops looking like a sample of N(0, 1).

Which of them act in the E-step: all its methods keep the norm, so `norm_penalty` is a constant
there. Where every patch is turned by one matrix q, the covariance of the patches, q S q^T, keeps
its eigenvalues, so a penalty on it would be a constant, too, for patches of the same grid;
`covariance_penalty` therefore looks at elements drawn at random, as Tang et al. do. It and
`moment_penalty` act with every method. All three act on a noise that is changed freely.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

_MOMENTS = (0.0, 1.0, 0.0, 3.0)  # of N(0, 1), the first to the fourth
_VARIANCES = (1.0, 2.0, 15.0, 96.0)  # of z, z^2, z^3, z^4
_SIDE, _DRAWS = 16, 4


def norm_penalty(z: Tensor) -> Tensor:
    """Negative log density of the noise's norm, less its minimum: 0 at |z|^2 = d - 1, the mode.

    It is 0.5 |z|^2 - (d - 1) ln |z| up to a constant: the norm of d Gaussian numbers has the chi
    distribution. Its mean over Gaussian noises is about 0.5. Source: Samuel et al. 2023
    (arXiv 2306.08687); used for one-step generators by Eyring et al. 2024 (ReNO, arXiv 2406.04312).

    Args:
        z: Noise, [B, C, h, w], of more than one element.

    Returns:
        [B], differentiable.
    """
    freedom = z.shape[1:].numel() - 1
    # In this form nothing large cancels: 0.5 |z|^2 is 8192 for SDXL, where float32 has 3 digits.
    excess = z.flatten(1).square().sum(1) / freedom - 1
    return 0.5 * freedom * (excess - excess.log1p())


def moment_penalty(z: Tensor) -> Tensor:
    """Mean over the first four moments of the squared distance in standard errors.

    For k = 1 ... 4, d (mean(z^k) - m_k)^2 / var(z^k) with m_k and var those of N(0, 1): about 1 for
    a Gaussian noise. Source: the method of moments; Tang et al. 2024 (arXiv 2405.18881) bound the
    first two in the same way.

    Args:
        z: Noise, [B, C, h, w].

    Returns:
        [B], differentiable.
    """
    flat = z.flatten(1)
    found = torch.stack([flat.pow(k + 1).mean(1) - m for k, m in enumerate(_MOMENTS)], 1)
    return flat.shape[1] * (found.square() / found.new_tensor(_VARIANCES)).mean(1)


def covariance_penalty(z: Tensor) -> Tensor:
    """Squared distance of a covariance from identity, 1 in the mean for a Gaussian noise.

    The d elements, in a random order fixed once, make m = d / k vectors of k elements with
    S = mean(v v^T); the penalty is m / (k (k + 1)) |S - I|^2 (Frobenius), averaged over 4 orders.
    Source: Tang et al. 2024 (arXiv 2405.18881, "probability regularization"), who take the
    spectral norm and turn it into a probability.

    Args:
        z: Noise, [B, C, h, w].

    Returns:
        [B], differentiable.
    """
    B, d = z.shape[0], z.shape[1:].numel()
    k = math.gcd(d, _SIDE)
    v = z.flatten(1)[:, _orders(d, z.device)].view(B, _DRAWS, d // k, k)
    S = v.mT @ v / (d // k)
    distance = (S - torch.eye(k, device=z.device, dtype=z.dtype)).square().sum((2, 3)).mean(1)
    return distance * (d / k) / (k * (k + 1))


@functools.lru_cache(maxsize=8)
def _orders(d: int, device: torch.device) -> Tensor:
    """Random orders of d elements, the same in every run: [4, d] int64."""
    source = torch.Generator().manual_seed(d)
    return torch.stack([torch.randperm(d, generator=source) for _ in range(_DRAWS)]).to(device)
