"""What a generator makes of fresh random noise, measured before, during and after training."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oneshot_fast.data.images import save_png, shrink, squared, tile
from oneshot_fast.embedded.classifier import load_classifier
from oneshot_fast.evaluation.distances import Verdict, error_of, replicates, verdicts
from oneshot_fast.evaluation.features import Features
from oneshot_fast.evaluation.measures import pairwise_diversity, prompt_accuracy
from oneshot_fast.evaluation.probe import PromptProbe
from oneshot_fast.generators.base import Classifier, Generator
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.runtime.files import (
    finite,
    read_json,
    read_safetensors,
    remove,
    write_json,
    write_safetensors,
)
from oneshot_fast.runtime.progress import progress
from oneshot_fast.runtime.seeds import derived_seed, gaussian

Scores = Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]]
_AT_ONCE = 16  # images
_REPLICATES, _SCORE = "replicates/", "score/"
_SHOWN = 8  # noises whose images are kept, to be seen side by side


def classifier_for(generator: Generator, prompts: Sequence[str]) -> Classifier | None:
    """The judge that comes with the generator, or that of digits; None if it lacks a prompt."""
    classifier: Classifier = generator.classifier or load_classifier()
    known = all(classifier.label_of(prompt) is not None for prompt in prompts)
    return classifier if known else None


def all_scores(rewards: WeightedRewards | None, judge: WeightedRewards | None = None) -> Scores:
    """What is measured of images: "reward", the weighted sum, every reward's own, every judge's."""

    def scores(images: Tensor, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        found = rewards.scores(images, prompts) if rewards is not None else {}
        total = {"reward": rewards.total(found)} if rewards is not None else {}
        judged = judge.scores(images, prompts) if judge is not None else {}
        return total | found | {f"judge {name}": values for name, values in judged.items()}

    return scores


def evaluated_prompts(prompts: Sequence[str], samples: int, seed: int) -> tuple[list[str], Tensor]:
    """Prompts of ``samples`` images, as frequent as among ``prompts``, in turns.

    Frequencies that differ by one at most are equal. Of many different prompts so many are drawn
    that each has two images.

    Returns:
        The prompts, and the number of each [samples] among the different ones.
    """
    often, most = Counter(prompts), max(1, samples // 2)
    distinct = list(often)
    draw = torch.Generator().manual_seed(derived_seed(seed, "evaluated prompts"))
    chosen = sorted(torch.randperm(len(distinct), generator=draw)[:most].tolist())
    weights = [often[distinct[k]] for k in chosen]
    if max(weights) - min(weights) <= 1:
        weights = [1] * len(weights)
    share = [samples * weight / sum(weights) for weight in weights]
    count = [int(part) for part in share]
    for k in sorted(range(len(share)), key=lambda k: count[k] - share[k])[: samples - sum(count)]:
        count[k] += 1  # of the largest remainders
    turns = sorted((turn, k) for k, of in enumerate(count) for turn in range(of))
    return [distinct[chosen[k]] for _, k in turns], torch.tensor([k for _, k in turns])


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
        features: Features | None = None,
        real: Iterable[Tensor] | None = None,
        real_prompts: Sequence[str] = (),
        scores: Scores | None = None,
    ) -> None:
        """Choose prompts and noises.

        Args:
            prompts: Prompts to draw from, see ``evaluated_prompts``.
            noise_shape: [C, h, w] of a noise.
            samples: Samples per measure.
            seed: Seed of the run.
            classifier: For accuracy; None leaves it out.
            features: What images are compared by; None measures no distances.
            real: Held-out target images, [3, H, W] in [0, 1] each; fewer than two are not used.
            real_prompts: The prompt of each.
            scores: Of images [B, 3, H, W] in [0, 1] and their prompts, [B] by name; their means
                are measured, too.
        """
        self.prompts, self.labels = evaluated_prompts(prompts, samples, seed)
        self.seeds = [derived_seed(seed, "evaluated noise", k) for k in range(samples)]
        self.eps = gaussian(self.seeds, noise_shape)
        self.classifier, self.features, self.scores = classifier, features, scores
        self.seed = derived_seed(seed, "bootstrap")
        found = list(_features(features, real)) if features and real is not None else []
        self.real = torch.cat(found) if sum(map(len, found)) > 1 else None
        self.probe: PromptProbe | None = None
        told = features.told if features is not None else None
        if self.real is not None and told is not None and len({*real_prompts}) > 1:
            self.probe = PromptProbe(self.real, told(real_prompts))
            self.real, self.told = self.probe.real, told(self.prompts)
        number = dict(zip(self.prompts, self.labels.tolist(), strict=True))
        self.real_labels = torch.tensor([number.get(prompt, -1) for prompt in real_prompts])

    @property
    def described(self) -> dict[str, Any]:
        """How images are compared, for a summary."""
        named = self.features
        return {
            "features": named.name if named else None,
            "is_weak": named is not None and named.is_weak,
            "real": 0 if self.real is None else len(self.real),
            "prompts": self.prompts[:_SHOWN],
        }

    def of_real(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Diversity in features of the real images, which had these prompts, and its error."""
        if self.real is None:
            return {}
        names = list(dict.fromkeys(prompts))
        labels = torch.tensor([names.index(prompt) for prompt in prompts])
        found = replicates(self.real, labels, None, seed=self.seed)
        return _with_errors(found)

    @staticmethod
    def kept(path: Path) -> dict[str, Any] | None:
        """The result that ``measure`` has kept; None if it has not."""
        files = [_beside(path, suffix) for suffix in (".json", ".png", ".safetensors")]
        return read_json(files[0]) if all(file.exists() for file in files) else None

    @torch.no_grad()
    def measure(self, generator: Generator, path: Path) -> dict[str, Any]:
        """Measure ``generator`` and keep the result in ``path``.json, .png and .safetensors.

        Args:
            generator: The generator as it is now.
            path: Where to keep the result, without suffix; an existing one is read. The one named
                "base" comes first: the drift is measured against it.

        Returns:
            samples, diversity (in pixels), drift (RMS latent distance to the base generator), with
            a classifier accuracy, the mean of each of the scores, with features those of
            ``replicates``, and ``errors``, the standard errors of these.
        """
        if (found := self.kept(path)) is not None:
            return found
        made = self._generate(generator, _beside(path, ".png"))
        is_base = path.name == "base"
        base = (
            made if is_base else read_safetensors(_beside(path.with_name("base"), ".safetensors"))
        )
        images = made.pop("images")
        result: dict[str, Any] = {
            "samples": len(self.prompts),
            "diversity": pairwise_diversity(images, self.labels),
            "drift": (made["latents"] - base["latents"]).square().mean().sqrt().item(),
        }
        if self.classifier is not None:
            named = [self.classifier.label_of(prompt) for prompt in self.prompts]
            logits = self.classifier(squared(images, 64))
            result["accuracy"] = prompt_accuracy(logits, torch.tensor(named))
        tensors = {"shown": made["shown"]} | ({"latents": made["latents"]} if is_base else {})
        scores = {k.removeprefix(_SCORE): v for k, v in made.items() if k.startswith(_SCORE)}
        if self.probe is not None:
            scores["alignment"] = self.probe.fit(made["features"], self.told)
            made["features"] = self.probe(made["features"])
        result |= {name: values.mean().item() for name, values in scores.items()}
        if self.features is not None:
            found = replicates(
                made["features"],
                self.labels,
                self.real,
                self.real_labels,
                seed=self.seed,
                per_image=scores,
                sigma=self.features.sigma,
            )
            tensors |= {_REPLICATES + name: values for name, values in found.items()}
            result |= _with_errors(found)
        result = finite(result)
        write_safetensors(_beside(path, ".safetensors"), tensors, {})
        write_json(_beside(path, ".json"), result)
        return result

    def _generate(self, generator: Generator, grid: Path) -> dict[str, Tensor]:
        """Of all noises latents [N, C, h, w], images [N, 3, <=64, <=64], features [N, F], scores.

        Saves a grid of samples; those of the first noises are ``shown``.
        """
        found: dict[str, list[Tensor]] = {}
        rows, columns = 5, min(16, int(self.labels.max()) + 1)
        with progress(len(self.prompts), f"evaluate {grid.stem}", "image") as bar:
            for start in range(0, len(self.prompts), _AT_ONCE):
                part = slice(start, start + _AT_ONCE)
                prompts = self.prompts[part]
                encoding = generator.told(prompts, self.seeds[part])
                latents = generator.latents(self.eps[part].to(generator.device), encoding)
                full = generator.decode(latents)
                new = {"latents": latents, "images": shrink(full, 64)}
                if start < rows * columns:
                    new["grid"] = shrink(full, 128)
                scores = dict(self.scores(full, prompts)) if self.scores else {}
                if self.features is not None:
                    new["features"] = self.features.of(full)
                    if self.features.fit is not None:
                        scores["alignment"] = self.features.fit(new["features"], prompts)
                new |= {_SCORE + name: values for name, values in scores.items()}
                for name, values in new.items():
                    found.setdefault(name, []).append(values.cpu())
                bar.update(len(full))
        made = {name: torch.cat(parts) for name, parts in found.items()}
        samples = made.pop("grid")  # of a batch at least, so that there are enough to be shown
        save_png(grid, tile(samples[: rows * columns], columns))
        return made | {"shown": (samples[:_SHOWN] * 255).round().to(torch.uint8)}


