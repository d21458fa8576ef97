"""Held-out pairs: chosen by the run's seed, read as what generators are measured against."""

import heapq
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from oneshot_fast.data.images import shrink
from oneshot_fast.data.manifests import MatchedPair
from oneshot_fast.data.records import Record
from oneshot_fast.errors import DataError, require
from oneshot_fast.evaluation.measures import real_measures
from oneshot_fast.evaluation.random_noise import RandomNoiseMeasure, forget_other
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.runtime.files import finite
from oneshot_fast.runtime.processes import main_first
from oneshot_fast.runtime.seeds import derived_seed

FEWEST, MOST = 16, 500  # pairs that are held out unless a share is given
ENOUGH = 64  # of fewer pairs none can be spared


Item = TypeVar("Item")


def hold_out(
    items: Sequence[Item], share: float | None, seed: int
) -> tuple[list[Item], list[Item]]:
    """Divide pairs into those to train on and those to measure by, by hashes of their places.

    So a line that is mended changes nothing for the others.

    Args:
        items: All pairs, and what could not be read.
        share: Of the pairs to measure by; None: a tenth, but 16 to 500, and of fewer than 64 none.
        seed: Of the choice.

    Raises:
        UserError: If the share is not in [0, 1), or leaves nothing to train on.
    """
    chosen = {*held_out_places(len(items), share, seed)}
    return (
        [item for k, item in enumerate(items) if k not in chosen],
        [item for k, item in enumerate(items) if k in chosen],
    )


def held_out_places(count: int, share: float | None, seed: int) -> list[int]:
    """Of ``count`` pairs the places of those that ``hold_out`` would measure by."""
    require(share is None or 0 <= share < 1, f"heldout is {share}; give a share from 0 to below 1")
    wanted = round((0.1 if share is None else share) * count)
    if share is None:
        wanted = min(MOST, max(FEWEST, wanted)) if count >= ENOUGH else 0
    require(wanted < count or not wanted, f"heldout {share} leaves no pair to train on; give less")
    places = range(count)
    return heapq.nsmallest(wanted, places, key=lambda k: derived_seed(seed, "held out", k))


def held_out_words(kept: int, held: int) -> str:
    """What ``hold_out`` did, in words."""
    if held:
        return f"{held} of {kept + held} pairs are held out, to measure by (--heldout)"
    return (
        f"{kept} pairs are too few to hold some out: whether the generator gets better is not "
        "measured; --heldout_root DIR names others, --heldout 0.2 takes a fifth of these"
    )


def measure_against(
    pairs: Sequence[Record | MatchedPair],
    targets: TargetImages,
    generator: Generator,
    folder: Path,
    resize_mode: str = "crop",
    made_of: Sequence[str] = (),
    also: Sequence[Path] = (),
    **more: Any,
) -> tuple[RandomNoiseMeasure, dict[str, Any], dict[int, str]]:
    """A measure on fresh noise against held-out pairs, with their prompts.

    Args:
        pairs: Held-out; those that cannot be read are left out.
        targets: Reads their images.
        generator: Says what a noise is.
        folder: Where results will be kept; those against other images are removed.
        resize_mode: Of pairs that do not have their own.
        made_of: What else results are made of, see ``forget_other``.
        also: What else is removed if these have changed.
        **more: As for ``RandomNoiseMeasure``.

    Returns:
        The measure, what is measured of the real images, and by place why a pair cannot be read.

    Raises:
        UserError: If none can be read.
    """
    modes = [getattr(pair, "resize_mode", resize_mode) for pair in pairs]
    places = [  # all are measured at one size
        (pair.image_path, "crop" if mode == "bucket" else mode)
        for pair, mode in zip(pairs, modes, strict=True)
    ]
    usable, images, reasons = list[int](), list[Tensor](), dict[int, str]()
    for k, place in enumerate(places):
        try:
            images.append(shrink(targets.image(*place)[None], 64))
        except DataError as error:
            reasons[k] = str(error)
            continue
        usable.append(k)
    first = next(iter(reasons.values()), "there is none")
    require(bool(usable), f"no held-out image can be read: {first}")
    main_first(lambda: forget_other(folder, [*made_of, *(pairs[k].id for k in usable)], *also))
    prompts = [pairs[k].prompt for k in usable]
    real = (targets.image(*places[k]) for k in usable)
    noise_shape = generator.noise_shape(*targets.size)
    measure = RandomNoiseMeasure(prompts, noise_shape, real=real, real_prompts=prompts, **more)
    measured = real_measures(torch.cat(images), prompts, more.get("classifier"))
    more_of_real = measure.of_real(prompts)
    errors = measured["errors"] | more_of_real.get("errors", {})
    return measure, finite({**measured, **more_of_real, "errors": errors}), reasons
