"""Measures of a set of samples: prompt accuracy, diversity and the Frechet distance."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from oneshot_fast.data.images import shrink, squared
from oneshot_fast.evaluation.distances import error_of, frechet, resamples
from oneshot_fast.generators.base import Classifier


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet distance between Gaussians fitted to two sets of features, as ``frechet``.

    Args:
        features_a: [N, F], N >= 2.
        features_b: [M, F], M >= 2.

    Returns:
        The distance, >= 0 up to rounding.

    Raises:
        ValueError: if the shapes do not fit or a set has fewer than two samples.
    """
    if features_a.ndim != 2 or features_b.ndim != 2 or features_a.shape[1] != features_b.shape[1]:
        raise ValueError(
            "expected features [N, F] and [M, F], got "
            f"{list(features_a.shape)} and {list(features_b.shape)}"
        )
    if min(len(features_a), len(features_b)) < 2:
        raise ValueError(
            f"expected at least 2 samples per set, got {len(features_a)} and {len(features_b)}"
        )
    a, b = features_a.detach().double().cpu(), features_b.detach().double().cpu()
    ones = (torch.ones(1, len(x), dtype=torch.float64) for x in (a, b))
    return frechet(a, b, *ones).item()


def pairwise_diversity(images: Tensor, labels: Tensor) -> float:
    """Mean RMS pixel distance over all pairs of different images with the same label.

    Images are [N, 3, H, W] in [0, 1] RGB, labels [N] integers. It is the mean over labels of a
    label's mean distance, in [0, 1]; labels of one image are left out, and with no pair at all it
    is NaN.
    """
    flat = images.detach().flatten(1).double()
    distances = [
        torch.pdist(members).mean()
        for label in labels.unique()
        if len(members := flat[labels == label]) > 1
    ]
    if not distances:
        return float("nan")
    return (torch.stack(distances).mean() / flat.shape[1] ** 0.5).item()


def diversity_error(images: Tensor, labels: Tensor) -> float:
    """Standard error of ``pairwise_diversity`` by a bootstrap over images; NaN without a pair."""
    flat = images.detach().flatten(1).double() / images[0].numel() ** 0.5
    weights, each = resamples(len(flat), seed=0), []
    for label in labels.unique():
        u, members = weights[:, labels == label], flat[labels == label]
        pairs = u.sum(1).square() - u.square().sum(1)
        each.append(((u @ torch.cdist(members, members)) * u).sum(1) / pairs)
    return error_of(torch.stack(each).nanmean(0))


def prompt_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit, of [N, K], is the prompted class, of [N] integers.

    Raises:
        ValueError: if the shapes do not fit or there is no image.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise ValueError(
            "expected logits [N, K] and labels [N] with N >= 1, got "
            f"{list(logits.shape)} and {list(labels.shape)}"
        )
    return (logits.argmax(1) == labels).double().mean().item()


@torch.no_grad()
def real_measures(
    images: Tensor, prompts: Sequence[str], classifier: Classifier | None
) -> dict[str, Any]:
    """Diversity, and with a classifier accuracy, of real images [M, 3, H, W] with their prompts.

    "errors" has the standard error of the diversity.
    """
    images = shrink(images, 64)
    names = list(dict.fromkeys(prompts))
    labels = torch.tensor([names.index(prompt) for prompt in prompts])
    result: dict[str, Any] = {"diversity": pairwise_diversity(images, labels)}
    result["errors"] = {"diversity": diversity_error(images, labels)}
    if classifier is not None:
        named = torch.tensor([classifier.label_of(prompt) for prompt in prompts])
        result["accuracy"] = prompt_accuracy(classifier(squared(images, 64)), named)
    return result
