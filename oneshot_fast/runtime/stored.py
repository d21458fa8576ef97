"""Long lists of which only a part is in memory."""

import pickle
import sqlite3
import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Stored(Sequence[T]):
    """Values in a temporary file of SQLite, which goes with this process. Threads may share it."""

    def __init__(self, values: Iterable[T]) -> None:
        """Write ``values``, of any type that can be pickled, as they come."""
        self._lock = threading.Lock()
        self._file = _temporary("CREATE TABLE stored (place INTEGER PRIMARY KEY, value BLOB)")
        self._file.execute("BEGIN")
        rows = ((place, pickle.dumps(value, -1)) for place, value in enumerate(values))
        self._count = self._file.executemany("INSERT INTO stored VALUES (?, ?)", rows).rowcount
        self._count = max(0, self._count)  # SQLite knows none of nothing
        self._file.execute("COMMIT")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[k] for k in range(*place.indices(self._count))]
        k = place + self._count if place < 0 else place
        with self._lock:
            found = self._file.execute("SELECT value FROM stored WHERE place = ?", (k,)).fetchone()
        if found is None:
            raise IndexError(place)
        return pickle.loads(found[0])


class StoredNumbers(MutableMapping[str, int]):
    """Whole numbers by name in a temporary file of SQLite, in the order of the names."""

    def __init__(self) -> None:
        """Begin without any."""
        self._file = _temporary("CREATE TABLE stored (name TEXT PRIMARY KEY, n) WITHOUT ROWID")

    def __getitem__(self, name: str) -> int:
        query = "SELECT n FROM stored WHERE name = ?"
        found: tuple[int] | None = self._file.execute(query, (name,)).fetchone()
        if found is None:
            raise KeyError(name)
        return found[0]

    def __setitem__(self, name: str, n: int) -> None:
        self._file.execute("INSERT OR REPLACE INTO stored VALUES (?, ?)", (name, n))

    def __delitem__(self, name: str) -> None:
        self[name]  # or KeyError
        self._file.execute("DELETE FROM stored WHERE name = ?", (name,))

    def __iter__(self) -> Iterator[str]:
        rows = self._file.execute("SELECT name FROM stored ORDER BY name")
        return (name for (name,) in rows)

    def __len__(self) -> int:
        (count,) = self._file.execute("SELECT count(*) FROM stored").fetchone()
        return int(count)


def _temporary(table: str) -> sqlite3.Connection:
    """A file that goes with this process; what is written counts at once, or with COMMIT."""
    file = sqlite3.connect("", check_same_thread=False, isolation_level=None)
    file.execute("PRAGMA journal_mode = OFF")
    file.execute(table)
    return file


class Without(Sequence[int]):
    """The places of a list but some, of which alone it takes memory."""

    def __init__(self, count: int, absent: Sequence[int]) -> None:
        """Leave the places ``absent``, in ascending order, out of ``count``."""
        self._count = count - len(absent)
        self._before = array("q", (place - k for k, place in enumerate(absent)))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return [self[place] for place in range(*k.indices(self._count))]
        if not 0 <= k < self._count:
            raise IndexError(k)
        return k + bisect_right(self._before, k)


class View(Sequence[T], Generic[T]):
    """What ``of`` makes of values of another list, one by one, at these places or at all."""

    def __init__(
        self, values: Sequence[Any], of: Callable[[Any], T], places: Sequence[int] | None = None
    ) -> None:
        """Look at ``values``, which stay as they are."""
        self._values, self._of, self._places = values, of, places

    def __len__(self) -> int:
        return len(self._values if self._places is None else self._places)

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return [self[place] for place in range(*k.indices(len(self)))]
        return self._of(self._values[k if self._places is None else self._places[k]])
