"""Networks of diffusers in float64 throughout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor


@contextmanager
def float64_stays() -> Iterator[None]:
    """Let no float64 tensor be cast to float32.

    diffusers does so inside (rotary positions, norms, linear attention), whatever type it is given,
    and the difference of two outputs is then that of their rounding.
    """
    to_float, to = Tensor.float, Tensor.to

    def kept(x: Tensor, value: Any) -> Any:
        return x.dtype if value is torch.float32 and x.dtype is torch.float64 else value

    def float_(x: Tensor, *args: Any, **how: Any) -> Tensor:
        return x if x.dtype is torch.float64 else to_float(x, *args, **how)

    def to_(x: Tensor, *args: Any, **how: Any) -> Tensor:
        return to(x, *(kept(x, a) for a in args), **{k: kept(x, a) for k, a in how.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", float_)
        patch.setattr(Tensor, "to", to_)
        yield
