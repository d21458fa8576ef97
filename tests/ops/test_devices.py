"""Which kernels serve which device, and the references on devices that can do little."""

import sys
from contextlib import contextmanager

import pytest
import torch
from op_checks import (
    CASES,
    FLOOR,
    assert_as_exact,
    cotangent_of,
    make,
    moved,
    value_and_gradients,
)
from rotation_samples import OPTIONS, cast, start
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import oneshot_fast
from oneshot_fast import ops
from oneshot_fast.ops import _backends, _register

SKEW_EXP = sys.modules["oneshot_fast.ops.skew_exp"]
ROTATION_STEP = sys.modules["oneshot_fast.ops.rotation_step"]


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("80-real", (8, 0), True),
        ("80-real", (8, 9), True),
        ("80-real", (7, 5), False),
        ("80-real", (9, 0), False),
        ("86-real", (8, 0), False),
        ("80-real 90-real 100 120", (12, 1), True),
        ("100", (12, 0), True),
        ("100-virtual", (10, 3), True),
        ("100-virtual", (9, 0), False),
        ("90a-real", (9, 0), True),
        ("90a", (10, 0), False),
        ("100f-real", (10, 3), True),
        ("100f", (12, 0), False),
        ("", (8, 0), False),
    ],
)
def test_code_runs_where_cuda_says(built, capability, runs):
    assert _backends.covers(built, capability) is runs


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs to ask about: an H100, and an RTX 2080 that the CUDA kernels have no code for."""
    capabilities = [(9, 0), (7, 5)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda index=None: capabilities[index or 0]
    )
    monkeypatch.setattr(_backends._C, "cuda_architectures", "80-real 90-real")
    monkeypatch.setattr(_backends, "choose_in_python", lambda: chosen.append(True))
    chosen: list[bool] = []
    found = _backends.importlib.util.find_spec
    monkeypatch.setattr(_backends.importlib.util, "find_spec", lambda n: n == "triton" or found(n))
    _backends.missing.cache_clear()
    yield chosen
    _backends.missing.cache_clear()


def test_every_gpu_has_what_serves_it(gpus):
    assert ops.backends() == ops.backends("cuda:0") == ("cuda", "triton", "reference")
    assert ops.backends("cuda:1") == ("triton", "reference")
    assert ops.backends("cpu") == ("cpu",)
    assert ops.backends("mps") == ops.backends("xpu") == ("reference",)
    assert _backends.backend("skew_exp", 0) == "cuda"
    assert not gpus  # the dispatcher calls C++
    assert _backends.backend("skew_exp", 1) == "triton"
    assert gpus  # and here Python
    serving = oneshot_fast.build_info()["backends"]
    assert serving["cuda:0"] == "cuda"
    assert "this GPU is sm_75" in serving["cuda:1"] and serving["cuda:1"].startswith("triton")
    assert serving["cpu"].startswith("cpu")


def test_the_choice_is_a_constant_to_the_compiler():
    def chosen(x):
        return x + ops.backends().index(_backends.backend("skew_exp"))

    assert not torch.compile(chosen, fullgraph=True, backend="eager")(torch.zeros(()))


def test_rocm_has_no_cuda(gpus, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert ops.backends() == ("triton", "reference")


def test_cuda_tensors_without_data_need_no_gpu():
    """The route to a CUDA kernel, as an export on a machine without one takes it."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, q = torch.empty(2, 4, 8, 8, device="cuda"), torch.empty(16, 16, device="cuda")
        assert ops.patch_rotate(x, ops.skew_exp(q), 2).device == x.device


class Modest(TorchDispatchMode):
    """Refuses what MPS and XPU have no kernel for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "matrix_exp" not in func.name()
        results = func(*args, **(kwargs or {}))
        for t in tree_leaves(results):
            assert not isinstance(t, torch.Tensor) or t.dtype != torch.float64, func
        return results


@contextmanager
def modest_device():
    """The CPU as a device that neither C++ nor Triton serves, without matrix_exp and float64."""
    with pytest.MonkeyPatch.context() as patch, Modest():
        patch.setattr(_register, "_has_kernel", lambda name, tensor, cuda: False)
        patch.setattr(ROTATION_STEP, "_has_op", lambda g: False)
        patch.setattr(SKEW_EXP, "_WITH_MATRIX_EXP", ())
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_references_on_a_modest_device(spec, case, dtype):
    args = make(spec, case, dtype)
    cotangent = cotangent_of(spec, args)
    expected = value_and_gradients(spec.reference, args, cotangent)
    truth = value_and_gradients(spec.reference, moved(args, dtype=torch.float64), cotangent)
    with modest_device():
        ours = value_and_gradients(spec.fn, args, cotangent)
    for result in zip(ours, expected, truth, strict=True):
        assert_as_exact(*result, dtype)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rotation_step_on_a_modest_device(options):
    given = cast(start((3, 5, 5)), torch.float32)
    ours, expected = cast(given, torch.float32), cast(given, torch.float32)
    truth = cast(given, torch.float64)
    with modest_device():
        ops.rotation_step(*ours, **options)
    for reference in (expected, truth):
        ROTATION_STEP.reference(*reference, **options, exp=torch.linalg.matrix_exp)
    for index in (0, 2, 3):
        assert_as_exact(ours[index], expected[index], truth[index], torch.float32)


@pytest.mark.parametrize("norm", [0.0, 1e-3, 1.0, 30.0, 1e4])
def test_the_exponential_by_products_is_orthogonal(norm):
    s = torch.randn(3, 7, 7)
    s = norm * (s - s.mT) / (s - s.mT).abs().sum(-1).max()
    s[1] *= 0.01  # squared less often than its mates
    q = SKEW_EXP.exp_by_products(s)
    defect = (q.mT.double() @ q.double() - torch.eye(7, dtype=torch.float64)).abs().max()
    assert defect <= 4 * 7 * torch.finfo(torch.float32).eps * max(1, norm) ** 0.5
    assert_as_exact(q[1:2], SKEW_EXP.exp_by_products(s[1:2]), q[1:2].double(), torch.float32)
    truth = torch.linalg.matrix_exp(s.double())
    assert (q - truth).abs().max() <= 4 * FLOOR[torch.float32] * max(1, norm)
    assert SKEW_EXP.exp_by_products(s[:0]).shape == (0, 7, 7)
    s[0, 0, 1] = torch.nan
    assert SKEW_EXP.exp_by_products(s)[1:].isfinite().all()
