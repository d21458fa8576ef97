"""Limited-memory BFGS with a memory of its own for each search."""

from __future__ import annotations

import torch
from torch import Tensor

from oneshot_fast.search.movers.adam import TINY

PAIRS = 20  # steps and changes of the gradient that are remembered
_CURVED = 1e-6  # cosine between the two of a pair from which it counts as curvature


def newton_direction(gradient: Tensor, moves: Tensor, changes: Tensor, first: Tensor) -> Tensor:
    """Approximate inverse Hessian times gradient by the two-loop recursion.

    Liu and Nocedal 1989 (Math. Programming 45). It starts from the geometric mean of the two step
    sizes of Barzilai and Borwein, as Dai, Al-Baali and Yang 2015 take for gradient descent.

    Args:
        gradient: [B, K, n].
        moves: Steps, [B, pairs, K, n], the newest last; 0 where there was none.
        changes: What they changed in the gradient, like ``moves``.
        first: Factor of the gradient where no pair shows positive curvature, [B].

    Returns:
        [B, K, n].
    """
    s, y, q = moves.flatten(2), changes.flatten(2), gradient.flatten(1)
    curvature, lengths, changed = (s * y).sum(-1), s.norm(dim=-1), y.norm(dim=-1)  # [B, pairs]
    counts = curvature > _CURVED * lengths * changed
    inverse = torch.where(counts, 1 / curvature.where(counts, torch.ones_like(curvature)), 0)
    for k in range(s.shape[1]):
        newest = lengths[:, k] / changed[:, k].clamp_min(TINY)
        first = torch.where(counts[:, k], newest, first)
    back = []
    for k in reversed(range(s.shape[1])):
        part = inverse[:, k, None] * (s[:, k] * q).sum(1, keepdim=True)
        q = q - part * y[:, k]
        back.append(part)
    q = first[:, None] * q
    for k, part in enumerate(reversed(back)):
        q = q + s[:, k] * (part - inverse[:, k, None] * (y[:, k] * q).sum(1, keepdim=True))
    return q.view_as(gradient)
