"""Which kernels serve CUDA tensors: this package's C++ ones, Triton's, or plain torch.

CPU tensors always take the C++ kernels; devices that are neither take the references.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

# by its name: to import it from the package is to import all that the package has
_C = importlib.import_module("oneshot_fast._C")
_AVAILABLE = tuple(
    name
    for name, found in (
        ("cuda", _C.cuda_kernels),
        ("triton", importlib.util.find_spec("triton") is not None),
        ("reference", True),
    )
    if found
)
_MISSING = {
    "cuda": "the extension was built without CUDA; build it with OSF_WITH_CUDA=on and nvcc on PATH",
    "triton": "Triton is not installed",
}
_forced: str | None = None


def backends() -> tuple[str, ...]:
    """Backends that can serve CUDA tensors here, the preferred one first."""
    return _AVAILABLE


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Let one backend serve CUDA tensors in this process: "cuda", "triton" or "reference".

    For tests and measurements; None leaves the choice as it is by default.

    Raises:
        RuntimeError: The backend is not available here; says what is missing.
    """
    global _forced
    if name is not None and name not in _AVAILABLE:
        why = _MISSING.get(name, f"there are {', '.join(('cuda', 'triton', 'reference'))}")
        raise RuntimeError(f"no backend {name!r}: {why}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def backend(op: str) -> str:
    """Backend that serves ``op`` on CUDA tensors: the forced one, or the decision for the op.

    Not measured: the C++ kernels come first for every op and size, because a launch of theirs costs
    the host less than Triton's, and they need neither a compiler nor tuning at run time. Where a
    measurement says otherwise for an op or a size, this is the place to enter it.
    """
    return _forced or _AVAILABLE[0]
