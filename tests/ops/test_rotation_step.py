"""Tests of the fused optimiser step: values, trust radius, drift, isolation, in-place semantics."""

import math
import os

import pytest
import torch
from op_checks import DTYPES, LAYOUTS, assert_as_exact, assert_equal
from rotation_samples import MODULE, MOMENTS, OPTIONS, cast, start
from torch import Tensor

from oneshot_fast import ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [(3, 16, 16), (2, 2, 5, 5), (37, 37), (2, 64, 64), (1, 2, 2), (3, 1, 1), (0, 8, 8)]
DEFAULTS = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "max_angle": math.pi / 4}


def copies(tensors) -> list[Tensor]:
    return [t.clone() for t in tensors]


def angles(before: Tensor, after: Tensor) -> Tensor:
    """Rotation angles of after before^-1, [..., D]."""
    return torch.linalg.eigvals(after.double().cpu() @ before.double().cpu().mT).angle().abs()


def drift(q: Tensor) -> float:
    """Largest ||q^T q - I||_F."""
    q = q.double().cpu()
    return (q.mT @ q - torch.eye(q.shape[-1])).norm(dim=(-2, -1)).max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scalar", MOMENTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, scalar, layout, dtype, device):
    for options in OPTIONS.values():
        given = cast(start(shape, scalar), dtype)
        ours = cast(given, dtype, layout, device)
        reference, truth = copies(given), [t.clone().double() for t in given]
        ops.rotation_step(*ours, **options)
        MODULE.reference(*reference, **options)
        MODULE.reference(*truth, **options)
        for index in (0, 2, 3):
            assert_as_exact(ours[index], reference[index], truth[index], reference[index].dtype)
        assert torch.equal(ours[4].cpu(), given[4] + 1)
        assert torch.equal(ours[1].cpu(), given[1])


@pytest.mark.parametrize("scalar", MOMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_composed_of_torch_and_skew_exp(dtype, scalar):
    """What serves large matrices on a GPU, and all of them there without our CUDA kernels."""
    for options in OPTIONS.values():
        composed = cast(start((2, 70, 70), scalar), dtype)
        fused = copies(composed)
        with ops.use_backend("reference"):
            MODULE._cuda(*composed, *{**DEFAULTS, **options}.values())
        ops.rotation_step(*fused, **options)
        for one, other in zip(composed, fused, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=200 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("D", [2, 5, 16, 64])
@pytest.mark.parametrize("max_angle", [1e-3, 0.2, math.pi / 4, 3.0])
def test_trust_radius(D, max_angle, device):
    tensors = cast(start((4, D, D)), torch.float64, device=device)
    before = tensors[0].clone()
    ops.rotation_step(*tensors, lr=1e4, max_angle=max_angle)
    largest = angles(before, tensors[0]).amax(-1)
    assert (largest <= max_angle * (1 + 1e-9)).all()
    assert (largest >= max_angle / (D / 2) ** (1 / 8) * (1 - 1e-9)).all()


def test_a_step_in_a_plane_is_lr_radians():
    """A constant gradient: m^ = sqrt(v^), so every step turns the plane by lr, down the slope."""
    q, m, v, steps = torch.eye(2)[None], torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), torch.zeros(1)
    target = torch.linalg.matrix_exp(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))[None]
    for count in range(1, 6):
        ops.rotation_step(q, -target @ q.mT, m, v, steps, lr=0.01, beta1=0.0, beta2=0.0)
        torch.testing.assert_close(angles(torch.eye(2), q)[0, 0].item(), 0.01 * count)
    assert (target * q).sum() > (target * torch.eye(2)).sum()


@pytest.mark.parametrize(
    ("D", "lr", "max_angle"), [(16, 0.02, 3.0), (16, 1.0, 3.0), (64, 1.0, 0.5)]
)
def test_no_drift_in_ten_thousand_steps(D, lr, max_angle, device):
    if INTERPRETED:
        pytest.skip("the interpreter is slow")
    q, g, m, v, steps = (torch.zeros(2, D, D, device=device) for _ in range(5))
    q += torch.eye(D, device=device)
    steps, worst = steps[:, 0, 0].clone(), 0.0
    for count in range(10_000):
        if count % 10 == 0:
            g.normal_()
        ops.rotation_step(q, g, m, v, steps, lr=lr, max_angle=max_angle)
        if count % 500 == 499:
            worst = max(worst, drift(q))
    assert worst < 1e-5
    assert (steps == 10_000).all()
    assert torch.equal(m, -m.mT)
    assert torch.equal(v, v.mT)


