import os
import subprocess
import sys

import torch

import oneshot_fast


def test_names_what_a_bug_report_needs():
    info = oneshot_fast.build_info()
    assert info["oneshot_fast"] == oneshot_fast.__version__
    assert info["torch_running"] == torch.__version__
    assert info["cpu_isa"] in ("generic", "avx2", "avx512", "avx512_bf16")
    assert info["cuda_version"] == torch.version.cuda
    assert all(info[name] for name in ("compiler", "torch_built_against"))


def isa_with(**env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "import oneshot_fast; print(oneshot_fast.build_info())"]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True)


def test_the_environment_chooses_the_instruction_set():
    assert "'cpu_isa': 'generic'" in isa_with(OSF_CPU="generic").stdout


def test_an_unknown_instruction_set_is_refused():
    run = isa_with(OSF_CPU="sse9")
    assert run.returncode != 0
    assert "OSF_CPU=sse9, but this CPU has" in run.stderr.splitlines()[-1]
