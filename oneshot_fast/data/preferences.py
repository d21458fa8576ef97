"""Pairs of images of one prompt, of which one is preferred."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from oneshot_fast.data.image_refs import ImageRef, Member, cell_place, find_file
from oneshot_fast.data.manifests import MatchedPair
from oneshot_fast.data.records import (
    Failure,
    claim_id,
    nothing_usable,
    pair_id,
    read_objects,
    text_field,
)
from oneshot_fast.data.tables import read_rows
from oneshot_fast.errors import DataError
from oneshot_fast.runtime.ledger import say
from oneshot_fast.runtime.processes import is_main

_PICKED = ("caption", "label_0", "label_1")
Noises = Mapping[tuple[str, str], MatchedPair]  # by real path of the image, and prompt


@dataclass(frozen=True)
class PreferredPair:
    """One line of a file of pairs; paths are absolute."""

    id: str
    prompt: str
    image: ImageRef  # the preferred one
    rejected: ImageRef
    weight: float
    line: int  # 1-based; of a table its row


def read_preferences(path: Path) -> tuple[list[PreferredPair], list[Failure]]:
    """Read pairs from JSON lines {"prompt", "image", "rejected"[, "weight"]}, or from Parquet.

    Paths are relative to the file's folder; the images are looked up, not decoded. A .parquet file
    is one of Pick-a-Pic (Kirstain et al. 2023, arXiv 2305.01569): columns "caption", "jpg_0" and
    "jpg_1" of bytes, "label_0" and "label_1", 1 of the better image. Ties, labels of 0.5, are left
    out.

    Returns:
        The pairs and the failures, each in file order.

    Raises:
        DataError: no such file, or no usable line in it, or no Parquet file of these columns.
    """
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file of pairs; give the path of a pairs.jsonl")
    used: dict[str, int] = {}
    if path.suffix == ".parquet":
        found = _picked(path.absolute(), used)
    else:
        found = [_parse(line, item, path.parent, used) for line, item in read_objects(path)]
    pairs = [item for item in found if isinstance(item, PreferredPair)]
    failures = [item for item in found if isinstance(item, Failure)]
    if not found and path.suffix == ".parquet":
        raise DataError(f"{path}: has no row, or ties alone")
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
    if isinstance(image, Path):
        return os.path.realpath(image)
    return str(image if "://" in image.file else replace(image, file=os.path.realpath(image.file)))


def _picked(path: Path, used: dict[str, int]) -> list[PreferredPair | Failure]:
    """Those of a Parquet file of Pick-a-Pic, without its ties."""
    found: list[PreferredPair | Failure] = []
    ties = 0
    for line, (group, row, cells) in enumerate(read_rows(path, _PICKED, _check_columns), 1):
        prompt = None
        try:
            prompt = text_field(cells, "caption")
            labels = cells["label_0"], cells["label_1"]
            if labels == (0.5, 0.5):
                ties += 1
                continue
            if labels not in ((1, 0), (0, 1)):
                raise DataError(
                    f"'label_0' and 'label_1' are {labels[0]} and {labels[1]}: give 1 and 0, 0 and "
                    "1, or 0.5 twice for a tie"
                )
            columns = ("jpg_0", "jpg_1") if labels == (1, 0) else ("jpg_1", "jpg_0")
            better, worse = (Member(str(path), cell_place(name, group, row)) for name in columns)
            name = claim_id(pair_id(better.place, worse.place, prompt), used)
            found.append(PreferredPair(name, prompt, better, worse, 1.0, line))
        except DataError as error:
            found.append(Failure(str(error), line, None, prompt, None))
    if ties and is_main():
        say(f"{path}: left out as ties: {ties}")
    return found


def _check_columns(names: list[str]) -> None:
    missing = [name for name in (*_PICKED, "jpg_0", "jpg_1") if name not in names]
    if missing:
        raise DataError(
            f"it lacks {', '.join(missing)}, which files of Pick-a-Pic have; give those, or a "
            "pairs.jsonl"
        )


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
