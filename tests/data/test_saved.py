"""Folders that ``save_to_disk`` of Hugging Face's datasets writes, made here without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
from shard_samples import grey, png, split

from oneshot_fast.data.image_refs import image_ref
from oneshot_fast.data.options import Selection
from oneshot_fast.data.shard_files import find_shards
from oneshot_fast.data.sources import open_pairs
from oneshot_fast.errors import DataError

arrow = pytest.importorskip("pyarrow")
Row = dict[str, Any]


def rows(first: int, last: int) -> list[Row]:
    return [
        {"image": {"bytes": png(n), "path": f"{n}.png"}, "text": f"grey {n}"}
        for n in range(first, last)
    ]


def stream(path: Path, rows: list[Row], batch: int = 2, **options: Any) -> None:
    table = arrow.Table.from_pylist(rows)
    with arrow.ipc.new_stream(path, table.schema, **options) as writer:
        writer.write_table(table, batch)


def save(folder: Path, *shards: list[Row], **state: Any) -> Path:
    folder.mkdir(parents=True)
    names = [f"data-{k:05d}-of-{len(shards):05d}.arrow" for k in range(len(shards))]
    for name, of_shard in zip(names, shards, strict=True):
        stream(folder / name, of_shard)
    listed = {"_data_files": [{"filename": name} for name in names], "_split": None, **state}
    (folder / "state.json").write_text(json.dumps(listed))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_saved_dataset(tmp_path: Path) -> None:
    folder = save(tmp_path / "set", rows(0, 5), rows(5, 7))
    stream(folder / "cache-1234.arrow", rows(7, 9))  # of map()
    records, failures = split(open_pairs(folder))
    assert not failures and [grey(record) for record in records] == list(range(7))
    assert [record.prompt for record in records] == [f"grey {n}" for n in range(7)]
    assert records[5].image == "data-00001-of-00002.arrow/0"
    assert image_ref(str(records[3].image_path)) == records[3].image_path
    for root in (f"{folder}/data-*.arrow", folder):
        assert split(open_pairs(root, Selection(start_index=1, max_samples=5)))[0] == records[1:6]
    (one, two), _ = split(open_pairs(folder / "data-00001-of-00002.arrow"))
    assert [grey(one), grey(two)] == [5, 6]


def test_a_saved_dict_of_datasets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "dict"
    save(root / "test", rows(3, 4))
    save(root / "train", rows(0, 3))
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["test", "train"]}))
    records, failures = split(open_pairs(root))
    assert [grey(record) for record in records] == [0, 1, 2] and not failures
    assert "of its splits train is read" in capsys.readouterr().err
    assert [record.id for record in records] == [r.id for r in split(open_pairs(root / "train"))[0]]
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["a", "b"]}))
    with pytest.raises(DataError, match="has splits a, b; give one's folder"):
        open_pairs(root)
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["test"]}))
    assert [grey(record) for record in split(open_pairs(root))[0]] == [3]


def test_behind_a_url(tmp_path: Path) -> None:
    folder, url = save(tmp_path / "set", rows(0, 3)), f"memory://{tmp_path}/set"
    fs = fsspec.filesystem("memory")
    for path in folder.iterdir():
        fs.pipe(f"{tmp_path}/set/{path.name}", path.read_bytes())
    records, failures = split(open_pairs(url))
    assert [grey(record) for record in records] == [0, 1, 2] and not failures
    assert str(records[0].image_path).startswith("memory://")


def test_a_bad_row_fails_alone(tmp_path: Path) -> None:
    good = {"bytes": png(1), "path": None}
    bad: list[tuple[object, object, str]] = [
        ({"bytes": None, "path": "a.png"}, "a", "has no image's bytes: save a column of the type"),
        (None, "a", "has no image's bytes"),
        (good, None, "'text' must be a string, not NoneType"),
        (good, " ", "'text' is empty"),
        (good, "a" * 70_000, "more than 64 kB"),
        (good, "a" * (5 << 20), "more than 4096 kB"),
    ]
    found = [{"image": image, "text": text} for image, text, _ in bad]
    folder = save(tmp_path / "set", [*rows(0, 1), *found, *rows(2, 3)])
    records, failures = split(open_pairs(folder))
    assert [grey(record) for record in records] == [0, 2]
    for failure, (_, _, reason) in zip(failures, bad, strict=True):
        assert reason.replace("NoneType", "null") in failure.reason
    listed = save(tmp_path / "list", [{"image": png(4), "caption": ["a cat", "one cat"]}])
    (record,) = open_pairs(listed)
    assert record.prompts == ("a cat", "one cat") and grey(record) == 4


def test_damage(tmp_path: Path) -> None:
    folder = save(tmp_path / "set", rows(0, 4), rows(4, 6))
    path = folder / "data-00000-of-00002.arrow"
    whole = path.read_bytes()
    for cut in (len(whole) - 8, len(whole) - 20, len(whole) // 2, 100, 0):
        path.write_bytes(whole[:cut])
        records, failures = split(open_pairs(folder))
        assert [grey(record) for record in records][-2:] == [4, 5]
        (failure,) = failures
        assert failure.image == path.name and f"{path.name}, after" in failure.reason
    stream(path, rows(0, 2), options=arrow.ipc.IpcWriteOptions(compression="zstd"))
    records, failures = split(open_pairs(folder))
    assert len(records) == 2 and len(failures) == 1 and "is compressed" in failures[0].reason
    path.unlink()
    with pytest.raises(DataError, match="no such file"):
        open_pairs(folder)
    (folder / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot be listed"):
        open_pairs(folder)
    other = save(tmp_path / "chosen", rows(0, 2), _indices_data_files=[{"filename": "i.arrow"}])
    with pytest.raises(DataError, match="flatten_indices"):
        open_pairs(other)
    (other / "state.json").unlink()  # now it may be a cache, of all splits
    assert find_shards(str(other)) == []
    with pytest.raises(DataError, match="no column 'image'"):
        open_pairs(save(tmp_path / "none", [{"a": "x", "text": "y"}]))
