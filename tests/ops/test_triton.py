"""The Triton kernels without a GPU: their values in the interpreter, their machine code by ptxas.

Both run in processes of their own: Triton decides at import whether it interprets.
"""

import importlib.util
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
ROOT = Path(__file__).parents[2]
# Triton 3.6's interpreter turns arrays of one element into integers, which NumPy 2.4 refuses
PYTHONS_WORK = "consistent or opcheck or compile or cayley"  # not the kernels': tested without it
NUMPY_TOO_NEW = "only 0-dimensional arrays can be converted to Python scalars"


def run(*arguments: str, **environment: str) -> None:
    """Run Python in the checkout; show the end of what it printed if it fails."""
    ended = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    if NUMPY_TOO_NEW in ended.stdout:
        pytest.skip("the interpreter of this Triton does not work with this NumPy")
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]


WITHOUT_TRITON = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "triton" else find(name, *more)
sys.modules["triton"] = None  # what an import of it finds
import torch
from oneshot_fast import ops
assert "triton" not in ops.backends()
x, a = torch.randn(2, 4, 8, 8, device="{device}"), torch.zeros(2, 16, 16, device="{device}")
a.requires_grad_()
z = ops.patch_rotate(x, ops.skew_exp(a), 2)
torch.testing.assert_close(z, x)
ops.latent_mse(z, x, x, 1.0).sum().backward()
assert a.grad.device == x.device
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_ops_work_without_triton(device):
    run("-c", WITHOUT_TRITON.format(device=device))


@needs_triton
@pytest.mark.slow
def test_kernels_agree_with_the_references_in_the_interpreter():
    run(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *("tests/ops/test_triton_kernels.py", "tests/ops/test_ops.py"),
        *("-k", f"interpreter and not ({PYTHONS_WORK})"),
        TRITON_INTERPRET="1",
    )


@needs_triton
def test_the_series_has_the_numbers_of_cpp():
    tool = runpy.run_path(str(ROOT / "tools" / "series_table.py"))
    assert tool["TABLE"].read_text() == tool["table"]()
    numbers = runpy.run_path(str(tool["TABLE"]))
    for n, value in enumerate(numbers["INVERSE_FACTORIALS"].value):
        assert value == 1 / math.factorial(n)
    for name, roundoff in (("THETA32", 2**-24), ("THETA64", 2**-53)):
        truth = (roundoff * math.factorial(13)) ** (1 / 13)
        assert numbers[name].value == pytest.approx(truth, rel=5e-3)


FOR_ROCM = """
import torch
torch.version.hip = "6.4"
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from oneshot_fast.kernels import skew_exp
constants = skew_exp._constants(torch.empty(2, 16, 16, device="meta"), "ieee")
options = {"num_warps": constants.pop("num_warps")}
signature = {"a_ptr": "*fp32", "q_ptr": "*fp32", "D": "i32"} | dict.fromkeys(constants, "constexpr")
source = ASTSource(skew_exp.skew_exp_kernel, signature, constexprs=constants)
compiled = triton.compile(source, target=GPUTarget("hip", "gfx942", 64), options=options)
assert "asm" not in compiled.asm["ttir"]
assert compiled.asm["hsaco"]
"""


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_rocm():
    """The one with assembly of NVIDIA's in it."""
    run("-c", FOR_ROCM)


@needs_triton
@pytest.mark.slow
def test_kernels_compile_without_spills(tmp_path):
    """One kernel; `make check` has the tool compile all of them."""
    run(
        "tools/check_triton.py",
        *("--arch", "90", "--dtype", "float32", "--kernel", "latent_mse"),
        TRITON_CACHE_DIR=str(tmp_path),
        TRITON_INTERPRET="0",
    )
