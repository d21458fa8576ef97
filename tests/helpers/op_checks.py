"""What the tests of the ops share: cases, layouts, gradients, and how exact is exact enough."""

import pytest
import torch
from torch import Tensor

from oneshot_fast.ops import OPS

# relative to max |truth|
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = [pytest.param(dtype, id=str(dtype)[6:]) for dtype in FLOOR]
SPECS = [pytest.param(spec, id=spec.name) for spec in OPS]
CASES = [pytest.param(spec, case, id=f"{spec.name}-{case}") for spec in OPS for case in spec.small]
# ops with kernels of their own on a GPU too; whether batch mates change a bit of the others there
# is torch's choice
GPU_SPECS = [param for param in SPECS if param.values[0].gpu_kernels]
GPU_CASES = [param for param in CASES if param.values[0].gpu_kernels]

# beyond the small cases: every patch side, several tiles of D, of patches and of partial sums
MORE = {
    "patch_rotate": [
        ((1, 3, 10, 12), 2, (1,)),
        ((1, 5, 20, 20), 4, (1, 5, 1)),
        ((1, 4, 16, 24), 8, ()),
        ((2, 2, 12, 40), 1, (2,)),
        ((1, 5, 10, 10), 5, ()),
        ((2, 4, 4, 32), 2, (2,)),
    ],
    "patch_outer": [
        ((1, 1, 24, 70), 1, (1,)),
        ((1, 16, 2, 17), 1, (1,)),
        ((1, 1, 8, 20), 4, ()),
        ((2, 4, 40, 36), 2, (2,)),
        ((3, 4, 64, 64), 2, ()),
        ((1, 4, 16, 24), 8, ()),
        ((1, 5, 10, 10), 5, (1,)),
    ],
    "skew_exp": [((1, 64, 64), 40.0), ((1, 66, 66), 9.0), ((3, 16, 16), 0.0)],
    "cayley": [((1, 66, 66), 9.0), ((2, 130, 130), 40.0)],
    "latent_mse": [((2, 3, 96, 97), 0.7)],
    "pixel_l1": [((2, 3, 96, 97),), ((1, 3, 1024, 704),)],  # past 8 MB gradients bypass the caches
}
MORE_CASES = [
    pytest.param(spec, case, id=f"{spec.name}-{case}")
    for spec in OPS
    for case in MORE.get(spec.name, ())
]
# cases of several images or matrices, each with an argument of its own
BATCHES = [
    pytest.param(spec, case, id=f"{spec.name}-{case}")
    for spec in OPS
    for case in [*spec.small, *MORE.get(spec.name, ())]
    if len(case[0]) > 2 and case[0][0] > 1 and case[-1] != ()
]


def contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def permuted(t: Tensor) -> Tensor:
    """Channels last for images, transposed for matrices."""
    if t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    return t.mT.contiguous().mT if t.dim() > 1 else t


def strided(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


def misaligned(t: Tensor) -> Tensor:
    """Contiguous, one element behind an aligned address."""
    memory = t.new_empty(t.numel() + 1)
    return memory[1:].view(t.shape).copy_(t)


LAYOUTS = [contiguous, permuted, strided, misaligned]


def make(
    spec, case, dtype=torch.float64, layout=contiguous, requires_grad=False, device="cpu"
) -> list:
    """The arguments of a case."""

    def place(a):
        if not isinstance(a, Tensor):
            return a
        return layout(a.to(device, dtype)).requires_grad_(requires_grad)

    return [place(a) for a in spec.inputs(*case)]


def tensors(args) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor)]


def moved(args, device="cpu", dtype=None) -> list:
    """Copies elsewhere, or in another dtype."""
    return [a.detach().to(device, dtype) if isinstance(a, Tensor) else a for a in args]


def cotangent_of(spec, args) -> Tensor:
    """Random, like the op's value."""
    value = spec.reference(*moved(args, "meta"))
    return torch.randn(value.shape).to(args[0].device, value.dtype)


def value_and_gradients(fn, args, cotangent) -> list[Tensor]:
    args = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args]
    value = fn(*args)
    return [value.detach(), *torch.autograd.grad(value, tensors(args), cotangent.to(value.dtype))]


def assert_as_exact(ours, reference, truth, dtype) -> None:
    """At most twice the reference's error plus the dtype's floor, relative to max |truth|."""
    assert ours.shape == truth.shape and ours.dtype == reference.dtype
    if truth.numel():
        scale = truth.abs().max()
        error = (ours.double().to(truth.device) - truth).abs().max()
        allowed = 2 * (reference.double() - truth).abs().max() + FLOOR[dtype] * scale
        assert error <= allowed, f"error {error / scale:.2e}, allowed {allowed / scale:.2e}"


def assert_value_and_gradients(spec, args, dtype, beside="cpu") -> list[Tensor]:
    """Ours on the device of ``args``, the reference and the float64 truth on ``beside``: ours."""
    cotangent = cotangent_of(spec, args)
    here, there = moved(args, beside), cotangent.to(beside)
    ours = value_and_gradients(spec.fn, args, cotangent)
    reference = value_and_gradients(spec.reference, here, there)
    truth = value_and_gradients(spec.reference, moved(here, beside, torch.float64), there)
    for result in zip(ours, reference, truth, strict=True):
        assert_as_exact(*result, dtype)
    return ours


def one_image(args, b) -> list:
    """The arguments of image or matrix b alone; what all share stays."""
    B = len(args[0])
    return [
        a[b : b + 1]
        if isinstance(a, Tensor) and a.dim() > 2
        else (1, *a[1:])
        if isinstance(a, tuple) and a[0] == B
        else a
        for a in args
    ]


def assert_equal(ours, others) -> None:
    """Bit for bit."""
    for one, other in zip(ours, others, strict=True):
        assert torch.equal(one, other)
