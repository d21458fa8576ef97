"""Native ops; each is drop-in for any torch project."""

from oneshot_fast.ops.latent_mse import latent_mse
from oneshot_fast.ops.patch_outer import patch_outer
from oneshot_fast.ops.patch_rotate import patch_rotate
from oneshot_fast.ops.pixel_l1 import pixel_l1
from oneshot_fast.ops.skew_exp import skew_exp

__all__ = ["latent_mse", "patch_outer", "patch_rotate", "pixel_l1", "skew_exp"]
