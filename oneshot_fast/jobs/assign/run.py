"""The E-step over a data set: batches of targets, each kept as it finishes.

A batch is one safetensors shard whose header carries the manifest's rows, so that noises and rows
appear together or not at all; manifest.jsonl is made of the shards' rows.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from oneshot_fast.data.pairs import Failure, Record, file_sha256
from oneshot_fast.data.sources import FolderSource, Source, pending
from oneshot_fast.errors import RunError, require
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.search import TargetSearch
from oneshot_fast.jobs.assign.shards import ShardWriter
from oneshot_fast.jobs.assign.targets import Preparer, Target
from oneshot_fast.noise.rotation import check_patching
from oneshot_fast.runtime.concurrency import Background, ahead
from oneshot_fast.runtime.files import (
    mend_jsonl,
    read_json,
    read_metadata,
    write_json,
    write_jsonl,
)
from oneshot_fast.runtime.folder import RunFolder
from oneshot_fast.runtime.processes import (
    barrier,
    claims,
    gather_objects,
    is_main,
    kept_by_main,
    processes,
)
from oneshot_fast.runtime.progress import end_tracking, progress, start_tracking
from oneshot_fast.search.solver import Solved

if TYPE_CHECKING:
    from accelerate import Accelerator

    from oneshot_fast.generators.base import Generator
    from oneshot_fast.generators.target_images import TargetImages

T = TypeVar("T")
OUTPUTS = (
    "noises", "images", "logs", "manifest.jsonl", "failures.jsonl", "history.jsonl",
    "summary.json", "diagnostics.json", "report.html",
)  # fmt: skip


class AssignRun:
    """Assignment of a whole data set into one folder, in batches that are kept as they finish."""

    def __init__(
        self,
        generator: Generator,
        targets: TargetImages,
        folder: Path,
        options: AssignOptions,
        *,
        seed: int = 0,
        resize_mode: str = "crop",
        batch_size: int = 16,
        num_images: int = 16,
        read_ahead: bool | None = None,
        previous: Path | None = None,
    ) -> None:
        """Describe the run.

        Args:
            generator: The generator; its weights stay fixed.
            targets: Reads and encodes the target images.
            folder: Where everything is written.
            options: How a noise is searched.
            seed: Seed of the run.
            resize_mode: "crop" or "squash".
            batch_size: TargetImages solved at once.
            num_images: TargetImages whose pictures are saved; -1 for all.
            read_ahead: Read and encode the next batch in a thread while this one is solved; by
                default not on the CPU, where that takes the cores that solve.
            previous: Manifest of an earlier assignment, whose noises this one begins with.

        Raises:
            UserError: If an option makes no sense or does not fit the latent.
        """
        options.check()
        require(batch_size >= 1, f"batch_size is {batch_size}; give at least 1")
        side = targets.resolution
        if options.mover == "rotation":
            size = generator.noise_shape(side, side)[1:]
            check_patching(size, options.patch_size, options.rotation_groups)
        self.generator, self.targets, self.folder = generator, targets, Path(folder)
        self.options, self.seed, self.resize_mode = options, seed, resize_mode
        self.batch_size, self.num_images, self.previous = batch_size, num_images, previous
        on_cpu = generator.device.type == "cpu"
        self.read_ahead = not on_cpu if read_ahead is None else read_ahead

    def settings(self, data: Source) -> dict[str, Any]:
        """Everything a result depends on."""
        return {
            "command": "assign",
            **dataclasses.asdict(self.options),
            "seed": self.seed,
            "resolution": self.targets.resolution,
            "resize_mode": self.resize_mode,
            "model": self.generator.fingerprint(),
            "device": self.generator.device.type,
            "samples": data.total,
            "data": data.identity,
            "previous": None if self.previous is None else file_sha256(self.previous),
        }

    def run(
        self,
        data: Sequence[Record] | Source,
        failures: Sequence[Failure] = (),
        *,
        overwrite: bool = False,
        report_to: str = "none",
    ) -> dict[str, Any]:
        """Assign every record that has no result yet, then write manifest, summary and report.

        Args:
            data: The data set; a stream is read once, as the work goes on.
            failures: Records already given up; they are listed beside the run's own.
            overwrite: Start anew.
            report_to: Tracker.

        Returns:
            The summary, as in summary.json.
        """
        source = FolderSource([*data], [*failures]) if isinstance(data, Sequence) else data
        settings = self.settings(source)
        with kept_by_main(RunFolder(self.folder, settings, OUTPUTS, overwrite)):
            done = self._done()
            barrier()  # until all have seen the same
            if isinstance(source, FolderSource):
                self._check_unchanged(source.records, done)
            if self._is_complete(source, done):
                return self._summary()
            failed: list[Failure] = []
            tracker = start_tracking(report_to, self.folder, settings)
            if is_main():
                mend_jsonl(self.folder / "history.jsonl")
            self._solve(source, done, failed, tracker)
            end_tracking(tracker)
            failed = gather_objects(failed)
            if is_main():
                self._finish(self._done(), failed)
            barrier()
            return self._summary()

    def _done(self) -> dict[str, dict[str, Any]]:
        """Rows of all shards by id."""
        shards = sorted((self.folder / "noises").glob("*.safetensors"))
        return {row["id"]: row for shard in shards for row in read_metadata(shard, "rows")}

    def _summary(self) -> dict[str, Any]:
        return dict(read_json(self.folder / "summary.json"))

    def _is_complete(self, source: Source, done: Mapping[str, Any]) -> bool:
        """Whether nothing is left to do; a failed record is tried again."""
        if not (self.folder / "summary.json").exists():
            return False
        if source.total is not None:
            return len(done) == source.total
        summary = self._summary()
        return summary["samples"] == len(done) and not summary["failed"]

    def _check_unchanged(self, records: Sequence[Record], done: dict[str, Any]) -> None:
        for record in records:
            # Not by modification time, which a copied or restored file brings along.
            row = done.get(record.id)
            if row and file_sha256(record.image_path) != row["image_sha256"]:
                raise RunError(
                    f"{record.image} changed after its noise was assigned; restore it, or start "
                    "anew with --overwrite"
                )

    def _writer(self, tracker: Accelerator) -> ShardWriter:
        return ShardWriter(
            self.generator,
            self.targets,
            self.folder,
            tracker,
            resize_mode=self.resize_mode,
            num_images=self.num_images,
        )

    def _solve(
        self,
        source: Source,
        done: dict[str, dict[str, Any]],
        failures: list[Failure],
        tracker: Accelerator,
    ) -> None:
        """Solve what is not done, while the next batch is read and the last one is written."""
        if is_main():
            write_jsonl(self.folder / "manifest.jsonl", done.values())
        writer = self._writer(tracker)
        total = None
        if source.total is not None:
            mine = -(-(source.total - len(done)) // processes().num_processes)
            total = mine * (self.options.gradient_steps + 1)
            if self.options.choice:
                total += mine * self.options.draws
        with (
            progress(total, "assign", "eval") as bar,
            Background(functools.partial(writer.write, done=done)) as writing,
        ):

            def keep(found: Sequence[Solved[Target]]) -> None:
                shard, failed = writer.shard(found)
                failures.extend(failed)
                if shard is not None:
                    writing.submit(shard)

            search = TargetSearch(
                self.generator,
                self.options,
                seed=self.seed,
                batch_size=self.batch_size,
                on_evaluations=bar.update,
            )
            ready: list[Solved[Target]] = []
            try:
                prepared = self._prepared(source, done, failures)
                for found in search.solve(prepared):
                    ready += found
                    if len(ready) >= self.batch_size or not self.options.stops_early:
                        full, ready = ready, []
                        keep(full)
            finally:  # after Ctrl-C, too, what has finished is kept
                keep(ready)

    def _prepared(
        self, source: Source, done: Mapping[str, Any], failures: list[Failure]
    ) -> Iterator[list[Target]]:
        """What is not done of each batch, ready for the device; failures join ``failures``."""
        preparer = Preparer(
            self.generator,
            self.targets,
            seed=self.seed,
            resize_mode=self.resize_mode,
            needs_images=self.options.pixel_l1_weight > 0,
            features=self.options.features,
            previous=self.previous,
        )
        batches = self._claimed(pending(source, done, self.window))
        with ThreadPoolExecutor(1) as reading:
            inline = map(preparer.prepare, batches)
            for targets, failed in (
                ahead(reading, preparer.prepare, batches) if self.read_ahead else inline
            ):
                failures += failed
                if targets:
                    yield targets

    def _claimed(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches that this process is to solve."""
        mine = claims(str(self.folder))
        number = next(mine)
        for k, batch in enumerate(batches):
            if k == number:
                yield batch
                number = next(mine)

    @property
    def window(self) -> int:
        """Targets that are solved together: a batch, or those that share their noises."""
        pools = self.options.choice == "pool"
        return max(self.batch_size, self.options.pool_window if pools else 0)

    def _finish(self, done: Mapping[str, dict[str, Any]], failures: Sequence[Failure]) -> None:
        """Write the manifest, the failures and the summary."""
        rows = sorted(done.values(), key=lambda row: int(row["index"]))
        write_jsonl(self.folder / "manifest.jsonl", rows)
        write_jsonl(
            self.folder / "failures.jsonl",
            [{k: v for k, v in dataclasses.asdict(f).items() if v is not None} for f in failures],
        )
        require(bool(rows), f"no target could be assigned; see {self.folder / 'failures.jsonl'}")
        seconds = sum(event["seconds"] for event in mend_jsonl(self.folder / "history.jsonl"))
        summary = {
            "samples": len(rows),
            "failed": len(failures),
            "truncated_prompts": sum(row["prompt_truncated"] for row in rows),
            "initial_loss": statistics.fmean(row["initial_loss"] for row in rows),
            "best_loss": statistics.fmean(row["best_loss"] for row in rows),
            "nfe": statistics.fmean(row["nfe"] for row in rows),
            "losses": _mean_curve([row["losses"] for row in rows]),
            "seconds": round(seconds, 3),
            "images_per_second": round(len(rows) / max(seconds, 1e-9), 3),
            "settings": read_json(self.folder / "run.json"),
        }
        write_json(self.folder / "summary.json", summary)


def _mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """Mean loss per step; targets that ended early stay at their last loss."""
    steps = range(max(map(len, curves)))
    return [statistics.fmean(curve[min(k, len(curve) - 1)] for curve in curves) for k in steps]
