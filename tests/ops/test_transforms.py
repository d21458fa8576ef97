"""Forward mode, torch.func and autocast, beside the references that torch differentiates itself."""

import pytest
import torch
from op_checks import SPECS, make, tensors
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from oneshot_fast import ops

SPECS_OF = {spec.name: spec for spec in ops.OPS}
# small enough for a Jacobian, with every form of q
CASES = [
    ("patch_rotate", ((2, 1, 4, 4), 2, ())),
    ("patch_rotate", ((2, 1, 4, 4), 2, (2,))),
    ("patch_rotate", ((1, 1, 4, 4), 2, (1, 2, 1))),
    ("patch_outer", ((2, 1, 4, 4), 2, ())),
    ("patch_outer", ((2, 1, 4, 4), 2, (2, 1, 2))),
    ("skew_exp", ((2, 3, 3), 2.0)),
    ("cayley", ((2, 3, 3), 2.0)),
    ("latent_mse", ((2, 1, 2, 3), 0.7)),
    ("pixel_l1", ((2, 1, 2, 3),)),
]
each_case = pytest.mark.parametrize(("name", "case"), CASES, ids=str)


def functions(name, case):
    """The op and its reference as functions of their tensors alone, and such tensors."""
    spec = SPECS_OF[name]
    args = make(spec, case)
    given = tuple(tensors(args))
    rest = args[len(given) :]
    return [lambda *t, fn=fn: fn(*t, *rest) for fn in (spec.fn, spec.reference)], given


def assert_close(ours, reference) -> None:
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)


@each_case
def test_forward_mode(name, case):
    fns, given = functions(name, case)
    tangents = tuple(torch.randn_like(t) for t in given)
    assert_close(*(jvp(fn, given, tangents)[1] for fn in fns))

    def along(fn, which: int) -> Tensor:
        duals = list(given)
        duals[which] = forward_ad.make_dual(given[which], tangents[which])
        return forward_ad.unpack_dual(fn(*duals)).tangent

    with forward_ad.dual_level():
        for which in range(len(given)):
            assert_close(*(along(fn, which) for fn in fns))


@each_case
def test_transforms(name, case):
    fns, given = functions(name, case)
    every = tuple(range(len(given)))
    weights = torch.randn_like(fns[0](*given))
    losses = [lambda *t, fn=fn: (weights * fn(*t) + fn(*t) ** 2).sum() for fn in fns]
    for transform in (grad, hessian):
        assert_close(*(transform(loss, every)(*given) for loss in losses))
    for transform in (jacrev, jacfwd):
        assert_close(*(transform(fn, every)(*given) for fn in fns))
    stacked = tuple(torch.stack([t, -t, t + 1], 1) for t in given)
    assert_close(*(vmap(fn, 1)(*stacked) for fn in fns))
    assert_close(*(vmap(grad(loss, every), 1)(*stacked) for loss in losses))
    for which in every:
        dims = tuple(1 if i == which else None for i in every)
        mixed = [stacked[i] if i == which else given[i] for i in every]
        assert_close(*(vmap(fn, dims)(*mixed) for fn in fns))


@each_case
def test_forward_and_reverse_mode_agree(name, case):
    (fn, _), given = functions(name, case)
    leaves = [t.requires_grad_() for t in given]
    assert torch.autograd.gradcheck(
        fn, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=False
    )
    if name != "pixel_l1":  # no second derivative
        assert torch.autograd.gradgradcheck(fn, leaves, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_autocast(spec, compiled):
    """As torch has it: products in the lower precision, exponentials and sums in float32."""
    torch.compiler.reset()
    args = make(spec, spec.small[1], torch.float32, requires_grad=True)
    args[0] = args[0].detach().bfloat16().requires_grad_()
    fn = torch.compile(spec.fn, fullgraph=True, backend="aot_eager") if compiled else spec.fn
    with torch.autocast("cpu", torch.bfloat16):
        value = fn(*args)
    lower = spec.name.startswith("patch_") or spec.name == "cayley"
    assert value.dtype == (torch.bfloat16 if lower else torch.float32)
    value.sum().backward()
    for t in tensors(args):
        assert t.grad.dtype == t.dtype
    with torch.no_grad():
        exact = spec.reference(*(a.double() if isinstance(a, Tensor) else a for a in args))
    torch.testing.assert_close(value.double(), exact, rtol=0, atol=0.05 * exact.abs().max().item())


def test_autocast_leaves_float64():
    x, q = torch.randn(1, 1, 4, 4).double(), torch.eye(4).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.patch_rotate(x, q, 2), x)
        assert ops.skew_exp(q).dtype == torch.float64


def test_losses_take_a_lower_precision_prediction():
    y, target = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    low = y.bfloat16().requires_grad_()
    for fn in (ops.pixel_l1, lambda y, target: ops.latent_mse(y, target, target, 0.5)):
        loss = fn(low, target)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, fn(low.detach().float(), target))
        (gradient,) = torch.autograd.grad(loss.sum(), low)
        assert gradient.dtype == torch.bfloat16


def test_rotation_step_is_float32_under_autocast():
    q, m, v = torch.eye(4), torch.zeros(4, 4), torch.zeros(4, 4)
    lr, steps = torch.tensor(0.1), torch.tensor(0.0)  # a tensor lr takes the composed step
    with torch.autocast("cpu", torch.bfloat16):
        ops.rotation_step(q, torch.randn(4, 4), m, v, steps, lr=lr)
    assert (q.mT @ q - torch.eye(4)).abs().max() < 1e-5
