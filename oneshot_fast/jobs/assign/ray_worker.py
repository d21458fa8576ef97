"""What an actor of the Ray engine does: batches of targets in, their shards on the disk."""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError

from oneshot_fast.data.pairs import Failure, Record
from oneshot_fast.errors import UserError
from oneshot_fast.generators.options import ModelOptions
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.search import TargetSearch
from oneshot_fast.jobs.assign.shards import ShardWriter, shard_path
from oneshot_fast.jobs.assign.targets import Preparer, Target
from oneshot_fast.runtime.concurrency import ahead
from oneshot_fast.runtime.files import read_metadata
from oneshot_fast.runtime.progress import silence_imports
from oneshot_fast.search.solver import Solved

if TYPE_CHECKING:
    from oneshot_fast.generators.base import Generator

Batch = list[tuple[int, Record] | Failure]
Rows = list[dict[str, Any]]
# what ends a command with one line; everything else is a fault of ours and keeps its traceback
EXPECTED = (UserError, OSError, SafetensorError)


@dataclass(frozen=True)
class Job:
    """What the actors do, as they are told; paths are the same on all machines.

    Attributes:
        model: How the generator is loaded; its device is that of the actors.
        model_id: The generator.
        options: How a noise is searched.
        folder: The run's, absolute.
        resolution: Image side in pixels; None: the generator's own.
        seed: Seed of the run.
        resize_mode: "crop" or "squash".
        batch_size: Targets solved at once.
        num_images: Targets whose pictures are saved; -1 for all.
        start: Folder at which relative paths begin.
    """

    model: ModelOptions
    model_id: str
    options: AssignOptions
    folder: Path
    resolution: int | None = None
    seed: int = 0
    resize_mode: str = "crop"
    batch_size: int | Literal["auto"] = "auto"
    num_images: int = 16
    start: Path = field(default_factory=Path.cwd)

    def load(self) -> tuple[Generator, TargetImages]:
        """The generator, and what reads the targets."""
        generator = self.model.load(self.model_id)
        return generator, TargetImages(generator, self.resolution)

    @property
    def on_gpu(self) -> bool:
        """Whether the actors have a GPU each."""
        return self.model.device == "cuda"


@dataclass(frozen=True)
class Result:
    """What became of some batches: the rows of each shard, failures, and what stopped the work."""

    shards: list[Rows]
    failures: list[Failure]
    error: Exception | None = None


class Worker:
    """Matches batches and writes their shards, without Ray."""

    def __init__(self, job: Job) -> None:
        """Load the generator."""
        silence_imports()
        self._job, options = job, job.options
        generator, targets = job.load()
        self._preparer = Preparer(
            generator,
            targets,
            seed=job.seed,
            resize_mode=job.resize_mode,
            needs_images=options.pixel_l1_weight > 0,
            features=options.features,
        )
        self._size = int(job.batch_size)
        self._search = TargetSearch(generator, options, seed=job.seed, batch_size=self._size)
        self._writer = ShardWriter(
            generator,
            targets,
            job.folder,
            None,
            resize_mode=job.resize_mode,
            num_images=job.num_images,
        )

    def match(self, batches: Sequence[Batch]) -> Result:
        """Solve ``batches`` and write them, less what was written when they were tried before."""
        shards = self._written(batches)
        done = {row["id"] for rows in shards for row in rows}
        left = [
            [x for x in batch if isinstance(x, Failure) or x[1].id not in done] for batch in batches
        ]
        failures: list[Failure] = []
        ready: list[Solved[Target]] = []

        def keep() -> None:
            shard, failed = self._writer.shard(ready)
            failures.extend(failed)
            if shard is not None:
                shards.append(self._writer.keep(shard))
            ready.clear()

        prepared = self._prepared(left, failures)
        for found in self._search.solve(prepared):
            ready += found
            if len(ready) >= self._size or not self._job.options.stops_early:
                keep()
        keep()
        return Result(shards, failures)

    def _written(self, batches: Sequence[Batch]) -> list[Rows]:
        """Rows of the shards of these very targets."""
        shards = []
        for index, record in (x for batch in batches for x in batch if not isinstance(x, Failure)):
            path = self._job.folder / shard_path(index)
            if path.exists() and any(row["id"] == record.id for row in read_metadata(path, "rows")):
                shards.append(read_metadata(path, "rows"))
        return shards

    def _prepared(
        self, batches: Sequence[Batch], failures: list[Failure]
    ) -> Iterator[list[Target]]:
        """Targets ready for the device; failures join ``failures``."""
        prepare = self._preparer.prepare
        with ThreadPoolExecutor(1) as reading:
            in_time = (
                ahead(reading, prepare, batches) if self._job.on_gpu else map(prepare, batches)
            )
            for targets, failed in in_time:
                failures += failed
                if targets:
                    yield targets


class Actor:
    """A worker as Ray Data calls it."""

    def __init__(self, job: Job) -> None:
        """Nothing is loaded before the first call, which can say what went wrong."""
        self._job = job

    @functools.cached_property
    def _worker(self) -> Worker:
        os.chdir(self._job.start)
        return Worker(self._job)

    def __call__(self, work: Mapping[str, Sequence[bytes]]) -> dict[str, list[bytes]]:
        """Column "work" of pickled batches in, column "result" of pickled results out."""
        return {"result": [pickle.dumps(self._result(item)) for item in work["work"]]}

    def _result(self, work: bytes) -> Result:
        batches = pickle.loads(work)
        if isinstance(batches, Exception):
            return Result([], [], batches)
        try:
            return self._worker.match(batches)
        except EXPECTED as error:
            return Result([], [], error)
