"""Registration of fake and autograd for the C++ ops, and the registry of their descriptions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import oneshot_fast._C  # noqa: F401  (loading it registers torch.ops.oneshot_fast)


@dataclass(frozen=True)
class OpSpec:
    """What the generic tests and the benchmarks need to know of an op.

    Attributes:
        name: The op's name in Python, in the schema and in C++.
        fn: The public function.
        reference: The plain-torch definition, called like ``fn``.
        inputs: Makes the arguments of one case: float64 tensors, ints, floats and sequences.
        small: Cases for tests, odd shapes among them.
        large: Cases for benchmarks.
        trained: How many of the first arguments need a gradient in benchmarks.
    """

    name: str
    fn: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: Callable[..., tuple[Any, ...]]
    small: Sequence[tuple[Any, ...]]
    large: Sequence[tuple[Any, ...]]
    trained: int


def define(
    name: str,
    fake: Callable[..., Tensor],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    reference: Callable[..., Tensor] | None = None,
) -> Callable[..., Tensor]:
    """Register fake and autograd of ``oneshot_fast::name``; return the function that calls it.

    The arguments are those of ``torch.library.register_fake`` and ``register_autograd``. In eager
    mode the returned function takes the same rules through an ``autograd.Function`` of its own and
    skips the dispatcher's autograd key, which is written in Python and costs more than a small op.
    On devices other than the CPU, for which there is no kernel yet, ``reference`` serves.
    """
    op: Callable[..., Tensor] = getattr(torch.ops.oneshot_fast, name).default
    torch.library.register_fake(f"oneshot_fast::{name}", fake)
    torch.library.register_autograd(f"oneshot_fast::{name}", backward, setup_context=setup_context)

    def forward(ctx: Any, *args: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*args)
        setup_context(ctx, args, output)
        return output

    function: Any = type(
        name,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )

    def call(*args: Any) -> Tensor:
        if reference is not None and not args[0].is_cpu:
            return reference(*args)
        if torch.compiler.is_compiling():
            return op(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call
