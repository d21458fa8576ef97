"""Data sets to go through once: folders, WebDataset tar shards, Parquet, Arrow, local or remote.

A `Source` gives records and failures in a fixed order, as often as it is asked. Shards are read
while it is iterated, one after another, so that work starts without a pass over everything.
"""

import hashlib
import json
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeAlias

from oneshot_fast.data.image_refs import Member
from oneshot_fast.data.options import ALL, Selection
from oneshot_fast.data.pairs import read_pairs
from oneshot_fast.data.records import Failure, Record, claim_id, pair_id
from oneshot_fast.data.shard_files import Shard, find_shards
from oneshot_fast.data.shards import Sample, read_arrow, read_parquet, read_tar
from oneshot_fast.data.tables import extra_module
from oneshot_fast.errors import DataError, one_line
from oneshot_fast.runtime.seeds import content_id

_READERS = {".tar": read_tar, ".parquet": read_parquet, ".arrow": read_arrow}
_ID_DIGITS = 16
_FIRST = 20  # samples, one of which must be usable before any work starts


# records with their places in the data set, and failures
Batch: TypeAlias = list[tuple[int, Record] | Failure]


class Source(Protocol):
    """A data set as a stream.

    It may have a ``state``, which changes when something of it may have been mended, and
    ``listed``, the number of records and failures; both are cheap.
    """

    @property
    def identity(self) -> str:
        """What a run's settings say of the data set; does not change with what is broken."""

    @property
    def total(self) -> int | None:
        """Number of records, where it is known without a pass over the data."""

    def __iter__(self) -> Iterator[Record | Failure]:
        """Records and failures, from the first, in the same order each time."""


@dataclass(frozen=True)
class FolderSource:
    """Pairs of a list, which is read as a whole."""

    records: list[Record]
    failures: list[Failure]

    @property
    def identity(self) -> str:
        """Always the same: lines may be mended, and what is done is looked up in the list."""
        return "pairs"

    @property
    def state(self) -> str:
        """Hash of the ids of what can be used."""
        return content_id(*(record.id for record in self.records))

    @property
    def listed(self) -> int:
        """Number of lines."""
        return len(self.records) + len(self.failures)

    @property
    def total(self) -> int:
        """Number of records."""
        return len(self.records)

    def __iter__(self) -> Iterator[Record | Failure]:
        """In the file's order."""
        items: list[Record | Failure] = [*self.records, *self.failures]
        return iter(sorted(items, key=lambda item: item.line or 0))


@dataclass(frozen=True)
class ShardSource:
    """Samples of tar shards, Parquet or Arrow files.

    A record's `image` is "shard/key", and its `line` the sample's number in the shard, from 1. Its
    id is the first 16 hex digits of sha256(`image` + NUL + prompt), enough to tell 10^8 samples
    apart; the second and later samples of a shard with the same pair get "-1", "-2", ... Only the
    ids of one shard are held in memory for that.
    """

    root: str
    shards: list[Shard]
    selection: Selection = ALL

    @property
    def identity(self) -> str:
        """Hash of the shards' names, of the fields and of the range."""
        chosen = self.selection
        fields = (chosen.prompt_field, chosen.image_field, chosen.start_index, chosen.max_samples)
        text = json.dumps([*fields, [shard.name for shard in self.shards]])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def state(self) -> str:
        """Hash of the shards' sizes and times, and of what keeps them from being read."""
        return content_id(*((one.size, one.changed, one.problem) for one in self.shards))

    @property
    def total(self) -> None:
        """Not known before the last shard was read."""
        return None

    def __iter__(self) -> Iterator[Record | Failure]:
        """Shard by shard.

        Raises:
            DataError: at the end, if there was no usable record in the range.
        """
        start, count = self.selection.start_index, self.selection.max_samples
        stop = None if count is None else start + count
        first, usable = None, False
        for item in islice(self._samples(), start, stop):
            first, usable = first or item, usable or isinstance(item, Record)
            yield item
        if first is None:
            raise DataError(f"{self.root} has no sample number {start} (start_index)")
        if not usable:
            raise self._nothing_usable(first)

    def check(self) -> None:
        """Look at the first samples only.

        Raises:
            DataError: none of them can be used, for instance because a column has another name, or
                a library is missing.
        """
        if any(shard.suffix != ".tar" for shard in self.shards):
            extra_module("pyarrow.parquet")
        first = list(islice(self._samples(), 1))
        if not first:
            raise DataError(f"{self.root}: its shards are empty")
        if not any(isinstance(item, Record) for item in islice(self._samples(), _FIRST)):
            raise self._nothing_usable(first[0])

    def _samples(self) -> Iterator[Record | Failure]:
        for shard in self.shards:
            used: dict[str, int] = {}
            if shard.problem:
                yield Failure(shard.problem, image=shard.name)
                continue
            read = _READERS[shard.suffix]
            number = 0
            fields = self.selection.prompt_field, self.selection.image_field
            try:
                for sample in read(shard.file, *fields):
                    number += 1
                    yield _record(shard, number, sample, used)
            except Exception as error:  # damaged bytes and file systems raise nearly any class
                reason = f"{shard.name}, after {number} samples: {one_line(error)}"
                yield Failure(reason, number + 1, image=shard.name)

    def _nothing_usable(self, first: Record | Failure) -> DataError:
        reason = f"{first.image}: {first.reason}" if isinstance(first, Failure) else ""
        return DataError(f"{self.root}: no usable sample; the first, {reason}")


def open_pairs(data_root: str | Path, selection: Selection = ALL) -> Source:
    """Open a data set of any layout.

    Args:
        data_root: what `read_pairs` takes; or a folder with *.tar or *.parquet, or of datasets'
            save_to_disk; or such a file, *.arrow, too, or a pattern of such files with *, ?, [a-z],
            {000..123} or {a,b}; each a path or an fsspec URL such as
            hf://datasets/user/name/data or s3://bucket/shards/{000..123}.tar.
        selection: which of its samples, a bad one counting, and their fields: see `read_pairs`,
            `read_tar` and `read_parquet`.

    Raises:
        DataError: no such data set, no usable sample among its first, or a bad range.
    """
    selection.check()
    root = str(data_root)
    shards = find_shards(root, selection.allow_outside_root)
    if shards:
        source = ShardSource(root, shards, selection)
        source.check()
        return source
    return FolderSource(*read_pairs(Path(root), selection))


def pending(source: Iterable[Record | Failure], done: Container[str], size: int) -> Iterator[Batch]:
    """Cut a data set into batches and leave out what is done.

    Batches are cut before, and with failures, so that a resumed run solves the same targets
    together, those that were mended among them.

    Args:
        source: The data set.
        done: Ids of the records to leave out.
        size: Records and failures per batch.

    Yields:
        Records with their places in the list, and failures.
    """
    batch: Batch = []
    for index, item in enumerate(source):
        if item.id is None or item.id not in done:
            batch.append(item if isinstance(item, Failure) else (index, item))
        if (index + 1) % size == 0:
            yield batch
            batch = []
    yield batch


def _record(shard: Shard, number: int, sample: Sample, used: dict[str, int]) -> Record | Failure:
    image = f"{shard.name}/{sample.key}"
    prompts = sample.prompts
    if not prompts:
        return Failure(sample.reason or "", number, image=image)
    name = claim_id(pair_id(image, *prompts, digits=_ID_DIGITS), used)
    place = Member(shard.file, sample.place)
    return Record(name, number, prompts[0], image, place, prompts if prompts[1:] else ())
