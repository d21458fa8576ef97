"""Rows in the headers of shards, found by their ids: where each lies is kept on disk."""

import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from oneshot_fast.runtime.files import Json, read_metadata

_OPEN = 16  # shards whose rows are in memory
_PAGE = 1000  # places that are read at once


class RowIndex(Mapping[str, Json]):
    """Rows by the ids of their samples, in the order of their "index".

    The places lie in a temporary file of SQLite, so millions of rows take little memory; the rows
    are read from the shards. Threads may share it.
    """

    def __init__(self) -> None:
        """Begin without rows."""
        self._lock, self._count = threading.Lock(), 0
        self._places = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._places.execute("PRAGMA journal_mode = OFF")  # it dies with this process
        self._places.execute(
            "CREATE TABLE places (id TEXT PRIMARY KEY, at INTEGER, shard TEXT, place INTEGER) "
            "WITHOUT ROWID"
        )
        self._places.execute("CREATE INDEX ordered ON places (at, id)")
        self._rows = lru_cache(_OPEN)(lambda shard: read_metadata(Path(shard), "rows"))

    def add(self, shard: Path, rows: Sequence[Json]) -> None:
        """Take the rows of a shard; one of the same id is replaced."""
        places = [(row["id"], row["index"], str(shard), k) for k, row in enumerate(rows)]
        with self._lock:
            self._places.execute("BEGIN")
            self._count -= sum(self._place(row["id"]) is not None for row in rows)
            self._places.executemany("INSERT OR REPLACE INTO places VALUES (?, ?, ?, ?)", places)
            self._places.execute("COMMIT")
            self._count += len({row["id"] for row in rows})

    def _place(self, name: object) -> tuple[str, int] | None:
        found: tuple[str, int] | None = self._places.execute(
            "SELECT shard, place FROM places WHERE id = ?", (name,)
        ).fetchone()
        return found

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return self._place(name) is not None

    def __getitem__(self, name: str) -> Json:
        with self._lock:
            found = self._place(name)
            if found is None:
                raise KeyError(name)
            row: Json = self._rows(found[0])[found[1]]
            return row

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        last = (-1, "")
        while True:
            with self._lock:
                page = self._places.execute(
                    "SELECT at, id FROM places WHERE (at, id) > (?, ?) ORDER BY at, id LIMIT ?",
                    (*last, _PAGE),
                ).fetchall()
            if not page:
                return
            yield from (name for _, name in page)
            last = page[-1]
