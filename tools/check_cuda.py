"""Compile every CUDA kernel for every architecture and report its registers, memory and spills.

Needs nvcc but no GPU and no CUDA torch. A warning is an error, and so are spills, a stack frame and
more static shared memory than a block has: arrays meant for registers would be slow memory.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
ARCHITECTURES = ("80", "90", "100")
FLAGS = ("-std=c++20", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra")
STATIC_SHARED_BYTES = 48 << 10

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
    shared: int
    stack: int
    spills: int

    @property
    def fits(self) -> bool:
        """Whether nothing that belongs into registers lies in memory."""
        return self.stack == 0 and self.spills == 0 and self.shared <= STATIC_SHARED_BYTES


def parse(source: str, log: str) -> list[Kernel]:
    """Read the resource report that ``-Xptxas -v`` prints."""
    kernels = []
    for entry in ENTRY.finditer(log):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        kernels.append(
            Kernel(
                source=source,
                arch=entry["arch"],
                name=entry["name"],
                registers=int(entry["registers"]),
                shared=int(shared[1]) if shared else 0,
                stack=int(entry["stack"]),
                spills=int(entry["stores"]) + int(entry["loads"]),
            )
        )
    return kernels


def compile_source(nvcc: str, source: Path, arch: str) -> list[Kernel]:
    """Compile one file for one architecture; raise with the compiler's words if that fails."""
    with tempfile.TemporaryDirectory() as folder:
        target = f"arch=compute_{arch},code=[sm_{arch},compute_{arch}]"
        command = [nvcc, *FLAGS, "-gencode", target, "-Xptxas", "-v", "-c", str(source)]
        command += ["-o", str(Path(folder) / "object.o")]
        run = subprocess.run(command, capture_output=True, text=True)
    log = run.stdout + run.stderr
    if run.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{log}")
    kernels = parse(source.name, log)
    reports = log.count("Compiling entry function")
    if len(kernels) != reports or not kernels:
        raise RuntimeError(f"{source.name}: read {len(kernels)} of {reports} reports of ptxas")
    return kernels


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
        "| source | kernel | sm | instances | registers | shared bytes | stack | spills |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (source, name, arch), group in sorted(groups.items()):
        registers = sorted(k.registers for k in group)
        spread = str(registers[0]) if len(group) == 1 else f"{registers[0]} to {registers[-1]}"
        lines.append(
            f"| {source} | {name} | {arch} | {len(group)} | {spread} "
            f"| {max(k.shared for k in group)} | {max(k.stack for k in group)} "
            f"| {max(k.spills for k in group)} |"
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    """Check all sources; 0 if every kernel fits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="one line per instance")
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, metavar="NUMBER")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(argv)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("skipped: nvcc is not on PATH, the CUDA kernels are not checked")
        return 0
    sources = sorted(SOURCES.glob("*.cu"))
    tasks = [(nvcc, source, arch) for source in sources for arch in options.arch]
    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            kernels = [k for part in pool.map(lambda t: compile_source(*t), tasks) for k in part]
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    print("\n".join(report(kernels, options.all)))
    bad = [kernel for kernel in kernels if not kernel.fits]
    for kernel in bad:
        print(f"does not fit: {kernel}", file=sys.stderr)
    print(f"{len(kernels)} kernels of {len(sources)} files, {len(bad)} do not fit")
    return 1 if bad or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
