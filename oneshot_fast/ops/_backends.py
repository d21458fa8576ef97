"""Which kernels serve CUDA tensors: this package's C++ ones, Triton's, or plain torch.

CPU tensors always take the C++ kernels; devices that are neither take the references. Where the C++
kernels serve CUDA tensors they are what the dispatcher calls; Python only comes between once Triton
has been asked for, by name or by a GPU that they have no code for.
"""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# by its name: to import it from the package is to import all that the package has
_C = importlib.import_module("oneshot_fast._C")
_NAMES = ("cuda", "triton", "reference")
_forced: str | None = None
_choosers: dict[str, Callable[..., Any]] = {}


def backends(device: torch.device | str | int | None = None) -> tuple[str, ...]:
    """Backends that can serve tensors on ``device``, the preferred one first.

    Args:
        device: By default the current CUDA device, or without a GPU what is installed for one.
    """
    kind, index = _place(device)
    if kind == "cuda":
        return tuple(name for name, why in missing(index).items() if not why)
    return ("cpu",) if kind == "cpu" else ("reference",)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Let one backend serve CUDA tensors in this process: "cuda", "triton" or "reference".

    For tests and measurements; None leaves the choice as it is by default.

    Raises:
        RuntimeError: The backend is not available here; says what is missing.
    """
    global _forced
    if name is not None and name not in backends():
        why = missing(_place(None)[1]).get(name, f"there are {', '.join(_NAMES)}")
        raise RuntimeError(f"no backend {name!r}: {why}")
    if name == "triton":
        choose_in_python()
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def backend(op: str, index: int = -1) -> str:
    """Backend that serves ``op`` on a CUDA device: the forced one, or the decision for the op.

    Not measured: the C++ kernels come first for every op and size, because a launch of theirs costs
    the host less than Triton's, and they need neither a compiler nor tuning at run time. Where a
    measurement says otherwise for an op or a size, this is the place to enter it.
    """
    return _forced or _by_default(index)


def _by_default(index: int) -> str:
    name = next(name for name, why in missing(index).items() if not why)
    if name == "triton":
        choose_in_python()
    return name


# as torch.compiler.assume_constant_result has it, which would import the compiler
_by_default._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def missing(index: int) -> dict[str, str]:
    """What keeps each backend from serving a CUDA device (-1: the current one), "" if nothing."""
    built, cuda = _C.cuda_architectures, ""
    if not built:
        cuda = (
            "the extension was built without CUDA; build it with OSF_WITH_CUDA=on and nvcc on PATH"
        )
    elif torch.version.hip:
        cuda = "the CUDA kernels do not run on ROCm"
    elif torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(index if index >= 0 else None)
        if not covers(built, (major, minor)):
            cuda = (
                f"the CUDA kernels are built for {built}, this GPU is sm_{major}{minor}; build "
                f"them with OSF_CUDA_ARCHITECTURES={major}{minor}-real"
            )
    triton = "" if importlib.util.find_spec("triton") else "Triton is not installed"
    return {"cuda": cuda, "triton": triton, "reference": ""}


def covers(built: str, capability: tuple[int, int]) -> bool:
    """Whether code for the architectures ``built``, named as by CMake, runs on a GPU.

    Machine code runs on its major version from its minor one on, and on its very GPU where it ends
    in "a"; without "-real" there is PTX, which every later GPU takes, a family's ("f") its own.
    """
    for name in built.split():
        number, _, kind = name.partition("-")
        digits = number.rstrip("af")
        version = int(digits[:-1]), int(digits[-1])
        same = version[0] == capability[0] and version[1] <= capability[1]
        later = version <= capability and kind != "real" and not number.endswith("f")
        if version == capability if number.endswith("a") else same or later:
            return True
    return False


def serve_cuda(name: str, chooser: Callable[..., Any]) -> None:
    """Register what serves ``oneshot_fast::name`` on CUDA tensors where no C++ kernel does."""
    _choosers[name] = chooser
    if not _C.cuda_architectures:
        torch.library.impl(f"oneshot_fast::{name}", "CUDA")(chooser)


@functools.cache
def choose_in_python() -> None:
    """Put Python's choice in the place of the C++ kernels, for the rest of the process."""
    if not _C.cuda_architectures:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of kernels that are replaced
        for name, chooser in _choosers.items():
            torch.library.impl(f"oneshot_fast::{name}", "CUDA")(chooser)


def _place(device: torch.device | str | int | None) -> tuple[str, int]:
    """Type of a device, and its index or -1."""
    found = torch.device("cuda" if device is None else device)
    return found.type, -1 if found.index is None else found.index
