"""What the commands share: argument parsing and exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
from safetensors import SafetensorError

from oneshot_fast.errors import UserError, require
from oneshot_fast.runtime.progress import silence_imports

OK, SOME_FAILED, BAD_INPUT, NO_SPACE, INTERRUPTED = 0, 1, 2, 3, 130
Options = TypeVar("Options")


def run_command(
    name: str, options: type[Options], command: Callable[[Options], int], argv: Sequence[str] | None
) -> int:
    """Parse ``argv`` into ``options``, run ``command`` and turn its end into an exit code.

    Args:
        name: The command's name, as in ``python -m oneshot_fast.NAME``.
        options: Dataclass whose fields are flags, or groups of flags.
        command: What to run.
        argv: Arguments; None takes the process's own.

    Returns:
        0; 1 if some samples failed; 2 on bad input (one line on stderr); 3 on a full disk; 130
        after Ctrl-C.
    """
    silence_imports()
    again = "everything finished is kept; repeat the command to go on"
    try:
        code = command(_parse(name, options, argv))
        if "oneshot_fast.runtime.processes" in sys.modules:
            sys.modules["oneshot_fast.runtime.processes"].leave()
        return code
    except UserError as error:
        return _fail(BAD_INPUT, str(error))
    except KeyboardInterrupt:
        print(f"\ninterrupted: {again}", file=sys.stderr)
        return INTERRUPTED
    except (OSError, SafetensorError) as error:
        number, place = _system_error(error)
        if isinstance(error, SafetensorError) and number is None:
            return _fail(BAD_INPUT, f"damaged safetensors file: {error}; restore it")
        if number is None:
            raise
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return _fail(NO_SPACE, f"no space left to write{place}: free some; {again}")
        return _fail(BAD_INPUT, f"{os.strerror(number)}{place}; check the path and its permissions")


def _fail(code: int, message: str) -> int:
    print("error: " + " ".join(message.splitlines()), file=sys.stderr)
    return code


def _system_error(error: OSError | SafetensorError) -> tuple[int | None, str]:
    """Error number and place; safetensors names the number only in its message."""
    if isinstance(error, OSError):
        return error.errno, f" ({error.filename})" if error.filename else ""
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None, ""


def _parse(name: str, options: type[Options], argv: Sequence[str] | None) -> Options:
    """Options of the command line.

    Raises:
        UserError: With the one line that matters of the box that tyro draws.
    """
    drawn = io.StringIO()
    try:
        with contextlib.redirect_stderr(drawn):
            return tyro.cli(
                options,
                prog=f"python -m oneshot_fast.{name}",
                description=inspect.cleandoc(options.__doc__ or ""),
                args=argv,
                use_underscores=True,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as end:
        if not end.code:
            raise
        rows = [line.strip("│─- ") and line.strip("│ ") for line in drawn.getvalue().splitlines()]
        below_title = itertools.dropwhile(lambda row: not row, rows[1:])
        said = " ".join(itertools.takewhile(bool, below_title)).removeprefix("Error parsing ")
        said = said or "these arguments make no sense"
        raise UserError(f"{said} (python -m oneshot_fast.{name} --help)") from None


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
