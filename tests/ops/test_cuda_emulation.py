"""The values of the CUDA kernels without a GPU.

A host compiler builds csrc/cuda as it is, against the headers in cuda_emulation, which run the
blocks of a grid one after another and the threads of a block in turn, each up to its next barrier.
The ops then run on CPU tensors through these kernels and are held against their references.

This shows wrong values and indices; outputs that are not written; reads of memory that is not
initialised, and accesses just outside of an array (all that lies there is NaN and must stay so);
misaligned accesses of tensor cores; barriers that are left out, mostly, or not reached by all;
copies that nobody waits for; and results that depend on the order of threads or the number of
blocks. It does not show what needs a GPU: races between blocks, asynchronous launches, weak memory
order, caches, the rounding of 16-bit tensor cores and of fast instructions, registers and speed.

CXX and CXXFLAGS are used as by make. With the sanitizers of GCC every access is checked, and every
pair of accesses within a block for a barrier between them:

    T="python -m pytest tests/ops/test_cuda_emulation.py"
    CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all" ASAN_OPTIONS=detect_leaks=0 \
        LD_PRELOAD=$(g++ -print-file-name=libasan.so) $T
    CXXFLAGS=-fsanitize=thread LD_PRELOAD=$(g++ -print-file-name=libtsan.so) setarch -R $T
"""

import ctypes
import functools
import math
import os
import shlex
import shutil
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from op_checks import (
    DTYPES,
    GPU_CASES,
    MORE_CASES,
    assert_as_exact,
    assert_equal,
    assert_value_and_gradients,
    make,
    tensors,
)
from rotation_samples import MODULE, MOMENTS, OPTIONS, cast, start
from torch import Tensor

from oneshot_fast import ops

EMULATION = Path(__file__).with_name("cuda_emulation")
KERNELS = Path(__file__).parents[2] / "csrc" / "cuda"
FLAGS = (
    "-std=c++20 -Og -march=native -fPIC -fno-strict-aliasing -fno-extern-tls-init "
    "-Wno-unknown-pragmas"
)
GUARD = 256  # bytes


class Grid(ctypes.Structure):
    """PatchGrid of csrc/patch_grid.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("B", "C", "H", "W", "p", "Gh", "Gw")]


class Matrices(ctypes.Structure):
    """Matrices of csrc/kernels.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("transposed", ctypes.c_bool),
    ]


