"""Data sets of shards, local and remote: what they name, in which order, and how they are used."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shard_samples import grey, parquet, place, png, rows, samples, split, tar, write

from oneshot_fast.data.image_refs import file_sha256
from oneshot_fast.data.manifests import read_manifest
from oneshot_fast.data.options import Selection
from oneshot_fast.data.pairs import read_pairs
from oneshot_fast.data.records import Failure
from oneshot_fast.data.shard_files import expand_braces, find_shards
from oneshot_fast.data.sources import open_pairs
from oneshot_fast.errors import DataError


@pytest.mark.parametrize("where", ["local", "memory"])
def test_tar_shards(where: str, tmp_path: Path) -> None:
    root, add = place(where, tmp_path)
    add("001.tar", tar(*samples(3, 6, "jpg")))
    add("000.tar", tar(*samples(0, 3)))
    source = open_pairs(root)
    records, failures = split(source)
    assert not failures and source.total is None
    assert [r.prompt for r in records] == [f"grey {n}" for n in range(6)]
    assert [grey(r) for r in records] == list(range(6))
    assert [r.image for r in records[2:4]] == ["000.tar/000002.png", "001.tar/000003.jpg"]
    assert [r.line for r in records] == [1, 2, 3] * 2
    named = hashlib.sha256(b"000.tar/000002.png\0grey 2").hexdigest()[:16]
    assert records[2].id == named
    assert file_sha256(records[2].image_path) == hashlib.sha256(png(2)).hexdigest()
    assert split(source) == (records, failures)  # once more, from the start


@pytest.mark.parametrize("where", ["local", "memory"])
def test_parquet(where: str, tmp_path: Path) -> None:
    root, add = place(where, tmp_path)
    add("b.parquet", parquet(rows(10, 13)))
    add("a.parquet", parquet(rows(0, 10)))
    source = open_pairs(root)
    records, failures = split(source)
    assert not failures and [r.prompt for r in records] == [f"grey {n}" for n in range(13)]
    assert [grey(r) for r in records] == list(range(13))
    assert [records[9].image, records[10].image] == ["a.parquet/9", "b.parquet/0"]
    assert str(records[9].image_path).endswith("a.parquet#image:2:1")
    assert [grey(r) for r in reversed(records)] == list(range(12, -1, -1))
    assert split(source) == (records, failures)


def test_only_as_much_is_read_as_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", tar(*samples(0, 4)))
    os.mkfifo(tmp_path / "1.tar")  # reading it would wait for ever
    write(tmp_path / "2.tar", b"")
    found = [item for item, _ in zip(open_pairs(f"{tmp_path}/[02].tar"), range(4), strict=False)]
    assert [item.prompt for item in found] == [f"grey {n}" for n in range(4)]
    assert len(list(open_pairs(f"{tmp_path}/[02].tar", Selection(max_samples=4)))) == 4
    assert find_shards(str(tmp_path))[1].name == "2.tar"  # a pipe is no shard


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_ranges_and_order(tmp_path: Path, kind: str) -> None:
    for shard in range(3):
        first, last = 4 * shard, 4 * shard + 4
        body = tar(*samples(first, last)) if kind == "tar" else parquet(rows(first, last), 3)
        write(tmp_path / f"{shard}.{kind}", body)
    records = split(open_pairs(tmp_path))[0]
    part = open_pairs(tmp_path, Selection(start_index=3, max_samples=6))
    assert split(part) == (records[3:9], [])
    assert part.identity == open_pairs(tmp_path, Selection(start_index=3, max_samples=6)).identity
    assert len(split(open_pairs(tmp_path, Selection(start_index=11, max_samples=6)))[0]) == 1
    with pytest.raises(DataError, match="no sample number 12"):
        list(open_pairs(tmp_path, Selection(start_index=12)))
    with pytest.raises(DataError, match="max_samples is 0"):
        open_pairs(tmp_path, Selection(max_samples=0))


def test_identity(tmp_path: Path) -> None:
    write(tmp_path / "one" / "0.tar", tar(*samples(0, 2)))
    (tmp_path / "two").mkdir()
    write(tmp_path / "two" / "0.tar", tar(*samples(0, 2)))
    source = open_pairs(tmp_path / "one")
    moved = open_pairs(tmp_path / "two")
    assert source.identity == moved.identity
    assert [r.id for r in split(source)[0]] == [r.id for r in split(moved)[0]]
    others = {open_pairs(tmp_path / "one", Selection(max_samples=1)).identity}
    others.add(open_pairs(tmp_path / "one", Selection(start_index=1)).identity)
    others.add(open_pairs(tmp_path / "one", Selection(prompt_field="txt")).identity)
    write(tmp_path / "two" / "1.tar", tar(*samples(0, 2)))
    others.add(open_pairs(tmp_path / "two").identity)
    assert len(others | {source.identity}) == 5
    write(tmp_path / "one" / "0.tar", tar(*samples(0, 9)))
    mended = open_pairs(tmp_path / "one")
    assert mended.identity == source.identity and mended.state != source.state


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_links_to_shards(tmp_path: Path, kind: str) -> None:
    body = {"tar": lambda n: tar(*samples(n, n + 1)), "parquet": lambda n: parquet(rows(n, n + 1))}
    for name, n in ((f"data/a.{kind}", 0), ("hub/blob", 1), ("data/in/side", 2)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, body[kind](n))
    for name, goal in (("b", "../hub/blob"), ("c", "in/side"), ("d", "../hub/none")):
        (tmp_path / "data" / f"{name}.{kind}").symlink_to(goal)
    for root in (str(tmp_path / "data"), f"{tmp_path}/data/*.{kind}"):
        records, failures = split(open_pairs(root))
        assert [grey(r) for r in records] == [0, 2]
        assert [f.image for f in failures] == [f"b.{kind}", f"d.{kind}"]
        assert all("--allow_outside_root" in f.reason for f in failures)
        followed, (dangling,) = split(open_pairs(root, Selection(allow_outside_root=True)))
        assert [grey(r) for r in followed] == [0, 1, 2]
        assert "its link leads to no file" in dangling.reason
    for root in (f"{tmp_path}/data/b.{kind}", f"{tmp_path}/data/{{b,b}}.{kind}"):
        records, failures = split(open_pairs(root))  # named itself
        assert [grey(r) for r in records] == [1] and not failures


def test_folders_are_sources_too(data: Path) -> None:
    with (data / "pairs.jsonl").open("a") as file:
        file.write("{\n")
    records, failures = read_pairs(data)
    write(data / "never.tar", b"read")
    source = open_pairs(data)
    assert split(source) == (records, failures) == split(source)
    assert source.total == len(records) and isinstance(list(source)[-1], Failure)
    assert source.listed != open_pairs(data, Selection(max_samples=2)).listed


def test_patterns(tmp_path: Path) -> None:
    assert expand_braces("a{08..11}.tar") == [f"a{n}.tar" for n in ("08", "09", "10", "11")]
    assert expand_braces("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
    for name in ("x/a0.tar", "x/a1.tar", "y/a0.tar", "y/[1].tar"):
        write(tmp_path / name, tar(*samples(0, 1)))
    patterns = {
        "x/a{0..1}.tar": ["a0.tar", "a1.tar"],
        "x/*.tar": ["a0.tar", "a1.tar"],
        "{y,x}/a0.tar": ["y/a0.tar", "x/a0.tar"],
        "*/a?.tar": ["x/a0.tar", "x/a1.tar", "y/a0.tar"],
        "{x/*,x/a0}.tar": ["a0.tar", "a1.tar"],
        "y/[1].tar": ["[1].tar"],
        "x/a1.tar": ["a1.tar"],
    }
    for pattern, names in patterns.items():
        found = find_shards(f"{tmp_path}/{pattern}")
        assert [shard.name for shard in found] == names, pattern
        assert all(os.path.isfile(shard.file) and shard.size for shard in found)
        assert len(split(open_pairs(f"{tmp_path}/{pattern}"))[0]) == len(names)


def test_names_with_wildcards(tmp_path: Path) -> None:
    for folder in ("a[0]", "b{1}"):
        write(tmp_path / folder / "x[1].parquet", parquet(rows(0, 2)))
        assert [grey(r) for r in split(open_pairs(tmp_path / folder))[0]] == [0, 1]


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("{0}/none/*.tar", "no .tar or .parquet"),
        ("{0}/{{0..3}}.tar", r"no such file or folder: .*0\.tar"),
        ("{0}/mixed", "both .tar and .parquet"),
        ("{0}/empty.tar", r"no usable sample; the first, empty\.tar: .*empty file"),
        ("{0}/text.tar", r"text\.tar: text\.tar, after 0 samples"),
        ("{0}/zipped.tar", "after 0 samples: invalid header"),  # its images have no place
        ("{0}/zeros.tar", "its shards are empty"),
        ("{0}/a.tar.gz", r"give a folder, \.tar, \.parquet or \.jsonl file"),
        ("{0}/none", "no such folder or"),
        ("memory://nowhere", "no such file or folder"),
        ("memory://nowhere/*.tar", "no .tar or .parquet"),
        ("nosuch://x/*.tar", "cannot be listed: .*nosuch"),
    ],
)
def test_nothing_to_read(tmp_path: Path, root: str, message: str) -> None:
    for name in ("mixed/0.tar", "mixed/0.parquet", "empty.tar", "a.tar.gz"):
        write(tmp_path / name, b"")
    write(tmp_path / "text.tar", b"a cat\n" * 200)
    write(tmp_path / "zeros.tar", tar())
    write(tmp_path / "zipped.tar", gzip.compress(tar(*samples(0, 30))))
    with pytest.raises(DataError, match=message) as caught:
        open_pairs(root.format(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_from_shards_to_a_trained_model(
    tmp_path: Path, small_data: Path, call: Callable[..., Any], kind: str
) -> None:
    pairs, _ = read_pairs(small_data)
    images = [record.image_path.read_bytes() for record in pairs]
    if kind == "tar":
        members = [(f"{n}.png", image) for n, image in enumerate(images)]
        captions = [(f"{n}.txt", record.prompt.encode()) for n, record in enumerate(pairs)]
        order = [member for both in zip(members, captions, strict=True) for member in both]
        body = tar(*order[:4], ("bad.txt", b"no image"), *order[4:])
    else:
        table = [{"image": i, "prompt": r.prompt} for i, r in zip(images, pairs, strict=True)]
        body = parquet([*table[:2], {"image": None, "prompt": "no image"}, *table[2:]])
    write(tmp_path / "set" / f"0.{kind}", body)
    flags = ["--data_root", tmp_path / "set", "--model_id", "tiny", "--steps", 1, "--num_images", 0]
    ended = call("assign", *flags, "--batch_size", 4, "--output_root", tmp_path / "run")
    assert ended.code == 1, ended.err  # one sample failed
    (failure,) = map(json.loads, (tmp_path / "run" / "failures.jsonl").read_text().splitlines())
    assert failure["image"] == {"tar": "0.tar/bad", "parquet": "0.parquet/2"}[kind]
    (tmp_path / "run").rename(tmp_path / "run2")  # the references are relative to the manifest
    manifest = tmp_path / "run2" / "manifest.jsonl"
    matched, failures = read_manifest(manifest)
    assert [p.prompt for p in matched] == [r.prompt for r in pairs] and not failures
    assert [p.image_sha256 for p in matched] == [file_sha256(r.image_path) for r in pairs]
    ended = call(
        "sft", "--manifest_path", manifest, "--model_id", "tiny", "--output_dir", tmp_path / "sft",
        "--epochs", 1, "--preserve_pool_size", 1,
    )  # fmt: skip
    assert ended.code == 0, ended.err


def test_a_process_that_ends_in_the_middle_ends(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", parquet(rows(0, 200), group=10))
    code = (
        "import itertools, sys; from oneshot_fast.data.sources import open_pairs\n"
        "stream = iter(open_pairs(sys.argv[1])); print(len([*itertools.islice(stream, 3)]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert (ended.stdout, ended.stderr) == ("3\n", "")
