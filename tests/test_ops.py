"""Tests of every op in OPS; a new op adds cases to its SPEC, not code here."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from oneshot_fast import _C, ops
from oneshot_fast.ops import OPS
from oneshot_fast.ops._register import OpSpec

FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
SPECS = [pytest.param(spec, id=spec.name) for spec in OPS]
CASES = [pytest.param(spec, case, id=f"{spec.name}-{case}") for spec in OPS for case in spec.small]
DTYPES = [pytest.param(dtype, id=str(dtype)[6:]) for dtype in FLOOR]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill new tensors with NaN, which shows every output element that a kernel leaves out."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def permuted(t: Tensor) -> Tensor:
    """Channels last for images, transposed for matrices."""
    if t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    return t.mT.contiguous().mT


def strided(t: Tensor) -> Tensor:
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


LAYOUTS = [contiguous, permuted, strided]


def make(spec, case, dtype=torch.float64, layout=contiguous, requires_grad=False):
    def place(a):
        return layout(a.to(dtype)).requires_grad_(requires_grad) if isinstance(a, Tensor) else a

    return [place(a) for a in spec.inputs(*case)]


def tensors(args):
    return [a for a in args if isinstance(a, Tensor)]


def value_and_gradients(fn, args, cotangent):
    args = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args]
    value = fn(*args)
    return [value.detach(), *torch.autograd.grad(value, tensors(args), cotangent.to(value.dtype))]


def assert_as_exact(ours, reference, truth, dtype):
    """At most twice the reference's error plus the dtype's floor, relative to max |truth|."""
    assert ours.shape == truth.shape and ours.dtype == reference.dtype
    if truth.numel():
        scale = truth.abs().max()
        error = (ours.double() - truth).abs().max()
        allowed = 2 * (reference.double() - truth).abs().max() + FLOOR[dtype] * scale
        assert error <= allowed, f"error {error / scale:.2e}, allowed {allowed / scale:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_value_and_gradients(spec, case, layout, dtype):
    args = make(spec, case, dtype, layout)
    exact = [a.double() if isinstance(a, Tensor) else a for a in args]
    cotangent = torch.randn_like(spec.reference(*args))
    ours = value_and_gradients(spec.fn, args, cotangent)
    reference = value_and_gradients(spec.reference, args, cotangent)
    truth = value_and_gradients(spec.reference, exact, cotangent)
    for result in zip(ours, reference, truth, strict=True):
        assert_as_exact(*result, dtype)


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_derivatives_are_consistent(spec, case):
    args = make(spec, case, requires_grad=True)
    assert torch.autograd.gradcheck(spec.fn, args, fast_mode=True)
    assert torch.autograd.gradgradcheck(spec.fn, args, fast_mode=True)


class Recorder(TorchDispatchMode):
    """Keeps every call of an op of ours."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "oneshot_fast":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", SPECS)
def test_opcheck(spec, layout):
    """The op, and the ops that its backward calls."""
    args = make(spec, spec.small[1], torch.float32, layout, requires_grad=True)
    with Recorder() as recorder:
        spec.fn(*args).sum().backward()
    assert recorder.calls[0][0] is getattr(torch.ops.oneshot_fast, spec.name).default
    assert len(recorder.calls) > 1
    for op, op_args in recorder.calls:
        leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in op_args]
        torch.library.opcheck(op, leaves)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("spec", SPECS)
