"""Build driver: setuptools -> CMake -> ninja. The metadata is in pyproject.toml.

torch is no build requirement: an isolated build would fetch a second, CUDA torch and link to it.
The extension is built against the torch that is installed, and OSF_TORCH_PYTHON may name the
interpreter that has it (uv and `python -m build` hide it).
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 11)
QUERY = """
import importlib.util, pathlib, runpy, sys
spec = importlib.util.find_spec("torch")
if spec is None or not spec.submodule_search_locations:
    sys.exit(1)
folder = pathlib.Path(spec.submodule_search_locations[0])
print(runpy.run_path(str(folder / "version.py"))["__version__"], folder, sep="|")
"""


def installed_torch() -> tuple[str, str]:
    """Version and folder of the torch that the package will run with, without importing it.

    pip hides the user's packages in an isolated build behind PYTHONPATH only, so a child process
    without it sees them.
    """
    python = os.environ.get("OSF_TORCH_PYTHON", sys.executable)
    hidden = {"PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME"}
    for env in (None, {k: v for k, v in os.environ.items() if k not in hidden}):
        command = [python, "-c", QUERY]
        query = subprocess.run(command, env=env, capture_output=True, text=True)
        if query.returncode == 0:
            version, folder = query.stdout.strip().split("|")
            break
    else:
        sys.exit(
            f"oneshot_fast needs an installed torch to build, and {python} has none: install torch "
            ">= 2.11, then repeat (with --no-build-isolation, or its python in OSF_TORCH_PYTHON)"
        )
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TORCH:
        sys.exit(f"oneshot_fast needs torch >= 2.11, found {version} in {folder}")
    return version, folder


class CMakeBuild(build_ext):
    """Runs CMake, which is the one build description."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        torch_version, torch_folder = installed_torch()
        if shutil.which("cmake") is None or shutil.which("ninja") is None:
            sys.exit("oneshot_fast needs cmake and ninja to build: pip install cmake ninja")
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch_version}"
        configure = [
            *("cmake", "-S", ROOT, "-B", build, "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DOSF_TORCH_VERSION={torch_version}",
            f"-DOSF_TORCH_DIR={torch_folder}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", build], check=True)


setup(
    ext_modules=[Extension("oneshot_fast._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
