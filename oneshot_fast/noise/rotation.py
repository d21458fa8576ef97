"""Patch-wise rotations of noise: as an nn.Module, the closest one, and the angles of found ones."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from oneshot_fast import ops
from oneshot_fast.errors import require


class PatchRotation(nn.Module):
    """One learnable rotation per image, applied to every p x p patch of its latent noise.

    The parameter ``skew`` is any square matrix a; q = exp(a - a^T) is orthogonal, so the rotated
    noise has the energy and, for a fixed q, the law of the base noise. It starts at the identity.
    Source of the parametrisation: Lezcano-Casado and Martinez-Rubio 2019 (arXiv 1901.08428).
    """

    def __init__(
        self,
        latent_shape: Sequence[int],
        patch_size: int,
        groups: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        """Make the identity rotation.

        Args:
            latent_shape: [B, C, H, W] of the noises, in latent pixels.
            patch_size: Patch side p in latent pixels; divides H and W.
            groups: Tiles of patches per side, each with its own q; divides H/p and W/p.
            device: Where the parameter lives.

        Raises:
            UserError: If p or groups do not divide the latent.
        """
        super().__init__()
        check_patching(latent_shape[-2:], patch_size, groups)
        B, C = latent_shape[:2]
        tiles = () if groups == 1 else (groups, groups)
        D = C * patch_size**2
        self.patch_size = patch_size
        self.skew = nn.Parameter(torch.zeros(B, *tiles, D, D, device=device))

    def q(self) -> Tensor:
        """Orthogonal matrices, [B, D, D] or [B, G, G, D, D], float32."""
        return ops.skew_exp(self.skew)

    def forward(self, eps: Tensor) -> Tensor:
        """Rotated noise, [B, C, H, W] like ``eps``."""
        return ops.patch_rotate(eps, self.q(), self.patch_size)


def check_patching(size: Sequence[int], patch_size: int, groups: int) -> None:
    """Raise UserError unless patches and tiles divide a latent of ``size`` [H, W]."""
    _check_divides("patch_size", patch_size, size, "latent")
    grid = [side // patch_size for side in size]
    _check_divides("rotation_groups", groups, grid, "patches")


def _check_divides(name: str, value: int, size: Sequence[int], what: str) -> None:
    H, W = size
    sides = [k for k in range(1, min(H, W) + 1) if H % k == 0 and W % k == 0]
    fits = f"{name} {value} does not divide the {H} x {W} {what}; use one of {sides}"
    require(value in sides, fits)


def towards(pattern: Tensor, eps: Tensor, p: int) -> Tensor:
    """Orthogonal q [B, D, D] that turn each noise's patches closest to those of ``pattern``.

    The orthogonal Procrustes problem: with sum t e^T = U S V^T over the patches, of side ``p``, q =
    U V^T. Source: Schoenemann 1966, A generalized solution of the orthogonal Procrustes problem.
    The pattern is [C, H, W], the noises are [B, C, H, W] float32.
    """
    sums = ops.patch_outer(pattern.expand_as(eps).contiguous(), eps, p, (len(eps),))
    left, _, right = torch.linalg.svd(sums)
    return left @ right


def rotation_angles(q: Tensor) -> Tensor:
    """RMS rotation angle of each image in degrees, [B], of q [B, D, D] or [B, G, G, D, D].

    It is sqrt(mean theta^2) over the eigenvalues e^(i theta) of q: 0 leaves the noise as it is, and
    uniformly random rotations have about 104 degrees (pi / sqrt(3)). The cosines are the
    eigenvalues of q's symmetric part, since q is normal.
    """
    cosines = torch.linalg.eigvalsh((q + q.mT) / 2).clamp(-1, 1)
    return cosines.acos().square().flatten(1).mean(1).sqrt().rad2deg()


def angles_between(z: Tensor, eps: Tensor) -> Tensor:
    """Angles in degrees, [B], between noises [B, C, H, W]; accurate for small ones."""
    a, b = (x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True) for x in (z, eps))
    return 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1)).rad2deg()
