from pathlib import Path
from typing import Any

import torch

import oneshot_fast


def test_names_what_a_bug_report_needs():
    info = oneshot_fast.build_info()
    assert info["oneshot_fast"] == oneshot_fast.__version__
    assert info["torch_running"] == torch.__version__
    assert info["cpu_isa"] in ("generic", "avx2", "avx512", "avx512_bf16")
    assert info["cuda_version"] == torch.version.cuda
    assert all(info[name] for name in ("compiler", "torch_built_against"))


def isa_with(forks: Any, folder: Path, chosen: str) -> Any:
    """What a process says that has not used the extension yet."""
    script = folder / "isa.py"
    script.write_text("import oneshot_fast; print(oneshot_fast.build_info())")
    return forks.run(str(script), [], folder, environment={"OSF_CPU": chosen})


def test_the_environment_chooses_the_instruction_set(forks: Any, tmp_path: Path) -> None:
    assert "'cpu_isa': 'generic'" in isa_with(forks, tmp_path, "generic").out


def test_an_unknown_instruction_set_is_refused(forks: Any, tmp_path: Path) -> None:
    ended = isa_with(forks, tmp_path, "sse9")
    assert ended.code != 0
    assert "OSF_CPU=sse9, but this CPU has" in ended.err.splitlines()[-1]