def test_compile(spec, backend):
    torch.compiler.reset()
    args = make(spec, spec.small[1], torch.float32)
    cotangent = torch.randn_like(spec.fn(*args))
    compiled = torch.compile(spec.fn, fullgraph=True, backend=backend)
    for ours, eager in zip(
        value_and_gradients(compiled, args, cotangent),
        value_and_gradients(spec.fn, args, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_threads_do_not_change_a_bit(spec, case):
    args = make(spec, case, torch.float32)
    cotangent = torch.randn_like(spec.fn(*args))
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(value_and_gradients(spec.fn, args, cotangent))
    for result in zip(*results, strict=True):
        assert all(torch.equal(r, result[0]) for r in result)


def one_image(args, b):
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


BATCHES = [
    p for p in CASES if len(p.values[1][0]) > 2 and p.values[1][0][0] > 1 and p.values[1][-1] != ()
]


@pytest.mark.parametrize("poison", [None, torch.nan, torch.inf])
@pytest.mark.parametrize(("spec", "case"), BATCHES)
def test_batch_mates_do_not_change_a_bit(spec, case, poison):
    args = make(spec, case, torch.float32)
    cotangent = torch.randn_like(spec.fn(*args))
    alone = value_and_gradients(spec.fn, one_image(args, 1), cotangent[1:2])
    if poison:
        args[0][0] = poison
    together = value_and_gradients(spec.fn, args, cotangent)
    for one, many in zip(alone, together, strict=True):
        assert torch.equal(one, many[1:2])


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    if isa == _C.isa():
        pytest.skip("in use, so all other tests run it")
    env = os.environ | {"OSF_CPU": isa}
    probe = [sys.executable, "-c", "from oneshot_fast import _C; _C.isa()"]
    if "but this CPU has" in subprocess.run(probe, env=env, capture_output=True, text=True).stderr:
        pytest.skip(f"no {isa} here")
    tests = ["-k", "value_and_gradients or batch_mates", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", __file__, *tests]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.parametrize("norm", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("D", [5, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_skew_exp_is_orthogonal(dtype, D, norm):
    a = torch.randn(2, D, D, dtype=dtype)
    q = ops.skew_exp(a * (norm / (a - a.mT).abs().sum(-1).max())).double()
    defect = (q.mT @ q - torch.eye(D, dtype=torch.float64)).abs().max()
    assert defect <= 4 * D * torch.finfo(dtype).eps
    assert torch.linalg.det(q).allclose(torch.ones(2, dtype=torch.float64), atol=1e-3)


def test_tensors_without_elements():
    assert ops.patch_rotate(torch.zeros(2, 0, 4, 4), torch.zeros(0, 0), 2).shape == (2, 0, 4, 4)
    assert ops.patch_outer(torch.zeros(2, 0, 4, 4), torch.zeros(2, 0, 4, 4), 2).shape == (0, 0)
    no_patches = torch.zeros(2, 1, 0, 4)
    assert torch.equal(ops.patch_outer(no_patches, no_patches, 2, (2,)), torch.zeros(2, 4, 4))
    assert ops.skew_exp(torch.zeros(3, 0, 0)).shape == (3, 0, 0)
    assert ops.latent_mse(*[no_patches] * 3, 1.0).isnan().all()
    assert ops.pixel_l1(no_patches, no_patches).isnan().all()


X = torch.zeros(2, 4, 8, 8)
Q = torch.zeros(2, 16, 16)


@pytest.mark.parametrize(
    ("fn", "args", "message"),
    [
        (ops.patch_rotate, (X[0], Q, 2), r"expected \[B, C, H, W\], got \[4, 8, 8\]"),
        (ops.patch_rotate, (X, Q, 3), r"p = 3 must divide H and W of \[2, 4, 8, 8\]"),
        (ops.patch_rotate, (X, Q, 0), r"p = 0 must divide"),
        (ops.patch_rotate, (X, Q, 4), r"q must be \[2, 64, 64\], got \[2, 16, 16\]"),
        (ops.patch_rotate, (X, Q[:1], 2), r"got \[1\]"),
        (ops.patch_rotate, (X, Q[:, None, None].expand(2, 3, 1, 16, 16), 2), "3 x 1 tiles"),
        (ops.patch_rotate, (X, Q.double(), 2), "q must be Float, got Double"),
        (ops.patch_outer, (X, X[:1], 2), r"b must be \[2, 4, 8, 8\], got \[1, 4, 8, 8\]"),
        (ops.patch_outer, (X, X, 2, (3,)), r"got \[3\]"),
        (ops.skew_exp, (X[:, :, :4],), r"expected \[..., D, D\], got \[2, 4, 4, 8\]"),
        (ops.skew_exp, (Q.int(),), "Half or BFloat16, got Int"),
        (ops.latent_mse, (X, X, X[:, :3], 1.0), r"target must be \[2, 4, 8, 8\]"),
        (ops.latent_mse, (X.half(), X, X, 1.0), "x must be Half, got Float"),
        (ops.pixel_l1, (X, X[0]), r"target must be \[2, 4, 8, 8\], got \[4, 8, 8\]"),
    ],
)
def test_wrong_arguments_are_named(fn, args, message):
    with pytest.raises(RuntimeError, match=message):
        fn(*args)


@pytest.mark.parametrize("spec", OPS, ids=lambda spec: spec.name)
def test_other_devices_are_served_by_the_reference(spec: OpSpec) -> None:
    args = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in spec.inputs(*spec.small[0])]
    args[0].requires_grad_()
    output = spec.fn(*args)
    assert output.device.type == "meta"
    assert output.shape == spec.fn(*spec.inputs(*spec.small[0])).shape
    (gradient,) = torch.autograd.grad(output.sum(), args[:1])
    assert gradient.shape == args[0].shape
