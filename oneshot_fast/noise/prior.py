"""A penalty that grows as the norm of a noise leaves that of a sample of N(0, 1).

It acts on a noise that moves freely (``--method free``); all other ways to move one keep its norm.
"""

from torch import Tensor


def norm_penalty(z: Tensor) -> Tensor:
    """Negative log density of the norms of ``z`` [B, C, h, w], less its minimum: [B].

    It is 0.5 |z|^2 - (d - 1) ln |z| up to a constant, 0 at |z|^2 = d - 1, the mode: the norm of d
    Gaussian numbers has the chi distribution. Its mean over Gaussian noises is about 0.5. Source:
    Samuel et al. 2023 (arXiv 2306.08687); used for one-step generators by Eyring et al. 2024 (ReNO,
    arXiv 2406.04312).
    """
    freedom = z.shape[1:].numel() - 1
    # In this form nothing large cancels: 0.5 |z|^2 is 8192 for SDXL, where float32 has 3 digits.
    excess = z.flatten(1).square().sum(1) / freedom - 1
    return 0.5 * freedom * (excess - excess.log1p())
