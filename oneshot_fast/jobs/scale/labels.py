"""What `scale data` made, to train rewards on: images at steps, and the scores of the last."""

import json
import math
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oneshot_fast.data.image_refs import ImageRef, Member
from oneshot_fast.data.images import load_image, size_in
from oneshot_fast.data.sizes import Size
from oneshot_fast.errors import DataError, one_line, refused, require
from oneshot_fast.runtime.seeds import content_id
from oneshot_fast.search.pruning import Floats

LABELS = "labels.jsonl"


@dataclass(frozen=True)
class Labels:
    """N images of each of P prompts, at some steps.

    Attributes:
        prompts: P texts, which may repeat.
        steps: Numbers of the steps, from 0, that rise; the last is the sampler's last.
        scores: [P, N, len(steps)] of one reward.
        pictures: Where the image of a prompt, number and step is.
        size: Height and width of all of them, pixels.
    """

    prompts: tuple[str, ...]
    steps: tuple[int, ...]
    scores: Floats
    pictures: Mapping[tuple[int, int, int], ImageRef]
    size: Size

    @property
    def num_steps(self) -> int:
        """S of the sampler."""
        return self.steps[-1] + 1

    @property
    def final(self) -> Floats:
        """[P, N]: scores of the finished images."""
        return self.scores[..., -1]

    def early(self, step: int) -> Floats:
        """[P, N]: scores of the estimates of a step."""
        return self.scores[..., self.steps.index(step)]

    def images(self, rows: Sequence[tuple[int, int]], step: int) -> Tensor:
        """[B, 3, H, W] float32 in [0, 1] RGB of these prompts and numbers.

        Raises:
            DataError: If a picture is gone or damaged.
        """
        found = [load_image(self.pictures[p, n, step], *self.size) for p, n in rows]
        return torch.stack(found)


def read_labels(folder: Path, reward: str) -> Labels:
    """Read what `scale data` wrote into ``folder``.

    Raises:
        DataError: If it is not whole, with file, line and what is wrong.
    """
    path = folder / LABELS
    if not path.is_file():
        raise DataError(f"{folder} has no {LABELS}; make it with `scale data`")
    found: dict[tuple[str, str], tuple[str, list[float]]] = {}
    steps: list[int] | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
            prompt_id, _, image_id = row["id"].partition("/")
            text, own_steps, per_step = row["prompt"], row["steps"], row["scores_per_step"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{place}: no line of `scale data`: {one_line(error)}") from None
        known = ", ".join(per_step)
        require(reward in per_step, f"{place}: no scores of {reward}, only of {known}")
        values = per_step[reward]
        if steps is None:
            steps = own_steps
        if own_steps != steps or len(values) != len(steps):
            raise DataError(f"{place}, {row['id']}: its steps are {own_steps}, others' {steps}")
        if not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
            raise DataError(f"{place}, {row['id']}: a score of {reward} is no finite number")
        if (prompt_id, image_id) in found:
            raise DataError(f"{place}: {row['id']} comes a second time")
        found[prompt_id, image_id] = text, values
    if not found or not steps:
        raise DataError(f"{path} has no images")
    return _arranged(folder, found, tuple(steps))


def _arranged(
    folder: Path, found: Mapping[tuple[str, str], tuple[str, list[float]]], steps: tuple[int, ...]
) -> Labels:
    by_prompt: dict[str, dict[str, tuple[str, list[float]]]] = {}
    for (prompt_id, image_id), value in found.items():
        by_prompt.setdefault(prompt_id, {})[image_id] = value
    count = len(next(iter(by_prompt.values())))
    pictures: dict[tuple[int, int, int], ImageRef] = {}
    for p, (prompt_id, images) in enumerate(by_prompt.items()):
        if len(images) != count:
            raise DataError(f"{folder}: {prompt_id} has {len(images)} images, others {count}")
        place = folder / "images" / prompt_id
        members = _members(place.with_name(f"{prompt_id}.tar"))
        for n, image_id in enumerate(images):
            for step in steps:
                found_in = members.get(f"{prompt_id}-{image_id}.s{step:02d}.png")
                path = place / image_id / f"s{step:02d}.png"
                require(
                    found_in is not None or path.is_file(),
                    f"{path} is missing; repeat the `scale data` command, without --no_save_images",
                )
                pictures[p, n, step] = found_in or path
    first = next(iter(pictures.values()))
    texts = tuple(next(iter(images.values()))[0] for images in by_prompt.values())
    scores = np.array([[values for _, values in images.values()] for images in by_prompt.values()])
    return Labels(texts, steps, scores, pictures, size_in(first))


def _members(path: Path) -> dict[str, Member]:
    """Files in a tar shard, by name; nothing if it is not there."""
    if not path.is_file():
        return {}
    with refused(DataError, f"{path} is damaged: "), tarfile.open(path, "r:") as shard:
        return {
            info.name: Member(str(path.absolute()), f"{info.offset_data}+{info.size}")
            for info in shard
        }


def split(prompts: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Places of prompts to train on, and of those kept aside: no text is in both.

    Raises:
        UserError: If there are too few different prompts.
    """
    texts = [*dict.fromkeys(prompts)]
    order = np.random.default_rng(seed).permutation(len(texts))
    apart = {texts[k] for k in order[: max(1, round(share * len(texts)))]}
    require(len(apart) < len(texts), "give at least 2 different prompts, some to keep aside")
    train = [k for k, text in enumerate(prompts) if text not in apart]
    return train, [k for k, text in enumerate(prompts) if text in apart]


def described(labels: Labels, path: Path) -> dict[str, Any]:
    """What a training's settings say of the images."""
    return {
        "data": content_id(path.read_text(encoding="utf-8")),
        "images": [*labels.final.shape],
        "image_size": [*labels.size],
        "steps": [*labels.steps],
    }
