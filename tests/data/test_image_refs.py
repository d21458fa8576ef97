"""References to images inside shards: found again from text, read alone."""

import json
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save_file
from shard_samples import grey, parquet, place, png, rows, samples, split, tar, write

from oneshot_fast.data.image_refs import Member, image_ref, image_text
from oneshot_fast.data.images import load_image
from oneshot_fast.data.manifests import read_manifest
from oneshot_fast.data.sources import open_pairs
from oneshot_fast.errors import DataError


def test_an_image_is_read_without_the_rest_of_its_tar(tmp_path: Path) -> None:
    body = tar(*samples(0, 3))
    write(tmp_path / "a.tar", body)
    record = split(open_pairs(tmp_path))[0][1]
    offset, length = map(int, str(record.image_path).partition("#")[2].split("+"))
    assert body[offset : offset + length] == png(1)
    # Everything else may be lost.
    write(tmp_path / "a.tar", bytes(offset) + body[offset : offset + length])
    assert grey(record) == 1
    write(tmp_path / "a.tar", bytes(offset) + body[offset : offset + length - 1])
    with pytest.raises(DataError, match=r"a\.tar#\d+\+\d+: cannot be read: the file ends"):
        grey(record)


def test_a_name_with_colons_is_no_chain_of_urls(tmp_path: Path) -> None:
    write(tmp_path / "a::b.tar", tar(*samples(0, 2)))
    records, failures = split(open_pairs(tmp_path))
    assert not failures and [grey(record) for record in records] == [0, 1]


def test_a_bad_image_fails_when_it_is_loaded(tmp_path: Path) -> None:
    pair = [("x.png", b"no image"), ("x.txt", b"a")]
    write(tmp_path / "0.tar", tar(*pair, *samples(0, 1)))
    records, failures = split(open_pairs(tmp_path))
    assert not failures and grey(records[1]) == 0
    with pytest.raises(DataError, match=r"0\.tar#512\+8: not an image"):
        grey(records[0])


def test_large_row_groups(tmp_path: Path) -> None:
    table = [{"image": png(n % 256), "prompt": f"{n}"} for n in range(300)]
    write(tmp_path / "0.parquet", parquet(table, group=250))
    records, _ = split(open_pairs(tmp_path))
    assert [grey(records[n]) for n in (0, 63, 64, 249, 250, 299, 1)] == [0, 63, 64, 249, 250, 43, 1]
    write(tmp_path / "0.parquet", parquet(table[1:], group=250))
    assert grey(records[0]) == 1  # a rewritten file is not taken from memory
    with pytest.raises(DataError, match="no such row"):
        load_image(Member(str(tmp_path / "0.parquet"), "image:1:60"), 4, 4)
    with pytest.raises(DataError, match="no such row group"):
        load_image(Member(str(tmp_path / "0.parquet"), "image:9:0"), 4, 4)


@pytest.mark.parametrize("where", ["local", "memory"])
def test_references_in_a_manifest(where: str, tmp_path: Path) -> None:
    root, add = place(where, tmp_path)
    add("0.tar", tar(*samples(0, 2)))
    add("a.parquet", parquet(rows(2, 3)))
    found = [*open_pairs(f"{root}/0.tar"), *open_pairs(f"{root}/a.parquet")]
    run = (tmp_path / "run").resolve()
    run.mkdir()
    save_file({"z": torch.zeros(1, 4, 2, 2)}, run / "n.safetensors")
    lines = [
        {"prompt": r.prompt, "target_image_path": text, "noise_path": "n.safetensors"}
        for r in found
        for text in (str(r.image_path), image_text(r.image_path, run))
    ]
    lines.append(lines[0] | {"target_image_path": f"{tmp_path}/none.tar#1+2"})
    (run / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pairs, failures = read_manifest(run / "manifest.jsonl")
    assert [grey(pair) for pair in pairs] == [0, 0, 1, 1, 2, 2]
    assert [f.reason.partition(" (")[0] for f in failures] == [f"no such file: {tmp_path}/none.tar"]
    if "://" not in root:
        (tmp_path / "set").rename(tmp_path / "run" / "set")
        assert image_text(found[0].image_path, run).startswith("../set/0.tar#")


def test_urls_and_names_like_references(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/one/a.png", png(7))
    assert float(load_image(image_ref("memory://one/a.png"), 4, 4).mean()) == pytest.approx(7 / 255)
    with pytest.raises(DataError, match=r"memory://one/b\.png: no such file"):
        load_image(image_ref("memory://one/b.png"), 4, 4)
    write(tmp_path / "a.tar#1+2", png(8))
    assert image_ref("a.tar#1+2", tmp_path) == tmp_path / "a.tar#1+2"
    assert image_text(tmp_path / "a.png", tmp_path) == "a.png"


def test_files_beside_a_remote_shard(tmp_path: Path) -> None:
    root, add = place("memory", tmp_path)
    add("beside.png", png(5))
    add("set/in/side.png", png(6))
    cells = [{"bytes": None, "path": path} for path in ("in/side.png", "../beside.png")]
    cells.append({"bytes": None, "path": f"{root}/beside.png"})
    add("set/0.parquet", parquet([{"image": cell, "text": "a"} for cell in cells]))
    inside, *outside = split(open_pairs(f"{root}/set"))[0]
    assert grey(inside) == 6
    for record in outside:
        with pytest.raises(DataError, match="leads out of the shard's folder"):
            grey(record)
