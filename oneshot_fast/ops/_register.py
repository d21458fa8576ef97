"""Registration of the ops with torch, and the form of their descriptions."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oneshot_fast.ops._backends import _C, backend


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
        gpu_kernels: Whether a GPU has kernels of its own for it, or torch's ops serve there.
    """

    name: str
    fn: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    inputs: Callable[..., tuple[Any, ...]]
    small: Sequence[tuple[Any, ...]]
    large: Sequence[tuple[Any, ...]]
    trained: int
    gpu_kernels: bool = True


def define(
    name: str,
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    reference: Callable[..., Any] | None = None,
    *,
    saved: int = 0,
    setup_context: Callable[..., None] | None = None,
    cuda: bool = True,
) -> Callable[..., Any]:
    """Register fake, autograd and CUDA of ``oneshot_fast::name``; return the function to call.

    ``fake``, ``setup_context`` and ``backward`` are those of ``torch.library``; ``fake`` also
    raises for wrong arguments, and by default the first ``saved`` of them are saved, the others
    put into ``ctx.options``. In eager mode the returned function takes the same rules through an
    ``autograd.Function`` of its own and skips the dispatcher's autograd key, which is written in
    Python and costs more than a small op.

    Where no kernel can serve (another device, or CUDA without kernels or ``cuda``), ``reference``
    does; the gradients' ops have none, since torch differentiates the reference.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:saved])
        ctx.options = inputs[saved:]

    setup_context = setup_context or keep
    op: Callable[..., Any] = getattr(torch.ops.oneshot_fast, name).default
    torch.library.register_fake(f"oneshot_fast::{name}", fake)
    torch.library.register_autograd(f"oneshot_fast::{name}", backward, setup_context=setup_context)
    if cuda:
        torch.library.impl(f"oneshot_fast::{name}", "CUDA")(_cuda_kernel(name, fake))

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = op(*args)
        setup_context(ctx, args, output)
        return output

    function: Any = type(
        name,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )

    def call(*args: Any) -> Any:
        if reference is not None and not _has_kernel(name, args[0], cuda):
            return reference(*args)
        if torch.compiler.is_compiling():
            return op(*args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def _has_kernel(name: str, tensor: Tensor, cuda: bool) -> bool:
    """Whether a kernel, or for a tensor without data the fake, serves the op on this device."""
    if tensor.is_cuda:
        return cuda and backend(name) != "reference"
    return tensor.is_cpu or tensor.is_meta


def _cuda_kernel(name: str, fake: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op on CUDA tensors: the backend is chosen at each call, Triton imported at the first."""
    compiled: Any = getattr(torch.ops.oneshot_fast_cuda, name).default if _C.cuda_kernels else None

    def run(*args: Any) -> Tensor:
        if backend(name) == "cuda":
            return compiled(*args)
        fake(*args)  # the launchers check nothing
        module = importlib.import_module(f"oneshot_fast.kernels.{name.removeprefix('d_')}")
        output: Tensor = getattr(module, name)(*args)
        return output

    return run
