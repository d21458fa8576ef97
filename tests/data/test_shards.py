"""Samples of tar shards and Parquet: each fault alone, with shard and key."""

import json
import sys
import tarfile
from pathlib import Path

import pytest
from shard_samples import grey, parquet, png, rows, samples, split, tar, write

from oneshot_fast.data.image_refs import Member, image_ref, need_readers
from oneshot_fast.data.options import Selection
from oneshot_fast.data.records import Record
from oneshot_fast.data.shards import read_tar
from oneshot_fast.data.sources import open_pairs
from oneshot_fast.errors import DataError


def test_captions(tmp_path: Path) -> None:
    caption = json.dumps({"caption": "from json", "alt": "other", "width": 9}).encode()
    body = tar(
        ("./in/0.png", png(1)), ("./in/0.json", caption), ("./in/0.txt", b"\xef\xbb\xbf from txt "),
        ("./in/1.json", caption), ("./in/1.PNG", png(2)), ("./in/1.mask.png", png(9)),
        ("./in/2.webp", png(3, "webp")), ("./in/2.alt", "aus Größe".encode()),
        ("./in/2.json", caption), ("./in/.hidden", b""), ("README", b"no extension"),
    )  # fmt: skip
    write(tmp_path / "0.tar", body)

    def prompts(**fields: str) -> list[str]:
        return [r.prompt for r in split(open_pairs(tmp_path, Selection(**fields)))[0]]

    assert prompts() == ["from txt", "from json", "from json"]
    assert prompts(prompt_field="caption") == ["from json"] * 3
    assert prompts(prompt_field="alt") == ["other", "other", "aus Größe"]
    records, failures = split(open_pairs(tmp_path, Selection(image_field="mask.png")))
    assert [grey(r) for r in records] == [9] and records[0].image == "0.tar/in/1.mask.png"
    assert [f.image for f in failures] == ["0.tar/in/0", "0.tar/in/2"]
    assert failures[0].reason == "has no image .mask.png (--image_field) but .png, .json, .txt"
    with pytest.raises(DataError, match=r"0.tar/in/0: .*set --prompt_field, one of: caption, alt"):
        prompts(prompt_field="title")


def test_a_bad_sample_fails_alone(tmp_path: Path) -> None:
    bad = {
        "no caption": [("x.png", png(0))],
        "no image": [("x.txt", b"a")],
        "two members .txt": [("x.png", png(0)), ("x.txt", b"a"), ("x.txt", b"b")],
        "'.txt' is empty": [("x.png", png(0)), ("x.txt", b" \n")],
        "no UTF-8 at byte 1": [("x.png", png(0)), ("x.txt", b"a\xff")],
        "broken .json": [("x.png", png(0)), ("x.json", b"{")],
        "not an object but list": [("x.png", png(0)), ("x.json", b"[]")],
        "'text' must be a string, not int": [("x.png", png(0)), ("x.json", b'{"text": 3}')],
        "one of: a, b": [("x.png", png(0)), ("x.json", b'{"a": "x", "b": "y"}')],
    }
    for reason, members in bad.items():
        write(tmp_path / "0.tar", tar(*samples(0, 2), *members, *samples(2, 4)))
        records, failures = split(open_pairs(tmp_path))
        assert [r.prompt for r in records] == [f"grey {n}" for n in range(4)]
        assert len(failures) == 1 and reason in failures[0].reason
        assert failures[0].image == "0.tar/x" and failures[0].line == 3


def test_repeated_samples(tmp_path: Path) -> None:
    body = tar(*samples(0, 2), *samples(0, 2), *samples(0, 1))
    for shard in "01":
        write(tmp_path / f"{shard}.tar", body)
    ids = [r.id for r in split(open_pairs(tmp_path))[0]]
    a, b = ids[:2]
    assert ids[:5] == [a, b, f"{a}-1", f"{b}-1", f"{a}-2"] and len(set(ids)) == 10
    assert [r.id for r in split(open_pairs(tmp_path, Selection(start_index=4)))[0]] == ids[4:]


def _records(path: Path, body: bytes) -> list[Record]:
    write(path, body)
    return split(open_pairs(path))[0]