def _with_errors(found: Mapping[str, Tensor]) -> dict[str, Any]:
    """Values and standard errors of ``replicates``."""
    values = {name: row[0].item() for name, row in found.items()}
    return {**values, "errors": {name: error_of(row) for name, row in found.items()}}


def _features(features: Features, images: Iterable[Tensor]) -> Iterator[Tensor]:
    """Features [B, F] of some images [3, H, W] after the other, B at once."""
    rest = iter(images)
    while batch := list(islice(rest, _AT_ONCE)):
        with torch.no_grad():
            yield features.of(torch.stack(batch)).cpu()


def forget_other(folder: Path, made_of: list[str], *more: Path) -> None:
    """Measures in ``folder``, and ``more``, are made anew if they were made of something else.

    ``made_of`` are ids of held-out pairs that can be read, and whatever else may be mended.
    """
    path = folder / "made-of.json"
    if path.exists() and read_json(path, list) == made_of:
        return
    for measured in (*folder.glob("*.json"), *more) if path.exists() else ():
        remove(measured)
    write_json(path, made_of)


def shown(path: Path) -> Tensor:
    """Images of the first noises, [<=8, 3, H, W] uint8, of a result of ``RandomNoiseMeasure``."""
    return read_safetensors(_beside(path, ".safetensors"))["shown"]


def compare(before: Path, after: Path) -> dict[str, Verdict]:
    """What ``after`` is against ``before``, two results of one ``RandomNoiseMeasure``, in pairs."""

    def kept(path: Path) -> dict[str, Tensor]:
        tensors = read_safetensors(_beside(path, ".safetensors"))
        return {
            name.removeprefix(_REPLICATES): values
            for name, values in tensors.items()
            if name.startswith(_REPLICATES)
        }

    return verdicts(kept(before), kept(after))


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
