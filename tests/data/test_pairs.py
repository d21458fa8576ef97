"""Data sets: real files in, every fault as a reason with its line."""

import hashlib
import json
import os
import re
import tracemalloc
import unicodedata
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from oneshot_fast.data.image_refs import file_sha256
from oneshot_fast.data.options import Selection
from oneshot_fast.data.pairs import read_pairs
from oneshot_fast.errors import DataError


def digest(image: str, prompt: str) -> str:
    return hashlib.sha256(image.encode() + b"\0" + prompt.encode()).hexdigest()[:12]


def line(prompt: object = "a cat", image: object = "a.png") -> str:
    return json.dumps({"prompt": prompt, "image": image})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with the images a.png and sub/b.png; an image lies beside it."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    for path in (root / "a.png", root / "sub" / "b.png", tmp_path / "outside.png"):
        Image.new("RGB", (4, 4), "red").save(path)
    return root


def write(path: Path, *lines: str | bytes, end: bytes = b"\n") -> Path:
    path.write_bytes(b"".join((x.encode() if isinstance(x, str) else x) + end for x in lines))
    return path


def test_pairs(root: Path) -> None:
    write(root / "pairs.jsonl", line(), line(" ein Vögel — 鳥 \u2028", "sub/b.png"))
    write(root / "metadata.jsonl", "never read")
    records, failures = read_pairs(root)
    assert not failures
    assert [(r.line, r.prompt, r.image) for r in records] == [
        (1, "a cat", "a.png"),
        (2, " ein Vögel — 鳥 \u2028", "sub/b.png"),
    ]
    assert [r.id for r in records] == [digest(r.image, r.prompt) for r in records]
    assert records[1].image_path == (root / "sub" / "b.png").resolve()
    assert read_pairs(root / "pairs.jsonl") == (records, [])


def test_relative_data_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root / "pairs.jsonl", line())
    monkeypatch.chdir(root.parent)
    records, _ = read_pairs(Path("root"))
    assert records[0].image_path == (root / "a.png").resolve()
    monkeypatch.chdir(root)
    assert read_pairs(Path("pairs.jsonl"))[0] == read_pairs(Path("."))[0] == records


def test_image_folder(root: Path) -> None:
    write(root / "metadata.jsonl", json.dumps({"file_name": "sub/b.png", "text": "a dog", "n": 3}))
    records, failures = read_pairs(root)
    assert [(r.prompt, r.image) for r in records] == [("a dog", "sub/b.png")] and not failures
    assert read_pairs(root / "metadata.jsonl") == (records, [])


def test_other_fields(root: Path) -> None:
    path = write(root / "my.jsonl", json.dumps({"caption": "a dog", "file": "a.png"}), line())
    records, failures = read_pairs(path, Selection(prompt_field="caption", image_field="file"))
    assert [r.prompt for r in records] == ["a dog"]
    assert [(f.line, f.reason) for f in failures] == [(2, "missing field 'file'")]
    with pytest.raises(DataError, match=r"'title'; set --prompt_field, one of: caption, file, im"):
        read_pairs(path, Selection(prompt_field="title"))
    with pytest.raises(DataError, match="'url'; set --image_field"):
        read_pairs(path, Selection(image_field="url"))


def test_repeated_pairs_keep_their_ids_in_every_range(root: Path) -> None:
    write(root / "pairs.jsonl", line(), "{", line("other"), line(), line("x", "none.png"), line())
    base = digest("a.png", "a cat")
    records, failures = read_pairs(root)
    assert [r.id for r in records] == [base, digest("a.png", "other"), f"{base}-1", f"{base}-2"]
    assert [(f.line, f.id) for f in failures] == [(2, None), (5, digest("none.png", "x"))]
    assert read_pairs(root, Selection(start_index=3)) == (records[2:], failures[1:])
    assert read_pairs(root, Selection(start_index=1, max_samples=2)) == (records[1:2], failures[:1])


