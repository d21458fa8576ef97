"""Angles of rotations, and the rotation that turns a noise closest to a pattern."""

import math

import pytest
import torch

from oneshot_fast import ops
from oneshot_fast.noise.rotation import rotation_angles, towards


@pytest.mark.parametrize("degrees", [0.0, 30.0, 90.0, 180.0])
def test_rotation_angle_of_planes_turned_by_the_same_angle(degrees: float) -> None:
    angle = math.radians(degrees)
    plane = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]],
        dtype=torch.float64,
    )
    basis = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double())[
        0
    ]
    q = basis @ torch.block_diag(plane, plane, plane) @ basis.T
    half = torch.block_diag(plane, plane, torch.eye(2, dtype=torch.float64))
    angles = rotation_angles(torch.stack([q, half]))
    expected = torch.tensor([degrees, degrees * math.sqrt(4 / 6)], dtype=torch.float64)
    torch.testing.assert_close(angles, expected, atol=1e-5, rtol=0)


def test_towards_is_the_closest_rotation() -> None:
    channels, p = 2, 2
    D = channels * p * p
    draw = torch.Generator().manual_seed(0)
    eps, pattern = (
        torch.randn(3, channels, 8, 16, generator=draw),
        torch.randn(channels, 8, 16, generator=draw),
    )
    q = towards(pattern, eps, p)
    torch.testing.assert_close(q @ q.mT, torch.eye(D).expand(3, D, D), atol=1e-5, rtol=0)
    best = (ops.patch_rotate(eps, q, p) * pattern).sum((1, 2, 3))
    for seed in range(20):
        skew = 0.2 * torch.randn(3, D, D, generator=torch.Generator().manual_seed(seed))
        other = torch.linalg.matrix_exp(skew - skew.mT) @ q
        assert ((ops.patch_rotate(eps, other, p) * pattern).sum((1, 2, 3)) < best).all()
