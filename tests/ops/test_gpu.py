"""What only a GPU shows: graphs, streams, devices, huge tensors, memory, synchronisation.

Values and gradients on a GPU are in test_ops.py: its tests run there on each backend.
"""

import gc
import os

import pytest
import torch
from op_checks import (
    CASES,
    GPU_SPECS,
    MORE_CASES,
    SPECS,
    assert_equal,
    assert_value_and_gradients,
    contiguous,
    cotangent_of,
    make,
    misaligned,
    tensors,
    value_and_gradients,
)

from oneshot_fast import ops

pytestmark = pytest.mark.gpu
on_each_backend = pytest.mark.parametrize("device", ["cuda", "triton"], indirect=True)
FLOATS = [torch.float32, torch.bfloat16]
GPU_LARGE = [
    pytest.param(spec, case, id=f"{spec.name}-{case}")
    for (spec,) in (param.values for param in GPU_SPECS)
    for case in spec.large
]
WITH_KERNELS = [
    param
    for param in [*CASES, *MORE_CASES]
    if param.values[0].gpu_kernels and 0 not in param.values[1][0]
]


def captured(run):
    """A graph of one call and the tensors that it fills, after calls that compile and tune."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@pytest.mark.skipif(os.environ.get("OSF_WITH_CUDA") != "on", reason="OSF_WITH_CUDA is not on")
def test_every_backend_is_here():
    assert ops.backends() == ("cuda", "triton", "reference")


@pytest.mark.parametrize("spec", SPECS)
def test_references_serve(spec):
    with ops.use_backend("reference"):
        args = make(spec, spec.small[1], torch.float32, device="cuda")
        assert_value_and_gradients(spec, args, torch.float32)


@on_each_backend
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", [contiguous, misaligned])
@pytest.mark.parametrize(("spec", "case"), GPU_LARGE)
def test_value_and_gradients_of_large_tensors(spec, case, layout, dtype, device):
    args = make(spec, case, dtype, layout, device=device)
    assert_value_and_gradients(spec, args, dtype, beside="cuda")


@on_each_backend
@pytest.mark.usefixtures("poisoned_memory")  # so that a replay needs what it writes itself
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("spec", "case"), WITH_KERNELS)
def test_graphs_of_forward_and_backward(spec, case, dtype, device):
    args = make(spec, case, dtype, device=device)
    cotangent = cotangent_of(spec, args)
    graph, results = captured(lambda: value_and_gradients(spec.fn, args, cotangent))
    for _ in range(2):
        fresh = make(spec, case, dtype, device=device)
        for old, new in zip(tensors(args), tensors(fresh), strict=True):
            old.copy_(new)
        graph.replay()
        assert_equal(results, value_and_gradients(spec.fn, fresh, cotangent))


@on_each_backend
@pytest.mark.parametrize("spec", GPU_SPECS)
def test_ops_run_on_the_current_stream(spec, device):
    """Inputs that a busy stream has yet to write are NaN for whoever does not wait for it."""
    args = make(spec, spec.large[0], torch.float32, device=device)
    cotangent = cotangent_of(spec, args)
    expected = value_and_gradients(spec.fn, args, cotangent)
    late = [torch.full_like(a, torch.nan) if isinstance(a, torch.Tensor) else a for a in args]
    late_cotangent = torch.full_like(cotangent, torch.nan)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles, 50 ms or more
        for old, new in zip(tensors(late), tensors(args), strict=True):
            old.copy_(new)
        late_cotangent.copy_(cotangent)
        results = value_and_gradients(spec.fn, late, late_cotangent)
    torch.cuda.synchronize()
    assert_equal(results, expected)


@on_each_backend
@pytest.mark.parametrize("spec", SPECS)
def test_second_device(spec, device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    args = make(spec, spec.large[0], torch.float32, device=f"{device}:1")
    assert torch.cuda.current_device() == 0
    assert_value_and_gradients(spec, args, torch.float32)
    results = value_and_gradients(spec.fn, args, cotangent_of(spec, args))
    assert all(result.device == args[0].device for result in results)


@on_each_backend
@pytest.mark.parametrize("spec", GPU_SPECS)
def test_nothing_waits_for_the_device(spec, device):
    args = make(spec, spec.large[0], torch.float32, device=device)
    cotangent = cotangent_of(spec, args)
    value_and_gradients(spec.fn, args, cotangent)  # compiles and tunes
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_gradients(spec.fn, args, cotangent)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_each_backend
@pytest.mark.parametrize(("spec", "case"), GPU_LARGE)
def test_repeats_do_not_change_a_bit(spec, case, device):
    args = make(spec, case, torch.float32, device=device)
    cotangent = cotangent_of(spec, args)
    first = value_and_gradients(spec.fn, args, cotangent)
    for _ in range(5):
        assert_equal(value_and_gradients(spec.fn, args, cotangent), first)


def peak_bytes(run):
    """Bytes that a call asked the allocator for and held at the same time, and its result."""
    run()  # compiles, tunes
    gc.collect()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    result = run()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before, result


@on_each_backend
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("spec", "case"), GPU_LARGE)
def test_memory_is_outputs_and_a_few_matrices(spec, case, dtype, device):
    """Scratch: at most 18 matrices per q in the accumulation dtype, 1 % of the images."""
    args = make(spec, case, dtype, device=device)
    cotangent = cotangent_of(spec, args)
    with torch.no_grad():
        peak, value = peak_bytes(lambda: spec.fn(*args))
    matrices = {"patch_rotate": args[1:2], "patch_outer": [value], "skew_exp": [value]}
    scratch = sum(18 * 4 * q.numel() for q in matrices.get(spec.name, ()))
    scratch += sum(a.nbytes for a in tensors(args)) // 100
    assert peak <= value.nbytes + scratch
    peak, results = peak_bytes(lambda: value_and_gradients(spec.fn, args, cotangent))
    assert peak <= sum(result.nbytes for result in results) + scratch


def room_for(gigabytes):
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GB of GPU memory, {free:.0f} are free")


@on_each_backend
def test_patches_of_many_images_beyond_2_31_elements(device):
    room_for(24)
    B = 2**13 + 1
    x = torch.randn(B, 4, 256, 256, dtype=torch.bfloat16, device=device)
    assert x.numel() > 2**31
    q = torch.randn(B, 16, 16, device=device).bfloat16()
    z = ops.patch_rotate(x, q, 2)
    sums = ops.patch_outer(z, x, 2, q)
    for b in (0, B // 2, B - 1):
        one = slice(b, b + 1)
        assert torch.equal(z[one], ops.patch_rotate(x[one], q[one], 2))
        assert torch.equal(sums[one], ops.patch_outer(z[one], x[one], 2, q[one]))


@on_each_backend
def test_patches_of_one_image_beyond_2_31_elements(device):
    room_for(16)
    x = torch.randn(1, 2, 2**15, 2**15 + 8, dtype=torch.bfloat16, device=device)
    assert x.numel() > 2**31
    q = torch.randn(8, 8, device=device).bfloat16()
    z = ops.patch_rotate(x, q, 2)
    for rows in (slice(0, 4), slice(2**14, 2**14 + 4), slice(2**15 - 4, 2**15)):
        assert torch.equal(z[:, :, rows], ops.patch_rotate(x[:, :, rows].contiguous(), q, 2))


@on_each_backend
def test_loss_beyond_2_31_elements(device):
    room_for(24)
    B = 2732
    y, target = (torch.randn(B, 3, 512, 512, dtype=torch.bfloat16, device=device) for _ in range(2))
    assert y.numel() > 2**31
    y.requires_grad_()
    loss = ops.pixel_l1(y, target)
    (d_y,) = torch.autograd.grad(loss, y, torch.ones_like(loss))
    for b in (0, B // 2, B - 1):
        alone = y[b : b + 1].detach().requires_grad_()
        one = ops.pixel_l1(alone, target[b : b + 1])
        assert torch.equal(one, loss[b : b + 1])
        assert_equal(torch.autograd.grad(one, alone, torch.ones_like(one)), [d_y[b : b + 1]])


@on_each_backend
@pytest.mark.parametrize("D", [16, 100])
def test_graph_of_rotation_step(D, device):
    """In one launch and as a composition; what the steps are is in test_rotation_step.py."""
    q = torch.linalg.qr(torch.randn(5, D, D)).Q.contiguous().to(device)
    m, v = torch.zeros(2, 5, D, D, device=device)
    state = [q, m, v, torch.zeros(5, device=device)]
    start = [t.clone() for t in state]
    g = torch.randn(5, D, D, device=device)
    graph, _ = captured(lambda: ops.rotation_step(state[0], g, *state[1:], lr=0.01))
    for old, new in zip(state, start, strict=True):
        old.copy_(new)
    for _ in range(3):
        g.copy_(torch.randn(g.shape))
        graph.replay()
        ops.rotation_step(start[0], g, *start[1:], lr=0.01)
    for graphed, eager in zip(state, start, strict=True):
        torch.testing.assert_close(graphed, eager)