def test_ranges_count_records_not_blank_lines(root: Path) -> None:
    write(root / "pairs.jsonl", "", line("0"), "  \t", line("1"), "", line("2"), line("3"), "")
    records, failures = read_pairs(root, Selection(start_index=1, max_samples=2))
    assert [(r.prompt, r.line) for r in records] == [("1", 4), ("2", 6)] and not failures
    assert len(read_pairs(root, Selection(start_index=3, max_samples=99))[0]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_index": -1}, "start_index is -1"),
        ({"max_samples": -1}, "max_samples is -1"),
        ({"max_samples": 0}, "at least 1"),
        ({"start_index": 1}, "has 1 records"),
    ],
)
def test_bad_ranges(root: Path, options: dict[str, int], message: str) -> None:
    write(root / "pairs.jsonl", line())
    with pytest.raises(DataError, match=message):
        read_pairs(root, Selection(**options))


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_bom_and_line_ends(root: Path, end: bytes) -> None:
    bom = b"\xef\xbb\xbf"
    write(root / "pairs.jsonl", bom + line("0").encode(), bom, line("1"), end=end)
    path = write(root / "open.jsonl", line("0"), "", line("1"), end=end)
    path.write_bytes(path.read_bytes().removesuffix(end))  # no line end after the last record
    for source in (root, path):
        records, failures = read_pairs(source)
        assert [(r.prompt, r.line) for r in records] == [("0", 1), ("1", 3)] and not failures


def test_long_lines_and_long_prompts_fail_alone(root: Path) -> None:
    longest = "ä" * (1 << 15)
    write(root / "pairs.jsonl", line("ä" * 3_000_000), line(longest + "a"), line(longest), line())
    records, failures = read_pairs(root)
    assert [r.line for r in records] == [3, 4] and records[0].prompt == longest
    assert ["4096 kB" in failures[0].reason, "64 kB" in failures[1].reason] == [True, True]


def test_a_huge_line_takes_little_memory(root: Path) -> None:
    with write(root / "pairs.jsonl", line()).open("r+b") as file:
        file.truncate(1 << 28)  # a hole of zeros, without a line end
    tracemalloc.start()
    records, failures = read_pairs(root)
    assert len(records) == len(failures) == 1
    assert tracemalloc.get_traced_memory()[1] < 1 << 25
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("wanted", "there", "said"),
    [
        ("a.PNG", "a.png", "there is a.png"),
        ("SUB/b.png", "sub/b.png", "there is sub/b.png"),
        ("sub\\b.png", "sub/b.png", "there is sub/b.png"),
        ("https://example.org/a.png", "a.png", "URLs are not fetched here"),
        ("s3://bucket/a.png", "a.png", "URLs are not fetched here"),
    ],
)
def test_what_is_there_instead_is_named(root: Path, wanted: str, there: str, said: str) -> None:
    write(root / "pairs.jsonl", line(), line("b", wanted))
    assert said in read_pairs(root)[1][0].reason
    write(root / "pairs.jsonl", line("b", there))
    assert len(read_pairs(root)[0]) == 1


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_composed_and_decomposed_names_are_equal(root: Path, forms: tuple[str, str]) -> None:
    listed, stored = (unicodedata.normalize(form, "für/é.png") for form in forms)
    (root / stored).parent.mkdir()
    (root / "a.png").rename(root / stored)
    write(root / "pairs.jsonl", line("a", listed))
    (record,), failures = read_pairs(root)
    assert record.image == listed and record.image_path == (root / stored) and not failures


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"prompt": "a", "image":', "broken JSON"),
        ('{"prompt": "a"} {"image": "a.png"}', "broken JSON"),
        ("[" * 100_000, "broken JSON"),
        ('{"prompt": ' + "9" * 5000 + ', "image": "a.png"}', "JSON|string"),
        ("\0\0\0\0", "broken JSON"),
        ('["a", "a.png"]', "not a JSON object but list"),
        ("null", "not a JSON object"),
        ('{"image": "a.png"}', "missing field 'prompt'"),
        ('{"prompt": "a"}', "missing field 'image'"),
        (line(None), "'prompt' must be a string, not null"),
        (line(3), "'prompt' must be a string, not int"),
        (line([]), "'prompt' is an empty list"),
        (line(["a", None]), r"'prompt\[1\]' must be a string, not null"),
        (line(["a", " "]), r"'prompt\[1\]' is empty"),
        (line(["a", ["b"]]), r"'prompt\[1\]' must be a string, not list"),
        (line(["a", "ä" * 40_000]), r"'prompt\[1\]' has 80,000 bytes"),
        (line(["a" * 60_000] * 20), "'prompt' has 1,200,000 bytes"),
        (line("a", ["a.png"]), "'image' must be a string, not list"),
        (line("a", None), "'image' must be a string, not null"),
        (line("a", {"bytes": ""}), "'image' must be a string, not dict"),
        (line(""), "'prompt' is empty"),
        (line(" \t\n\u3000"), "'prompt' is empty"),
        (line("a", ""), "'image' is empty"),
        (line("a\0b"), "'prompt' has a NUL"),
        (line("a", "a.png\0"), "'image' has a NUL"),
        ('{"prompt": "\\ud800", "image": "a.png"}', "surrogate"),
        (b'{"prompt": "\xff\xfe", "image": "a.png"}', "invalid UTF-8 at byte 12"),
        (line("a", "none.png"), "no such image file"),
        (line("a", "x" * 300 + ".png"), "no such image file"),
        (line("a", "a.png/b.png"), "no such image file"),
        (line("a", "sub"), "folder"),
        (line("a", "."), "folder"),
        (line("a", "loop.png"), "no such image file"),
        (line("a", "dangling.png"), "no such image file"),
        (line("a", "../outside.png"), "allow_outside_root"),
        (line("a", "sub/../../outside.png"), "allow_outside_root"),
        (line("a", "../root-sibling/a.png"), "allow_outside_root"),
        (line("a", "/etc/hostname"), "allow_outside_root"),
        (line("a", "link.png"), "allow_outside_root"),
        (line("a", "up/outside.png"), "allow_outside_root"),
    ],
)
def test_a_bad_line_fails_alone(root: Path, bad: str | bytes, reason: str) -> None:
    (root / "loop.png").symlink_to("loop.png")
    (root / "dangling.png").symlink_to("nowhere.png")
    (root / "link.png").symlink_to("../outside.png")
    (root / "up").symlink_to("..")
    (root.parent / "root-sibling").mkdir()
    Image.new("L", (2, 2)).save(root.parent / "root-sibling" / "a.png")
    write(root / "pairs.jsonl", line("first"), "", bad, line("last", "sub/b.png"))
    records, failures = read_pairs(root)
    assert [r.prompt for r in records] == ["first", "last"]
    assert len(failures) == 1 and failures[0].line == 3
    assert re.search(reason, failures[0].reason) and "\n" not in failures[0].reason
    assert len(failures[0].reason) < 1000
    json.dumps(asdict(failures[0]), ensure_ascii=False).encode()  # can be written to a file


