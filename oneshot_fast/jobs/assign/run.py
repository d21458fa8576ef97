"""The E-step over a data set, into one folder."""

import contextlib
import dataclasses
from array import array
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from oneshot_fast.data.image_refs import file_sha256, image_text
from oneshot_fast.data.images import MUCH, cut_warning, save_png
from oneshot_fast.data.records import Failure, Record
from oneshot_fast.data.sizes import Buckets, Resolution, Size
from oneshot_fast.data.sources import Batch, FolderSource, Source, pending
from oneshot_fast.errors import DataError, RunError, require
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.plan import assign_plan, fitting_batch_size
from oneshot_fast.jobs.assign.search import TargetSearch
from oneshot_fast.jobs.assign.targets import Preparer, Target, failure
from oneshot_fast.planning.timing import Plan
from oneshot_fast.runtime.concurrency import ahead
from oneshot_fast.runtime.files import Json, read_json
from oneshot_fast.runtime.shards import ShardRun, mean, mean_curve
from oneshot_fast.search.movers.registry import check_fits
from oneshot_fast.search.solver import Solved

BUCKET_STEP = 64  # pixels, as trainers have it
_SORTED = 8  # batches


class AssignRun(ShardRun[Batch, Solved[Target]]):
    """Assignment of a whole data set into one folder, in batches that are kept as they finish."""

    command = "assign"
    outputs = (
        "noises", "images", "logs", "manifest.jsonl", "failures.jsonl", "history.jsonl",
        "summary.json", "diagnostics.json", "report.html",
    )  # fmt: skip
    nothing_kept = "no target could be assigned"
    save_image = staticmethod(save_png)

    def __init__(
        self,
        generator: Generator,
        data: Source | Sequence[Record],
        folder: Path | str,
        options: AssignOptions,
        *,
        seed: int = 0,
        batch_size: int | Literal["auto"] = 16,
        resize_mode: str = "crop",
        bucket_step: int = BUCKET_STEP,
        resolution: Resolution | None = None,
        targets: TargetImages | None = None,
        num_images: int = 16,
        failures: Sequence[Failure] = (),
        read_ahead: bool | None = None,
        previous: Path | None = None,
    ) -> None:
        """Describe the run.

        Args:
            generator: The generator; its weights stay fixed.
            data: The data set; a stream is read once, as the work goes on.
            folder: Where everything is written.
            options: How a noise is searched.
            seed: Seed of the run.
            batch_size: Targets solved at once; "auto" takes what fits on a GPU.
            resize_mode: "crop", "squash", "pad", or "bucket": each image takes that one of some
                sizes, of about equal area, which a crop costs least.
            bucket_step: What their sides are multiples of, pixels.
            resolution: Image side in pixels, or height and width; by default the generator's own.
            targets: Instead: reads and encodes the images, and keeps them for other runs.
            num_images: Targets whose pictures are saved; -1 for all.
            failures: Records already given up; they are listed beside the run's own.
            read_ahead: Read and encode the next batch in a thread while this one is solved; by
                default not on the CPU, where that takes the cores that solve.
            previous: Manifest of an earlier assignment, whose noises this one begins with.

        Raises:
            UserError: If an option makes no sense or does not fit the latent.
        """
        options.check()
        self.source = FolderSource([*data], [*failures]) if isinstance(data, Sequence) else data
        self.targets = targets or TargetImages(generator, resolution)
        size, self.buckets = self.targets.size, None
        if resize_mode == "bucket":
            self.buckets = _buckets(generator, size, bucket_step)
        for each_size in (size,) if self.buckets is None else self.buckets.sizes:
            check_fits(options, generator.noise_shape(*each_size))
        require(
            options.choice != "pool" or not generator.draws_noise,
            "the noises of a pool serve any target, but this sampler draws others later, for each "
            "target its own; use --method best_of_n",
        )
        if batch_size == "auto":
            batch_size = fitting_batch_size(generator, options, size)
        each = options.gradient_steps + 1 + (options.draws if options.choice else 0)
        super().__init__(folder, batch_size, self.source.total, each)
        self.generator, self.options, self.seed = generator, options, seed
        self.resize_mode, self.num_images, self.previous = resize_mode, num_images, previous
        self.bucket_step = bucket_step
        self._moved: dict[str, str] = {}  # places of images by id, where they are new
        on_cpu = generator.device.type == "cpu"
        self.read_ahead = not on_cpu if read_ahead is None else read_ahead

    def settings(self) -> dict[str, Any]:
        return {
            "command": self.command,
            **dataclasses.asdict(self.options),
            "seed": self.seed,
            "resize_mode": self.resize_mode,
            **({} if self.buckets is None else {"bucket_step": self.bucket_step}),
            **self.generator.settings(self.targets.size),
            "samples": getattr(self.source, "listed", self.total),
            "data": self.source.identity,
            "previous": None if self.previous is None else file_sha256(self.previous),
        }

    def plan(self) -> Plan:
        """What the run will need; does nothing of it."""
        return assign_plan(
            self.generator,
            self.options,
            resolution=self.targets.size,
            batch_size=self.batch_size,
            samples=self.total,
            num_images=self.num_images,
        )

    def check(self) -> None:
        """Raise RunError if what is done is not at its place in the list, or its image changed."""
        if not isinstance(self.source, FolderSource):
            return
        items = dict(enumerate(self.source))
        there = {row["id"]: items.get(row["index"]) for row in self.done.values()}
        # a line that is broken now may be the one that was there
        _refuse([
            self.done[name] for name, item in there.items()
            if item is None or item.id not in (name, None)
        ])  # fmt: skip
        for name, item in there.items():
            if isinstance(item, Record):
                with contextlib.suppress(DataError):  # what cannot be read has not changed
                    self._check(item, self.done[name])

    def is_finished(self) -> bool:
        """Whether nothing is left to do, and nothing was mended since."""
        path = self.folder / self.summary_name
        return super().is_finished() and read_json(path).get("state") == self._state

    @property
    def _state(self) -> str | None:
        return getattr(self.source, "state", None)

    @staticmethod
    def _check(record: Record, row: Json | None) -> None:
        # Not by modification time, which a copied or restored file brings along.
        if row and file_sha256(record.image_path) != row["image_sha256"]:
            raise RunError(
                f"{record.image} changed after its noise was assigned; restore it, or start "
                "anew with --overwrite"
            )

    @property
    def window(self) -> int:
        """Targets read together: a batch, those that share their noises, or to sort by size."""
        pools = self.options.pool_window if self.options.choice == "pool" else 0
        return max(self.batch_size, pools, 0 if self.buckets is None else _SORTED * self.batch_size)

    @property
    def fills_shards(self) -> bool:
        """They finish one by one where they stop early."""
        return self.options.stops_early

    def batches(self, done: Container[str]) -> Iterator[Batch]:
        return pending(self.reviewed(), done, self.window)

    def reviewed(self) -> Iterator[Record | Failure]:
        """The data set; what is done of it is looked up: a mended shard may have moved it.

        Raises:
            RunError: At the end, if samples that are done are gone without a failure.
        """
        known, home = self.done, self.folder.resolve()
        gone, failed = set(known), False
        for item in self.source:
            failed |= isinstance(item, Failure)
            row = known[item.id] if item.id in gone else None
            if row is not None and isinstance(item, Record):
                gone.discard(row["id"])
                place = image_text(item.image_path, home)
                if place != row["target_image_path"]:
                    self._check(item, row)
                    self._moved[row["id"]] = place
            yield item
        if not failed:
            _refuse([known[name] for name in sorted(gone)])

    def line(self, row: Json) -> Json:
        """With the image's place of now."""
        moved = self._moved.get(row["id"])
        return super().line(row if moved is None else row | {"target_image_path": moved})

    def solve(self, batches: Iterable[Batch]) -> Iterator[Sequence[Solved[Target]]]:
        """Choose noises for the targets of ``batches``, and move them."""
        search = TargetSearch(
            self.generator,
            self.options,
            seed=self.seed,
            batch_size=self.batch_size,
            on_evaluations=self.on_evaluations,
        )
        return search.solve(self._prepared(batches))

    def _prepared(self, batches: Iterable[Batch]) -> Iterator[list[Target]]:
        """Targets ready for the device, read while others are solved."""
        preparer = Preparer(
            self.generator,
            self.targets,
            self.options,
            seed=self.seed,
            resize_mode=self.resize_mode,
            buckets=self.buckets,
            previous=self.previous,
        )
        with ThreadPoolExecutor(1) as reading:
            inline = map(preparer.prepare, batches)
            for targets, failed in (
                ahead(reading, preparer.prepare, batches) if self.read_ahead else inline
            ):
                self.failures += [failure.row for failure in failed]
                yield from self._alike(targets)

    def _alike(self, targets: Sequence[Target]) -> Iterator[list[Target]]:
        """Batches of targets of one size."""
        count = len(targets) if self.options.choice == "pool" else self.batch_size
        groups: dict[torch.Size, list[Target]] = {}
        for target in targets:
            groups.setdefault(target.eps.shape, []).append(target)
        for group in groups.values():
            for start in range(0, len(group), count):
                yield group[start : start + count]

    def failure(self, found: Solved[Target]) -> Json:
        return failure(found.item.record, "its loss became NaN or infinite").row

    @torch.no_grad()
    def images(self, found: Solved[Target]) -> dict[str, Tensor]:
        """Target, and what the generator makes of base noise and assigned noise."""
        target = found.item
        if 0 <= self.num_images <= target.index:
            return {}
        name = target.record.id
        images = {f"{name}-target.png": self.targets.image(*target.place)}
        for kind, noise in (("base", target.eps), ("assigned", found.z.to(target.eps.device))):
            latents = self.generator.latents(noise[None], target.prompt)
            images[f"{name}-{kind}.png"] = self.generator.decode(latents)[0].cpu()
        return images

    def row(self, found: Solved[Target], place: Mapping[str, Any]) -> Json:
        target, record, losses = found.item, found.item.record, found.losses
        return {
            "id": record.id,
            "index": target.index,
            "prompt": record.prompt,
            **({"prompts": record.prompts} if record.prompts else {}),
            "prompt_truncated": target.is_truncated,
            "cut": round(target.cut, 3),
            "target_image_path": image_text(record.image_path, self.folder.resolve()),
            "image_sha256": target.image_sha256,
            "resize_mode": self.resize_mode,
            **({} if target.frame is None else target.frame.fields),
            **place,
            "seed": target.seed,
            "initial_loss": losses[0] if target.first_loss is None else target.first_loss,
            "best_loss": min(losses),
            "best_step": found.best_step,
            "candidates": target.candidates,
            "nfe": target.candidates + 3 * len(losses) - 2,
            "losses": losses,
        }

    def means(self, rows: Collection[Json]) -> dict[str, float | None]:
        names = ("initial_loss", "best_loss")
        return {name: mean(row[name] for row in rows) for name in names}

    def summary(self, rows: Collection[Json], is_last: bool) -> Json:
        cut, long, nfe = list[tuple[object, float]](), list[str](), array("d")
        for row in rows:
            nfe.append(row["nfe"])
            if row.get("cut", 0.0) > MUCH:
                cut.append((row["target_image_path"], row["cut"]))
            if row["prompt_truncated"]:
                long.append(row["prompt"])
        remedy = "--resize_mode pad keeps all of them" + ("" if self.buckets else ", bucket most")
        self.generator.warn_of_cut(long)
        return {
            "state": self._state,
            "truncated_prompts": len(long),
            "cut_images": cut_warning(cut, remedy),
            **self.means(rows),
            "nfe": mean(nfe),
            "losses": mean_curve(row["losses"] for row in rows),
        }


def _buckets(generator: Generator, size: Size, step: int) -> Buckets:
    """Those around a square; UserError if there are none that the model makes."""
    height, width = size
    require(height == width, "resize_mode bucket makes its own heights and widths; leave them out")
    factor = generator.size_multiple
    require(
        step > 0 and step % factor == 0,
        f"bucket_step {step} is not a positive multiple of {factor}, as the model needs it",
    )
    return Buckets.of(height, step)


def _refuse(gone: Sequence[Json]) -> None:
    """Raise RunError if there are rows of samples that are no longer what was assigned."""
    if gone:
        raise RunError(
            f"{len(gone)} samples with noises are no longer in the data set, such as "
            f"{gone[0]['target_image_path']}; restore it, or start anew with --overwrite"
        )
