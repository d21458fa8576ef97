"""The training of one small generator into a folder, in stages that are kept."""

import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from oneshot_fast.data.images import save_png, tile
from oneshot_fast.evaluation.measures import frechet_distance
from oneshot_fast.generators.toy import ToyGenerator
from oneshot_fast.generators.toy_networks import ToyClassifier
from oneshot_fast.recipes.toy.compare import measured
from oneshot_fast.recipes.toy.data import LabelledImages
from oneshot_fast.recipes.toy.datasets import Recipe
from oneshot_fast.recipes.toy.train import train_classifier, train_generator
from oneshot_fast.runtime.files import read_json, write_json, write_safetensors
from oneshot_fast.runtime.folder import RunFolder

OUTPUTS = ("classifier.safetensors", "model", "eval", "real.png", "summary.json")


def train(
    folder: Path,
    recipe: Recipe,
    train_set: LabelledImages,
    heldout: LabelledImages,
    *,
    seed: int = 0,
    samples: int = 1000,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train classifier and generator and measure them; what is finished is kept.

    ``folder`` gets classifier.safetensors, model/ (see ``ToyGenerator.save``), eval/ with samples,
    real.png and summary.json, which is returned. ``samples`` random noises, and as many held-out
    images at most, are measured.
    """
    settings = {
        "command": "toy train",
        "prompts": list(train_set.prompts),
        "noise_shape": recipe.noise_shape,
        "steps": recipe.steps,
        "width": recipe.width,
        "images": [*train_set.images.shape, len(heldout.images)],
        "seed": seed,
        "samples": samples,
    }
    with RunFolder(folder, settings, OUTPUTS, overwrite) as run:
        run.reopen("summary.json")
        if not (folder / "summary.json").exists():
            started = time.perf_counter()
            generator = _generator(folder, recipe, train_set, seed)
            seconds = time.perf_counter() - started
            measures = _measure(folder, generator, train_set, heldout, seed, samples)
            write_json(folder / "summary.json", measures | {"seconds": round(seconds, 1)})
        return dict(read_json(folder / "summary.json"))


def _generator(folder: Path, recipe: Recipe, data: LabelledImages, seed: int) -> ToyGenerator:
    """The trained generator with its classifier, each trained or, where it is finished, read."""
    if (folder / "model").exists():
        return ToyGenerator.load(folder / "model")
    path = folder / "classifier.safetensors"
    if path.exists():
        classifier = ToyClassifier(data.prompts, data.images.shape[-1])
        classifier.load_state_dict(load_file(path))
        classifier.requires_grad_(False).eval()
    else:
        classifier = train_classifier(data, steps=min(1500, recipe.steps), seed=seed)
        write_safetensors(path, classifier.state_dict(), {})
    generator = train_generator(
        data,
        recipe.noise_shape,
        steps=recipe.steps,
        against=recipe.against,
        batch_size=recipe.batch_size,
        width=recipe.width,
        seed=seed,
    )
    generator.classifier = classifier
    generator.save(folder / "model")
    return generator


@torch.no_grad()
def _measure(
    folder: Path,
    generator: ToyGenerator,
    train_set: LabelledImages,
    heldout: LabelledImages,
    seed: int,
    samples: int,
) -> dict[str, Any]:
    """Quality on random noise beside that of real images.

    ``frechet_distance`` of real images is that of training images to held-out ones: what a perfect
    generator would get.
    """
    assert generator.classifier is not None
    real, some = heldout.sample(samples), train_set.sample(samples)
    found = measured({"base": generator}, real, folder / "eval", samples=samples, seed=seed)
    features = (generator.classifier.features(part.images) for part in (some, real))
    distance = frechet_distance(*features)
    save_png(folder / "real.png", tile(real.images[:80], 16))
    return {
        "generator": found["base"],
        "real images": found["real images"] | {"frechet_distance": distance},
    }
