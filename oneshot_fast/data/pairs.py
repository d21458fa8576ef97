"""Pairs in, matched pairs out: data sets, manifests and noises, read with one failure per bad line.

A bad line never stops the rest: it becomes a `Failure` with its line number and reason. `DataError`
is raised only where nothing at all can be done.
"""

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from oneshot_fast.data.image_refs import existing, hint
from oneshot_fast.data.images import save_png
from oneshot_fast.data.options import ALL, Selection
from oneshot_fast.data.records import (
    Failure,
    Record,
    claim_id,
    nothing_usable,
    pair_id,
    read_objects,
    text_field,
)
from oneshot_fast.errors import DataError, one_line
from oneshot_fast.runtime.files import write_jsonl

_LAYOUTS = {"pairs.jsonl": ("prompt", "image"), "metadata.jsonl": ("text", "file_name")}


def read_pairs(data_root: Path, selection: Selection = ALL) -> tuple[list[Record], list[Failure]]:
    """Read the (prompt, image) pairs of a data set; the images are looked up, not decoded.

    Args:
        data_root: folder with pairs.jsonl ({"prompt", "image"}) or, without it, metadata.jsonl of a
            Hugging Face image folder ({"text", "file_name"}); or the path of such a .jsonl file.
        selection: which of its records (non-blank lines), and their fields.

    Returns:
        The records and the failures among the chosen lines, each in file order.

    Raises:
        DataError: no such data set, no usable record in it, a field in no line, or a bad range.
    """
    selection.check()
    path = _find_pairs(data_root)
    defaults = _LAYOUTS.get(path.name, _LAYOUTS["pairs.jsonl"])
    fields = (selection.prompt_field or defaults[0], selection.image_field or defaults[1])
    parsed = _parse_pairs(path, fields)
    start, count = selection.start_index, selection.max_samples
    if start >= len(parsed) > 0:
        raise DataError(f"start_index is {start}, but {path} has {len(parsed)} records")
    root = Path(os.path.realpath(path.parent))
    chosen = parsed[start:][:count]
    found = [_find_image(item, root, selection.allow_outside_root) for item in chosen]
    records = [item for item in found if isinstance(item, Record)]
    failures = [item for item in found if isinstance(item, Failure)]
    if not records:
        example = f'{{"{fields[0]}": "a red bird", "{fields[1]}": "bird.png"}}'
        raise nothing_usable(path, failures, example)
    return records, failures


def write_pairs(
    folder: Path, prompts: Iterable[str], names: Iterable[str], images: Iterable[Tensor]
) -> None:
    """Write a data set as ``read_pairs`` reads it: PNG files and then, with all there, the list.

    Args:
        folder: where to.
        prompts: one per image.
        names: of the image files, inside ``folder``.
        images: [3, H, W] each, in [0, 1] RGB.
    """
    rows = []
    for prompt, name, image in zip(prompts, names, images, strict=True):
        save_png(folder / name, image)
        rows.append({"prompt": prompt, "image": name})
    write_jsonl(folder / "pairs.jsonl", rows)


def _find_pairs(data_root: Path) -> Path:
    """Path of the .jsonl file that lists the pairs."""
    if os.path.isfile(data_root):
        if data_root.suffix == ".jsonl":
            return data_root
        raise DataError(f"{data_root}: give a folder, .tar, .parquet or .jsonl file as data_root")
    if not os.path.isdir(data_root):
        raise DataError(f"{data_root}: no such folder or .jsonl file; check data_root")
    for name in _LAYOUTS:
        if os.path.isfile(data_root / name):
            return data_root / name
    raise DataError(
        f"{data_root}: has no {' and no '.join(_LAYOUTS)}, and no *.tar or *.parquet; add one of "
        "them"
    )


def _parse_pairs(path: Path, fields: tuple[str, str]) -> list[Record | Failure]:
    """Every record of the file, so that ids do not depend on the part of it that is used."""
    lines = list(read_objects(path))
    found = sorted({name for _, item in lines if isinstance(item, dict) for name in item})
    for field, flag in zip(fields, ("--prompt_field", "--image_field"), strict=True):
        if found and field not in found:
            names = one_line(", ".join(found))
            raise DataError(f"{path}: no line has the field '{field}'; set {flag}, one of: {names}")
    used: dict[str, int] = {}
    return [_parse_pair(number, item, fields, used) for number, item in lines]


def _parse_pair(
    line: int, item: dict[str, object] | str, fields: tuple[str, str], used: dict[str, int]
) -> Record | Failure:
    """The record of one line, its image not yet looked up."""
    prompt = image = None
    try:
        if isinstance(item, str):
            raise DataError(item)
        image = text_field(item, fields[1])
        prompt = text_field(item, fields[0])
    except DataError as error:
        return Failure(str(error), line, image=image)
    return Record(claim_id(pair_id(image, prompt), used), line, prompt, image, Path(image))


def _find_image(item: Record | Failure, root: Path, allow_outside_root: bool) -> Record | Failure:
    if isinstance(item, Failure):
        return item
    path = Path(os.path.realpath(existing(root / item.image) or root / item.image))
    if not (allow_outside_root or path.is_relative_to(root)):
        reason = f"image leads outside {root}: move it there or pass --allow_outside_root"
    elif not os.path.exists(path):
        reason = f"no such image file: {path}{hint(item.image, root)}"
    elif not os.path.isfile(path):
        reason = f"image is a folder or device, not a file: {path}"
    else:
        return replace(item, image_path=path)
    return Failure(reason, item.line, item.id, item.prompt, item.image)
