"""What a generator makes of fresh random noise, measured before, during and after training."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from oneshot_fast.data.images import save_png, shrink, tile
from oneshot_fast.embedded.classifier import load_classifier
from oneshot_fast.evaluation.measures import frechet_distance, pairwise_diversity, prompt_accuracy
from oneshot_fast.generators.base import Classifier, Generator
from oneshot_fast.runtime.files import (
    finite,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
)
from oneshot_fast.runtime.progress import progress
from oneshot_fast.runtime.seeds import derived_seed, gaussian

Scores = Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]]


def classifier_for(generator: Generator, prompts: Sequence[str]) -> Classifier | None:
    """The judge that comes with the generator, or that of digits; None if it lacks a prompt."""
    classifier: Classifier = generator.classifier or load_classifier()
    known = all(classifier.label_of(prompt) is not None for prompt in prompts)
    return classifier if known else None


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
            path: Where to keep the result, without suffix; an existing one is read. The one named
                "base" comes first: the drift is measured against it.

        Returns:
            samples, diversity, drift (RMS latent distance to the base generator), with a
            classifier accuracy and frechet_distance, and the mean of each of the scores.
        """
        result_path, grid = (path.with_name(path.name + end) for end in (".json", ".png"))
        base_path, is_base = path.with_name("base.safetensors"), path.name == "base"
        if result_path.exists() and grid.exists() and (base_path.exists() or not is_base):
            return read_json(result_path)
        latents, images, means = self._generate(generator, grid)
        if is_base:
            write_safetensors(base_path, {"latents": latents}, {})
        base = read_safetensors(base_path)["latents"]
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
        result = finite(result | means)
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
                scored = self.scores(full, self.prompts[part]) if self.scores else {}
                for name, values in scored.items():
                    scores.setdefault(name, []).append(values)
                full = full.cpu()
                shown.append(shrink(full, 128)[: max(0, rows * columns - start)])
                images.append(shrink(full, 64))
                bar.update(len(full))
        save_png(grid, tile(torch.cat(shown), columns))
        means = {name: torch.cat(parts).mean().item() for name, parts in scores.items()}
        return torch.cat(latents).cpu(), torch.cat(images), means
