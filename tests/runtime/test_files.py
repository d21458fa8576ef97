"""Atomic files, mended lines, no leftovers."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from oneshot_fast.runtime import files


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"value": 1})
    files.write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {"rows": ["é"]})
    with disk_of(100):
        with pytest.raises(OSError, match="large"):
            files.write_json(tmp_path / "a.json", {"value": "long" * 99})
        with pytest.raises(OSError, match="large"):
            files.write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(99)}, {})
    assert files.read_json(tmp_path / "a.json") == {"value": 1}
    assert load_file(tmp_path / "a.safetensors")["x"].tolist() == [1, 1]
    assert files.read_metadata(tmp_path / "a.safetensors", "rows") == ["é"]
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.safetensors"]


def test_a_full_disk_leaves_no_half_of_appended_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    files.append_jsonl(path, [{"k": 0}])
    with disk_of(60), pytest.raises(OSError):
        files.append_jsonl(path, [{"k": 1}, {"k": "x" * 99}])
    files.append_jsonl(path, [{"k": 2}])
    assert files.mend_jsonl(path) == [{"k": 0}, {"k": 2}]


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_torn_last_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.jsonl"
    # U+2028 and U+0085 are line ends to many readers; the é may be torn in its middle.
    whole = [{"p": "a\u2028b\u0085c"}, {"p": "d"}]
    files.append_jsonl(path, [*whole, {"p": "éé"}])
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3
    path.write_bytes(path.read_bytes()[:-cut])
    torn = [] if cut > 1 else [{"p": "éé"}]  # the first byte cut off is the line's end
    assert files.mend_jsonl(path) == [*whole, *torn]
    files.append_jsonl(path, [{"p": "next"}])
    assert files.mend_jsonl(path) == [*whole, *torn, {"p": "next"}]


def test_mending_makes_no_file(tmp_path: Path) -> None:
    assert files.mend_jsonl(tmp_path / "none.jsonl") == []
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("can_link", [True, False])
def test_a_copied_folder_shares_only_tensor_files(
    tmp_path: Path, can_link: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    if not can_link:
        monkeypatch.setattr(os, "link", refuse)
    names = ("config.json", "unet/weights.safetensors")
    for name in names:
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_text(name)
    (tmp_path / "b").symlink_to("a")
    for _ in range(2):
        files.copy_folder(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").is_symlink()
    assert [(tmp_path / "b" / name).read_text() for name in names] == [*names]
    shared = [(tmp_path / "a" / name).samefile(tmp_path / "b" / name) for name in names]
    assert shared == [False, can_link]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with files.write_folder(tmp_path / "f") as folder:
        (folder / "old").touch()
        assert not (tmp_path / "f").exists()
    with pytest.raises(RuntimeError), files.write_folder(tmp_path / "f") as folder:
        (folder / "new").touch()
        raise RuntimeError
    assert os.listdir(tmp_path) == ["f"] and os.listdir(tmp_path / "f") == ["old"]
    with files.write_folder(tmp_path / "f") as folder:
        (folder / "new").touch()
    assert os.listdir(tmp_path) == ["f"] and os.listdir(tmp_path / "f") == ["new"]
