"""The distance between features of images, by a function of the user's."""

import torch
from torch import Tensor

from oneshot_fast.errors import DataError, require
from oneshot_fast.evaluation.features import features_of


@torch.no_grad()
def target_features(image: Tensor, name: str) -> Tensor:
    """Features [F] float32 of a target image [3, H, W] in [0, 1].

    Computed alone, so that they do not depend on other images.

    Raises:
        DataError: If they are not finite.
        UserError: If the function does not fit.
    """
    found = features_of(image[None], name)[0]
    if not found.isfinite().all():
        raise DataError(f"features {name} of the image are NaN or infinite")
    return found


def feature_mse(images: Tensor, target: Tensor, name: str) -> Tensor:
    """Mean squared distance, [B] differentiable, of images' features from ``target`` [B, F].

    Raises:
        UserError: If the function ``name`` does not fit, or gives no gradient where one is needed.
    """
    found = features_of(images, name)
    needs_gradient = images.requires_grad and torch.is_grad_enabled()
    require(
        found.requires_grad or not needs_gradient,
        f"features {name} carry no gradient; make them differentiable, or use --method "
        "best_of_n or pool",
    )
    require(
        found.shape == target.shape,
        f"features {name} of a made image have {found.shape[1]} values, of its target "
        f"{target.shape[1]}",
    )
    return (found - target).square().mean(1)
