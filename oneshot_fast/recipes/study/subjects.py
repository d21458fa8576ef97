"""The generators under study, their data and the measures on random noise."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from oneshot_fast.data.pairs import read_pairs
from oneshot_fast.data.records import Record
from oneshot_fast.evaluation.measures import frechet_distance, pairwise_diversity, prompt_accuracy
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.generators.toy_networks import ToyClassifier
from oneshot_fast.recipes.drawn import train_drawn
from oneshot_fast.recipes.letters import Style, letters
from oneshot_fast.recipes.toy.data import LabelledImages, digits, shapes
from oneshot_fast.recipes.toy.train import train_classifier, train_generator
from oneshot_fast.runtime.files import read_safetensors, write_folder, write_safetensors


@dataclass(frozen=True)
class SubjectRecipe:
    """How a base generator is made, and what it is aligned with.

    Attributes:
        noise_shape: [C, h, w] of its noise.
        steps: Of its training.
        width: Of its network; 0 for one that ``recipes/drawn.py`` makes.
        patch_size: Of rotations of its noise.
        tiles: G of rotations per tile.
        base: The subject whose generator it is, for targets in a style of their own.
    """

    noise_shape: tuple[int, int, int]
    steps: int
    width: int
    patch_size: int
    tiles: int
    base: str | None = None

    @property
    def usual_step(self) -> float:
        """In radians: Adam's learning rate of 5e-4 on the elements of a skew matrix."""
        D = self.noise_shape[0] * self.patch_size**2
        return 5e-4 * 2 * (D - 1) ** 0.5


SUBJECTS = {
    "digits": SubjectRecipe((64, 1, 1), 300, 16, 1, 1),
    "shapes": SubjectRecipe((4, 8, 8), 800, 24, 2, 4),
    "letters": SubjectRecipe((4, 8, 8), 0, 0, 2, 4),
    "italics": SubjectRecipe((4, 8, 8), 0, 0, 2, 4, base="letters"),
    "centred": SubjectRecipe((4, 8, 8), 0, 0, 2, 4, base="letters"),
    # kept aside: nothing was chosen by these
    "shapes64": SubjectRecipe((4, 8, 8), 0, 0, 2, 4),
    "upright": SubjectRecipe((4, 8, 8), 0, 0, 2, 4, base="shapes64"),
}


class Subject:
    """A base generator, its targets on the disk, real images that nothing was trained on."""

    def __init__(self, name: str, folder: Path, quick: bool) -> None:
        """Read or make everything of one of ``SUBJECTS`` in ``folder``; with ``quick`` small."""
        self.recipe, self.folder, self.quick = SUBJECTS[name], folder, quick
        self._base_images: dict[tuple[int, int], Tensor] = {}
        self.train, self.real = _images_of(name, quick)
        self.base_folder = self._base(name)
        self.records = _on_disk(self.train, folder / "targets", 16 if quick else 256)
        self.heldout = _on_disk(self.real, folder / "heldout", 16 if quick else 64)
        self.classifier = self.base().classifier or self.judge
        with torch.no_grad():
            self._real_features = self.classifier.features(self.real.images)
            self._train_features = self.classifier.features(self.train.images[:1600])

    def _base(self, name: str) -> Path:
        """Where the base generator is, trained if it is not there yet."""
        recipe, name = self.recipe, self.recipe.base or name
        folder = self.folder.parent / name / "base"
        if recipe.width:
            if not folder.exists():
                steps = recipe.steps // 20 if self.quick else recipe.steps
                made = train_generator(
                    self.train, recipe.noise_shape, steps=steps, width=recipe.width
                )
                made.classifier = train_classifier(self.train, steps=150 if self.quick else 1500)
                made.save(folder)
            return folder
        if not (folder / "pipeline").exists():
            train_drawn(_images_of(name, self.quick)[0], folder, self.quick)
        return folder / "pipeline"

    @cached_property
    def judge(self) -> ToyClassifier:
        """A classifier that no generator comes with, and nothing is chosen by."""
        path = self.folder / "judge.safetensors"
        if not path.exists():
            made = train_classifier(self.train, steps=50 if self.quick else 1500, seed=1)
            write_safetensors(path, made.state_dict(), {})
        judge = ToyClassifier(self.train.prompts, self.train.images.shape[-1])
        judge.load_state_dict(read_safetensors(path))
        return judge.eval().requires_grad_(False)

    def base(self) -> Generator:
        """The base generator, loaded anew."""
        return load_generator(self.base_folder, device="cpu", master_weights=True)

    def pairs(self, count: int, start: int) -> list[Record]:
        """``count`` training images from ``start`` on, in a random order, as pairs on the disk."""
        folder = self.folder / f"pairs-{start}"
        if not folder.exists():
            with write_folder(folder) as temporary:
                self.train.write_pairs(temporary, count, start)
        return read_pairs(folder)[0]

    def judged(self, generator: Generator, samples: int) -> dict[str, float]:
        """Frechet distance, accuracy and diversity by ``judge``: means of five sets of noises.

        The distance is to 1600 images of the targets' distribution that are no targets; that of
        digits is of the training writers, whose digits are moved, as others write otherwise.
        """
        judge, found = self.judge, []
        with torch.no_grad():
            for seed in range(5):
                images, labels = self.samples(generator, samples, seed)
                distance = frechet_distance(judge.features(images), self._judged_features)
                accuracy = prompt_accuracy(judge(images), labels)
                spread = pairwise_diversity(images, labels)
                found.append(
                    {"frechet_distance": distance, "accuracy": accuracy, "diversity": spread}
                )
        return {key: sum(row[key] for row in found) / 5 for key in found[0]}

    def judged_real(self) -> dict[str, float]:
        """Accuracy and diversity of the images that ``judged`` takes its distance to."""
        images, labels = self._no_targets.images, self._no_targets.labels
        with torch.no_grad():
            accuracy = prompt_accuracy(self.judge(images), labels)
        return {"accuracy": accuracy, "diversity": pairwise_diversity(images, labels)}

    @cached_property
    def _no_targets(self) -> LabelledImages:
        return self.train.sample(1600, max(0, len(self.train.images) - 1600))

    @cached_property
    @torch.no_grad()
    def _judged_features(self) -> Tensor:
        return self.judge.features(self._no_targets.images)

    @torch.no_grad()
    def samples(self, generator: Generator, count: int, seed: int) -> tuple[Tensor, Tensor]:
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
    def quality(self, generator: Generator, count: int, seed: int) -> dict[str, float]:
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


def _images_of(name: str, quick: bool) -> tuple[LabelledImages, LabelledImages]:
    """Training images, and held-out ones of other writers or other draws."""
    few = (640, 320) if quick else (8000, 1600)
    if name == "digits":
        return digits("train"), digits("heldout")
    if name in get_args(Style):
        style = cast(Style, name)
        return letters(0, few[0], style), letters(1, few[1], style)
    size, upright = 16 if name == "shapes" else 64, name == "upright"
    return shapes("train", few[0], size, upright), shapes("heldout", few[1], size, upright)


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
