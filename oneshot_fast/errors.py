"""Errors that a user can mend. Each message is one line that says what to do."""

import contextlib
import importlib
from collections.abc import Iterator


class UserError(ValueError):
    """Base of all of them; commands print the message and exit with 2."""


class DataError(UserError):
    """A data set, image, manifest or noise cannot be used."""


class ModelError(UserError):
    """A model cannot be used."""


class RunError(UserError):
    """A run cannot start or go on."""


class DamagedError(RunError):
    """A file that a run of ours wrote is not as it was written."""

    def __init__(self, path: object) -> None:
        """Name the file, and say what makes it again."""
        super().__init__(
            f"{path} is damaged; repeat the command that wrote it with --verify, which makes it "
            "again or says what cannot be made again"
        )


def require(condition: bool, message: str) -> None:
    """Raise UserError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def refused(kind: type[UserError], prefix: str = "") -> Iterator[None]:
    """Raise what a library raises inside, of whatever class, as ``kind``: prefix and its message.

    Our own errors pass as they are.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise kind(prefix + one_line(error)) from error


def printable(text: str) -> str:
    """``text`` without what a terminal would obey: escapes and other control characters."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def need_package(name: str, flag: str) -> None:
    """Raise UserError unless a package that not everybody has, and ``flag`` needs, can be used."""
    try:
        importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"{flag} needs a package that is not installed: pip install {name}"
        ) from None


def one_line(message: object) -> str:
    """First 200 characters of a message on one line; of an error without one, its class name."""
    return printable(" ".join(str(message).split()) or type(message).__name__)[:200]