class RotationOptions(ctypes.Structure):
    """RotationOptions of csrc/kernels.h."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "max_angle")),
        ("scalar", ctypes.c_bool),
    ]


def argument(a):
    """What a launcher takes for a Python value."""
    if isinstance(a, torch.dtype):
        return ctypes.c_int([torch.float32, torch.float64, torch.float16, torch.bfloat16].index(a))
    if isinstance(a, Tensor):
        return ctypes.c_void_p(a.data_ptr())
    if isinstance(a, ctypes.Structure):
        return ctypes.byref(a)
    kinds = {bool: ctypes.c_bool, int: ctypes.c_int64, float: ctypes.c_double}
    return kinds.get(type(a), ctypes.c_void_p)(a)


def memory(shape, dtype, shift: int = 0) -> Tensor:
    """A tensor full of NaN amid more of it, ``shift`` elements behind an aligned address."""
    begin, size = GUARD + shift * dtype.itemsize, shape.numel() * dtype.itemsize
    every = torch.full((begin + size + GUARD,), 0xFF, dtype=torch.uint8)
    return every[begin : begin + size].view(dtype).view(shape)


def is_untouched_around(t: Tensor) -> bool:
    """Whether what lies around a tensor made by ``memory`` is as it was."""
    every = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
    begin = t.storage_offset() * t.itemsize
    return bool((every[:begin] == 0xFF).all() and (every[begin + t.nbytes :] == 0xFF).all())


class Emulator:
    """The ops on CPU tensors through the CUDA kernels, each in both schedules of the emulator.

    Arguments lie in memory of their own, ``shift`` elements behind an aligned address; results are
    tuples.
    """

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self.shift = 0

    def serve(self, library: torch.library.Library) -> None:
        """Replace the CPU's kernels."""

        def call(name, *args):
            results = self.run(name, *args)
            return results[0] if len(results) == 1 else results

        def rotation_step(q, g, m, v, steps, *options):
            moved = self.run("rotation_step", q, g, m, v, steps, *options)
            for old, new in zip((q, m, v, steps), moved, strict=True):
                old.copy_(new)

        names = [name for name in vars(Emulator) if hasattr(torch.ops.oneshot_fast, name)]
        for name in names:
            library.impl(name, functools.partial(call, name), "CPU")
        library.impl("rotation_step", rotation_step, "CPU")

    def run(self, name: str, *args) -> tuple[Tensor, ...]:
        """Results of an op, which the schedule must not change."""
        schedule = ctypes.c_int.in_dll(self._library, "emulated_schedule")
        results = []
        for schedule.value in (0, 1):
            placed = (self._place(a) if isinstance(a, Tensor) else a for a in args)
            results.append(getattr(self, name)(*placed))
        assert_equal(*results)
        return results[0]

    def patch_rotate(self, x, q, p):
        D, transposed = q.shape[-1], not q.is_contiguous()
        matrices = Matrices(q.data_ptr(), D * D if q.dim() > 2 else 0, transposed)
        out = self._memory(x.shape, x.dtype)
        self._launch("patch_rotate", x.dtype, grid(x, p, q.shape[:-2]), x, matrices, out)
        assert is_untouched_around(q)
        return (out,)

    def d_patch_rotate(self, grad, x, q, p):
        rotated = self.patch_rotate(grad, q.mT, p)
        return *rotated, *self.patch_outer(grad, x, p, list(q.shape[:-2]))

    def patch_outer(self, a, b, p, leading):
        D, shared = a.shape[1] * p * p, not leading
        arguments = a.dtype, grid(a, p, leading)
        work = self._workspace("patch_outer", *arguments, shared)
        out = self._memory(torch.Size([*leading, D, D]), a.dtype)
        self._launch("patch_outer", *arguments, a, b, shared, work, out)
        return (out,)

    def skew_exp(self, a):
        return self._exponential("skew_exp", a)

    def d_skew_exp(self, grad, a, q):
        return self._exponential("d_skew_exp", grad, a, q)

    def _exponential(self, name, *inputs):
        a = inputs[0]
        arguments = a.dtype, a.shape[:-2].numel(), a.shape[-1]
        out, work = self._memory(a.shape, a.dtype), self._workspace(name, *arguments)
        self._launch(name, *arguments, *inputs, work, out)
        return (out,)

    def rotation_step(self, q, g, m, v, steps, *options):
        arguments = g.dtype, steps.numel(), g.shape[-1]
        scalar = v.shape == steps.shape
        self._launch(
            "rotation_step", *arguments, RotationOptions(*options, scalar), g, q, m, v, steps
        )
        return q, m, v, steps

    def latent_mse(self, *args):
        return self._loss("latent_mse", *args)

    def pixel_l1(self, *args):
        return self._loss("pixel_l1", *args)

    def _loss(self, name, x, *others):
        B, n, acc = len(x), x.shape[1:].numel(), torch.promote_types(x.dtype, torch.float32)
        loss, work = self._memory(torch.Size([B]), acc), self._workspace("loss", B, n)
        self._launch(name, x.dtype, B, n, x, *others, work, loss)
        return (loss,)

    def d_latent_mse(self, *args):
        return self._loss_gradient("d_latent_mse", *args)

    def d_pixel_l1(self, *args):
        return self._loss_gradient("d_pixel_l1", *args)

    def _loss_gradient(self, name, grad, x, *others):
        out = self._memory(x.shape, x.dtype)
        self._launch(name, x.dtype, len(x), x.shape[1:].numel(), grad, x, *others, out)
        return (out,)

    def _launch(self, name, *args):
        error = self._call(name, ctypes.c_int, *args, None)
        assert error == 0, self._call("error_text", ctypes.c_char_p, error)
        assert all(is_untouched_around(t) for t in tensors(args))

    def _workspace(self, name, *args):
        size = self._call(f"{name}_workspace_bytes", ctypes.c_int64, *args)
        return memory(torch.Size([size]), torch.uint8)

    def _call(self, name, result, *args):
        address = ctypes.c_void_p.in_dll(self._library, f"emulated_{name}").value
        return ctypes.CFUNCTYPE(result)(address)(*map(argument, args))

    def _memory(self, shape, dtype):
        return memory(shape, dtype, self.shift)

    def _place(self, t):
        """A copy in memory of our own; matrices may be transposed ones."""
        if not t.is_contiguous() and t.mT.is_contiguous():
            return self._place(t.mT).mT
        return self._memory(t.shape, t.dtype).copy_(t)


