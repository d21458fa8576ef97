"""The E-step as a Ray Data pipeline: batches of targets in, shards out, one actor per GPU.

The driver keeps the run's folder and hands out the batches that a single process would cut. An
actor loads the generator, matches its batches and writes their shards; only rows travel back. Ray
restarts an actor that dies and repeats its work, less the shards that were written.
"""

import collections
import contextlib
import dataclasses
import functools
import logging
import os
import pickle
from collections.abc import Iterator
from typing import Any

from oneshot_fast.data.sources import Batch, Source, pending
from oneshot_fast.errors import UserError, require
from oneshot_fast.generators.base import LoadOptions
from oneshot_fast.generators.loading import find_family
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.assign.plan import fitting_batch_size
from oneshot_fast.jobs.assign.ray_worker import EXPECTED, Actor, Job, Result
from oneshot_fast.jobs.assign.run import AssignRun
from oneshot_fast.planning.memory import ON_CPU
from oneshot_fast.runtime.processes import processes
from oneshot_fast.runtime.progress import progress, silence_imports

_AT_ONCE = 8  # batches of one call, where the next one is read ahead or fills free places


class RayRun(AssignRun):
    """A run whose batches are solved by actors; all the rest is that of one process."""

    def __init__(self, job: Job, source: Source, actors: int) -> None:
        """Describe the run: what ``actors`` actors do, and the data set."""
        # its own generator tells weights and sizes, and needs no GPU for that
        dtype = job.model.dtype
        if job.on_gpu and dtype == "auto":
            family, _ = find_family(job.model_id, LoadOptions(local_files_only=True))
            dtype = "bfloat16" if family.runs_in_half else dtype
        model = dataclasses.replace(job.model, device="cpu", dtype=dtype, compile=False)
        model = dataclasses.replace(model, compile_mode="default")
        super().__init__(model.load(job.model_id), source, **job.arguments)
        self._job, self._actors = job, actors

    def settings(self) -> dict[str, Any]:
        """Those of a run by a process on the actors' device: one can finish the other's."""
        return super().settings() | {"device": self._job.model.device}

    def solve_all(self) -> None:
        """Let the actors solve what is not done, and note what they wrote."""
        if self.done:  # the pipeline itself looks at nothing that is done
            collections.deque(self.reviewed(), maxlen=0)
        left = None if self.total is None else self.total - len(self.done)
        with progress(left, self.command, "target") as bar:
            for result in self._results(frozenset(self.done), left):
                if result.error is not None:
                    raise result.error
                self.failures += result.failures
                for rows in result.shards:
                    self.note(rows)
                    bar.update(len(rows))
                bar.update(sum("id" in failure for failure in result.failures))

    def _results(self, done: frozenset[str], left: int | None) -> Iterator[Result]:
        """The pipeline: the data set's stream in one task, batches by actors, results here."""
        import ray.data

        context = ray.data.DataContext.get_current()
        # every piece of work and every result is a block of its own, passed on at once
        context.target_max_block_size = 1
        context.enable_progress_bars = False
        work = functools.partial(
            _work, source=self.source, done=done, window=self.window, at_once=self._at_once(left)
        )
        results = (
            ray.data.from_items([0])
            .map_batches(work, num_cpus=0)
            .map_batches(
                Actor,
                batch_size=1,
                fn_constructor_args=(self._job,),
                num_cpus=1,
                num_gpus=1 if self._job.on_gpu else None,
                # one call runs, the next one waits at the actor
                compute=ray.data.ActorPoolStrategy(
                    size=self._actors, max_tasks_in_flight_per_actor=2
                ),
            )
        )
        for row in results.iter_rows():
            yield pickle.loads(row["result"])

    def _at_once(self, left: int | None) -> int:
        """Batches of one call: several where that helps, but enough calls for every actor."""
        if not (self._job.on_gpu or self.options.stops_early):
            return 1
        if left is None:
            return _AT_ONCE
        return max(1, min(_AT_ONCE, left // (4 * self._actors * self.window)))


def run_on_ray(
    job: Job, source: Source, *, actors: int | None = None, **more: Any
) -> dict[str, Any]:
    """Assign a data set with Ray: on the cluster of this machine, else on this machine alone.

    Args:
        job: What to do; its device None takes GPUs where the cluster has them.
        source: The data set; every machine must see it, and the folder, at the same paths.
        actors: How many; by default one per GPU, else one per CPU core.
        **more: As for ``AssignRun.run``.

    Returns:
        The summary, as in summary.json.

    Raises:
        UserError: If Ray is missing or the cluster has no place for the actors.
    """
    require(processes().num_processes == 1, "--engine ray starts its own processes: start it alone")
    with _cluster(job.model.device, actors) as (device, count):
        job = dataclasses.replace(job, model=dataclasses.replace(job.model, device=device))
        if job.arguments["batch_size"] == "auto":
            fitting = {**job.arguments, "batch_size": _fitting(job)}
            job = dataclasses.replace(job, arguments=fitting)
        run = RayRun(job, source, count)
        return run.run(**more)


@contextlib.contextmanager
def _cluster(device: str | None, actors: int | None) -> Iterator[tuple[str, int]]:
    """Join Ray's cluster or start one here; yields the actors' device and number."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report its use to its makers
    try:
        import ray
        import ray.data
    except ImportError:
        raise UserError('--engine ray needs Ray Data: pip install "ray[data]"') from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    started = not ray.is_initialized()
    if started:
        ray.init(logging_level=logging.ERROR)
    try:
        there = ray.cluster_resources()
        on_gpu = there.get("GPU", 0) >= 1 if device is None else device.startswith("cuda")
        places = int(there.get("GPU" if on_gpu else "CPU", 0))
        count = places if actors is None else actors
        kind = "GPUs" if on_gpu else "CPU cores"
        require(1 <= count <= places, f"{count} Ray actors: Ray has {places} {kind}")
        yield ("cuda" if on_gpu else "cpu"), count
    finally:
        if started:
            ray.shutdown()


def _fitting(job: Job) -> int:
    """Batch size that fits on an actor's device; a worker of Ray ends with a task on a GPU."""
    import ray

    if not job.on_gpu:
        return ON_CPU
    task = ray.remote(_measure).options(num_cpus=1, num_gpus=1)
    return int(ray.get(task.remote(job)))


def _measure(job: Job) -> int:
    os.chdir(job.start)
    silence_imports()
    generator, given = job.model.load(job.model_id), job.arguments
    size = TargetImages(generator, given["resolution"]).size
    return fitting_batch_size(generator, given["options"], size)


def _work(
    _: object, *, source: Source, done: frozenset[str], window: int, at_once: int
) -> Iterator[dict[str, list[bytes]]]:
    """Column "work": pickled batches, a few at once, in the order of the data set."""
    some: list[Batch] = []
    try:
        for batch in pending(source, done, window):
            if batch:
                some.append(batch)
            if len(some) == at_once:
                yield {"work": [pickle.dumps(some)]}
                some = []
        if some:
            yield {"work": [pickle.dumps(some)]}
    except EXPECTED as error:
        yield {"work": [pickle.dumps(error)]}
