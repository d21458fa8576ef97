"""The Triton kernels in Triton's interpreter, against the float64 references; no GPU needed.

Triton reads the setting when it is first imported, so this file runs in a process of its own:
test_triton.py starts it, or ``pytest tests/interpreted_kernels.py``.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from torch import Tensor

from oneshot_fast.kernels import (
    latent_mse,
    patch_outer,
    patch_rotate,
    pixel_l1,
    skew_exp,
    skew_exp_tiled,
)
from oneshot_fast.kernels.patch_tiles import INTERPRETED
from oneshot_fast.ops import OPS

FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DTYPES = [pytest.param(dtype, id=str(dtype)[6:]) for dtype in FLOOR]
SPECS = {spec.name: spec for spec in OPS}
ULP = 2.0**-24

# the ops of OPS by their launchers, called like the public functions
LAUNCHERS = {
    "patch_rotate": patch_rotate.patch_rotate,
    "patch_outer": patch_outer.patch_outer,
    "skew_exp": skew_exp.skew_exp,
    "latent_mse": lambda *args: latent_mse.latent_mse(*args)[0],
    "pixel_l1": lambda *args: pixel_l1.pixel_l1(*args)[0],
}
# beyond the small cases: every patch side, several tiles of D, of patches and of partial sums
MORE = {
    "patch_rotate": [
        ((1, 3, 10, 12), 2, (1,)),
        ((1, 5, 20, 20), 4, (1, 5, 1)),
        ((1, 4, 16, 24), 8, ()),
        ((2, 2, 48, 40), 1, (2,)),
        ((1, 5, 10, 10), 5, ()),
    ],
    "patch_outer": [
        ((1, 1, 72, 70), 1, (1,)),
        ((3, 4, 64, 64), 2, ()),
        ((1, 4, 16, 24), 8, ()),
        ((1, 5, 10, 10), 5, (1,)),
    ],
    "skew_exp": [((1, 64, 64), 40.0), ((1, 66, 66), 9.0), ((3, 16, 16), 0.0)],
    "latent_mse": [((2, 3, 96, 97), 0.7)],
    "pixel_l1": [((2, 3, 96, 97),)],
}
CASES = [
    pytest.param(name, case, id=f"{name}-{case}")
    for name, more in MORE.items()
    for case in [*SPECS[name].small, *more]
]


@pytest.fixture(autouse=True)
def few_squarings(monkeypatch):
    """Launch no more squarings of tiled matrices than these tests need; the interpreter is slow."""
    monkeypatch.setattr(skew_exp_tiled, "_SQUARINGS", 7)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill new tensors with NaN, which shows every output element that a kernel leaves out."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(name, case, dtype):
    return [a.to(dtype) if isinstance(a, Tensor) else a for a in SPECS[name].inputs(*case)]


def double(args):
    return [a.double() if isinstance(a, Tensor) else a for a in args]


def check(ours: Tensor, in_dtype: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """At most twice the error of plain torch in the same dtype, plus a few roundings."""
    assert ours.shape == truth.shape
    assert ours.dtype == in_dtype.dtype
    if truth.numel() == 0:
        return
    scale = truth.abs().max().item()
    error = (ours.double() - truth).abs().max().item()
    allowed = 2 * (in_dtype.double() - truth).abs().max().item() + FLOOR[dtype] * scale
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


def gradient(reference, args, cotangent, index=0):
    args = [a.detach().requires_grad_() if isinstance(a, Tensor) else a for a in args]
    return torch.autograd.grad(reference(*args), args[index], cotangent)[0]


def test_kernels_are_interpreted():
    assert INTERPRETED.value, "Triton was imported before this module"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, case", CASES)
def test_values(name, case, dtype):
    args = inputs(name, case, dtype)
    reference = SPECS[name].reference
    check(LAUNCHERS[name](*args), reference(*args), reference(*double(args)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*SPECS["skew_exp"].small, *MORE["skew_exp"]], ids=str)
def test_d_skew_exp(case, dtype):
    (a,) = inputs("skew_exp", case, dtype)
    grad = torch.randn(a.shape).to(dtype)
    reference = SPECS["skew_exp"].reference
    ours = skew_exp.d_skew_exp(grad, a, skew_exp.skew_exp(a))
    truth = gradient(reference, [a.double()], grad.double())
    check(ours, gradient(reference, [a], grad), truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*SPECS["latent_mse"].small, *MORE["latent_mse"]], ids=str)
def test_d_latent_mse(case, dtype):
    args = inputs("latent_mse", case, dtype)
    loss, ours = latent_mse.latent_mse(*args, with_gradient=True)
    grad, ones = torch.randn_like(loss), torch.ones_like(loss)
    reference, sigma = SPECS["latent_mse"].reference, args[-1]
    truth = gradient(reference, double(args), ones.double())
    check(ours, gradient(reference, args, ones), truth, dtype)
    for index, scale in enumerate((-sigma, 1.0, -1.0)):
        ours = latent_mse.d_latent_mse(grad, *args, scale)
        truth = gradient(reference, double(args), grad.double(), index)
        check(ours, gradient(reference, args, grad, index), truth, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*SPECS["pixel_l1"].small, *MORE["pixel_l1"]], ids=str)
def test_d_pixel_l1(case, dtype):
    args = inputs("pixel_l1", case, dtype)
    loss, ours = pixel_l1.pixel_l1(*args, with_gradient=True)
    grad, ones = torch.randn_like(loss), torch.ones_like(loss)
    reference = SPECS["pixel_l1"].reference
    truth = gradient(reference, double(args), ones.double())
    check(ours, gradient(reference, args, ones), truth, dtype)
    for index in (0, 1):
        ours = pixel_l1.d_pixel_l1(grad, *args, wrt_target=index == 1)
        truth = gradient(reference, double(args), grad.double(), index)
        check(ours, gradient(reference, args, grad, index), truth, dtype)


def test_pixel_l1_at_the_borders_and_at_nan():
    y = torch.tensor([-1.0, 1.0, 0.0, 3.0, -3.0, torch.nan]).reshape(6, 1, 1, 1)
    target = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 0.5]).reshape(6, 1, 1, 1)
    loss, d_y = pixel_l1.pixel_l1(y, target, with_gradient=True)
    reference = SPECS["pixel_l1"].reference
    torch.testing.assert_close(loss, reference(y, target), equal_nan=True)
    torch.testing.assert_close(d_y[:5], gradient(reference, [y, target], torch.ones(6))[:5])


@pytest.mark.parametrize("config", patch_rotate.CONFIGS, ids=str)
@pytest.mark.parametrize("case", [((1, 4, 16, 8), 8, ()), ((1, 4, 36, 34), 2, (1,))], ids=str)
def test_patch_rotate_in_every_configuration(config, case, monkeypatch):
    monkeypatch.setattr(patch_rotate.patch_rotate_kernel, "configs", [config])
    x, q, p = inputs("patch_rotate", case, torch.float32)
    reference = SPECS["patch_rotate"].reference
    truth = reference(x.double(), q.double(), p)
    check(patch_rotate.patch_rotate(x, q, p), reference(x, q, p), truth, torch.float32)


@pytest.mark.parametrize("leading", [(), (2,), (2, 2, 3)], ids=str)
def test_patch_rotate_by_the_transpose(leading):
    """As an argument, as a view, and both, which cancel."""
    x, q, p = inputs("patch_rotate", ((2, 4, 8, 12), 2, leading), torch.float64)
    reference = SPECS["patch_rotate"].reference
    rotate = patch_rotate.patch_rotate
    torch.testing.assert_close(rotate(x, q, p, transpose=True), reference(x, q.mT, p))
    torch.testing.assert_close(rotate(x, q.mT, p), reference(x, q.mT, p))
    torch.testing.assert_close(rotate(x, q.mT, p, transpose=True), reference(x, q, p))


def test_patch_rotate_and_patch_outer_of_512_elements():
    x, q, p = inputs("patch_rotate", ((1, 8, 8, 16), 8, ()), torch.float32)
    z = patch_rotate.patch_rotate(x, q, p)
    torch.testing.assert_close(z, SPECS["patch_rotate"].reference(x, q, p))
    sums = patch_outer.patch_outer(z, x, p)
    torch.testing.assert_close(sums, SPECS["patch_outer"].reference(z, x, p))


def test_channels_last():
    x, q, p = inputs("patch_rotate", ((2, 4, 8, 12), 2, (2,)), torch.float64)
    y = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        patch_rotate.patch_rotate(y, q, p), SPECS["patch_rotate"].reference(x, q, p)
    )
    torch.testing.assert_close(
        patch_outer.patch_outer(y, x, p, (2,)), SPECS["patch_outer"].reference(x, x, p, (2,))
    )


def test_results_of_an_image_do_not_depend_on_its_batch():
    x, q, p = inputs("patch_rotate", ((3, 4, 40, 36), 2, (3,)), torch.float32)
    a, norms = torch.randn(3, 16, 16), torch.tensor([0.1, 3.0, 40.0])
    a = a * (norms / (a - a.mT).abs().sum(-1).amax(-1))[:, None, None]
    rotated, sums = patch_rotate.patch_rotate(x, q, p), patch_outer.patch_outer(x, x, p, (3,))
    matrices = skew_exp.skew_exp(a)
    for b in range(3):
        one = slice(b, b + 1)
        assert torch.equal(rotated[one], patch_rotate.patch_rotate(x[one], q[one], p))
        assert torch.equal(sums[one], patch_outer.patch_outer(x[one], x[one], p, (1,)))
        assert torch.equal(matrices[one], skew_exp.skew_exp(a[one]))


@pytest.mark.parametrize("D, norm", [(2, 100.0), (16, 1.0), (37, 9.0), (64, 300.0), (72, 100.0)])
def test_skew_exp_is_orthogonal(D, norm):
    (a,) = inputs("skew_exp", ((1, D, D), norm), torch.float32)
    q = skew_exp.skew_exp(a)[0].double()
    assert (q.mT @ q - torch.eye(D)).abs().max() <= 4 * ULP * D


@pytest.mark.parametrize("D", [16, 65])
def test_skew_exp_of_a_symmetric_matrix_is_exactly_the_identity(D):
    a = torch.randn(D, D)
    assert torch.equal(skew_exp.skew_exp(a + a.mT), torch.eye(D))


@pytest.mark.parametrize(
    "D, bad", [(5, torch.nan), (5, torch.inf), (5, 1e30), (65, torch.nan), (65, 1e4)]
)
def test_skew_exp_without_a_result_is_nan(D, bad):
    """And ends, also with more squarings than are launched; its batch mates are not touched."""
    a = torch.randn(2, D, D) / D
    good = a[1].clone()
    a[0, 1, 0] = bad
    q = skew_exp.skew_exp(a)
    assert q[0].isnan().any()
    assert torch.equal(q[1], skew_exp.skew_exp(good))
    da = skew_exp.d_skew_exp(torch.ones_like(a), a, q)
    assert da[0].isnan().any()
    assert not da[1].isnan().any()
