"""Pairs in, matched pairs out: data sets, manifests and noises, read with one failure per bad line.

A bad line never stops the rest: it becomes a `Failure` with its line number and reason. `DataError`
is raised only where nothing at all can be done.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from oneshot_fast.errors import DataError
from oneshot_fast.images import load_image
from oneshot_fast.inputs import (
    Failure,
    claim_id,
    one_line,
    pair_id,
    read_objects,
    text_field,
)
from oneshot_fast.noise_files import read_noise

__all__ = [
    "DataError",
    "Failure",
    "MatchedPair",
    "Record",
    "file_sha256",
    "load_image",
    "load_noise",
    "pair_id",
    "read_manifest",
    "read_pairs",
]

_LAYOUTS = {"pairs.jsonl": ("prompt", "image"), "metadata.jsonl": ("text", "file_name")}


@dataclass(frozen=True)
class Record:
    """One (prompt, target image) of a data set.

    `id` is the first 12 hex digits of sha256(image as written + NUL + prompt); the second and later
    lines with the same pair get "-1", "-2", ... in file order, whatever part of the file is used.
    """

    id: str
    line: int  # 1-based
    prompt: str
    image: str  # as written
    image_path: Path  # absolute, symlinks resolved


@dataclass(frozen=True)
class MatchedPair:
    """One (prompt, target image, noise) of a manifest; paths are absolute."""

    id: str
    prompt: str
    image_path: Path
    noise_path: Path  # .safetensors, or .pt from the reference workflow
    noise_index: int | None  # row of tensor "z" in a safetensors shard; None: a file of one noise
    resize_mode: str = "crop"  # how the target was brought to the model's resolution
    image_sha256: str | None = None  # of the target when the noise was assigned


def read_pairs(
    data_root: Path,
    *,
    prompt_field: str | None = None,
    image_field: str | None = None,
    start_index: int = 0,
    max_samples: int | None = None,
    allow_outside_root: bool = False,
) -> tuple[list[Record], list[Failure]]:
    """Read the (prompt, image) pairs of a data set; the images are looked up, not decoded.

    Args:
        data_root: folder with pairs.jsonl ({"prompt", "image"}) or, without it, metadata.jsonl of a
            Hugging Face image folder ({"text", "file_name"}); or the path of such a .jsonl file.
        prompt_field: name of the prompt's field, where it is another.
        image_field: name of the image's field, where it is another.
        start_index: records (non-blank lines) to skip.
        max_samples: most records to read; None reads all.
        allow_outside_root: accept images that lie outside `data_root`.

    Returns:
        The records and the failures among the chosen lines, each in file order.

    Raises:
        DataError: no such data set, no usable record in it, a field in no line, or a bad range.
    """
    if start_index < 0:
        raise DataError(f"start_index is {start_index}: give 0 or more")
    if max_samples is not None and max_samples < 1:
        raise DataError(f"max_samples is {max_samples}: give at least 1")
    path = _find_pairs(data_root)
    defaults = _LAYOUTS.get(path.name, _LAYOUTS["pairs.jsonl"])
    fields = (prompt_field or defaults[0], image_field or defaults[1])
    parsed = _parse_pairs(path, fields)
    if start_index >= len(parsed) > 0:
        raise DataError(f"start_index is {start_index}, but {path} has {len(parsed)} records")
    root = Path(os.path.realpath(path.parent))
    chosen = parsed[start_index:][:max_samples]
    found = [_find_image(item, root, allow_outside_root) for item in chosen]
    records = [item for item in found if isinstance(item, Record)]
    failures = [item for item in found if isinstance(item, Failure)]
    if not records:
        example = f'{{"{fields[0]}": "a red bird", "{fields[1]}": "bird.png"}}'
        raise _nothing_usable(path, failures, example)
    return records, failures


def file_sha256(path: Path) -> str:
    """Sha256 of a file's bytes, as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(path: Path) -> tuple[list[MatchedPair], list[Failure]]:
    """Read a manifest of matched pairs, of `oneshot_fast.assign` or of the reference workflow.

    Lines of ours hold id, prompt, target_image_path, noise_path and noise_index; their paths are
    relative to the manifest's folder. Lines of the reference workflow hold prompt,
    target_image_path and best_input_noise_path; their paths are relative to the manifest's folder
    or else to the working directory. Absolute paths are taken as they are. A line without an id
    gets the id that `Record` describes; a repeated id gets "-1", "-2", ... in file order.

    Returns:
        The pairs and the failures, each in file order.

    Raises:
        DataError: no such file, or no usable line in it.
    """
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such manifest file; give the path of a manifest.jsonl")
    used: dict[str, int] = {}
    found = [_parse_match(number, item, path.parent, used) for number, item in read_objects(path)]
    pairs = [item for item in found if isinstance(item, MatchedPair)]
    failures = [item for item in found if isinstance(item, Failure)]
    if not pairs:
        raise _nothing_usable(
            path, failures, '{"prompt": ..., "target_image_path": ..., "noise_path": ...}'
        )
    return pairs, failures