@pytest.mark.parametrize(
    ("cut", "kept", "named"),
    [
        ("image", 2, "000002.png is cut off"),
        ("caption", 2, "000002.txt is cut off"),
        ("header", 2, "after key 000001"),
        ("padding", 3, "after key 000002"),
        ("end", 4, "after key 000003"),
        ("flipped", 2, "after key 000001"),
        ("flipped between", 2, "after key 000002"),
    ],
)
def test_a_damaged_tar_gives_what_lies_before(
    tmp_path: Path, cut: str, kept: int, named: str
) -> None:
    body = tar(*samples(0, 4))
    places = [str(r.image_path).partition("#")[2] for r in _records(tmp_path / "whole.tar", body)]
    third, fourth = (int(place.partition("+")[0]) for place in places[2:])
    # before an image lies its header, before that the caption's block, which is mostly padding
    end = {
        "image": third + 20,
        "caption": fourth - 1024 + 2,
        "header": third - 100,
        "padding": fourth - 512 - 100,
        "end": len(body.rstrip(b"\0")) // 512 * 512 + 512,
    }.get(cut, len(body))
    body = body[:end]
    # in the header of the third image, or of its caption
    if flip := {"flipped": third - 500, "flipped between": fourth - 1536 + 12}.get(cut):
        body = body[:flip] + b"\xff" + body[flip + 1 :]
    write(tmp_path / "set" / "0.tar", body)
    write(tmp_path / "set" / "1.tar", tar(*samples(7, 9)))
    records, failures = split(open_pairs(tmp_path / "set"))
    assert [grey(r) for r in records] == [*range(kept), 7, 8]
    assert [r.prompt for r in records] == [f"grey {grey(r)}" for r in records]
    assert len(failures) == 1 and failures[0].image == "0.tar"
    assert named in failures[0].reason and failures[0].line == kept + 1


def test_damaged_parquet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = parquet(rows(0, 4))
    write(tmp_path / "0.parquet", body[:-20])
    write(tmp_path / "1.parquet", parquet(rows(1, 3)))
    write(tmp_path / "2.parquet", parquet([{"image": b"", "title": "x"}]))
    records, failures = split(open_pairs(tmp_path))
    assert [grey(r) for r in records] == [1, 2]
    assert [f.image for f in failures] == ["0.parquet", "2.parquet"]
    assert "set --prompt_field, one of: image, title" in failures[1].reason
    assert capfd.readouterr().err == ""


def test_parquet_columns(tmp_path: Path) -> None:
    write(tmp_path / "beside.png", png(5))
    write(tmp_path / "set" / "beside.png", png(6))
    cells: list[tuple[object, str, int | str]] = [
        ({"bytes": png(3), "path": "x.png"}, "struct", 3),
        ({"bytes": None, "path": "beside.png"}, "path", 6),
        ({"bytes": None, "path": "../beside.png"}, "outside", "leads out"),
        ({"bytes": None, "path": str(tmp_path / "beside.png")}, "absolute", "leads out"),
        ({"bytes": None, "path": None}, "nothing", "neither bytes nor a path"),
        (None, "null", "neither bytes nor a path but NoneType"),
    ]
    table = [{"pic#1": cell, "my prompt": prompt} for cell, prompt, _ in cells]
    bad = [{"pic#1": cells[0][0], "my prompt": value} for value in (None, " ")]
    write(tmp_path / "set" / "0.parquet", parquet(table[:2] + bad + table[2:], group=3))
    with pytest.raises(DataError, match=r"'prompt' or 'text' or 'caption'; .*: pic#1, my prompt"):
        open_pairs(tmp_path / "set")
    with pytest.raises(DataError, match=r"no column 'image'; set --image_field, one of: pic#1"):
        open_pairs(tmp_path / "set", Selection(prompt_field="my prompt"))
    fields = {"prompt_field": "my prompt", "image_field": "pic#1"}
    records, failures = split(open_pairs(tmp_path / "set", Selection(**fields)))
    assert [r.prompt for r in records] == [prompt for _, prompt, _ in cells]
    assert [(f.image, f.reason) for f in failures] == [
        ("0.parquet/2", "'my prompt' must be a string, not null"),
        ("0.parquet/3", "'my prompt' is empty"),
    ]
    for record, (_, _, expected) in zip(records, cells, strict=True):
        assert image_ref(str(record.image_path)) == record.image_path
        if isinstance(expected, int):
            assert grey(record) == expected
        else:
            with pytest.raises(DataError, match=expected):
                grey(record)


def test_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "0.parquet", parquet(rows(0, 1)))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"the library pyarrow: pip install oneshot-fast\[data\]"):
        open_pairs(tmp_path)
    member = Member(str(tmp_path / "0.parquet"), "image:0:0")
    with pytest.raises(DataError, match=r"pip install oneshot-fast\[data\]"):
        need_readers([tmp_path, member])
    with pytest.raises(DataError, match="nofs:// cannot be read"):
        need_readers([Member("nofs://a/b.png")])
    need_readers([tmp_path, Member("memory://a/b.tar", "0+4")])
    write(tmp_path / "tars" / "0.tar", tar(*samples(0, 1)))
    assert len(split(open_pairs(tmp_path / "tars"))[0]) == 1  # tar shards need none


def test_a_caption_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    header = tarfile.TarInfo("0.txt")
    header.size = 6 << 30
    with (tmp_path / "0.tar").open("wb") as file:
        file.write(header.tobuf())
        file.seek(512 + header.size)
        file.write(tar(("0.png", png(0)), *samples(1, 2)))
    first, second = read_tar(str(tmp_path / "0.tar"), None, None)
    assert "6,442,450,944 bytes, more than 64 kB" in (first.reason or "")
    assert second.prompts == ("grey 1",)
