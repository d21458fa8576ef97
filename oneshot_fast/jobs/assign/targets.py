"""Targets made ready for the search: read, encoded and on the device, ahead of their turn."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from oneshot_fast.data.image_refs import file_sha256
from oneshot_fast.data.images import crop_loss, size_in
from oneshot_fast.data.noise_files import read_noise
from oneshot_fast.data.records import Failure, Record
from oneshot_fast.data.sizes import Buckets, Frame, Resolution, size_of
from oneshot_fast.errors import DataError
from oneshot_fast.evaluation.features import features_of
from oneshot_fast.generators.base import Conditioning, Generator
from oneshot_fast.generators.target_images import Place, TargetImages
from oneshot_fast.jobs.assign.features import target_features
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.runtime.files import mend_jsonl
from oneshot_fast.runtime.seeds import derived_seed, gaussian, record_seed
from oneshot_fast.search.problem import Problem


@dataclass(frozen=True)
class Target:
    """One target with all that its search needs, on the generator's device.

    Attributes:
        index: Place in the data set.
        record: Prompt, of several captions the one that the seed drew, and image.
        seed: Seed of the base noise.
        image_sha256: Of the image file.
        is_truncated: Whether the prompt is too long for the text encoders.
        eps: Base noise, [C, h, w] float32.
        prompt: Encoding of the one prompt.
        latent: [C, h, w] float32.
        image: [3, H, W] float32 in [0, 1]; None without a pixel loss.
        features: Of the image, [F] float32; None without their loss.
        candidates: Random noises among which ``eps`` was chosen; 0: it was not.
        first_loss: Loss of one of them taken blindly; None without a choice.
        start: Noise that gradients begin at, [C, h, w] float32; None: at ``eps``.
        cut: Part of the picture that a crop took away.
        place: Where the picture is, and how it is brought to its size.
        frame: How it came to the size of its bucket; None without buckets.
    """

    index: int
    record: Record
    seed: int
    image_sha256: str
    is_truncated: bool
    eps: Tensor
    prompt: Conditioning
    latent: Tensor
    image: Tensor | None
    features: Tensor | None = None
    candidates: int = 0
    first_loss: float | None = None
    start: Tensor | None = None
    cut: float = 0.0
    place: Place = (Path(), "crop")
    frame: Frame | None = None


class Preparer:
    """Makes targets ready, a batch at a time."""

    def __init__(
        self,
        generator: Generator,
        targets: TargetImages,
        options: AssignOptions,
        *,
        seed: int,
        resize_mode: str,
        buckets: Buckets | None = None,
        previous: Path | None = None,
    ) -> None:
        """Bind what all targets share.

        With ``buckets`` the resize mode is not asked. ``previous`` is the manifest of an earlier
        assignment of the same targets, whose noises they begin with.
        """
        self._buckets = buckets
        self._generator, self._targets, self._seed = generator, targets, seed
        self._options, self._resize_mode, self._earlier = options, resize_mode, previous
        self._rows = {row["id"]: row for row in (mend_jsonl(previous) if previous else ())}

    def prepare(
        self, batch: Sequence[tuple[int, Record] | Failure]
    ) -> tuple[list[Target], list[Failure]]:
        """Targets of (index, record) pairs; failures are passed on, with those of reading."""
        ready, failures = [], []
        for item in batch:
            if isinstance(item, Failure):
                failures.append(item)
                continue
            index, record = item
            try:
                ready.append(self._target(index, record))
            except DataError as error:
                failures.append(failure(record, str(error)))
        return ready, failures

    def _target(self, index: int, record: Record) -> Target:
        generator, options, size = self._generator, self._options, self._targets.size
        if record.prompts:
            drawn = derived_seed(self._seed, "caption", record.id) % len(record.prompts)
            record = replace(record, prompt=record.prompts[drawn])
        path, device, frame = record.image_path, generator.device, None
        place: Place = (path, self._resize_mode)
        prompt = generator.told([record.prompt], [record_seed(record.id)])
        if self._buckets is not None:
            frame = self._buckets.frame(size_in(path))
            prompt, size = generator.framed(prompt, [frame]), frame.size
            place = path, "crop", size
        latent = self._targets.latent(*place).to(device)
        image = self._targets.image(*place).to(device) if options.decodes else None
        features = None
        if image is not None and options.features is not None:
            features = target_features(image, options.features)
        seed, start, row = derived_seed(self._seed, record.id), None, self._rows.get(record.id)
        if row is not None and self._earlier is not None:
            shard = self._earlier.parent / row["noise_path"]
            seed, start = int(row["seed"]), read_noise(shard, row["noise_index"]).to(device)
        eps = gaussian([seed], generator.noise_shape(*size))[0].to(device)
        return Target(
            index,
            record,
            seed,
            file_sha256(path),
            generator.is_truncated(record.prompt),
            eps,
            prompt,
            latent,
            image if options.pixel_l1_weight else None,
            features,
            start=start,
            cut=crop_loss(path, size) if place[1] == "crop" else 0.0,
            place=place,
            frame=frame,
        )


def problem_of(targets: Sequence[Target]) -> Problem:
    """The batch of ``targets``."""
    columns = {
        "latents": [target.latent for target in targets],
        "images": [target.image for target in targets if target.image is not None],
        "features": [target.features for target in targets if target.features is not None],
    }
    return Problem(
        torch.stack([target.eps for target in targets]),
        targets[0].prompt.cat([target.prompt for target in targets]),
        target={name: torch.stack(column) for name, column in columns.items() if column},
        start=torch.stack([t.eps if t.start is None else t.start for t in targets]),
    )


@torch.no_grad()
def random_problem(
    generator: Generator, options: AssignOptions, resolution: Resolution, count: int
) -> Problem:
    """A batch of ``count`` random targets with all that their search needs, on the device."""
    size = size_of(resolution)
    with torch.device(generator.device):
        eps = torch.randn(count, *generator.noise_shape(*size))
        target = {"latents": torch.randn(count, *generator.latent_shape(*size))}
        images = torch.rand(count, 3, *size) if options.decodes else None
        conditioning = generator.blank_prompts(count)
    if images is not None and options.pixel_l1_weight:
        target["images"] = images
    if images is not None and options.features is not None:
        target["features"] = features_of(images, options.features)
    return Problem(eps, conditioning, target=target)


def failure(record: Record, reason: str) -> Failure:
    """The failure of ``record`` for ``reason``."""
    return Failure(reason, record.line, record.id, record.prompt, record.image)
