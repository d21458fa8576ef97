"""Align one-step text-to-image generators with data: native ops, assignment, training, EM."""

import importlib.metadata

import torch

from oneshot_fast import _C, ops
from oneshot_fast.noise.rotation_adam import RotationAdam

__version__ = importlib.metadata.version("oneshot-fast")
__all__ = ["RotationAdam", "__version__", "build_info", "ops"]


def build_info() -> dict[str, str | bool | None]:
    """Versions that a bug report needs: package, compiler, torch, instruction set, CUDA, Triton."""
    return {
        "oneshot_fast": __version__,
        "compiler": _C.compiler,
        "torch_built_against": _C.torch_version,
        "torch_running": torch.__version__,
        "cpu_isa": _C.isa(),
        "cuda_kernels": _C.cuda_kernels,
        "cuda_available": torch.cuda.is_available(),
        "cuda_version": torch.version.cuda,
        "triton": _installed_version("triton"),
    }


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
