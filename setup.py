"""Build driver: setuptools -> CMake -> ninja. The metadata is in pyproject.toml.

torch is no build requirement: an isolated build would fetch a second, CUDA torch and link to it.
The extension is built against the torch that is installed, and OSF_TORCH_PYTHON may name the
interpreter that has it (uv and `python -m build` hide it).

Environment variables: OSF_TORCH_PYTHON; OSF_WITH_CUDA = auto (the default: the CUDA kernels are
built if the installed torch has CUDA and nvcc is found), on or off; OSF_CUDA_ARCHITECTURES, as in
CMake.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
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
version = runpy.run_path(str(folder / "version.py"))
print(version["__version__"], version.get("cuda") or "", folder, sep="|")
"""


def installed_torch() -> tuple[str, str, str]:
    """Version, CUDA version or "", and folder of the torch that the package will run with.

    pip hides the user's packages in an isolated build behind PYTHONPATH only, so a child process
    without it sees them.
    """
    python = os.environ.get("OSF_TORCH_PYTHON", sys.executable)
    hidden = {"PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME"}
    for env in (None, {k: v for k, v in os.environ.items() if k not in hidden}):
        command = [python, "-c", QUERY]
        query = subprocess.run(command, env=env, capture_output=True, text=True)
        if query.returncode == 0:
            version, cuda, folder = query.stdout.strip().split("|")
            break
    else:
        sys.exit(
            f"oneshot_fast needs an installed torch to build, and {python} has none: install torch "
            ">= 2.11, then repeat (with --no-build-isolation, or its python in OSF_TORCH_PYTHON)"
        )
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TORCH:
        sys.exit(f"oneshot_fast needs torch >= 2.11, found {version} in {folder}")
    return version, cuda, folder


def with_cuda(torch_cuda: str) -> bool:
    """Whether to build the CUDA kernels."""
    wanted = os.environ.get("OSF_WITH_CUDA", "auto").lower()
    if wanted not in ("auto", "on", "off"):
        sys.exit(f"OSF_WITH_CUDA is {wanted!r}; set it to auto, on or off")
    found = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if wanted == "on" and not found:
        sys.exit("OSF_WITH_CUDA is on but nvcc is not on PATH: install CUDA or set CUDACXX")
    if wanted == "auto" and torch_cuda and not found:
        print("oneshot_fast: no nvcc on PATH, so the GPU will be served by Triton", file=sys.stderr)
    return wanted == "on" or (wanted == "auto" and bool(torch_cuda and found))


class CMakeBuild(build_ext):
    """Runs CMake, which is the one build description."""

    def build_extension(self, ext: Extension) -> None:
        torch_version, torch_cuda, torch_folder = installed_torch()
        path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))
        cmake, ninja = (shutil.which(tool, path=path) for tool in ("cmake", "ninja"))
        if cmake is None or ninja is None:
            sys.exit("oneshot_fast needs cmake and ninja to build: pip install cmake ninja")
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch_version}"
        for old in (ROOT / "oneshot_fast").glob("_C.cpython-*.so"):  # would hide the one for all
            old.unlink()
        configure = [
            *(cmake, "-S", ROOT, "-B", build, "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DOSF_TORCH_VERSION={torch_version}",
            f"-DOSF_TORCH_DIR={torch_folder}",
            f"-DOSF_WITH_CUDA={'ON' if with_cuda(torch_cuda) else 'OFF'}",
        ]
        if architectures := os.environ.get("OSF_CUDA_ARCHITECTURES"):
            configure.append(f"-DOSF_CUDA_ARCHITECTURES={architectures}")
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", build], check=True)


setup(
    ext_modules=[Extension("oneshot_fast._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
