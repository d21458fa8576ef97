"""Matched pairs back from manifests, ours and the reference workflow's."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from glob import glob, has_magic
from itertools import chain
from pathlib import Path

from oneshot_fast.data.image_refs import ImageRef, find_file, image_ref, image_text, need_readers
from oneshot_fast.data.records import (
    Failure,
    claim_id,
    nothing_usable,
    pair_id,
    read_objects,
    text_field,
    texts_field,
)
from oneshot_fast.data.sizes import Frame, Size
from oneshot_fast.errors import DataError
from oneshot_fast.runtime.files import mend_jsonl, write_jsonl
from oneshot_fast.runtime.seeds import content_id
from oneshot_fast.runtime.stored import Stored, StoredNumbers

_EXAMPLE = '{"prompt": ..., "target_image_path": ..., "noise_path": ...}'


@dataclass(frozen=True)
class MatchedPair:
    """One (prompt, target image, noise) of a manifest; paths are absolute."""

    id: str
    prompt: str
    image_path: ImageRef
    noise_path: Path  # .safetensors, or .pt from the reference workflow
    noise_index: int | None  # row of tensor "z" in a safetensors shard; None: a file of one noise
    resize_mode: str = "crop"  # how the target was brought to its size
    image_sha256: str | None = None  # of the target when the noise was assigned
    line: int = 0  # 1-based
    digest: str = ""  # of the line, whatever of it is read
    prompts: tuple[str, ...] = ()  # where there are several captions: all of them
    frame: Frame | None = None  # of resize_mode "bucket"
    assigned_id: str = ""  # the id in the manifest, where another line has it, too

    @property
    def record_id(self) -> str:
        """Id of the record that the noise was assigned to, by which samplers draw later noises."""
        return self.assigned_id or self.id

    @property
    def place(self) -> tuple[ImageRef, str, Size | None]:
        """The target's path, how it is brought to its size, and this if it has its own."""
        if self.frame is not None:
            return self.image_path, "crop", self.frame.size
        return self.image_path, self.resize_mode, None


def find_manifests(given: Iterable[Iterable[Path]]) -> list[Path]:
    """The manifests that are named, each a path or a pattern with *, ? or [a-z], without repeats.

    Raises:
        DataError: a pattern fits no file.
    """
    found: list[Path] = []
    for path in chain.from_iterable(given):
        matches = [path] if path.exists() else [Path(x) for x in sorted(glob(str(path)))]
        if not matches and has_magic(str(path)):
            raise DataError(f"{path}: no file fits this pattern; give paths of manifest.jsonl")
        found += matches or [path]
    return [*dict.fromkeys(found)]


def read_manifests(paths: Sequence[Path]) -> tuple[Sequence[MatchedPair], list[Failure]]:
    """Read several manifests as one, see ``read_manifest``; the pairs stay on disk.

    Lines are counted through all of them, and reasons name the file. An id of an earlier one gets
    "-1", "-2", ...

    Raises:
        DataError: one of them cannot be read, or has no usable line.
    """
    failures: list[Failure] = []

    def read() -> Iterator[MatchedPair]:
        before, used = 0, StoredNumbers()
        for path in paths:
            line, usable, failed = 0, False, len(failures)
            for line, item in _matches(path, used):
                if isinstance(item, MatchedPair):
                    usable = True
                    yield replace(item, line=before + line)
                    continue
                where = f"{path}, line {line}: " if len(paths) > 1 else ""
                failures.append(replace(item, line=before + line, reason=where + item.reason))
            if not usable:
                raise nothing_usable(path, failures[failed:], _EXAMPLE)
            before += line

    pairs = Stored(read())
    need_readers(pair.image_path for pair in pairs)
    return pairs, failures


def read_manifest(path: Path) -> tuple[list[MatchedPair], list[Failure]]:
    """Read a manifest of matched pairs, of `oneshot_fast.assign` or of the reference workflow.

    Lines of ours hold id, prompt, target_image_path, noise_path and noise_index; their paths are
    relative to the manifest's folder. Lines of the reference workflow hold prompt,
    target_image_path and best_input_noise_path; their paths are relative to the manifest's folder
    or else to the working directory. Absolute paths are taken as they are. A line without an id
    gets the id that `Record` describes; a repeated id gets "-1", "-2", ... in file order. Of a line
    with a list of several captions (prompts, or prompt itself) all are kept.

    Returns:
        The pairs and the failures, each in file order.

    Raises:
        DataError: no such file, no usable line in it, or a library for its images is missing.
    """
    pairs, failures = read_manifests([path])
    return [*pairs], failures


def _matches(path: Path, used: StoredNumbers) -> Iterator[tuple[int, MatchedPair | Failure]]:
    """Of each line its number and what it holds; ``used`` are ids, see ``claim_id``."""
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such manifest file; give the path of a manifest.jsonl")
    for number, item in read_objects(path):
        yield number, _parse_match(number, item, path.parent, used)


def merge_manifests(old: Path, new: Path, merged: Path) -> None:
    """Write the lines of ``old``, each replaced by the line of ``new`` with its id, if any.

    All are manifests of ours; the paths are made relative to the folder of ``merged``.
    """
    home = merged.parent.resolve()
    lines: dict[str, dict[str, object]] = {}
    for path in (old, new):
        for row in mend_jsonl(path):
            image = image_ref(row["target_image_path"], path.parent.resolve())
            noise = path.parent.resolve() / row["noise_path"]
            lines[row["id"]] = row | {
                "target_image_path": image_text(image, home),
                "noise_path": os.path.relpath(noise, home),
            }
    write_jsonl(merged, lines.values())


def _parse_match(
    line: int, item: dict[str, object] | str, folder: Path, used: StoredNumbers
) -> MatchedPair | Failure:
    name = image = None
    prompts: tuple[str, ...] = ()
    said = content_id(json.dumps(item, sort_keys=True))
    try:
        if isinstance(item, str):
            raise DataError(item)
        image = text_field(item, "target_image_path")
        prompts = texts_field(item, "prompt")
        wanted = pair_id(image, *prompts) if item.get("id") is None else text_field(item, "id")
        name = claim_id(wanted, used)
        own = "" if name == wanted else wanted
        reference = "noise_path" not in item and "best_input_noise_path" in item
        noise = text_field(item, "best_input_noise_path" if reference else "noise_path")
        index = _noise_index(item, noise)
        folders = [folder, Path.cwd()] if reference else [folder]
        image_path = image_ref(image, *folders)
        noise_path = find_file(noise, folders)
        mode = text_field(item, "resize_mode") if "resize_mode" in item else "crop"
        digest = text_field(item, "image_sha256") if "image_sha256" in item else None
        place = image_path, noise_path, index
        several = prompts if prompts[1:] else ()
        if item.get("prompts") is not None:
            several = texts_field(item, "prompts")
        frame = Frame.read(item) if mode == "bucket" else None
        return MatchedPair(name, prompts[0], *place, mode, digest, line, said, several, frame, own)
    except DataError as error:
        return Failure(str(error), line, name, next(iter(prompts), None), image, said)


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
