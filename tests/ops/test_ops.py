"""Tests of every op in OPS; a new op adds cases to its SPEC, not code here.

A test with ``device`` runs on the CPU and, where there is a GPU, on each of its backends.
"""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from op_checks import (
    BATCHES,
    CASES,
    DTYPES,
    LAYOUTS,
    MORE_CASES,
    SPECS,
    assert_equal,
    assert_value_and_gradients,
    contiguous,
    cotangent_of,
    make,
    misaligned,
    moved,
    one_image,
    permuted,
    value_and_gradients,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from oneshot_fast import _C, ops
from oneshot_fast.ops import _backends, _checks
from oneshot_fast.ops._register import OpSpec

pytestmark = pytest.mark.usefixtures("poisoned_memory")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED_FORMS = [
    (contiguous, torch.float64),
    (contiguous, torch.float32),
    (contiguous, torch.float16),
    (permuted, torch.bfloat16),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_value_and_gradients(spec, case, layout, dtype, device):
    if INTERPRETED and (layout, dtype) not in INTERPRETED_FORMS:
        pytest.skip("the interpreter is slow")
    assert_value_and_gradients(spec, make(spec, case, dtype, layout, device=device), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("spec", "case"), MORE_CASES)
def test_value_and_gradients_of_larger_tensors(spec, case, dtype, device):
    half_tiled = spec.name == "skew_exp" and case[0][-1] > 64 and dtype is torch.bfloat16
    past_caches = spec.name == "pixel_l1" and case[0][-1] > 99
    if INTERPRETED and (past_caches or (dtype is not torch.float32 and not half_tiled)):
        pytest.skip("the interpreter is slow, and small tensors take the same path")
    if device == "cpu" and past_caches and dtype.itemsize < 4:
        pytest.skip("gradients of 16 bits do not bypass the caches: small tensors take the path")
    assert_value_and_gradients(spec, make(spec, case, dtype, device=device), dtype)


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_derivatives_are_consistent(spec, case, device):
    args = make(spec, case, requires_grad=True, device=device)
    # torch's matrix products in the second derivatives may not repeat themselves on a GPU
    options = {"fast_mode": True, "nondet_tol": 0.0 if device == "cpu" else 1e-12}
    assert torch.autograd.gradcheck(spec.fn, args, **options)
    assert torch.autograd.gradgradcheck(spec.fn, args, **options)


class Recorder(TorchDispatchMode):
    """Keeps every call of an op of ours."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "oneshot_fast":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


# the last one compiles, where misaligned tensors are as contiguous ones
OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", SPECS)
def test_opcheck(spec, layout, device):
    """The op, and the ops that its backward calls."""
    checks = OPCHECKS[:-1] if layout is misaligned else OPCHECKS
    if device == "cuda" and not spec.gpu_kernels:
        pytest.skip("made of torch's ops")
    args = make(spec, spec.small[1], torch.float32, layout, requires_grad=True)
    with Recorder() as recorder:
        spec.fn(*args).sum().backward()
    assert recorder.calls[0][0] is getattr(torch.ops.oneshot_fast, spec.name).default
    assert len(recorder.calls) > 1
    for op, op_args in recorder.calls:
        leaves = [
            layout(a.detach().to(device)).requires_grad_() if isinstance(a, Tensor) else a
            for a in op_args
        ]
        torch.library.opcheck(op, leaves, test_utils=checks)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("spec", SPECS)
def test_compile(spec, backend, device):
    torch.compiler.reset()
    args = make(spec, spec.small[1], torch.float32, device=device)
    cotangent = cotangent_of(spec, args)
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
    cotangent = cotangent_of(spec, args)
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(value_and_gradients(spec.fn, args, cotangent))
    for result in results:
        assert_equal(result, results[0])


@pytest.mark.parametrize("poison", [None, torch.nan, torch.inf])
@pytest.mark.parametrize(("spec", "case"), BATCHES)
def test_batch_mates_do_not_change_a_bit(spec, case, poison, device):
    if INTERPRETED and poison is not torch.nan:
        pytest.skip("the interpreter is slow")
    if device == "cuda" and not spec.gpu_kernels:
        pytest.skip("torch chooses its algorithm by the size of the batch")
    args = make(spec, case, torch.float32, device=device)
    cotangent = cotangent_of(spec, args)
    alone = value_and_gradients(spec.fn, one_image(args, 1), cotangent[1:2])
    if poison:
        args[0][0] = poison
    together = value_and_gradients(spec.fn, args, cotangent)
    assert_equal(alone, [result[1:2] for result in together])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_the_shape_of_an_image_does_not_change_a_bit(p, dtype):
    """Sixteen patches in one row, which a CPU may take as whole vectors, and in one column."""

    def turned(t: Tensor) -> Tensor:
        return t.unflatten(3, (16, p)).transpose(2, 3).flatten(2, 3)

    a, b = torch.randn(2, 2, 4, p, 16 * p).to(dtype)
    matrices = torch.randn(2, 4 * p * p, 4 * p * p).to(dtype)
    for q in (matrices, matrices.mT):
        rotated = ops.patch_rotate(turned(a), q, p)
        assert_equal([turned(ops.patch_rotate(a, q, p))], [rotated])
    for like in ((), (2,)):
        sums = ops.patch_outer(turned(a), turned(b), p, like)
        assert_equal([ops.patch_outer(a, b, p, like)], [sums])


def test_every_instruction_set():
    """All but the one in use, which all other tests run; those that the CPU lacks are warned of."""
    isas = [i for i in ("generic", "avx2", "avx512", "avx512_bf16") if i != _C.isa()]
    helpers = str(Path(__file__).parents[1] / "helpers")
    env = os.environ | {"ISAS": " ".join(isas), "PYTHONPATH": os.pathsep.join([helpers, *sys.path])}
    files = [Path(__file__), Path(__file__).with_name("test_rotation_step.py")]
    # no kernel sees a strided tensor: it is made contiguous before; nor asks whether its input is
    # aligned, so that what is misaligned shows all that aligned ones would
    chosen = "cpu and not strided and ((value_and_gradients and not contiguous) or batch_mates "
    chosen += "or (test_values and contiguous))"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "each_isa"]
    run = subprocess.run([*command, *files, "-k", chosen], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    tested = re.findall(r"^tested: (\w+)", run.stdout, re.M)
    assert tested
    for isa in isas:
        if isa not in tested:
            assert re.search(rf"^OSF_CPU={isa}, but this CPU has", run.stdout, re.M), run.stdout
            warnings.warn(f"no {isa} here", stacklevel=1)


@pytest.mark.parametrize("norm", [1e-3, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("D", [2, 5, 16, 37, 64, 72, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_skew_exp_is_orthogonal(dtype, D, norm, device):
    tiled = D > 64 or (D > 32 and dtype is torch.float64)
    if INTERPRETED and tiled:
        pytest.skip("the interpreter is slow")
    a = torch.randn(2, D, D, dtype=dtype)
    a *= norm / (a - a.mT).abs().sum(-1).max()
    q = ops.skew_exp(a.to(device)).double().cpu()
    defect = (q.mT @ q - torch.eye(D, dtype=torch.float64)).abs().max()
    assert defect <= 4 * D * torch.finfo(dtype).eps
    assert torch.linalg.det(q).allclose(torch.ones(2, dtype=torch.float64), atol=1e-3)


@pytest.mark.parametrize("D", [16, 65])
def test_skew_exp_of_a_symmetric_matrix_is_exactly_the_identity(D, device):
    a = torch.randn(D, D, device=device)
    assert torch.equal(ops.skew_exp(a + a.mT), torch.eye(D, device=device))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("D", [5, 65])
def test_skew_exp_without_a_result_is_not_finite(D, bad, device):
    """And ends; its batch mates are not touched."""
    if INTERPRETED and D > 64:
        pytest.skip("the interpreter is slow, and test_triton_kernels.py has one of NaN")
    a = torch.randn(2, D, D, device=device) / D
    good = a[1].clone()
    a[0, 1, 0] = bad
    a.requires_grad_()
    q = ops.skew_exp(a)
    (d_a,) = torch.autograd.grad(q, a, torch.ones_like(q))
    assert torch.equal(q[1], ops.skew_exp(good))
    assert not d_a[1].isnan().any()
    for result in (q[0], d_a[0]):
        assert not result.isfinite().all()


def test_pixel_l1_at_the_borders_and_at_nan(device):
    y = torch.tensor([-1.0, 1.0, 0.0, 3.0, -3.0, torch.nan]).reshape(6, 1, 1, 1)
    args = [y, torch.full_like(y, 0.5)]
    (reference,) = (spec.reference for spec in ops.OPS if spec.name == "pixel_l1")
    ours = value_and_gradients(ops.pixel_l1, moved(args, device), torch.ones(6, device=device))
    truth = value_and_gradients(reference, args, torch.ones(6))
    torch.testing.assert_close(ours[0].cpu(), truth[0], equal_nan=True)
    torch.testing.assert_close(ours[1][:5].cpu(), truth[1][:5])


@pytest.mark.parametrize("D", [2, 16, 37, 64, 130])
def test_cayley_near_the_identity_is_exact_to_rounding(D):
    a = torch.randn(2, D, D) * 0.1 / D
    (reference,) = (spec.reference for spec in ops.OPS if spec.name == "cayley")
    truth = reference(a.double())
    assert (ops.cayley(a) - truth).abs().max() <= torch.finfo(torch.float32).eps


@pytest.mark.parametrize("D", [16, 40])
def test_cayley_of_large_matrices_exchanges_rows(D):
    """Without pivots it is ten times less orthogonal."""
    q = ops.cayley(1e3 * torch.randn(2, D, D)).double()
    assert (q.mT @ q - torch.eye(D)).abs().max() < 5e-7


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_cayley_keeps_batch_mates_apart(poison, device):
    a = torch.randn(3, 16, 16, device=device)
    a[0] = poison
    torch.testing.assert_close(ops.cayley(a)[1:], ops.cayley(a[1:]))


def test_tensors_without_elements():
    assert ops.patch_rotate(torch.zeros(2, 0, 4, 4), torch.zeros(0, 0), 2).shape == (2, 0, 4, 4)
    assert ops.patch_outer(torch.zeros(2, 0, 4, 4), torch.zeros(2, 0, 4, 4), 2).shape == (0, 0)
    no_patches = torch.zeros(2, 1, 0, 4)
    assert torch.equal(ops.patch_outer(no_patches, no_patches, 2, (2,)), torch.zeros(2, 4, 4))
    assert ops.skew_exp(torch.zeros(3, 0, 0)).shape == (3, 0, 0)
    assert ops.cayley(torch.zeros(3, 0, 0)).shape == (3, 0, 0)
    assert ops.latent_mse(*[no_patches] * 3, 1.0).isnan().all()
    assert ops.pixel_l1(no_patches, no_patches).isnan().all()


X = torch.zeros(2, 4, 8, 8)
Q = torch.zeros(2, 16, 16)


@pytest.mark.parametrize("device", ["cpu", "meta"])  # of the C++ checks, and of the fakes'
@pytest.mark.parametrize(
    ("fn", "args", "message"),
    [
        (ops.patch_rotate, (X[0], Q, 2), r"expected \[B, C, H, W\], got \[4, 8, 8\]"),
        (ops.patch_rotate, (X, Q, 3), r"p = 3 must divide H and W of \[2, 4, 8, 8\]"),
        (ops.patch_rotate, (X, Q, 0), r"p = 0 must divide"),
        (ops.patch_rotate, (X, Q, 4), r"q must be \[2, 64, 64\], got \[2, 16, 16\]"),
        (ops.patch_rotate, (X, Q[0, 0], 2), r"q must be \[..., D, D\], got \[16\]"),
        (ops.patch_rotate, (X, Q[:1], 2), r"per image \(2\) or per tile .* got \[1\]"),
        (ops.patch_rotate, (X, Q[:, None, None].expand(2, 3, 1, 16, 16), 2), "3 x 1 tiles"),
        (ops.patch_rotate, (X, Q.double(), 2), "q must be float32, got float64"),
        (ops.patch_rotate, (X.int(), Q.int(), 2), "float16 or bfloat16, got int32"),
        (ops.patch_outer, (X, X[:1], 2), r"b must be \[2, 4, 8, 8\], got \[1, 4, 8, 8\]"),
        (ops.patch_outer, (X, X, 2, (3,)), r"got \[3\]"),
        (ops.skew_exp, (X[:, :, :4],), r"expected \[..., D, D\], got \[2, 4, 4, 8\]"),
        (ops.skew_exp, (Q.int(),), "float16 or bfloat16, got int32"),
        (ops.cayley, (X[:, :, :4],), r"expected \[..., D, D\], got \[2, 4, 4, 8\]"),
        (ops.cayley, (Q.int(),), "float16 or bfloat16, got int32"),
        (ops.latent_mse, (X, X, X[:, :3], 1.0), r"target must be \[2, 4, 8, 8\]"),
        (ops.latent_mse, (X.int(), X.int(), X.int(), 1.0), "float16 or bfloat16, got int32"),
        (ops.latent_mse, (X, X.int(), X, 1.0), "x must be float32, got int32"),
        (ops.pixel_l1, (X, X[0]), r"target must be \[2, 4, 8, 8\], got \[4, 8, 8\]"),
    ],
)
def test_wrong_arguments_are_named(fn, args, message, device):
    """And nothing else: no file, no line of C++."""
    with pytest.raises(RuntimeError, match=f"^{fn.__name__}: .*{message}"):
        fn(*(a.to(device) if isinstance(a, Tensor) else a for a in args))


@pytest.mark.parametrize("layout", [contiguous, permuted])
@pytest.mark.parametrize("tiles", [(), (2, 3)])
def test_a_shared_matrix_is_not_copied(tiles, layout, device):
    """An expanded q is read with stride 0; its gradient is summed by torch."""
    x, q = torch.randn(3, 4, 8, 12, device=device), torch.randn(16, 16, device=device)
    every = layout(q).expand(3, *tiles, 16, 16)
    shared = value_and_gradients(ops.patch_rotate, [x, every, 2], torch.ones_like(x))
    copied = value_and_gradients(ops.patch_rotate, [x, every.contiguous(), 2], torch.ones_like(x))
    assert_equal(shared, copied)
    odd = q.expand(3, 16, 16)[:, :, ::2].repeat_interleave(2, -1)  # and what is neither is copied
    assert torch.equal(ops.patch_rotate(x, odd, 2), ops.patch_rotate(x, odd.contiguous(), 2))


def test_only_what_a_gradient_needs_is_saved():
    x, q = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 16)
    for moving, kept in (((True, False), q), ((False, True), x)):
        args = [t.clone().requires_grad_(moves) for t, moves in zip((x, q), moving, strict=True)]
        saved = [t for t in ops.patch_rotate(*args, 2).grad_fn.saved_tensors if t is not None]
        assert_equal(saved, [kept])


def test_tensors_on_two_devices_are_named():
    with pytest.raises(RuntimeError, match="q must be on cpu, got meta"):
        _checks.check_like("patch_rotate", "q", Q.to("meta"), Q.shape, X)


@pytest.mark.parametrize("spec", SPECS)
def test_tensors_without_data(spec: OpSpec) -> None:
    """The fakes also serve the meta device, gradients included."""
    args = spec.inputs(*spec.small[0])
    output = spec.fn(*(a.to("meta").requires_grad_() if isinstance(a, Tensor) else a for a in args))
    assert output.is_meta
    assert output.shape == spec.fn(*args).shape
    assert output.dtype == spec.fn(*args).dtype


def test_backends():
    assert ops.backends()[-1] == "reference"
    assert ("cuda" in ops.backends()) == bool(_C.cuda_architectures)
    with pytest.raises(
        RuntimeError, match=r"no backend 'metal': there are cuda, triton, reference"
    ):
        ops.use_backend("metal").__enter__()
    with ops.use_backend("reference"):
        assert _backends.backend("skew_exp") == "reference"
        with ops.use_backend(None):
            assert _backends.backend("skew_exp") == ops.backends()[0]
        assert _backends.backend("skew_exp") == "reference"
