"""Pairs of images of one prompt, of which one is preferred."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from oneshot_fast.data.image_refs import ImageRef, find_file
from oneshot_fast.data.manifests import MatchedPair
from oneshot_fast.data.records import (
    Failure,
    claim_id,
    nothing_usable,
    pair_id,
    read_objects,
    text_field,
)
from oneshot_fast.errors import DataError

Noises = Mapping[tuple[str, str], MatchedPair]  # by real path of the image, and prompt


@dataclass(frozen=True)
class PreferredPair:
    """One line of a file of pairs; paths are absolute."""

    id: str
    prompt: str
    image: ImageRef  # the preferred one
    rejected: ImageRef
    weight: float
    line: int  # 1-based


def read_preferences(path: Path) -> tuple[list[PreferredPair], list[Failure]]:
    """Read pairs from JSON lines {"prompt", "image", "rejected"[, "weight"]}.

    Paths are relative to the file's folder; the images are looked up, not decoded.

    Returns:
        The pairs and the failures, each in file order.

    Raises:
        DataError: no such file, or no usable line in it.
    """
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file of pairs; give the path of a pairs.jsonl")
    used: dict[str, int] = {}
    found = [_parse(line, item, path.parent, used) for line, item in read_objects(path)]
    pairs = [item for item in found if isinstance(item, PreferredPair)]
    failures = [item for item in found if isinstance(item, Failure)]
    if not pairs:
        example = '{"prompt": "a bird", "image": "better.png", "rejected": "worse.png"}'
        raise nothing_usable(path, failures, example)
    return pairs, failures


def noises_by_image(matched: Sequence[MatchedPair]) -> Noises:
    """The lines of manifests by their image and prompt."""
    return {(_real(pair.image_path), pair.prompt): pair for pair in matched}


def noise_of(noises: Noises, image: ImageRef, prompt: str) -> MatchedPair:
    """The line of a manifest that has a noise for an image.

    Raises:
        DataError: If there is none.
    """
    found = noises.get((_real(image), prompt))
    if found is None:
        raise DataError(f"no manifest has a noise for {image} with this prompt; assign it one")
    return found


def _real(image: ImageRef) -> str:
    return os.path.realpath(image) if isinstance(image, Path) else str(image)


def _parse(
    line: int, item: dict[str, object] | str, folder: Path, used: dict[str, int]
) -> PreferredPair | Failure:
    prompt = image = None
    try:
        if isinstance(item, str):
            raise DataError(item)
        prompt, image = text_field(item, "prompt"), text_field(item, "image")
        rejected = text_field(item, "rejected")
        weight = item.get("weight", 1.0)
        is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (is_number and 0 <= float(str(weight)) < float("inf")):
            raise DataError(f"'weight' is {weight!r}: give a finite number, 0 or more")
        better, worse = (find_file(name, [folder]) for name in (image, rejected))
        if os.path.samefile(better, worse):
            raise DataError(f"'image' and 'rejected' are the same file, {better}")
        name = claim_id(pair_id(image, rejected, prompt), used)
        return PreferredPair(name, prompt, better, worse, float(str(weight)), line)
    except DataError as error:
        return Failure(str(error), line, None, prompt, image)
