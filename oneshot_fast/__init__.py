"""Align one-step text-to-image generators with data: native ops, assignment, training, EM."""

import importlib.metadata
import importlib.util

import torch

from oneshot_fast import _C, ops

__version__ = importlib.metadata.version("oneshot-fast")
__all__ = ["__version__", "build_info", "ops"]


def build_info() -> dict[str, str | bool | None]:
    """Versions that a bug report needs: package, compiler, torch, instruction set, CUDA, Triton."""
    triton = importlib.util.find_spec("triton")
    return {
        "oneshot_fast": __version__,
        "compiler": _C.compiler,
        "torch_built_against": _C.torch_version,
        "torch_running": torch.__version__,
        "cpu_isa": _C.isa(),
        "cuda_available": torch.cuda.is_available(),
        "cuda_version": torch.version.cuda,
        "triton": importlib.metadata.version("triton") if triton else None,
    }
