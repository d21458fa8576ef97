import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from oneshot_fast import _C

ROOT = Path(__file__).parents[2]


def run(*command, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | {k: str(v) for k, v in env.items()},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def bare_python(tmp_path) -> Path:
    """An interpreter without torch."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    return tmp_path / "bare" / "bin" / "python"


@pytest.mark.parametrize(
    ("version", "message"), [(None, "install torch >= 2.11"), ("2.10.1+cpu", "found 2.10.1+cpu")]
)
def test_build_names_a_missing_or_old_torch_in_one_line(bare_python, tmp_path, version, message):
    if version:
        site = next((tmp_path / "bare" / "lib").glob("python*/site-packages"))
        (site / "torch").mkdir()
        (site / "torch" / "__init__.py").touch()
        (site / "torch" / "version.py").write_text(f"__version__ = {version!r}\n")
    target = tmp_path / "out"
    build = run("setup.py", "-q", "build", "-b", target, OSF_TORCH_PYTHON=bare_python)
    assert build.returncode != 0
    assert message in build.stderr.strip().splitlines()[-1]
    assert "Traceback" not in build.stderr


LOAD = """
import ctypes, importlib.util, sys
ctypes.CDLL(sys.argv[2], ctypes.RTLD_GLOBAL)  # as import torch does, which has no build for all
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.isa(), module.torch_version)
"""


def loads_in_every_python(extension: Path) -> None:
    """The one extension in each other interpreter that is at hand."""
    libtorch = Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"
    for minor in range(10, 15):
        python = shutil.which(f"python3.{minor}")
        if python and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            command = [python, "-c", LOAD, extension, libtorch]
            loaded = subprocess.run(command, capture_output=True, text=True)
            assert loaded.stdout.split() == [_C.isa(), torch.__version__], loaded.stderr


@pytest.mark.slow
def test_sdist_installs_and_computes(tmp_path):
    """From the sdist alone, through a wheel, against the torch that is installed."""
    files = [f for f in (ROOT / "oneshot_fast").rglob("*") if f.suffix not in (".pyc", ".so")]
    files += (ROOT / "oneshot_fast" / "kernels").glob("*.py")  # rglob may skip symbolic links
    built = run("setup.py", "-q", "sdist", "-d", tmp_path)
    assert built.returncode == 0, built.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert not [name for name in archive.getnames() if name.endswith((".so", ".pyc"))]
    site = tmp_path / "site"
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
    # not optimised: that build is the one which all other tests use
    installed = run(*pip, "--target", site, sdist, CMAKE_BUILD_TYPE="None")
    assert installed.returncode == 0, installed.stderr
    missing = [f for f in files if f.is_file() and not (site / f.relative_to(ROOT)).is_file()]
    assert not missing
    (wheel,) = site.glob("oneshot_fast-*.dist-info/WHEEL")
    assert "Tag: cp310-abi3-" in wheel.read_text()
    loads_in_every_python(site / "oneshot_fast" / "_C.abi3.so")
    compute = (
        "import torch, oneshot_fast; from oneshot_fast import ops;"
        "print(oneshot_fast.__file__, ops.skew_exp(torch.zeros(3, 3)).trace().item())"
    )
    used = run("-c", compute, PYTHONPATH=site, PYTHONSAFEPATH=1)
    assert used.stdout.split() == [str(site / "oneshot_fast" / "__init__.py"), "3.0"], used.stderr