def load_noise(pair: MatchedPair) -> Tensor:
    """Load the noise of one matched pair; of a shard, only its row is read.

    Returns:
        [C, h, w] float32 on the CPU, finite.

    Raises:
        DataError: the file is damaged or no plain tensor; the noise has a wrong shape or values.
    """
    return read_noise(pair.noise_path, pair.noise_index)


def _find_pairs(data_root: Path) -> Path:
    """Path of the .jsonl file that lists the pairs."""
    if os.path.isfile(data_root):
        if data_root.suffix == ".jsonl":
            return data_root
        raise DataError(f"{data_root}: give a folder or a .jsonl file as data_root")
    if not os.path.isdir(data_root):
        raise DataError(f"{data_root}: no such folder or .jsonl file; check data_root")
    for name in _LAYOUTS:
        if os.path.isfile(data_root / name):
            return data_root / name
    raise DataError(f"{data_root}: has no {' and no '.join(_LAYOUTS)}; add one of them")


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
    path = Path(os.path.realpath(root / item.image))
    if not (allow_outside_root or path.is_relative_to(root)):
        reason = f"image leads outside {root}: move it there or pass --allow_outside_root"
    elif not os.path.exists(path):
        reason = f"no such image file: {path}"
    elif not os.path.isfile(path):
        reason = f"image is a folder or device, not a file: {path}"
    else:
        return replace(item, image_path=path)
    return Failure(reason, item.line, item.id, item.prompt, item.image)


def _nothing_usable(path: Path, failures: Sequence[Failure], example: str) -> DataError:
    if not failures:
        return DataError(f"{path}: is empty; write one JSON object per line: {example}")
    first = failures[0]
    count = f"no usable line, {len(failures)} failed"
    return DataError(f"{path}: {count}; the first, line {first.line}: {first.reason}")


def _parse_match(
    line: int, item: dict[str, object] | str, folder: Path, used: dict[str, int]
) -> MatchedPair | Failure:
    name = prompt = image = None
    try:
        if isinstance(item, str):
            raise DataError(item)
        image = text_field(item, "target_image_path")
        prompt = text_field(item, "prompt")
        wanted = pair_id(image, prompt) if item.get("id") is None else text_field(item, "id")
        name = claim_id(wanted, used)
        reference = "noise_path" not in item and "best_input_noise_path" in item
        noise = text_field(item, "best_input_noise_path" if reference else "noise_path")
        index = _noise_index(item, noise)
        folders = [folder, Path.cwd()] if reference else [folder]
        image_path = _find_file(image, folders)
        noise_path = _find_file(noise, folders)
        mode = text_field(item, "resize_mode") if "resize_mode" in item else "crop"
        digest = text_field(item, "image_sha256") if "image_sha256" in item else None
        return MatchedPair(name, prompt, image_path, noise_path, index, mode, digest)
    except DataError as error:
        return Failure(str(error), line, name, prompt, image)


def _noise_index(item: dict[str, object], noise: str) -> int | None:
    """Checked `noise_index` of a manifest line, whose noise file must be of a known kind."""
    index = item.get("noise_index")
    suffix = Path(noise).suffix
    if suffix not in (".safetensors", ".pt"):
        raise DataError(f"noise file '{noise}' is neither .safetensors nor .pt")
    if index is None:
        return None
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise DataError("'noise_index' must be a whole number, 0 or more, or null")
    if suffix == ".pt":
        raise DataError("'noise_index' needs a .safetensors noise file: a .pt file holds one noise")
    return index


def _find_file(name: str, folders: Sequence[Path]) -> Path:
    for folder in folders:
        path = folder.absolute() / name
        if os.path.isfile(path):
            return path
    raise DataError(f"no such file: {name} (looked from {' and '.join(map(str, folders))})")
