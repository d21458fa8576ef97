"""All generators of one work folder, measured on the same random noises."""

from __future__ import annotations

import shutil
from pathlib import Path

from oneshot_fast.evaluation.measures import RandomNoiseMeasure, real_measures
from oneshot_fast.generators.toy import ToyGenerator
from oneshot_fast.recipes.toy.data import LabelledImages
from oneshot_fast.runtime.files import write_json

_TRAINED = {"base": "train/model"} | {
    name: f"{name}/checkpoint-final" for name in ("sft", "direct_sft", "em")
}


def compare(
    folder: Path, heldout: LabelledImages, *, samples: int = 1000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Measure the base generator and every trained one there is.

    Args:
        folder: Work folder of ``python -m oneshot_fast.toy``; gets comparison/ with the measures
            and pictures of samples.
        heldout: Real images that are no targets.
        samples: Random noises.
        seed: Of the noises.

    Returns:
        The measures by name, those of the real images at the end.
    """
    results = folder / "comparison"
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir()
    base = ToyGenerator.load(folder / "train" / "model")
    prompts = [heldout.prompts[k] for k in heldout.labels.tolist()]
    measure = RandomNoiseMeasure(
        heldout.prompts,
        base.config.noise_shape,
        samples=samples,
        seed=seed,
        classifier=base.classifier,
        real=heldout.images,
    )
    found = {}
    for name, place in _TRAINED.items():
        if (folder / place).exists():
            generator = ToyGenerator.load(folder / place)
            found[name] = measure.measure(generator, results / name)
    found["real images"] = real_measures(heldout.images, prompts, base.classifier)
    write_json(results / "comparison.json", found)
    return found
