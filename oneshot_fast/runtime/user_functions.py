"""``python:module.function``: functions that users write and name on the command line."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from oneshot_fast.errors import UserError, one_line


def import_function(name: str, what: str) -> Callable[..., Any]:
    """The function that ``name``, python:module.function, names.

    Modules are also looked for in the working directory.

    Args:
        name: As the user wrote it.
        what: What it is for, in messages.

    Raises:
        UserError: If there is none.
    """
    kind, _, path = name.partition(":")
    module, _, function = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        if kind != "python":
            raise ValueError("it does not begin with python:")
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"cannot import {what} {name}: {one_line(error)}; write python:module.function"
        ) from None
    if not callable(found):
        raise UserError(f"{what} {name} is no function but {type(found).__name__}")
    return found
