"""What the commands share: argument parsing and exit codes."""

import contextlib
import dataclasses
import errno
import faulthandler
import inspect
import io
import itertools
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
from safetensors import SafetensorError

from oneshot_fast.errors import UserError, one_line, printable, require
from oneshot_fast.runtime.concurrency import handling, stop
from oneshot_fast.runtime.files import Json, if_writable
from oneshot_fast.runtime.options import RunOptions
from oneshot_fast.runtime.processes import is_main, leave, lost_another, set_timeout
from oneshot_fast.runtime.progress import silence_imports

OK, SOME_FAILED, BAD_INPUT, NO_SPACE, CRASHED = 0, 1, 2, 3, 70
EXIT_CODES = """exit codes: 0 all done; 1 some records failed; 2 bad input; 3 disk full; 70 crashed;
129, 130, 143 stopped by SIGHUP (terminal closed), Ctrl-C, SIGTERM: repeat the command to go on"""
_AGAIN = "everything finished is kept; repeat the command to go on"
# signals, standard streams, random state and the group of processes are the process's
_ONE_AT_A_TIME = threading.RLock()
Options = TypeVar("Options")


def run_command(
    name: str,
    options: type[Options],
    command: Callable[[Options], int],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse ``argv`` into ``options``, run ``command`` and turn its end into an exit code.

    SIGTERM and SIGHUP end it as Ctrl-C does. A second command, in another thread, waits.

    Args:
        name: The command's name, as in ``python -m oneshot_fast.NAME``.
        options: Dataclass whose fields are flags, or groups of flags.
        command: What to run.
        argv: Arguments; None takes the process's own.

    Returns:
        One of EXIT_CODES; all but 0, 1 and 70 with one line on stderr.
    """
    with _ONE_AT_A_TIME, handling(stop, "SIGTERM", "SIGHUP"):
        silence_imports()
        if sys.__stderr__ is not None and not faulthandler.is_enabled():
            faulthandler.enable(sys.__stderr__)  # a crash in native code says where it was
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal may lack a path's letters
                stream.reconfigure(errors="backslashreplace")
        try:
            given = _parse(name, options, sys.argv[1:] if argv is None else argv)
            minutes = public(given).get("timeout_minutes")
            if minutes is not None:
                set_timeout(minutes)
            if isinstance(run := getattr(given, "run", None), RunOptions):
                run.check()  # before any long work
            code = command(given)
            leave()
            return code
        except KeyboardInterrupt as interrupt:
            number = interrupt.args[0] if interrupt.args else signal.SIGINT
            by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
            return _say(128 + number, f"\ninterrupted{by}: {_AGAIN}")
        except Exception as error:
            return _fail(error)


def _fail(error: Exception) -> int:
    """Say what ended a command, and return its exit code."""
    if isinstance(error, UserError):
        return _say(BAD_INPUT, f"error: {printable(' '.join(str(error).splitlines()))}")
    number, place = _system_error(error)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return _say(NO_SPACE, f"error: no space left to write{place}: free some; {_AGAIN}")
    if number is not None:
        return _say(
            BAD_INPUT,
            f"error: {os.strerror(number)}{place}; check the path and its permissions",
        )
    if isinstance(error, SafetensorError):
        return _say(BAD_INPUT, f"error: damaged safetensors file: {one_line(error)}; restore it")
    if isinstance(error, RuntimeError) and lost_another(error):
        return _say(CRASHED, f"error: another process ended ({one_line(error)}); {_AGAIN}")
    said = "".join(traceback.format_exception(error))
    return _say(
        CRASHED,
        f"{said}crashed: not your fault; please report the lines above, with the command. {_AGAIN}",
    )


def _say(code: int, message: str) -> int:
    with contextlib.suppress(OSError):  # the terminal may be closed
        print(message, file=sys.stderr)
    return code


def _system_error(error: Exception) -> tuple[int | None, str]:
    """Number and place of an error of the system; safetensors names it only in its message."""
    if isinstance(error, OSError):
        place = printable(os.fsdecode(error.filename)) if error.filename else ""
        return error.errno, place and f" ({place})"
    found = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
    return int(found[1]) if found else None, ""


def _parse(name: str, options: type[Options], argv: Sequence[str]) -> Options:
    """Options of the command line.

    Raises:
        UserError: With the one line that matters of the box that tyro draws, or if a text is no
            Unicode or a number no 64-bit integer, which nothing below could use.
    """
    for text in argv:
        bare = text.encode(errors="ignore").decode()
        require(text == bare, f"{ascii(text)[:99]} is no UTF-8 text; rename or rewrite it")
    drawn = io.StringIO()
    try:
        with contextlib.redirect_stderr(drawn):
            given = tyro.cli(
                options,
                prog=f"python -m oneshot_fast.{name}",
                description=inspect.cleandoc(options.__doc__ or ""),
                args=argv,
                use_underscores=True,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as end:
        if not end.code:
            if {"-h", "--help"} & {*argv}:
                print(EXIT_CODES)
            raise
        rows = [line.strip("│─- ") and line.strip("│ ") for line in drawn.getvalue().splitlines()]
        below_title = itertools.dropwhile(lambda row: not row, rows[1:])
        said = " ".join(itertools.takewhile(bool, below_title)).removeprefix("Error parsing ")
        said = said or "these arguments make no sense"
        raise UserError(f"{said} (python -m oneshot_fast.{name} --help)") from None
    for flag, value in public(given).items():
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, int):
                require(-(2**63) <= one < 2**63, f"{flag} is {one}; that is beyond 64 bits")
    return given


def check_defaults(*groups: Any, needs: str) -> None:
    """Refuse flags that would do nothing.

    Args:
        *groups: Groups of flags, all of which should have been left out.
        needs: The flag that is missing, and without which they have no effect.

    Raises:
        UserError: If one of them was given.
    """
    for group in groups:
        for field in dataclasses.fields(group):
            require(
                getattr(group, field.name) == field.default,
                f"--{field.name} has no effect without {needs}; give {needs}, too",
            )


def finish(
    command: Any,
    folder: Path,
    summary: Json,
    write_report: Callable[[Path, Json], None],
    print_summary: Callable[[Json, Path], None],
    of: str = "records ",
) -> int:
    """Write a job's report, if it can be written, and say what was reached; the exit code."""
    if is_main():
        with if_writable():
            write_report(folder, public(command))
        print_summary(summary, folder)
        if summary["failed"]:
            print(f"{summary['failed']} {of}failed: {folder / 'failures.jsonl'}", file=sys.stderr)
        print(f"report: {folder / 'report.html'}")
    return SOME_FAILED if summary["failed"] else OK


def public(options: Any) -> dict[str, Any]:
    """Options as one flat dict of JSON values, flag by flag."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            flat |= public(value)
        else:
            flat[field.name] = str(value) if isinstance(value, Path) else value
    return flat
