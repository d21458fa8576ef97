"""tools/check_cuda.py: what it reads of the compiler's report, and what it lets pass."""

import runpy
from pathlib import Path

import pytest

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "check_cuda.py"))
LOG = """
ptxas info    : Compiling entry function '_ZN3osf5smallIfLi64ENS0_13DynamicSharedILi{dynamic}EEEEEvT1_' for 'sm_{arch}'
ptxas info    : Function properties for _ZN3osf5smallIfLi64ENS0_13DynamicSharedILi{dynamic}EEEEEvT1_
    {stack} bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 102 registers, used 1 barriers, {static} bytes smem, 392 bytes cmem[0]
"""  # noqa: E501


@pytest.mark.parametrize(
    ("arch", "static", "dynamic", "stack", "fits"),
    [
        ("86", 1 << 10, 98 << 10, 0, True),
        ("86", 1040, 98 << 10, 0, False),
        ("120", 0, 105_216, 0, False),
        ("80", 0, 105_216, 0, True),
        ("80", 49 << 10, 0, 0, False),
        ("90", 0, 0, 8, False),
    ],
)
def test_shared_memory_of_every_architecture_is_kept_to(arch, static, dynamic, stack, fits):
    log = LOG.format(arch=arch, static=static, dynamic=dynamic, stack=stack)
    (kernel,) = TOOL["parse"]("skew_exp.cu", log)
    assert (kernel.arch, kernel.static, kernel.dynamic) == (arch, static, dynamic)
    assert kernel.fits is fits
    assert str(static + dynamic) in TOOL["report"]([kernel], False)[2]
