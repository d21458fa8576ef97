"""Exit codes, signals, printing and numbers, of any command."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from oneshot_fast.cli import EXIT_CODES, run_command


@dataclass(frozen=True)
class Options:
    """A command."""

    text: str = ""
    """A text."""
    seed: int = 0
    """A number."""
    seeds: tuple[int, ...] = ()
    """Numbers."""


def end(command: Callable[[Options], object], *argv: str) -> int:
    return run_command("test", Options, lambda options: int(command(options) or 0), argv)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_end_with_their_code(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    assert end(lambda _: os.kill(os.getpid(), number)) == 128 + number
    assert "repeat the command to go on" in capsys.readouterr().err
    assert signal.getsignal(number) == before


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert end(lambda _: os.kill(os.getpid(), signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_crash_has_a_code_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert end(lambda _: 1 / 0) == 70
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-2] == "ZeroDivisionError: division by zero"
    assert "please report" in lines[-1] and "repeat the command" in lines[-1]


def test_a_crash_of_native_code_says_where(
    forks: Any, tmp_path: Path, small_data: Path, small_model: Path
) -> None:
    flags = ["--data_root", small_data, "--model_id", small_model, "--output_root", tmp_path / "x"]
    ended = forks.run("assign", flags, tmp_path, at="noises", signal_number=signal.SIGABRT)
    assert ended.code == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in ended.err and "oneshot_fast/assign.py" in ended.err


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_exit_codes(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        end(lambda _: 0, flag)
    assert capsys.readouterr().out.endswith(EXIT_CODES + "\n")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--seed", "9" * 23], "seed is 99999999999999999999999"),
        (["--seed", "-9999999999999999999"], "seed is -9999999999999999999"),
        (["--seeds", "1", "9" * 23], "seeds is 99999999999999999999999"),
        (["--text", "a\udcff"], r"'a\udcff' is no UTF-8 text"),
        (["--text", "a", "\x1b[31m"], r"\x1b[31m"),
    ],
)
def test_one_line_of_what_cannot_be_used(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end(lambda _: 0, *argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and line.isprintable()


def test_printing_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "cp1252", write_through=True))
    assert end(lambda _: print("runs/\u65e5\u672c")) == 0
    assert written.getvalue().split() == [rb"runs/\u65e5\u672c"]


def test_commands_of_two_threads_run_in_turn() -> None:
    inside, seen, codes = [0], [0], []

    def command(_: Options) -> None:
        inside[0] += 1
        seen[0] = max(seen[0], inside[0])
        threading.Event().wait(0.05)
        inside[0] -= 1

    threads = [threading.Thread(target=lambda: codes.append(end(command))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0, 0, 0] and seen == [1]
