"""All generators of one work folder, measured on the same random noises."""

import itertools
from collections.abc import Mapping
from pathlib import Path

import torch

from oneshot_fast.evaluation.features import of_classifier
from oneshot_fast.evaluation.measures import real_measures
from oneshot_fast.evaluation.random_noise import RandomNoiseMeasure
from oneshot_fast.generators.toy import ToyGenerator
from oneshot_fast.recipes.toy.data import LabelledImages
from oneshot_fast.runtime.files import write_json

_TRAINED = {"base": "train/model"} | {
    name: f"{name}/checkpoint-final" for name in ("sft", "direct_sft", "em")
}


def compare(folder: Path, heldout: LabelledImages, seed: int = 0) -> dict[str, dict[str, float]]:
    """Measure the base generator, every trained one there is, and real images that are no targets.

    ``folder``, the work folder of ``python -m oneshot_fast.toy``, gets comparison/ with the
    measures and pictures of 1000 samples.

    Returns:
        The measures by name, those of the real images at the end.
    """
    results = folder / "comparison"
    for name, end in itertools.product(_TRAINED, (".json", ".png")):  # not what others put there
        (results / (name + end)).unlink(missing_ok=True)
    generators = {
        name: ToyGenerator.load(folder / place)
        for name, place in _TRAINED.items()
        if (folder / place).exists()
    }
    found = measured(generators, heldout, results, samples=1000, seed=seed)
    write_json(results / "comparison.json", found)
    return found


@torch.no_grad()
def measured(
    generators: Mapping[str, ToyGenerator],
    heldout: LabelledImages,
    folder: Path,
    *,
    samples: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Measures of generators, the base one with all's classifier first, and of real images."""
    base = next(iter(generators.values()))
    prompts = [heldout.prompts[k] for k in heldout.labels.tolist()]
    measure = RandomNoiseMeasure(
        heldout.prompts,
        base.config.noise_shape,
        samples=samples,
        seed=seed,
        classifier=base.classifier,
        features=of_classifier(base.classifier) if base.classifier else None,
        real=heldout.images,
        real_prompts=prompts,
    )
    found = {name: measure.measure(g, folder / name) for name, g in generators.items()}
    return found | {"real images": real_measures(heldout.images, prompts, base.classifier)}