def grid(x, p, leading) -> Grid:
    return Grid(*x.shape, p, *(leading[1:] if len(leading) == 3 else (1, 1)))


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not on PATH")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one of them builds for all
        folder = folder.parent
    flags = [*FLAGS.split(), *shlex.split(os.environ.get("CXXFLAGS", ""))]

    def compiled(source: Path) -> Path:
        output = folder / f"{source.stem}.o"
        own = ["-fno-sanitize=all"] if source.suffix == ".cpp" else []
        run(*flags, *own, f"-I{EMULATION}", "-x", "c++", "-c", source, "-o", output)
        return output

    def run(*arguments: str | Path) -> None:
        subprocess.run([compiler, *arguments], check=True, env={**os.environ, "LD_PRELOAD": ""})

    library = folder / "emulated_kernels.so"
    with FileLock(f"{library}.lock"), ThreadPoolExecutor(os.cpu_count()) as pool:
        if not library.exists():
            sources = [EMULATION / "emulator.cpp", *KERNELS.glob("*.cu")]
            run(*flags, "-shared", *pool.map(compiled, sources), "-o", library)
    return Emulator(library)


@pytest.fixture(params=[0, 1], ids=["aligned", "misaligned"])
def emulated(emulator, request):
    """The emulator, which serves CPU tensors."""
    library = torch.library.Library("oneshot_fast", "IMPL")
    emulator.shift = request.param
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of kernels that are replaced
        emulator.serve(library)
        yield emulator
    library._destroy()


