"""Pairs in, matched pairs out: data sets, manifests and noises, read with one failure per bad line.

A bad line never stops the rest: it becomes a `Failure` with its line number and reason. `DataError`
is raised only where nothing at all can be done.
"""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from oneshot_fast.data.image_refs import existing, hint
from oneshot_fast.data.images import save_png
from oneshot_fast.data.options import ALL, Selection
from oneshot_fast.data.prompts import Row, read_table
from oneshot_fast.data.records import (
    Failure,
    Record,
    check_size,
    claim_id,
    nothing_usable,
    pair_id,
    read_objects,
    text_field,
    texts_field,
)
from oneshot_fast.data.tables import read_rows
from oneshot_fast.errors import DataError, one_line
from oneshot_fast.runtime.files import write_jsonl
from oneshot_fast.runtime.ledger import say
from oneshot_fast.runtime.processes import is_main

_OURS, _HUGGING_FACE = ("prompt", "image"), ("text", "file_name")
_LAYOUTS = {
    "pairs.jsonl": _OURS,
    **dict.fromkeys(("metadata.jsonl", "metadata.csv", "metadata.parquet"), _HUGGING_FACE),
}
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_CAPTIONS = (".txt", ".caption")
_REPEATS = re.compile(r"(\d{1,4})_(.*)")  # and prompt: a folder's name, as kohya's scripts have it


def read_pairs(data_root: Path, selection: Selection = ALL) -> tuple[list[Record], list[Failure]]:
    """Read the (prompt, image) pairs of a data set; the images are looked up, not decoded.

    Args:
        data_root: folder with pairs.jsonl ({"prompt", "image"}) or, without it, metadata.jsonl,
            .csv or .parquet of a Hugging Face image folder ({"text", "file_name"}), or one that has
            one folder with such a list; or the path of such a file; or a folder of images, or of
            folders of them, each with its caption in a .txt or .caption file of its name.
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
    root = Path(os.path.realpath(path if path.is_dir() else path.parent))
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
        if data_root.suffix in (".jsonl", ".csv") or data_root.name in _LAYOUTS:
            return data_root
        raise DataError(f"{data_root}: give a folder, .tar, .parquet or .jsonl file as data_root")
    if not os.path.isdir(data_root):
        raise DataError(f"{data_root}: no such folder or .jsonl file; check data_root")
    for name in _LAYOUTS:
        if os.path.isfile(data_root / name):
            return data_root / name
    inside = [
        f"{x.name}/{name}" for x in _folders(data_root) for name in _LAYOUTS if (x / name).is_file()
    ]
    if len(inside) == 1:
        return data_root / inside[0]
    if inside:
        raise DataError(
            f"{data_root}: has {one_line(', '.join(inside))}; give one of these folders"
        )
    if any(isinstance(row, dict) for _, row in _captioned(data_root)):
        return data_root
    raise DataError(
        f"{data_root}: has no {' and no '.join(_LAYOUTS)}, no *.tar, *.parquet or folder of "
        "save_to_disk; add one of them"
    )


def _rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    if path.is_dir():
        return _captioned(path, tell=True)
    if path.suffix == ".parquet":
        rows = read_rows(path, fields, lambda names: _check_fields(names, fields))
        return ((line, cells) for line, (_, _, cells) in enumerate(rows, 1))
    return read_table(path) if path.suffix == ".csv" else read_objects(path)


def _check_fields(found: Sequence[str], fields: Sequence[str]) -> None:
    """Raise DataError if there are lines, and none has one of the fields."""
    for field, flag in zip(fields, ("--prompt_field", "--image_field"), strict=True):
        if found and field not in found:
            names = one_line(", ".join(found))
            raise DataError(f"no line has the field '{field}'; set {flag}, one of: {names}")


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")


def _captioned(root: Path, tell: bool = False) -> Iterator[Row]:
    """Images of a folder, and of those in it, with the whole text of the caption file beside them.

    As for kohya's scripts a folder N_NAME counts N times, and NAME is the prompt of its images if
    none of them has a caption file.
    """
    numbers, told = itertools.count(1), []
    for folder in (root, *_folders(root)):
        names = {path.name for path in folder.iterdir() if path.name[0] != "."}
        images = [folder / name for name in sorted(names) if name.lower().endswith(_IMAGES)]
        kohya = _REPEATS.fullmatch(folder.name) if images and folder != root else None
        captions = {image.with_suffix(suffix).name for image in images for suffix in _CAPTIONS}
        named = kohya[2].strip() if kohya and not captions & names else ""
        if kohya:
            prompt = f', prompt "{one_line(named):.60}"' if named else ""
            told.append(f"{one_line(folder.name)} ({len(images)} images, {kohya[1]} times{prompt})")
        for image in images:
            row = _caption_row(image, root, named)
            yield from ((next(numbers), row) for _ in range(int(kohya[1]) if kohya else 1))
    if tell and told and is_main():
        say(f"folders by kohya's rule: {', '.join(told)}")


def _caption_row(image: Path, root: Path, named: str) -> dict[str, object] | str:
    name = image.relative_to(root).as_posix()
    paths = [image.with_suffix(suffix) for suffix in _CAPTIONS]
    path = next(filter(os.path.lexists, paths), paths[0])
    try:
        if not named:
            check_size(path.name, path.stat().st_size)
            named = path.read_text(encoding="utf-8-sig").strip()
        return {"prompt": named, "image": name}
    except FileNotFoundError:
        return f"{name} has no caption {path.name} beside it"
    except UnicodeDecodeError:
        return f"{path.name} of {name} is no UTF-8 text"
    except (DataError, OSError) as error:
        return f"caption of {name}: {one_line(error)}"


def _parse_pairs(path: Path, fields: tuple[str, str]) -> list[Record | Failure]:
    """Every record of the file, so that ids do not depend on the part of it that is used."""
    lines = list(_rows(path, fields))
    found = sorted({name for _, item in lines if isinstance(item, dict) for name in item})
    try:
        _check_fields(found, fields)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    used: dict[str, int] = {}
    return [_parse_pair(number, item, fields, used) for number, item in lines]


def _parse_pair(
    line: int, item: dict[str, object] | str, fields: tuple[str, str], used: dict[str, int]
) -> Record | Failure:
    """The record of one line, its image not yet looked up."""
    image = None
    try:
        if isinstance(item, str):
            raise DataError(item)
        image = text_field(item, fields[1])
        prompts = texts_field(item, fields[0])
    except DataError as error:
        return Failure(str(error), line, image=image)
    name = claim_id(pair_id(image, *prompts), used)
    return Record(name, line, prompts[0], image, Path(image), prompts if prompts[1:] else ())


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
