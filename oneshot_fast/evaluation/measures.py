"""Measures of a set of samples: prompt accuracy, diversity and the Frechet distance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from oneshot_fast.data.images import save_png, shrink, tile
from oneshot_fast.embedded.classifier import load_classifier
from oneshot_fast.runtime.files import read_json, write_json, write_safetensors
from oneshot_fast.runtime.progress import progress
from oneshot_fast.runtime.seeds import derived_seed, gaussian

if TYPE_CHECKING:
    from oneshot_fast.generators.base import Generator

Scores = Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]]


class Classifier(Protocol):
    """Judge of images in [0, 1] RGB."""

    def features(self, images: Tensor) -> Tensor:
        """Features [B, F], in which distances are measured, of images [B, 3, H, W]."""
        ...

    def label_of(self, prompt: str) -> int | None:
        """The class that ``prompt`` names, None if none."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of the classes, [B, K]."""
        ...


def classifier_for(generator: Generator, prompts: Sequence[str]) -> Classifier | None:
    """The judge that comes with the generator, or that of digits; None if it lacks a prompt."""
    classifier: Classifier = generator.classifier or load_classifier()
    known = all(classifier.label_of(prompt) is not None for prompt in prompts)
    return classifier if known else None


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet distance between Gaussians fitted to two sets of features.

    |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), Dowson and Landau 1982, as used for
    the FID (arXiv:1706.08500); in fp64. tr((C_a C_b)^(1/2)) is the sum of the singular values of
    L_a^T L_b with C = L L^T, and the centred features are such an L: singular covariances (fewer
    samples than features) need no regularisation.

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
    mean_a, mean_b = a.mean(0), b.mean(0)
    root_a, root_b = (a - mean_a) / (len(a) - 1) ** 0.5, (b - mean_b) / (len(b) - 1) ** 0.5
    overlap = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum()
    return (distance - 2 * overlap).item()


def pairwise_diversity(images: Tensor, labels: Tensor) -> float:
    """Mean RMS pixel distance over all pairs of different images with the same label.

    Args:
        images: [N, 3, H, W], [0, 1] RGB.
        labels: [N], integers.

    Returns:
        The mean over labels of a label's mean distance, in [0, 1]; labels of one image are left
        out, and with no pair at all it is NaN.

    Raises:
        ValueError: if the lengths differ.
    """
    if len(images) != len(labels):
        raise ValueError(f"expected one label per image, got {len(labels)} for {len(images)}")
    flat = images.detach().flatten(1).double()
    distances = [
        torch.pdist(members).mean()
        for label in labels.unique()
        if len(members := flat[labels == label]) > 1
    ]
    if not distances:
        return float("nan")
    return (torch.stack(distances).mean() / flat.shape[1] ** 0.5).item()


def prompt_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is the prompted class.

    Args:
        logits: [N, K].
        labels: [N], integers below K.

    Raises:
        ValueError: if the shapes do not fit or there is no image.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise ValueError(
            "expected logits [N, K] and labels [N] with N >= 1, got "
            f"{list(logits.shape)} and {list(labels.shape)}"
        )
    return (logits.argmax(1) == labels).double().mean().item()