@pytest.mark.parametrize("inside", ["sub/../a.png", "./a.png", "link.png", "ABSOLUTE"])
def test_paths_that_stay_inside_are_accepted(root: Path, inside: str) -> None:
    (root / "link.png").symlink_to("a.png")
    name = str(root / "a.png") if inside == "ABSOLUTE" else inside
    write(root / "pairs.jsonl", line("a", name))
    records, _ = read_pairs(root)
    assert records[0].image == name and records[0].image_path == (root / "a.png").resolve()


def test_data_root_may_be_a_symlink(root: Path) -> None:
    write(root / "pairs.jsonl", line())
    (root.parent / "alias").symlink_to("root")
    assert read_pairs(root.parent / "alias") == read_pairs(root)


def test_outside_root_on_request(root: Path) -> None:
    (root / "link.png").symlink_to("../outside.png")
    outside = (root.parent / "outside.png").resolve()
    names = ["../outside.png", str(outside), "link.png", "../none.png"]
    write(root / "pairs.jsonl", *(line("a", name) for name in names))
    records, failures = read_pairs(root, Selection(allow_outside_root=True))
    assert [r.image_path for r in records] == [outside] * 3
    assert [f.image for f in failures] == ["../none.png"]


def test_nothing_to_read(root: Path) -> None:
    with pytest.raises(DataError, match=r"has no pairs\.jsonl and no metadata\.jsonl"):
        read_pairs(root)
    with pytest.raises(DataError, match="no such folder"):
        read_pairs(root / "none")
    with pytest.raises(DataError, match="no such folder"):
        read_pairs(root / ("x" * 300))
    with pytest.raises(DataError, match=r"\.jsonl file as data_root"):
        read_pairs(root / "a.png")
    path = write(root / "pairs.jsonl", "", "  ")
    with pytest.raises(DataError, match=rf'{path}: is empty; .*"prompt": "a red bird"'):
        read_pairs(root)
    write(path, "", "{", line(None))
    with pytest.raises(DataError, match=rf"{path}: .*2 failed; the first, line 2: broken JSON"):
        read_pairs(root)
    path.write_bytes(b"\xff\xfe" + line().encode("utf-16-le"))
    with pytest.raises(DataError, match="UTF-8"):
        read_pairs(root)


