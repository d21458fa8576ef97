"""Parquet files whose cells are too large, or that repeat what is large: little memory is taken."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from shard_samples import grey, png, split

from oneshot_fast.data.options import Selection
from oneshot_fast.data.pairs import read_pairs
from oneshot_fast.data.sources import open_pairs
from oneshot_fast.errors import DataError

arrow = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
LONG = 66 << 20


def write(path: Path, texts: list[Any], images: list[bytes] | None = None, **options: Any) -> None:
    images = images or [png(k) for k in range(len(texts))]
    path.parent.mkdir(exist_ok=True)
    table = arrow.table(
        {"image": [{"bytes": body, "path": None} for body in images], "text": texts}
    )
    pq.write_table(table, path, **options)


def test_a_text_that_fills_a_page_fails_its_file(tmp_path: Path) -> None:
    write(tmp_path / "set" / "0.parquet", ["a", "b", "c" * LONG, "d"], row_group_size=2)
    write(tmp_path / "set" / "1.parquet", ["e", "f" * 70_000, "h"])
    records, failures = split(open_pairs(tmp_path / "set"))
    assert [record.prompt for record in records] == ["a", "b", "e", "h"]
    assert "0.parquet, after 2 samples: 'text' has 69,206," in failures[0].reason
    assert "more than 64 MB: shorten it" in failures[0].reason
    assert "'text' has 70,000 bytes" in failures[1].reason
    for texts in (["c" * LONG], [["a", "c" * LONG]]):  # in a list of captions, too
        write(tmp_path / "list" / "0.parquet", texts)
        with pytest.raises(DataError, match="more than 64 MB"):
            open_pairs(tmp_path / "list")
    table = arrow.table({"file_name": ["a.png"], "text": ["c" * LONG]})
    (tmp_path / "list" / "0.parquet").unlink()
    pq.write_table(table, tmp_path / "list" / "metadata.parquet")
    with pytest.raises(DataError, match=r"list/metadata\.parquet: 'text' has .* more than 64 MB"):
        read_pairs(tmp_path / "list")


def test_many_pages_of_a_large_column_are_read(tmp_path: Path) -> None:
    texts = [f"{k} " + "x" * 60_000 for k in range(1500)]
    for name, options in (
        ("plain", {"use_dictionary": False}),
        ("second", {"use_dictionary": False, "data_page_version": "2.0", "compression": "zstd"}),
        ("none", {"compression": "none"}),
    ):
        write(tmp_path / name / "0.parquet", texts, [png(1)] * len(texts), **options)
        records, failures = split(open_pairs(tmp_path / name))
        assert len(records) == len(texts) and not failures
        assert grey(records[-1]) == 1


def test_repeated_images_are_held_once(tmp_path: Path) -> None:
    body = png(3) + bytes(15 << 20)
    write(tmp_path / "0.parquet", [f"a{k}" for k in range(32)], [body] * 32)
    code = f"""
        import resource
        from oneshot_fast.data.sources import open_pairs
        records = list(open_pairs({str(tmp_path)!r}))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert len(records[20].image_path.read()) == {len(body)}
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    ran = [sys.executable, "-c", textwrap.dedent(code)]
    grown = int(subprocess.run(ran, check=True, capture_output=True, text=True).stdout)
    assert grown < 250 << 10  # kB; 32 of them are 0.5 GB


def test_an_image_that_fills_a_page_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oneshot_fast.data.image_refs.IMAGES", 1 << 20)
    images = [png(1), png(2) + bytes(2 << 20), png(3)]
    write(tmp_path / "0.parquet", ["a", "b", "c"], images, row_group_size=1)
    records, _ = split(open_pairs(tmp_path, Selection()))
    assert [grey(records[k]) for k in (0, 2)] == [1, 3]
    with pytest.raises(
        DataError, match=r"'image' has 2,09.* bytes in one page of row group 1, more"
    ):
        grey(records[1])
