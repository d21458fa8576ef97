"""Lists and rows that lie on disk are what they are in memory."""

from array import array
from pathlib import Path
from typing import Any

import pytest

from oneshot_fast.runtime.files import write_safetensors
from oneshot_fast.runtime.row_index import RowIndex
from oneshot_fast.runtime.shards import mean_curve
from oneshot_fast.runtime.stored import Stored, StoredNumbers, View, Without


def test_a_stored_list_is_a_list() -> None:
    values = [("a", 1), ("b", 2), ("c", 3), ("d", 4)]
    stored = Stored(iter(values))
    assert [*stored] == values and len(stored) == 4
    assert stored[-1] == values[-1] and stored[1:3] == values[1:3] and stored[::-2] == values[::-2]
    with pytest.raises(IndexError):
        stored[4]
    assert not Stored([]) and [*Stored([])] == []
    assert [*View(stored, lambda pair: pair[0], array("q", [2, 0]))] == ["c", "a"]
    assert View(stored, lambda pair: pair[1])[1:] == [2, 3, 4]


def test_places_of_a_list_but_some() -> None:
    for absent in ([], [0], [1, 2, 5], [0, 1, 6], [*range(7)]):
        kept = [k for k in range(7) if k not in absent]
        places = Without(7, absent)
        assert [*places] == kept and len(places) == len(kept) and places[1:3] == kept[1:3]
        with pytest.raises(IndexError):
            places[len(kept)]


def test_stored_numbers_are_a_dict() -> None:
    numbers = StoredNumbers()
    numbers["b"], numbers["a"], numbers["b"] = 1, 2, 3
    assert dict(numbers) == {"a": 2, "b": 3} and [*numbers] == ["a", "b"] and "c" not in numbers
    assert numbers.pop("a") == 2 and len(numbers) == 1
    with pytest.raises(KeyError):
        numbers["a"]


def shard(folder: Path, name: str, *indices: int) -> tuple[Path, list[dict[str, Any]]]:
    rows = [{"id": f"x{k}", "index": k, "value": name} for k in indices]
    write_safetensors(folder / name, {}, {"rows": rows})
    return folder / name, rows


def test_rows_are_found_by_id_and_come_in_order(tmp_path: Path) -> None:
    index = RowIndex()
    index.add(*shard(tmp_path, "b", 5, 2))
    index.add(*shard(tmp_path, "a", 3, 1))
    assert [row["index"] for row in index.values()] == [1, 2, 3, 5] and len(index) == 4
    assert "x5" in index and "x4" not in index and index["x2"]["value"] == "b"
    index.add(*shard(tmp_path, "c", 2, 4))  # one of them once more
    assert len(index) == 5 and index["x2"]["value"] == "c" and [*index] == [
        "x1", "x2", "x3", "x4", "x5",
    ]  # fmt: skip
    with pytest.raises(KeyError):
        index["x9"]


def test_curves_stay_at_their_last_value() -> None:
    curves = [[4.0, 2.0], [], [1.0], [1.0, None, 3.0], [None]]
    assert mean_curve(iter(curves)) == [2.0, 1.5, 2.0]
