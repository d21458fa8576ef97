"""Run folders: atomic files, mended lines, one writer, equal settings, no leftovers."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from oneshot_fast.errors import RunError
from oneshot_fast.runtime import files as runs

OUTPUTS = ("results", "summary.json")


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
    runs.write_json(tmp_path / "a.json", {"value": 1})
    runs.write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {"rows": ["é"]})
    with disk_of(100):
        with pytest.raises(OSError, match="large"):
            runs.write_json(tmp_path / "a.json", {"value": "long" * 99})
        with pytest.raises(SafetensorError, match="os error"):
            runs.write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(99)}, {})
    assert runs.read_json(tmp_path / "a.json") == {"value": 1}
    assert load_file(tmp_path / "a.safetensors")["x"].tolist() == [1, 1]
    assert runs.read_metadata(tmp_path / "a.safetensors", "rows") == ["é"]
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.safetensors"]


def test_a_full_disk_leaves_no_half_of_appended_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    runs.append_jsonl(path, [{"k": 0}])
    with disk_of(60), pytest.raises(OSError):
        runs.append_jsonl(path, [{"k": 1}, {"k": "x" * 99}])
    runs.append_jsonl(path, [{"k": 2}])
    assert runs.mend_jsonl(path) == [{"k": 0}, {"k": 2}]


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_torn_last_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.jsonl"
    # U+2028 and U+0085 are line ends to many readers; the é may be torn in its middle.
    whole = [{"p": "a\u2028b\u0085c"}, {"p": "d"}]
    runs.append_jsonl(path, [*whole, {"p": "éé"}])
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3
    path.write_bytes(path.read_bytes()[:-cut])
    torn = [] if cut > 1 else [{"p": "éé"}]  # the first byte cut off is the line's end
    assert runs.mend_jsonl(path) == [*whole, *torn]
    runs.append_jsonl(path, [{"p": "next"}])
    assert runs.mend_jsonl(path) == [*whole, *torn, {"p": "next"}]


def test_mending_makes_no_file(tmp_path: Path) -> None:
    assert runs.mend_jsonl(tmp_path / "none.jsonl") == []
    assert not os.listdir(tmp_path)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with runs.write_folder(tmp_path / "f") as folder:
        (folder / "old").touch()
        assert not (tmp_path / "f").exists()
    with pytest.raises(RuntimeError), runs.write_folder(tmp_path / "f") as folder:
        (folder / "new").touch()
        raise RuntimeError
    assert os.listdir(tmp_path) == ["f"] and os.listdir(tmp_path / "f") == ["old"]
    with runs.write_folder(tmp_path / "f") as folder:
        (folder / "new").touch()
    assert os.listdir(tmp_path) == ["f"] and os.listdir(tmp_path / "f") == ["new"]


def test_other_settings_are_named_and_refused(tmp_path: Path) -> None:
    with runs.RunFolder(tmp_path, {"lr": 0.1, "steps": 3, "sides": (1, 2)}, OUTPUTS):
        (tmp_path / "results").mkdir()
    with runs.RunFolder(tmp_path, {"lr": 0.1, "steps": 3, "sides": (1, 2)}, OUTPUTS):
        pass
    with (
        pytest.raises(RunError, match=r"\(lr: 0.1 then, 0.2 now; seed: None then, 5 now\).*over"),
        runs.RunFolder(tmp_path, {"lr": 0.2, "steps": 3, "sides": (1, 2), "seed": 5}, OUTPUTS),
    ):
        pass
    assert (tmp_path / "results").exists()


def test_overwrite_removes_what_the_run_owns_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    (tmp_path / ".tmp-mine").mkdir()
    with runs.RunFolder(tmp_path, {"lr": 1}, OUTPUTS):
        (tmp_path / "results" / "sub").mkdir(parents=True)
        (tmp_path / "summary.json").symlink_to(tmp_path / "mine.txt")
    with runs.RunFolder(tmp_path, {"lr": 2}, OUTPUTS, overwrite=True):
        assert sorted(os.listdir(tmp_path)) == [".lock", ".tmp-mine", "mine.txt", "run.json"]
    assert runs.read_json(tmp_path / "run.json") == {"lr": 2}


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_neither_mixed_in_nor_removed(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "results").mkdir()
    folder = runs.RunFolder(tmp_path, {}, OUTPUTS, overwrite)
    with pytest.raises(RunError, match="results, which no run of ours wrote"), folder:
        pass
    assert (tmp_path / "results").exists() and not (tmp_path / "run.json").exists()


def test_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    with runs.RunFolder(tmp_path, {}, OUTPUTS):
        (tmp_path / "results").mkdir()
    for name in (".tmp-run.json", ".tmp-old-results", ".tmp-summary.json", "results/.tmp-0"):
        (tmp_path / name).touch()
    with runs.RunFolder(tmp_path, {}, OUTPUTS):
        assert sorted(os.listdir(tmp_path)) == [".lock", "results", "run.json"]
        assert not os.listdir(tmp_path / "results")


def test_a_second_writer_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
        "print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / ".lock")], stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"locked\n"
        with (
            pytest.raises(RunError, match="in use by another process"),
            runs.RunFolder(tmp_path, {}, OUTPUTS),
        ):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        with runs.RunFolder(tmp_path, {}, OUTPUTS):
            assert (tmp_path / "run.json").exists()
