"""Lists of prompts: of every kind of file, by its columns."""

from __future__ import annotations

from pathlib import Path

import pytest

from oneshot_fast.data.prompts import read_prompts
from oneshot_fast.errors import UserError

PARTI = (
    "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\n"
    '"Hello" on a wall\tSigns\tWriting\t\n"the ""A"" train"\tSigns\tWriting\tx\n'
)


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("p.tsv", PARTI, ["bond", '"Hello" on a wall', 'the "A" train']),
        ("P.TSV", "id\ttext\n\n1\ta, b\n", ["a, b"]),
        ("p.csv", 'n,Caption\n1,"a, b"\n\n2,"two\n\nlines"\n', ["a, b", "two\n\nlines"]),
        ("p.csv", "caption,prompt,text\nc,p,t\n", ["p"]),
        ("p.jsonl", '{"Prompt": "a"}\n{"caption": "b"}\n', ["a", "b"]),
        ("p.json", '["a, b", {"text": "c"}]', ["a, b", "c"]),
        ("p.txt", "Prompt\tCategory\n\n a,b \n", ["Prompt\tCategory", "a,b"]),
        ("prompts", "\ufeffa\rb\r\nc", ["a", "b", "c"]),
    ],
)
def test_prompts(tmp_path: Path, name: str, text: str, prompts: list[str]) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert read_prompts(tmp_path / name) == prompts


def test_another_column(tmp_path: Path) -> None:
    for name, text in (("p.csv", "prompt,mine\na,b\n"), ("p.jsonl", '{"mine": "b"}\n')):
        (tmp_path / name).write_text(text)
        assert read_prompts(tmp_path / name, "mine") == ["b"]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("p.csv", "title,n\na,1\n", "line 2: no field prompt, text, caption; set --prompt_field"),
        ("p.csv", "prompt,n\na,1,2\n", "line 2: has 3 fields, the header 2"),
        ("p.csv", "prompt,n\n,1\n", "line 2: 'prompt' is empty"),
        ("p.csv", 'prompt\n"a\nb\n', "broken CSV"),
        ("p.csv", 'prompt\na\n"b"c\n', "line 3: broken CSV"),
        ("p.csv", "prompt,prompt\na,b\n", "two columns have one name"),
        ("p.csv", "prompt\n", "has no prompt"),
        ("p.tsv", "prompt\n" + "a" * 70_000, "line 2: .* more than 64 kB"),
        ("p.txt", "a\n" + "a" * 10_000_000 + "\nb", "line 2: longer than 64 kB"),
        ("p.jsonl", '{"prompt": 3}', "line 1: 'prompt' must be a string"),
        ("p.json", '["a", 3]', "entry 2: 'prompt' must be a string"),
        ("p.json", '["a"', "broken JSON"),
        ("p.json", '"a"', "no list of prompts"),
        ("p.xlsx", "PK", r"files \.xlsx are not read .* \.csv, \.json, \.jsonl, \.tsv, \.txt"),
        ("p.parquet", "PAR1", "files .parquet are not read"),
    ],
)
def test_what_is_refused(tmp_path: Path, name: str, text: str, reason: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=reason) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="URLs are not fetched here"):
        read_prompts(Path("https://example.org/p.tsv"))
    with pytest.raises(UserError, match="no such file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "p.txt").write_text("a")
    with pytest.raises(UserError, match="leave --prompt_field out"):
        read_prompts(tmp_path / "p.txt", "text")
