"""Registration of the ops with torch, and the form of their descriptions."""

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.amp import is_autocast_available
from torch.autograd import forward_ad

from oneshot_fast.ops._backends import backend, serve_cuda


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


# called at every call of an op, where looking them up would cost
AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality
excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
exclude = torch._C._dispatch_tls_set_dispatch_key_excluded
transforming = torch._C._are_functorch_transforms_active
casting = torch._C._is_any_autocast_enabled
compiling = torch.compiler.is_compiling
differentiating = torch.is_grad_enabled
requires_grad = torch._C._any_requires_grad


def define(
    name: str,
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    reference: Callable[..., Any] | None = None,
    *,
    saved: int = 0,
    setup_context: Callable[..., None] | None = None,
    vmap: Callable[..., Any] | None = None,
    flat: bool = False,
    autocast: str | None = None,
    cuda: bool = True,
) -> Callable[..., Any]:
    """Register fake, autograd, vmap and CUDA of ``oneshot_fast::name``; return what to call.

    ``fake``, ``setup_context``, ``backward`` and ``vmap`` are those of ``torch.library``; ``fake``
    also raises for wrong arguments, and by default the first ``saved`` of them are saved, the
    others put into ``ctx.options``. By default ``vmap`` puts the new batch in front, and joins it
    with the tensors' own if they are ``flat``, that is with one batch dimension only. ``autocast``
    is "lower" for an op that then runs in the lower precision type, as a matrix product does, or
    "float32".

    In eager mode the returned function takes the same rules through an ``autograd.Function`` of its
    own and skips the dispatcher's autograd key, which is written in Python and costs more than a
    small op. There are two: one has forward-mode derivatives and composes with ``torch.func``, the
    other serves where neither is asked for, and costs less.

    Where no kernel can serve (another device, or CUDA without kernels or ``cuda``), ``reference``
    does; the gradients' ops have none, since torch differentiates the reference.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        save(ctx, *inputs[:saved])
        ctx.options = inputs[saved:]

    setup_context = setup_context or keep
    vmap = vmap or partial(_vmap, lambda *args: call(*args), flat)
    op: Any = getattr(torch.ops.oneshot_fast, name).default
    direct = op._op  # without the method of Python that only calls it
    torch.library.register_fake(f"oneshot_fast::{name}", fake)
    torch.library.register_autograd(f"oneshot_fast::{name}", backward, setup_context=setup_context)
    torch.library.register_vmap(f"oneshot_fast::{name}", vmap)
    if cuda:
        serve_cuda(name, _cuda_kernel(name, fake))

    def forward(*args: Any) -> Any:
        # torch's context manager for this costs as much as a small op
        before = excluded(AUTOGRAD)
        exclude(AUTOGRAD, True)
        try:
            return direct(*args)
        finally:
            exclude(AUTOGRAD, before)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup_context(ctx, inputs, output)
        if forward_ad._current_level >= 0:
            outputs = output if isinstance(output, tuple) else (output,)
            ctx.zeros = [t.new_zeros(()).expand(t.shape) for t in outputs]

    def plain_forward(ctx: Any, *args: Any) -> Any:
        output = forward(*args)
        setup_context(ctx, args, output)
        return output

    rules = {"forward": forward, "setup_context": setup, "backward": backward, "vmap": vmap}
    function = _function(name, rules | {"jvp": partial(_jvp, backward)})
    plain = _function(name, {"forward": plain_forward, "backward": backward})
    # past the Python method of the same name, which inspects the signature of forward every time
    apply = super(torch.autograd.Function, plain).apply

    def call(*args: Any) -> Any:
        first = args[0]
        if not first.is_cpu and reference is not None and not _has_kernel(name, first, cuda):
            return reference(*args)
        if compiling():
            return op(*_cast(autocast, args))
        if casting():
            args = _cast(autocast, args)
        if transforming() or forward_ad._current_level >= 0:
            return function.apply(*args)
        if differentiating() and requires_grad(*args):
            return apply(*args)
        return forward(*args)

    return call


def _function(name: str, rules: dict[str, Callable[..., Any]]) -> Any:
    """A subclass of ``autograd.Function`` with these static methods."""
    methods = {key: staticmethod(rule) for key, rule in rules.items()}
    return type(name, (torch.autograd.Function,), methods)


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for the backward pass, and for forward mode."""
    ctx.save_for_backward(*tensors)
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(*tensors)


def _vmap(call: Callable[..., Any], flat: bool, info: Any, in_dims: Any, *args: Any) -> Any:
    moved = [in_front(a, d, info.batch_size) for a, d in zip(args, in_dims, strict=True)]
    if not flat:
        out = call(*moved)
        return out, (0,) * len(out) if isinstance(out, tuple) else 0
    out = call(*(a.flatten(0, 1) if isinstance(a, Tensor) else a for a in moved))
    return out.unflatten(0, moved[0].shape[:2]), 0


def in_front(a: Any, dim: int | None, size: int) -> Any:
    """A tensor with the dimension that vmap maps over in front, new where it has none."""
    if not isinstance(a, Tensor):
        return a
    return a.expand(size, *a.shape) if dim is None else a.movedim(dim, 0)


def _jvp(backward: Callable[..., Any], ctx: Any, *tangents: Tensor | None) -> Any:
    """Forward-mode derivative: the backward pass is linear in what it gets, so transpose it."""
    needed = [t is not None for t in tangents]
    primals = [forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]
    saved = SimpleNamespace(saved_tensors=primals, options=ctx.options, needs_input_grad=needed)

    along: list[Tensor] = []

    def pull(*cotangents: Tensor) -> tuple[Tensor, ...]:
        gradients = backward(saved, *cotangents)
        pairs = zip(
            gradients if isinstance(gradients, tuple) else (gradients,), tangents, strict=True
        )
        found = [(g, t) for g, t in pairs if g is not None and t is not None]
        along.extend(t for _, t in found)
        return tuple(g for g, _ in found) or cotangents

    transpose: Callable[..., Any] = torch.func.vjp(pull, *ctx.zeros)[1]
    result = transpose(tuple(along)) if along else ctx.zeros
    return result[0] if len(result) == 1 else result


def _cast(rule: str | None, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments as autocast wants them; float64 stays, as in torch's own rules."""
    kind = args[0].device.type
    if rule is None or not is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return args
    dtype = torch.float32 if rule == "float32" else torch.get_autocast_dtype(kind)
    return tuple(
        a.to(dtype)
        if isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64
        else a
        for a in args
    )


def without_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """A context in which the products of tensors like ``t`` stay in their dtype."""
    kind = t.device.type
    return torch.autocast(kind, enabled=False) if is_autocast_available(kind) else nullcontext()


def _has_kernel(name: str, tensor: Tensor, cuda: bool) -> bool:
    """Whether a kernel, or for a tensor without data the fake, serves the op on this device."""
    if tensor.is_cuda:
        return cuda and backend(name, tensor.get_device()) != "reference"
    return tensor.is_cpu or tensor.is_meta


def _cuda_kernel(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The op on CUDA tensors: the backend is chosen at each call, Triton imported at the first."""

    def run(*args: Any) -> Any:
        if backend(name, args[0].get_device()) == "cuda":
            return getattr(torch.ops.oneshot_fast_cuda, name).default(*args)
        fake(*args)  # the launchers check nothing
        module = importlib.import_module(f"oneshot_fast.kernels.{name.removeprefix('d_')}")
        return getattr(module, name)(*args)

    return run