class RandomNoiseMeasure:
    """Quality on fresh random noise, which is what a user of the generator gets.

    The prompts and noises are fixed by the seed, so that generators are compared on the same ones.
    Images are compared at 64 x 64 pixels at most.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        noise_shape: Sequence[int],
        *,
        samples: int,
        seed: int,
        classifier: Classifier | None = None,
        real: Tensor | None = None,
        scores: Scores | None = None,
    ) -> None:
        """Choose prompts and noises.

        Args:
            prompts: Prompts to draw from; at most 16 different ones are used.
            noise_shape: [C, h, w] of a noise.
            samples: Samples per measure.
            seed: Seed of the run.
            classifier: For accuracy and Frechet distance; None leaves them out.
            real: Held-out target images, [M, 3, H, W] in [0, 1], for the Frechet distance.
            scores: Of images [B, 3, H, W] in [0, 1] and their prompts, [B] by name; their means
                are measured, too.
        """
        distinct = list(dict.fromkeys(prompts))
        draw = torch.Generator().manual_seed(derived_seed(seed, "evaluated prompts"))
        chosen = sorted(torch.randperm(len(distinct), generator=draw)[:16].tolist())
        self.prompts = [distinct[chosen[k % len(chosen)]] for k in range(samples)]
        self.labels = torch.arange(samples) % len(chosen)
        self.eps = gaussian(
            [derived_seed(seed, "evaluated noise", k) for k in range(samples)], noise_shape
        )
        self.classifier, self.real, self.scores = classifier, real, scores

    @torch.no_grad()
    def measure(self, generator: Generator, path: Path) -> dict[str, float]:
        """Measure ``generator`` and keep the result in ``path``.json and ``path``.png.

        Args:
            generator: The generator as it is now.
            path: Where to keep the result, without suffix; an existing one is read. The first one
                in a folder must be of the base generator: the drift is measured against it.

        Returns:
            samples, diversity, drift (RMS latent distance to the base generator), with a
            classifier accuracy and frechet_distance, and the mean of each of the scores.
        """
        result_path = path.with_name(f"{path.name}.json")
        if result_path.exists():
            return read_json(result_path)
        latents, images, means = self._generate(generator, path.with_name(f"{path.name}.png"))
        base_path = path.with_name("base.safetensors")
        if not base_path.exists():
            write_safetensors(base_path, {"latents": latents}, {})
        base = load_file(base_path)["latents"]
        result = {
            "samples": len(self.prompts),
            "diversity": pairwise_diversity(images, self.labels),
            "drift": (latents - base).square().mean().sqrt().item(),
        }
        if self.classifier is not None:
            named = [self.classifier.label_of(prompt) for prompt in self.prompts]
            result["accuracy"] = prompt_accuracy(self.classifier(images), torch.tensor(named))
            if self.real is not None:
                features = (self.classifier.features(x) for x in (images, self.real))
                result["frechet_distance"] = frechet_distance(*features)
        result |= means
        write_json(result_path, result)
        return result

    def _generate(
        self, generator: Generator, grid: Path
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Of all noises latents [N, C, h, w], images [N, 3, <=64, <=64] and mean scores.

        Saves a grid of samples.
        """
        latents, images, shown = [], [], []
        scores: dict[str, list[Tensor]] = {}
        rows, columns = 5, int(self.labels.max()) + 1
        with progress(len(self.prompts), f"evaluate {grid.stem}", "image") as bar:
            for start in range(0, len(self.prompts), 16):
                part = slice(start, start + 16)
                encoding = generator.encode_prompts(self.prompts[part])
                latents.append(generator.latents(self.eps[part].to(generator.device), encoding))
                full = generator.decode(latents[-1])
                found = self.scores(full, self.prompts[part]) if self.scores else {}
                for name, values in found.items():
                    scores.setdefault(name, []).append(values)
                full = full.cpu()
                shown.append(shrink(full, 128)[: max(0, rows * columns - start)])
                images.append(shrink(full, 64))
                bar.update(len(full))
        save_png(grid, tile(torch.cat(shown), columns))
        means = {name: torch.cat(parts).mean().item() for name, parts in scores.items()}
        return torch.cat(latents).cpu(), torch.cat(images), means


@torch.no_grad()
def real_measures(
    images: Tensor, prompts: Sequence[str], classifier: Classifier | None
) -> dict[str, float]:
    """Diversity, and with a classifier accuracy, of real images [M, 3, H, W] with their prompts."""
    images = shrink(images, 64)
    names = list(dict.fromkeys(prompts))
    labels = torch.tensor([names.index(prompt) for prompt in prompts])
    result = {"diversity": pairwise_diversity(images, labels)}
    if classifier is not None:
        named = torch.tensor([classifier.label_of(prompt) for prompt in prompts])
        result["accuracy"] = prompt_accuracy(classifier(images), named)
    return result