SPECS = {spec.name: spec for spec in ops.OPS}
# instead of an image past the CPU's caches, one of more chunks than a warp adds at once
MANY_CHUNKS = ((1, 3, 220, 204),)
GPU_MORE_CASES = [
    param
    for param in MORE_CASES
    if param.values[0].gpu_kernels and math.prod(param.values[1][0]) < 1 << 18
]
GPU_MORE_CASES.append(pytest.param(SPECS["pixel_l1"], MANY_CHUNKS, id=f"pixel_l1-{MANY_CHUNKS}"))
PATCHES_OF_256 = ((1, 4, 16, 24), 8, (1,))
RUNS = [
    ((2, 4, 10, 16), 2, (2,)),
    ((2, 4, 8, 16), 2, (2, 2, 2)),
    ((1, 8, 4, 16), 2, ()),
    ((1, 16, 3, 16), 1, (1,)),
    ((1, 32, 2, 16), 1, ()),
    ((1, 1, 8, 16), 4, (1,)),
    ((1, 2, 8, 8), 4, ()),
]
PADDED = [((1, 9, 8, 16), 2, ()), ((2, 36, 2, 24), 1, (2,)), ((1, 3, 8, 24), 4, (1,))]
LARGE = [
    pytest.param("patch_rotate", PATCHES_OF_256, torch.float32, id="patch_rotate-float32"),
    pytest.param("patch_rotate", PATCHES_OF_256, torch.float16, id="patch_rotate-float16"),
    pytest.param("patch_outer", PATCHES_OF_256, torch.float32, id="patch_outer-float32"),
    pytest.param("patch_outer", PATCHES_OF_256, torch.float16, id="patch_outer-float16"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("spec", "case"), [*GPU_CASES, *GPU_MORE_CASES])
def test_value_and_gradients(spec, case, dtype, emulated):
    assert_value_and_gradients(spec, make(spec, case, dtype), dtype)


@pytest.mark.parametrize(("name", "case", "dtype"), LARGE)
def test_value_and_gradients_of_256_elements(name, case, dtype, emulated):
    assert_value_and_gradients(SPECS[name], make(SPECS[name], case, dtype), dtype)


@pytest.mark.parametrize("emulated", [0], indirect=True, ids=["aligned"])
@pytest.mark.parametrize(
    ("D", "norm"),
    [(96, 0.3), (96, 1e5), (128, 3000.0), (160, 4.0)],
)
def test_products_of_tf32_are_as_exact_as_float32(D, norm, emulated):
    """Value and gradient, and orthogonal to the 4 D ulp of docs/ops.md."""
    spec = SPECS["skew_exp"]
    args = make(spec, ((1, D, D), norm), torch.float32)
    q = assert_value_and_gradients(spec, args, torch.float32)[0].double()
    assert (q.mT @ q - torch.eye(D)).abs().max() < 4 * D * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", RUNS, ids=str)
@pytest.mark.parametrize("name", ["patch_rotate", "patch_outer"])
def test_value_and_gradients_of_whole_runs(name, case, dtype, emulated):
    """Where a row of patches is runs of 16 bytes, registers hold the operands of tensor cores."""
    assert_value_and_gradients(SPECS[name], make(SPECS[name], case, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", PADDED, ids=str)
@pytest.mark.parametrize("name", ["patch_rotate", "patch_outer"])
def test_value_and_gradients_of_padded_products(name, case, dtype, emulated):
    """36 or 48 elements are less than the 64 x 64 that a block computes on tensor cores."""
    assert_value_and_gradients(SPECS[name], make(SPECS[name], case, dtype), dtype)


def test_matrices_of_a_batch_are_squared_as_alone(emulated):
    """One launch squares all of them, each as often as it needs."""
    a = make(SPECS["skew_exp"], ((4, 66, 66), 2.0), torch.float64)[0]
    a = a * torch.tensor([0.1, 500.0, 20.0, 3.0]).double()[:, None, None]
    q = ops.skew_exp(a)
    assert torch.dist(q, torch.linalg.matrix_exp(a - a.mT)) < 1e-9
    (together,) = emulated.run("d_skew_exp", a.flip(1), a, q)
    for b in range(4):
        (alone,) = emulated.run("d_skew_exp", a[b : b + 1].flip(1), a[b : b + 1], q[b : b + 1])
        assert torch.equal(ops.skew_exp(a[b : b + 1]), q[b : b + 1])
        assert torch.equal(alone, together[b : b + 1])


@pytest.mark.parametrize("scalar", MOMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 5, 5), (2, 31, 31)], ids=str)
def test_rotation_step(shape, dtype, scalar, emulated):
    for options in OPTIONS.values():
        given = cast(start(shape, scalar), dtype)
        ours, reference = cast(given, dtype), cast(given, dtype)
        truth = cast(given, torch.float64)
        ops.rotation_step(*ours, **options)
        MODULE.reference(*reference, **options)
        MODULE.reference(*truth, **options)
        for index in (0, 2, 3):
            assert_as_exact(ours[index], reference[index], truth[index], reference[index].dtype)
        assert torch.equal(ours[4], given[4] + 1)
