"""Long lists of which only a part is in memory."""

import pickle
import sqlite3
import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Stored(Sequence[T]):
    """Values in a temporary file of SQLite, which goes with this process. Threads may share it."""

    def __init__(self, values: Iterable[T]) -> None:
        """Write ``values``, of any type that can be pickled, as they come."""
        self._lock = threading.Lock()
        self._file = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._file.execute("PRAGMA journal_mode = OFF")
        self._file.execute("CREATE TABLE stored (place INTEGER PRIMARY KEY, value BLOB)")
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


class View(Sequence[T], Generic[T]):
    """What ``of`` makes of values of another list, one by one, at these places or at all."""

    def __init__(
        self, values: Sequence[Any], of: Callable[[Any], T], places: "array[int] | None" = None
    ) -> None:
        """Look at ``values``, which stay as they are."""
        self._values, self._of, self._places = values, of, places

    def __len__(self) -> int:
        return len(self._values if self._places is None else self._places)

    def __getitem__(self, k: Any) -> Any:
        if isinstance(k, slice):
            return [self[place] for place in range(*k.indices(len(self)))]
        return self._of(self._values[k if self._places is None else self._places[k]])