@pytest.mark.parametrize("scalar", MOMENTS)
@pytest.mark.parametrize("poison", [None, math.nan, math.inf, 1e30])
def test_batch_mates_do_not_change_a_bit(poison, scalar, device):
    """A matrix with a gradient that is not finite, or too large to square, waits."""
    tensors = cast(start((5, 16, 16), scalar), torch.float32, device=device)
    alone = [t[2:3].clone() for t in tensors]
    if poison:
        tensors[1][3, 4, 1] = poison
    before = copies(tensors)
    ops.rotation_step(*tensors, lr=0.1)
    ops.rotation_step(*alone, lr=0.1)
    for together, one in zip(tensors, alone, strict=True):
        if device == "cpu" or MODULE._in_one_launch(tensors[1]):
            assert torch.equal(together[2:3], one)
        else:  # where no kernel fits, cuBLAS chooses its algorithm by the size of the batch
            torch.testing.assert_close(together[2:3], one)
    for now, then in zip(tensors, before, strict=True):
        waited = [torch.equal(now[b], then[b]) or now is tensors[1] for b in range(5)]
        assert waited == [now is tensors[1] or (b == 3 and bool(poison)) for b in range(5)]


def test_threads_do_not_change_a_bit():
    for shape in ((40, 16, 16), (1, 150, 150)):
        given, results = cast(start(shape), torch.float32), []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(copies(given))
            ops.rotation_step(*results[-1], lr=0.1)
        for result in results:
            assert_equal(result, results[0])


def test_leaves_move_outside_autograd():
    q, g, m, v, steps = cast(start((2, 4, 4)), torch.float32)
    q.requires_grad_()
    loss = (q @ q).sum()
    ops.rotation_step(q, g, m, v, steps, lr=0.1)
    assert q.is_leaf and q.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        ops.rotation_step(*cast(start((2, 4, 4)), torch.float32), lr=0.1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_and_compile(layout, device):
    torch.compiler.reset()
    given = cast(start((2, 8, 8)), torch.float32, layout, device)
    torch.library.opcheck(
        torch.ops.oneshot_fast.rotation_step.default, (*copies(given), *DEFAULTS.values())
    )
    eager, compiled = copies(given), copies(given)
    ops.rotation_step(*eager, lr=0.1)
    torch.compile(ops.rotation_step, fullgraph=True, backend="aot_eager")(*compiled, lr=0.1)
    assert_equal(eager, compiled)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [16, 64, 100])
def test_cuda_graph(D):
    tensors = cast(start((3, D, D)), torch.float32, device="cuda")
    eager = copies(tensors)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        warm = copies(tensors)
        ops.rotation_step(*warm, lr=0.1)
        stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.rotation_step(*tensors, lr=0.1)
    for _ in range(3):
        graph.replay()
        ops.rotation_step(*eager, lr=0.1)
    for graphed, one in zip(tensors, eager, strict=True):
        torch.testing.assert_close(graphed, one)


Q, G = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4)
M, V, STEPS = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4), torch.zeros(2)


@pytest.mark.parametrize("device", ["cpu", "meta"])  # of the C++ checks, and of the fake's
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((Q, G[..., :3], M, V, STEPS), r"expected \[..., D, D\], got \[2, 4, 3\]"),
        ((Q, G.int(), M, V, STEPS), "float16 or bfloat16, got int32"),
        ((Q[0], G, M, V, STEPS), r"q must be \[2, 4, 4\], got \[4, 4\]"),
        ((Q.half(), G.half(), M, V, STEPS), "q must be float32, got float16"),
        ((Q, G.double(), M, V, STEPS), "q must be float64, got float32"),
        ((Q, G, M[:1], V, STEPS), r"m must be \[2, 4, 4\], got \[1, 4, 4\]"),
        ((Q, G, M, V[0], STEPS), r"v must be \[2, 4, 4\], got \[4, 4\]"),
        ((Q, G, M, V, STEPS[0]), r"steps must be \[2\], got \[\]"),
        ((Q, G, M, V, STEPS.int()), "steps must be float32, got int32"),
    ],
)
def test_wrong_arguments_are_named(args, message, device):
    with pytest.raises(RuntimeError, match=f"^rotation_step: .*{message}"):
        ops.rotation_step(*(a.to(device) for a in args), lr=0.1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta1": 1.5}, r"beta1 must be in \[0, 1\), got 1.5"),
        ({"beta2": -0.1}, r"beta2 must be in \[0, 1\), got -0.1"),
        ({"eps": 0}, "eps must be above 0, got 0"),
        ({"max_angle": math.nan}, "max_angle must be above 0, got nan"),
    ],
)
def test_options_out_of_range_are_named(options, message, device):
    with pytest.raises(RuntimeError, match=f"^rotation_step: {message}$"):
        ops.rotation_step(*(t.to(device) for t in (Q, G, M, V, STEPS)), lr=0.1, **options)


def test_an_expanded_rotation_is_refused_before_anything_moves():
    q, m = torch.eye(4).expand(2, 4, 4), M.clone()
    with pytest.raises(RuntimeError, match=r"^rotation_step: q is expanded .* clone it$"):
        ops.rotation_step(q, torch.randn(2, 4, 4), m, V.clone(), STEPS.clone(), lr=0.1)
    assert torch.equal(q[0], torch.eye(4)) and not m.any()