def test_file_sha256(tmp_path: Path) -> None:
    for body in (b"", os.urandom(3 << 20)):
        (tmp_path / "a").write_bytes(body)
        assert file_sha256(tmp_path / "a") == hashlib.sha256(body).hexdigest()


def test_lists_as_csv_and_parquet_and_one_folder_down(root: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    table = {"file_name": ["a.png", "sub/b.png"], "text": ["a, cat", "a dog"]}
    pq.write_table(arrow.table(table), root / "metadata.parquet")
    found = [read_pairs(root)]
    (root / "metadata.parquet").unlink()
    write(root / "metadata.csv", "file_name,text", 'a.png,"a, cat"', "sub/b.png,a dog")
    found += [read_pairs(root), read_pairs(root / "metadata.csv"), read_pairs(root.parent)]
    for records, failures in found:
        assert [(r.prompt, r.image) for r in records] == list(
            zip(table["text"], table["file_name"], strict=True)
        )
        assert not failures and records[1].image_path == (root / "sub" / "b.png").resolve()
    (root.parent / "test").mkdir()
    (root.parent / "test" / "metadata.jsonl").write_text("")
    with pytest.raises(DataError, match=r"root/metadata\.csv, test/metadata\.jsonl; give one of"):
        read_pairs(root.parent)


def test_folders_of_images_with_captions(root: Path) -> None:
    (root / "sub").rename(root / "3_cat")
    write(root / "3_cat" / "b.txt", "a cat,", "sleeping")
    write(root / "a.txt", "a dog")
    Image.new("L", (4, 4)).save(root / "c.JPG", "jpeg")
    records, failures = read_pairs(root)
    assert [r.prompt for r in records] == ["a dog"] + ["a cat,\nsleeping"] * 3
    assert len({r.id for r in records}) == 4 and records[1].image == "3_cat/b.png"
    assert [f.reason for f in failures] == ["c.JPG has no caption c.txt beside it"]
    write(root / "c.txt", b"\xff")
    (root / "a.txt").write_text("a" * 70_000)
    records, failures = read_pairs(root)
    assert len(records) == 3 and len(failures) == 2


def test_the_prompt_of_kohyas_folders_without_captions(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "sub").rename(root / "3_my_cat")
    for name in ("2_red dog", "plain", "1_", "5_none"):
        (root / name).mkdir()
        Image.new("L", (4, 4)).save(root / name / "0.png")
    Image.new("L", (4, 4)).save(root / "2_red dog" / "._0.png")  # of macOS
    write(root / "3_my_cat" / "sample_prompts.txt", "of no image")
    write(root / "5_none" / "0.caption", "an own one")
    records, failures = read_pairs(root)
    assert [r.prompt for r in records] == ["red dog"] * 2 + ["my_cat"] * 3 + ["an own one"] * 5
    assert sorted(f.reason.split()[0] for f in failures) == ["1_/0.png", "a.png", "plain/0.png"]
    (said,) = capsys.readouterr().err.splitlines()
    assert '2_red dog (1 images, 2 times, prompt "red dog")' in said
    assert "5_none (1 images, 5 times)" in said and "plain" not in said
    Image.new("L", (4, 4)).save(root / "3_my_cat" / "c.png")
    write(root / "3_my_cat" / "c.txt", "my cat")  # now the other one lacks its caption
    assert [r.prompt for r in read_pairs(root)[0]].count("my cat") == 3
    assert sum("b.png has no caption" in f.reason for f in read_pairs(root)[1]) == 3


def test_several_captions(root: Path) -> None:
    pq, arrow = (pytest.importorskip(name) for name in ("pyarrow.parquet", "pyarrow"))
    texts = ["a cat", "a sleeping cat"]
    write(root / "pairs.jsonl", line(texts), line(["a cat"]), line("a cat"))
    records, failures = read_pairs(root)
    assert [(r.prompt, r.prompts) for r in records] == [("a cat", tuple(texts))] + [
        ("a cat", ())
    ] * 2
    assert records[0].id == digest("a.png", "\0".join(texts)) and not failures
    assert records[1].id == digest("a.png", "a cat")  # a list of one is that one
    (root / "pairs.jsonl").unlink()
    rows = {"file_name": ["a.png"], "text": [texts]}
    pq.write_table(arrow.table(rows), root / "metadata.parquet")
    assert read_pairs(root)[0] == [records[0]]
