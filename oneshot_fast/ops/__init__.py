"""Native ops; each is drop-in for any torch project."""

from oneshot_fast.ops._backends import backends, use_backend
from oneshot_fast.ops.cayley import SPEC as _CAYLEY
from oneshot_fast.ops.cayley import cayley
from oneshot_fast.ops.latent_mse import SPEC as _LATENT_MSE
from oneshot_fast.ops.latent_mse import latent_mse
from oneshot_fast.ops.patches import OUTER as _PATCH_OUTER
from oneshot_fast.ops.patches import ROTATE as _PATCH_ROTATE
from oneshot_fast.ops.patches import patch_outer, patch_rotate
from oneshot_fast.ops.pixel_l1 import SPEC as _PIXEL_L1
from oneshot_fast.ops.pixel_l1 import pixel_l1
from oneshot_fast.ops.rotation_step import rotation_step
from oneshot_fast.ops.skew_exp import SPEC as _SKEW_EXP
from oneshot_fast.ops.skew_exp import skew_exp

OPS = (_PATCH_ROTATE, _PATCH_OUTER, _SKEW_EXP, _CAYLEY, _LATENT_MSE, _PIXEL_L1)
"""Descriptions that the generic tests and the benchmarks read."""

__all__ = [
    "OPS",
    "backends",
    "cayley",
    "latent_mse",
    "patch_outer",
    "patch_rotate",
    "pixel_l1",
    "rotation_step",
    "skew_exp",
    "use_backend",
]
