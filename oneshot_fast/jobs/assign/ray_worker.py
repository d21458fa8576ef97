"""What an actor of the Ray engine does: batches of targets in, their shards on the disk."""

import functools
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from oneshot_fast.data.records import Failure
from oneshot_fast.data.sources import Batch, FolderSource
from oneshot_fast.errors import UserError
from oneshot_fast.generators.options import ModelOptions
from oneshot_fast.jobs.assign.run import AssignRun
from oneshot_fast.runtime.files import Json, read_metadata
from oneshot_fast.runtime.ledger import Ledger, listing
from oneshot_fast.runtime.progress import silence_imports
from oneshot_fast.runtime.shards import shard_path

Rows = list[Json]
# what ends a command with one line; everything else is a fault of ours and keeps its traceback
EXPECTED = (UserError, OSError, SafetensorError)


@dataclass(frozen=True)
class Job:
    """What the actors do, as they are told; paths are the same on all machines.

    Attributes:
        model: How the generator is loaded; its device is that of the actors.
        model_id: The generator.
        arguments: Of ``AssignRun`` beside generator and data; the folder is absolute.
        start: Folder at which relative paths begin.
    """

    model: ModelOptions
    model_id: str
    arguments: Mapping[str, Any]
    start: Path = field(default_factory=Path.cwd)

    @property
    def on_gpu(self) -> bool:
        """Whether the actors have a GPU each."""
        return self.model.device == "cuda"


@dataclass(frozen=True)
class Result:
    """What became of some batches: the rows of each shard, failures, and what stopped the work."""

    shards: list[Rows]
    failures: Rows
    error: Exception | None = None


class Actor:
    """Matches batches and writes their shards, as Ray Data calls it or without Ray."""

    def __init__(self, job: Job) -> None:
        """Nothing is loaded before the first call, which can say what went wrong."""
        self._job = job

    @functools.cached_property
    def _run(self) -> AssignRun:
        job = self._job
        os.chdir(job.start)
        silence_imports()
        return AssignRun(job.model.load(job.model_id), FolderSource([], []), **job.arguments)

    @functools.cached_property
    def _ledger(self) -> Ledger:
        return Ledger(self._run.folder)

    def match(self, batches: Sequence[Batch]) -> Result:
        """Solve ``batches`` and write them, less what was written when they were tried before."""
        run, shards = self._run, self._written(batches)
        done = {row["id"] for rows in shards for row in rows}
        left = [
            [x for x in batch if isinstance(x, Failure) or x[1].id not in done] for batch in batches
        ]
        run.failures = []
        with listing(self._ledger):
            run.solve_into(lambda *shard: shards.append(run.write(*shard)), left)
        return Result(shards, run.failures)

    def _written(self, batches: Sequence[Batch]) -> list[Rows]:
        """Rows of the shards of these very targets."""
        shards = []
        for index, record in (x for batch in batches for x in batch if not isinstance(x, Failure)):
            path = self._run.folder / shard_path(index)
            if path.exists() and any(row["id"] == record.id for row in read_metadata(path, "rows")):
                shards.append(read_metadata(path, "rows"))
        return shards

    def __call__(self, work: Mapping[str, Sequence[bytes]]) -> dict[str, list[bytes]]:
        """Column "work" of pickled batches in, column "result" of pickled results out."""
        return {"result": [pickle.dumps(self._result(item)) for item in work["work"]]}

    def _result(self, work: bytes) -> Result:
        batches = pickle.loads(work)
        if isinstance(batches, Exception):
            return Result([], [], batches)
        try:
            return self.match(batches)
        except EXPECTED as error:
            return Result([], [], error)
