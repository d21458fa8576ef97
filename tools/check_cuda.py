"""Build with CUDA for every architecture, without a GPU: resources of the kernels, and CPU tests.

Needs nvcc but neither a GPU nor a CUDA torch. A warning is an error, and so are spills and a stack
frame, since arrays meant for registers would be slow memory, and more shared memory, static and
dynamic, than a block of the architecture may have, since the launch would fail. What was built must
import beside the installed torch and pass the ops' tests on the CPU.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# shared bytes that a block may have, static and dynamic (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability"); static alone it is 48 KB everywhere
SHARED_BYTES = {
    arch: size << 10
    for arch, size in {"80": 163, "86": 99, "89": 99, "90": 227, "100": 227, "120": 99}.items()
}
STATIC_SHARED_BYTES = 48 << 10
IGNORED = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.so", "__pycache__", "*.egg-info")

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
    r"(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    """Resources of one kernel on one architecture, in bytes where not registers."""

    source: str
    arch: str
    name: str
    registers: int
    static: int
    dynamic: int
    stack: int
    spills: int

    @property
    def fits(self) -> bool:
        """Whether it can be launched, and nothing that belongs into registers lies in memory."""
        within = self.static + self.dynamic <= SHARED_BYTES[self.arch]
        return within and self.static <= STATIC_SHARED_BYTES and self.stack == self.spills == 0


def parse(source: str, log: str) -> list[Kernel]:
    """Read the resource report that ``-Xptxas -v`` prints."""
    kernels = []
    for entry in ENTRY.finditer(log):
        static = re.search(r"(\d+) bytes smem", entry["rest"])
        dynamic = re.search(r"DynamicSharedILi(\d+)E", entry["name"])  # csrc/cuda/common.cuh
        kernels.append(
            Kernel(
                source=source,
                arch=entry["arch"],
                name=entry["name"],
                registers=int(entry["registers"]),
                static=int(static[1]) if static else 0,
                dynamic=int(dynamic[1]) if dynamic else 0,
                stack=int(entry["stack"]),
                spills=int(entry["stores"]) + int(entry["loads"]),
            )
        )
    return kernels


def build(architectures: list[str], site: Path) -> list[Kernel]:
    """Install with CUDA into ``site``; raise with the compiler's words if that fails.

    The oldest architecture's PTX, which takes most of the time, serves all: no kernel asks which
    one it is compiled for.
    """
    oldest, *newer = sorted(architectures, key=int)
    codes = "".join(f" -gencode=arch=compute_{oldest},code=sm_{arch}" for arch in newer)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=IGNORED)
        run = subprocess.run(
            [
                *(sys.executable, "-m", "pip", "install", "-v", "--disable-pip-version-check"),
                *("--no-deps", "--no-build-isolation", "--target", str(site), str(tree)),
            ],
            env=os.environ
            | {"OSF_WITH_CUDA": "on", "OSF_CUDA_ARCHITECTURES": f"{oldest}-real"}
            # host code is not optimised, which is sooner done and leaves the kernels as they are
            | {"CUDAFLAGS": f"-Xptxas=-v{codes}", "CMAKE_BUILD_TYPE": "None"},
            capture_output=True,
            text=True,
        )
    log = run.stdout + run.stderr
    if run.returncode != 0:
        raise RuntimeError(f"the build with CUDA failed:\n{log[-20000:]}")
    kernels: list[Kernel] = []
    for step in re.split(r"^\s*\[\d+/\d+\] Building CUDA object .*/", log, flags=re.MULTILINE)[1:]:
        found = parse(step.split(".o\n")[0], step)
        if len(found) != step.count("Compiling entry function"):
            raise RuntimeError(f"did not understand the report of ptxas:\n{step[:5000]}")
        kernels += found
    return kernels


def test(site: Path) -> bool:
    """Whether the ops' tests pass with the package in ``site``, whose CPU kernels are as ever."""
    pytest = [shutil.which("pytest", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")]
    few = "contiguous and (opcheck or test_value_and_gradients and float32)"
    select = ["-k", f"{few} or wrong_arguments or backends", "-m", "not slow"]
    run = subprocess.run(
        [
            *pytest,
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            "pythonpath=tests/helpers",
            *select,
            "tests/ops/test_ops.py",
        ],
        env=os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    print("\n".join(run.stdout.splitlines()[-1 if run.returncode == 0 else -40 :]))
    where = [
        sys.executable,
        "-c",
        "import oneshot_fast as o; print(o.__file__, bool(o._C.cuda_architectures))",
    ]
    used = subprocess.run(
        where, env=os.environ | {"PYTHONPATH": str(site)}, cwd=site, capture_output=True, text=True
    )
    return run.returncode == 0 and used.stdout == f"{site}/oneshot_fast/__init__.py True\n"


def family(name: str) -> str:
    """Name of the function template that a mangled name is an instance of."""
    rest = name.removeprefix("_ZN").removeprefix("_Z")
    last = name
    while (size := re.match(r"\d+", rest)) is not None:
        last, rest = rest[size.end() :][: int(size[0])], rest[size.end() + int(size[0]) :]
    return last


def report(kernels: list[Kernel], every: bool) -> list[str]:
    """Table of the kernels, or of the most expensive instance of each template."""
    groups: dict[tuple[str, ...], list[Kernel]] = {}
    for kernel in kernels:
        name = kernel.name if every else family(kernel.name)
        groups.setdefault((kernel.source, name, kernel.arch), []).append(kernel)
    lines = [
        "| source | kernel | sm | number | registers | shared bytes | allowed | stack | spills |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (source, name, arch), group in sorted(groups.items()):
        registers = sorted(k.registers for k in group)
        spread = str(registers[0]) if len(group) == 1 else f"{registers[0]} to {registers[-1]}"
        lines.append(
            f"| {source} | {name} | {arch} | {len(group)} | {spread} "
            f"| {max(k.static + k.dynamic for k in group)} | {SHARED_BYTES[arch]} "
            f"| {max(k.stack for k in group)} | {max(k.spills for k in group)} |"
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    """Build, check and test; 0 if all is well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="one line per instance")
    parser.add_argument("--arch", nargs="+", default=[*SHARED_BYTES], choices=SHARED_BYTES)
    options = parser.parse_args(argv)
    if shutil.which("nvcc") is None:
        print("skipped: nvcc is not on PATH, the CUDA kernels are not checked")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            kernels = build(options.arch, Path(folder))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        passed = test(Path(folder))
    print("\n".join(report(kernels, options.all)))
    bad = [kernel for kernel in kernels if not kernel.fits]
    for kernel in bad:
        print(f"does not fit: {kernel}", file=sys.stderr)
    print(f"{len(kernels)} kernels, {len(bad)} do not fit; CPU tests with the CUDA build: {passed}")
    return 0 if kernels and passed and not bad else 1


if __name__ == "__main__":
    sys.exit(main())
