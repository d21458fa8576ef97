"""``make gpu`` on a machine that has torch and pytest, and neither a GPU nor a network."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TORCH = """torch torchgen functorch typing_extensions.py sympy mpmath networkx jinja2 markupsafe
    filelock fsspec setuptools _distutils_hack"""
PYTEST = "py.py pytest _pytest pluggy pluggy-*.dist-info iniconfig packaging pygments"
LEFT_OUT = shutil.ignore_patterns(
    ".*", "build", "dist", "runs", "docs", "*.egg-info", "__pycache__", "results"
)


def make(tree: Path, *arguments: object) -> subprocess.CompletedProcess:
    # what runs this test says nothing to what it runs
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "MAKE", "PYTHON"))}
    command = ["make", *map(str, arguments), "SYSTEM=1", f"PYTHON={tree.parent}/few/bin/python"]
    return subprocess.run(
        command, cwd=tree, env=env | {"OSF_WITH_CUDA": "off"}, capture_output=True, text=True
    )


@pytest.fixture
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkout whose extension is built, for an interpreter with a few packages and no more."""
    tree, site = tmp_path / "tree", tmp_path / "site-packages"
    shutil.copytree(ROOT, tree, ignore=LEFT_OUT, symlinks=True)
    site.mkdir()
    for name in request.param.split():
        for found in Path(torch.__file__).parents[1].glob(name):
            (site / found.name).symlink_to(found)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "few"], check=True)
    (found,) = (tmp_path / "few" / "lib").glob("python*/site-packages")
    (found / "few.pth").write_text(f"import site; site.addsitedir({str(site)!r})\n")
    metadata = tree / "oneshot_fast-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: oneshot-fast\nVersion: 0.1.0\n")
    ready = make(tree, "build/system/.ready")
    assert ready.returncode == 0, ready.stderr
    (tree / "build" / "system" / ".built-cuda").touch()
    return tree


@pytest.mark.slow
@pytest.mark.parametrize("tree", [f"{TORCH} {PYTEST}"], indirect=True, ids=[""])
def test_tests_are_skipped_where_there_is_no_gpu(tree):
    ended = make(tree, "gpu", "GPU_TESTS=tests/ops/test_gpu.py tests/ops/test_rotation_step.py")
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-2000:]
    assert "needs a CUDA device" in ended.stdout and " passed" not in ended.stdout
    assert "skipped: there is no CUDA device" in ended.stdout
    assert "skipped: diffusers is not installed" in ended.stdout


@pytest.mark.parametrize("tree", [PYTEST], indirect=True, ids=[""])
def test_a_failure_does_not_keep_the_rest_from_running(tree):
    ended = make(tree, "gpu")  # without torch there is no test, and no benchmark
    assert ended.returncode != 0
    assert "skipped: diffusers is not installed" in ended.stdout
