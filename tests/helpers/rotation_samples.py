"""Shared by tests: parts of test_rotation_step."""

import math
import sys

import pytest
import torch
from op_checks import contiguous
from torch import Tensor

MODULE = sys.modules["oneshot_fast.ops.rotation_step"]


OPTIONS = {
    "small step": {"lr": 0.01},
    "shortened": {"lr": 0.3, "max_angle": 0.2},
    "half a turn": {"lr": 3.0, "max_angle": math.pi, "eps": 0.1},
    "no memory": {"lr": 0.05, "beta1": 0.0, "beta2": 0.0},
    "tiny": {"lr": 1e-7, "max_angle": 1e-6},
}


MOMENTS = [pytest.param(False, id="elementwise"), pytest.param(True, id="scalar")]


def start(shape, scalar=False) -> list[Tensor]:
    """q, g, m, v, steps in the midst of a run, float64."""
    q = torch.linalg.matrix_exp(skew(shape).contiguous())
    v = skew(shape).square()
    steps = torch.arange(math.prod(shape[:-2])).reshape(shape[:-2]).double() * 7
    g = torch.randn(shape, dtype=torch.float64)
    return [q, g, skew(shape), v.mean((-2, -1)) if scalar else v, steps]


def skew(shape) -> Tensor:
    a = torch.randn(shape, dtype=torch.float64)
    return a - a.mT


def cast(tensors, dtype, layout=contiguous, device="cpu") -> list[Tensor]:
    """In the dtypes and the layout of a call with g in ``dtype``."""
    state = torch.promote_types(dtype, torch.float32)
    dtypes = [state, dtype, state, state, state]
    return [layout(t.to(device, d, copy=True)) for t, d in zip(tensors, dtypes, strict=True)]
