"""The generators under study, their data and the measures on random noise."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from oneshot_fast.data.pairs import read_pairs
from oneshot_fast.data.records import Record
from oneshot_fast.evaluation.measures import frechet_distance, pairwise_diversity, prompt_accuracy
from oneshot_fast.generators.toy import ToyGenerator
from oneshot_fast.recipes.toy.data import LabelledImages, digits, shapes
from oneshot_fast.recipes.toy.train import train_classifier, train_generator
from oneshot_fast.runtime.files import write_folder


@dataclass(frozen=True)
class SubjectRecipe:
    """How a base generator is made, and what it is aligned with.

    Attributes:
        noise_shape: [C, h, w] of its noise.
        steps: Of its training.
        width: Of its network.
        patch_size: Of rotations of its noise.
        tiles: G of rotations per tile.
    """

    noise_shape: tuple[int, int, int]
    steps: int
    width: int
    patch_size: int
    tiles: int

    @property
    def usual_step(self) -> float:
        """In radians: Adam's learning rate of 5e-4 on the elements of a skew matrix."""
        D = self.noise_shape[0] * self.patch_size**2
        return 5e-4 * 2 * (D - 1) ** 0.5


SUBJECTS = {
    "digits": SubjectRecipe((64, 1, 1), 300, 16, 1, 1),
    "shapes": SubjectRecipe((4, 8, 8), 800, 24, 2, 4),
}


class Subject:
    """A base generator, its targets on the disk, real images that nothing was trained on."""

    def __init__(self, name: str, folder: Path, quick: bool) -> None:
        """Read or make everything of "digits" or "shapes" in ``folder``; with ``quick`` small."""
        self.recipe = SUBJECTS[name]
        self._base_images: dict[tuple[int, int], Tensor] = {}
        if name == "digits":
            train, self.real = digits("train"), digits("heldout")
        else:
            train = shapes("train", 2000 if quick else 8000, 16)
            self.real = shapes("heldout", 1600, 16)
        self.base_folder = folder / "base"
        if not self.base_folder.exists():
            self._make_base(train, quick)
        self.records = _on_disk(train, folder / "targets", 32 if quick else 256)
        self.heldout = _on_disk(self.real, folder / "heldout", 16 if quick else 64)
        base = self.base()
        assert base.classifier is not None
        self.classifier = base.classifier
        with torch.no_grad():
            self._real_features = self.classifier.features(self.real.images)
            self._train_features = self.classifier.features(train.images[:1600])

    def _make_base(self, train: LabelledImages, quick: bool) -> None:
        recipe = self.recipe
        steps = recipe.steps // 20 if quick else recipe.steps
        generator = train_generator(train, recipe.noise_shape, steps=steps, width=recipe.width)
        generator.classifier = train_classifier(train, steps=150 if quick else 1500)
        generator.save(self.base_folder)

    def base(self) -> ToyGenerator:
        """The base generator, loaded anew."""
        return ToyGenerator.load(self.base_folder)

    @torch.no_grad()
    def samples(self, generator: ToyGenerator, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Images [count, 3, s, s] of all classes in turn on random noise, and their labels."""
        labels = torch.arange(count) % len(self.real.prompts)
        draw = torch.Generator().manual_seed(10_000 + seed)
        eps = torch.randn(count, *self.recipe.noise_shape, generator=draw)
        images = []
        for k in range(0, count, 200):
            prompts = [self.real.prompts[label] for label in labels[k : k + 200].tolist()]
            encoding = generator.encode_prompts(prompts)
            images.append(generator.decode(generator.latents(eps[k : k + 200], encoding)))
        return torch.cat(images), labels

    @torch.no_grad()
    def quality(self, generator: ToyGenerator, count: int, seed: int) -> dict[str, float]:
        """Measures on ``count`` random noises.

        Returns:
            frechet_distance to real images, in the classifier's features; accuracy; diversity;
            sharpness, the energy of the Laplacian over that of real images; drift, the RMS
            distance of the images from those of the base generator.
        """
        images, labels = self.samples(generator, count, seed)
        if (count, seed) not in self._base_images:
            self._base_images[count, seed] = self.samples(self.base(), count, seed)[0]
        base = self._base_images[count, seed]
        return {
            "frechet_distance": frechet_distance(
                self.classifier.features(images), self._real_features
            ),
            "accuracy": prompt_accuracy(self.classifier(images), labels),
            "diversity": pairwise_diversity(images, labels),
            "sharpness": _laplacian_energy(images) / _laplacian_energy(self.real.images),
            "drift": (images - base).square().mean().sqrt().item(),
        }

    def real_quality(self) -> dict[str, float]:
        """The same of real training images: what a perfect generator would reach, about."""
        images, labels = self.real.images, self.real.labels
        return {
            "frechet_distance": frechet_distance(self._train_features, self._real_features),
            "accuracy": prompt_accuracy(self.classifier(images), labels),
            "diversity": pairwise_diversity(images, labels),
            "sharpness": 1.0,
        }


def _on_disk(images: LabelledImages, folder: Path, count: int) -> list[Record]:
    """Some of the ``images`` as pairs, written where they are not there yet."""
    if not folder.exists():
        with write_folder(folder) as temporary:
            images.write_pairs(temporary, count)
    return read_pairs(folder)[0]


def _laplacian_energy(images: Tensor) -> float:
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    flat = images.flatten(0, 1)[:, None]
    return F.conv2d(flat, kernel).square().mean().item()
