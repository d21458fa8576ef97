"""skew_exp: the orthogonal matrix exp(a - a^T)."""

import torch
from torch import Tensor


def skew_exp(a: Tensor) -> Tensor:
    """Matrix exponential of the skew part of ``a``: exp(a - a^T), orthogonal with determinant 1.

    Args:
        a: Generators, [..., D, D], D at most 1024; only a - a^T matters.

    Returns:
        Orthogonal matrices, [..., D, D], in the dtype of ``a``.

    Raises:
        RuntimeError: ``a`` is not a batch of square matrices.
    """
    return reference(a)


def reference(a: Tensor) -> Tensor:
    """Plain-torch definition of ``skew_exp``."""
    return torch.matrix_exp(a - a.mT)
