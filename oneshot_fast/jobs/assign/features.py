"""Features of images, by a function of the user's, in which their distance is measured."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oneshot_fast.errors import DataError, require
from oneshot_fast.runtime.user_functions import import_function


@functools.cache
def feature_function(name: str) -> Callable[[Tensor], Any]:
    """The function that ``name``, python:module.function, names; UserError if there is none."""
    return import_function(name, "features")


def features_of(images: Tensor, name: str) -> Tensor:
    """Features [B, F] float32 that a function gives to images [B, 3, H, W] float32 in [0, 1] RGB.

    ``name`` is python:module.function; it returns a floating tensor [B, ...], differentiable.

    Raises:
        UserError: If it returns something else, or no gradient where one is needed.
    """
    found = feature_function(name)(images)
    require(
        torch.is_tensor(found) and found.is_floating_point(),
        f"features {name} must be a floating tensor, not {_kind(found)}",
    )
    require(
        found.ndim > 0 and len(found) == len(images) and found.numel() >= len(images),
        f"features {name} have shape {list(found.shape)}, expected [{len(images)}, ...], a row for "
        "each image",
    )
    needs_gradient = images.requires_grad and torch.is_grad_enabled()
    require(
        found.requires_grad or not needs_gradient,
        f"features {name} carry no gradient; make them differentiable, or use --method "
        "best_of_n or pool",
    )
    return found.float().flatten(1) if found.ndim > 1 else found.float()[:, None]


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
        UserError: If the function ``name`` does not fit.
    """
    found = features_of(images, name)
    require(
        found.shape == target.shape,
        f"features {name} of a made image have {found.shape[1]} values, of its target "
        f"{target.shape[1]}",
    )
    return (found - target).square().mean(1)


def _kind(value: object) -> str:
    return f"one of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
