"""Runs over many samples: batches kept as they finish, by one process or several.

A batch is one safetensors shard whose header carries its rows, so that tensors and rows appear
together or not at all; every other file is made of the shards' rows.
"""

import itertools
import math
import statistics
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import (
    Callable,
    Collection,
    Container,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from oneshot_fast.errors import DamagedError, require
from oneshot_fast.runtime.concurrency import in_background
from oneshot_fast.runtime.files import (
    Json,
    append_jsonl,
    finite,
    mend_jsonl,
    read_json,
    read_metadata,
    remove,
    write_json,
    write_jsonl,
    write_safetensors,
)
from oneshot_fast.runtime.folder import RunFolder
from oneshot_fast.runtime.ledger import Ledger, say, set_aside
from oneshot_fast.runtime.processes import (
    barrier,
    claims,
    gather_objects,
    is_main,
    kept_by_main,
    processes,
)
from oneshot_fast.runtime.progress import Tracker, progress, start_tracking
from oneshot_fast.runtime.row_index import RowIndex


class Result(Protocol):
    """What was found for one sample."""

    @property
    def index(self) -> int:
        """The sample's place in the run."""

    @property
    def is_finite(self) -> bool:
        """Whether it can be kept."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """A row of each of the shard's tensors, on the CPU."""


_SHOWN = 16  # samples whose pictures go to a tracker
Item = TypeVar("Item")
Found = TypeVar("Found", bound=Result)


class ShardRun(ABC, Generic[Item, Found]):
    """A job over samples into one folder, resumed where it stopped.

    A job says what it depends on (``settings``), cuts its samples into batches (``batches``),
    solves them (``solve``), and describes what was found (``row``, ``images``, ``means``,
    ``summary``).
    """

    command: ClassVar[str]
    outputs: ClassVar[tuple[str, ...]]
    summary_name: ClassVar[str] = "summary.json"
    nothing_kept: ClassVar[str]  # what is said if no result can be kept
    unlisted: ClassVar[tuple[str, ...]] = ()  # columns of the rows that manifest.jsonl leaves out

    def __init__(
        self, folder: Path | str, batch_size: int, total: int | None, evaluations: int
    ) -> None:
        """Describe the run; nothing is touched before ``run``.

        Args:
            folder: Where everything is written.
            batch_size: Samples of a shard.
            total: Samples in all; None where only their end tells.
            evaluations: Of the generator, for one sample; for the progress bar.

        Raises:
            UserError: If there is no batch of that size.
        """
        require(batch_size >= 1, f"batch_size is {batch_size}; give at least 1")
        self.folder, self.batch_size, self.total = Path(folder), batch_size, total
        self.done = RowIndex()  # by the ids of their samples
        self.failures: list[Json] = []  # lines of failures.jsonl
        self.on_evaluations: Callable[[int], object] = lambda count: None
        self._evaluations = evaluations
        self._tracker = Tracker()
        self._since = time.perf_counter()

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything a result depends on."""

    @abstractmethod
    def batches(self, done: Container[str]) -> Iterator[Item]:
        """All batches in order, the same in every process, less the samples with ids in ``done``.

        They are cut before these are left out: a resumed run solves the same samples together.
        """

    @abstractmethod
    def solve(self, batches: Iterable[Item]) -> Iterator[Sequence[Found]]:
        """Results as they come; what has none joins ``failures``."""

    @abstractmethod
    def failure(self, found: Found) -> Json:
        """Line of failures.jsonl for a result that is not finite."""

    @abstractmethod
    def row(self, found: Found, place: Mapping[str, Any]) -> Json:
        """What is kept of a result; ``place`` has noise_path and noise_index."""

    @abstractmethod
    def images(self, found: Found) -> Mapping[str, Tensor]:
        """Pictures to save, by file name."""

    @staticmethod
    @abstractmethod
    def save_image(path: Path, image: Tensor) -> None:
        """Write a picture."""

    @abstractmethod
    def means(self, rows: Collection[Json]) -> dict[str, float | None]:
        """What history.jsonl says of a shard."""

    @abstractmethod
    def summary(self, rows: Collection[Json], is_last: bool) -> Json:
        """What the summary says of all ``rows``; other files made of them are written, too."""

    @property
    def fills_shards(self) -> bool:
        """Whether results come one by one, to be gathered into whole shards."""
        return False

    def check(self) -> None:
        """Raise RunError if what is ``done`` does not fit the samples."""

    def look(self) -> None:
        """Read what is ``done``, and ``check`` it."""
        self.done = self._rows()
        self.check()

    def run(
        self, *, overwrite: bool = False, report_to: str | Tracker = "none", verify: bool = False
    ) -> Json:
        """Solve every sample that has no result yet, then write all files.

        Args:
            overwrite: Start anew.
            report_to: As for ``start_tracking``.
            verify: Compare the hashes of all files that are there.

        Returns:
            The summary, as in its file.

        Raises:
            RunError: If the folder is in use or holds another run.
            UserError: If no sample could be solved.
        """
        self.batch_size = min(gather_objects([self.batch_size]))  # all cut the same batches
        settings = self.settings()
        folder = RunFolder(self.folder, settings, self.outputs, overwrite, verify)
        with kept_by_main(folder):
            if is_main():
                self._drop_damaged(folder)
            barrier()
            self.done = self._rows()
            barrier()  # until all have seen the same
            self.check()
            if not self.is_finished():
                self._tracker = start_tracking(report_to, self.folder, settings)
                if is_main():
                    write_jsonl(self.folder / "manifest.jsonl", map(self.line, self.done.values()))
                self.solve_all()
                failures = gather_objects(self.failures)
                if is_main():
                    self._finish(failures)
                self._tracker.finish()
                barrier()
            return dict(read_json(self.folder / self.summary_name))

    def _drop_damaged(self, folder: RunFolder) -> None:
        """Set shards aside that cannot be read, and remove those that lost a picture."""
        images = [key for key in folder.damaged if key.startswith("images/")]
        lost = [key.removeprefix("images/") for key in images]
        for shard in self._shards():
            try:
                rows = read_metadata(shard, "rows")
            except DamagedError:
                say(f"{shard} is damaged; kept as {set_aside(shard, 'damaged').name}, made again")
                continue
            names = tuple(f"{row['id']}{sign}" for row in rows for sign in ("-", "/", ".tar"))
            if any(name.startswith(names) for name in lost):
                remove(shard)
        folder.reopen(self.summary_name)

    def _shards(self) -> list[Path]:
        """Those that this run wrote, in any of its processes."""
        paths = sorted((self.folder / "noises").glob("*.safetensors"))
        ledger = Ledger(self.folder)  # as it is now: other processes write, too
        return [path for path in paths if ledger.owns(ledger.key(path))]

    def _rows(self) -> RowIndex:
        """Rows of all shards."""
        found = RowIndex()
        for shard in self._shards():
            found.add(shard, read_metadata(shard, "rows"))
        return found

    def is_finished(self) -> bool:
        """Whether nothing is left to do; a failed sample is tried again."""
        path = self.folder / self.summary_name
        if not path.exists():
            return False
        summary, count = read_json(path), len(self.done)
        all_there = not summary["failed"] if self.total is None else count == self.total
        return bool(all_there and summary["samples"] == count)

    def solve_all(self) -> None:
        """Solve what is not done, while the last shard is written."""
        bar_total = None
        if self.total is not None:
            mine = -(-(self.total - len(self.done)) // processes().num_processes)
            bar_total = mine * self._evaluations
        with (
            progress(bar_total, self.command, "eval") as bar,
            in_background(lambda *shard: self.note(self.write(*shard))) as keep,
        ):
            self.on_evaluations = bar.update
            self._since = time.perf_counter()
            self.solve_into(keep, self._claimed(self.batches(self.done)))

    def _claimed(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The batches that this process is to solve."""
        mine = claims(str(self.folder))
        number = next(mine)
        for k, batch in enumerate(batches):
            if k == number:
                yield batch
                number = next(mine)

    def solve_into(
        self,
        keep: Callable[[Sequence[Found], Mapping[str, Tensor]], object],
        batches: Iterable[Item],
    ) -> None:
        """Solve ``batches`` and pass each shard's results, with pictures, to ``keep``."""

        def finite(found: Sequence[Found]) -> None:
            self.failures += [self.failure(one) for one in found if not one.is_finite]
            good = [one for one in found if one.is_finite]
            if good:
                keep(good, {name: x for one in good for name, x in self.images(one).items()})

        ready: list[Found] = []
        try:
            for found in self.solve(batches):
                if ready and found and _shapes(ready[0]) != _shapes(found[0]):
                    full, ready = ready, []
                    finite(full)
                ready += found
                if len(ready) >= self.batch_size or not self.fills_shards:
                    full, ready = ready, []
                    finite(full)
        finally:  # after Ctrl-C, too, what has finished is kept
            finite(ready)

    def write(self, found: Sequence[Found], images: Mapping[str, Tensor]) -> list[Json]:
        """Write pictures, then the shard; returns its rows."""
        path = self._new_path(found[0].index)
        places = [{"noise_path": path.as_posix(), "noise_index": k} for k in range(len(found))]
        rows = [finite(self.row(one, place)) for one, place in zip(found, places, strict=True)]
        for name, image in images.items():
            self.save_image(self.folder / "images" / name, image)
        tensors = {
            name: torch.stack([one.tensors[name] for one in found]) for name in found[0].tensors
        }
        write_safetensors(self.folder / path, tensors, {"rows": rows})
        return rows

    def _new_path(self, index: int) -> Path:
        """Name by the first sample's index, which can only repeat if a broken shard was mended."""
        paths = (shard_path(index, f"-{copy}" if copy else "") for copy in itertools.count())
        return next(path for path in paths if not (self.folder / path).exists())

    def note(self, rows: Sequence[Json]) -> None:
        """Count a shard's rows as done; the main process lists them and their means."""
        self.done.add(self.folder / rows[0]["noise_path"], rows)
        if not is_main():  # the lists are made of all shards in the end
            return
        append_jsonl(self.folder / "manifest.jsonl", map(self.line, rows))
        now = time.perf_counter()
        event = {"samples": len(self.done), **self.means(rows)}
        event["seconds"], self._since = round(now - self._since, 3), now
        append_jsonl(self.folder / "history.jsonl", [event])
        self._track(rows, event)

    def _track(self, rows: Iterable[Json], event: Json) -> None:
        """Send what is said of ``rows``, and the pictures of the first samples among them."""
        step = len(self.done)
        self._tracker.log(event, step)
        for name in (row["id"] for row in rows if row["index"] < _SHOWN):
            self._tracker.images(sorted((self.folder / "images").glob(f"{name}-*.png")), step)

    def line(self, row: Json) -> Json:
        """What manifest.jsonl says of a row."""
        return {key: value for key, value in row.items() if key not in self.unlisted}

    def _finish(self, failures: Sequence[Json]) -> None:
        """Write failures, manifest and summary, of the shards of all processes."""
        path = self.folder / "failures.jsonl"
        write_jsonl(path, failures)
        known, self.done = self.done, self._rows()
        require(bool(self.done), f"{self.nothing_kept}; see {path}")
        if len(known) < len(self.done) and self._tracker.is_on:  # the rest is of other processes
            others = [row for name, row in self.done.items() if name not in known]
            self._track(others, {"samples": len(self.done), **self.means(others)})
        self.write_lists(len(failures))

    def write_lists(self, failed: int, is_last: bool = True) -> None:
        """Write the manifest and the summary of what is done."""
        rows = self.done.values()
        write_jsonl(self.folder / "manifest.jsonl", map(self.line, rows))
        seconds = sum(event["seconds"] for event in mend_jsonl(self.folder / "history.jsonl"))
        summary = self.summary(rows, is_last) | {
            "failed": failed,
            "seconds": round(seconds, 3),
            "images_per_second": round(len(rows) / max(seconds, 1e-9), 3),
            "settings": read_json(self.folder / "run.json"),
        }
        write_json(self.folder / self.summary_name, {"samples": len(rows), **summary})


def _shapes(found: Result) -> list[torch.Size]:
    return [tensor.shape for tensor in found.tensors.values()]


def shard_path(index: int, suffix: str = "") -> Path:
    """Path, in a run's folder, of the shard whose first sample has this index."""
    return Path("noises") / f"{index:08d}{suffix}.safetensors"


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the finite ``values``; None stands for the others, and for a mean of none."""
    there = array("d", (value for value in values if value is not None and math.isfinite(value)))
    return statistics.fmean(there) if there else None


def mean_curve(curves: Iterable[Sequence[float | None]]) -> list[float | None]:
    """Mean per step; what ended early stays at its last value."""
    sums, counts = list[float](), list[int]()
    ends, ended = 0.0, 0  # of the last values of all curves so far, which may go on
    for curve in filter(None, curves):
        longer = len(curve) - len(sums)
        sums += [ends] * longer
        counts += [ended] * longer
        for k in range(len(sums)):
            value = curve[min(k, len(curve) - 1)]
            if value is not None and math.isfinite(value):
                sums[k] += value
                counts[k] += 1
        if curve[-1] is not None and math.isfinite(curve[-1]):
            ends, ended = ends + curve[-1], ended + 1
    return [total / count if count else None for total, count in zip(sums, counts, strict=True)]
