"""Compile every Triton kernel ahead of time, without a GPU; fail on spills or too much memory.

``python tools/check_triton.py [--arch 80 90 100] [--dtype float32 ...]`` runs every launcher on
tensors without storage, records each kernel, configuration and specialisation that it would launch,
and compiles those. Prints registers per thread, shared memory and spills for each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction, mangle_type

from oneshot_fast.kernels import latent_mse, patch_outer, patch_rotate, pixel_l1, skew_exp

# Bytes of shared memory that one program can have.
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = ("float32", "float16", "bfloat16", "float64")

Launch = tuple[JITFunction, dict[str, Any]]

# architecture, kernel, arguments and specialisation of each thing to compile
TASKS: dict[str, tuple[int, JITFunction, dict[str, Any], tuple[Any, ...]]] = {}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Tensor without storage."""
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(dtypes: Sequence[torch.dtype]) -> Iterator[Callable[[], object]]:
    """Calls of the launchers that together reach every kernel, branch and configuration."""
    for dtype in dtypes:
        for p in (1, 2, 4, 8):
            yield from patch_calls(empty(16, 4, 64, 64, dtype=dtype), p)
        for D in (4, 16, 32, 64, 256):
            a = empty(2, D, D, dtype=dtype)
            yield lambda a=a: skew_exp.skew_exp(a)
            yield lambda a=a: skew_exp.d_skew_exp(a, a, a)
        for shape in ((16, 4, 64, 64), (4, 3, 512, 512)):
            yield from loss_calls(empty(*shape, dtype=dtype))
    if torch.float32 not in dtypes:
        return
    # D = 1024, and sizes that divide nothing
    yield from patch_calls(empty(2, 4, 64, 64), 16)
    yield from patch_calls(empty(2, 3, 63, 63), 3)
    yield from loss_calls(empty(2, 3, 5, 7))


def patch_calls(x: Tensor, p: int) -> Iterator[Callable[[], object]]:
    """patch_rotate and patch_outer of ``x`` [B, C, H, W], with q per image and shared."""
    D = x.shape[1] * p * p
    q = torch.empty(len(x), D, D, dtype=x.dtype, device="meta")
    yield lambda: patch_rotate.patch_rotate(x, q, p)
    yield lambda: patch_rotate.patch_rotate(x, q, p, transpose=True)
    yield lambda: patch_rotate.patch_rotate(x, q[0], p)
    yield lambda: patch_outer.patch_outer(x, x, p, x.shape[:1])
    yield lambda: patch_outer.patch_outer(x, x, p)


def loss_calls(x: Tensor) -> Iterator[Callable[[], object]]:
    """The losses of ``x`` [B, C, H, W] and their gradients."""
    grad = empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
    yield lambda: latent_mse.latent_mse(x, x, x, 14.6)
    yield lambda: latent_mse.d_latent_mse(grad, x, x, x, 14.6, 1.0)
    yield lambda: pixel_l1.pixel_l1(x, x)
    yield lambda: pixel_l1.d_pixel_l1(grad, x, x, False)
    yield lambda: pixel_l1.d_pixel_l1(grad, x, x, True)


def recorded(dtypes: Sequence[torch.dtype]) -> list[Launch]:
    """Every launch of ``calls``, all configurations of tuned kernels among them."""
    launches: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        values = {**dict(zip(self.arg_names, args, strict=False)), **options}
        blocks = grid(values) if callable(grid) else grid
        assert len(blocks) == 1 and 0 < blocks[0] < 2**31, f"{self.__name__}: grid {blocks}"
        launches.append((self, values))

    def tune(self: Autotuner) -> Callable[..., tuple[float, ...]]:
        def once(kernel_call: Callable[[], None], quantiles: Any = None) -> tuple[float, ...]:
            kernel_call()
            return (1.0, 1.0, 1.0)

        return once

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(Autotuner, "do_bench", property(tune)),
    ):
        for call in calls(dtypes):
            call()
    return launches


def specialise(kernel: JITFunction, values: dict[str, Any]) -> tuple[Any, ...]:
    """Signature, constants, attributes and options of a launch, as Triton's launcher makes them."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values.get(parameter.name, parameter.default)
        annotated = parameter.annotation_type
        # plain integers: 1 is a constant, multiples of 16 are known as such
        special = isinstance(value, int) and not parameter.do_not_specialize and not annotated
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        signature[parameter.name] = annotated or mangle_type(value)
        if isinstance(value, Tensor) or (special and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in values.items() if name not in kernel.arg_names}
    return signature, constants, attributes, options


def compile_for(arch: int, kernel: JITFunction, specialised: tuple[Any, ...]) -> dict[str, int]:
    """Registers, bytes of shared memory, and bytes per thread where spilled registers lie."""
    signature, constants, attributes, options = specialised
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "-res-usage", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    return {"registers": registers, "shared": compiled.metadata.shared, "spilled": stack + local}


def compiled_row(key: str) -> dict[str, Any]:
    """Compile one of ``TASKS``; what the table has of it."""
    arch, kernel, values, specialised = TASKS[key]
    about = {"arch": arch, "kernel": kernel.__name__, "case": _label(values, specialised)}
    return about | compile_for(arch, kernel, specialised)


def _output(tool: str, *arguments: str) -> str:
    command = [str(TOOLS / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _label(values: dict[str, Any], specialised: tuple[Any, ...]) -> str:
    """What distinguishes a launch: dtype, compile-time constants, warps."""
    signature, constants, _, options = specialised
    dtype = next(t for t in signature.values() if t.startswith("*"))[1:]
    names = list(signature)
    shown = {
        names[i]: value
        for (i,), value in constants.items()
        if value is not None and names[i].isupper() and names[i] not in ("THETA", "ROUNDOFF", "ACC")
    }
    text = " ".join(f"{name}={value}" for name, value in shown.items() if value != "ieee")
    return f"{dtype} {text} warps={options.get('num_warps', 4)}"


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 where a kernel spills, needs too much memory or does not compile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--dtype", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    options = parser.parse_args(argv)
    for kernel, values in recorded([getattr(torch, name) for name in options.dtype]):
        if options.kernel in kernel.__name__:
            specialised = specialise(kernel, values)
            for arch in options.arch:
                key = f"{arch} {kernel.__name__} {specialised}"
                TASKS.setdefault(key, (arch, kernel, values, specialised))
    rows, bad = [], 0
    # forked, since kernels cannot be sent to a process
    with multiprocessing.get_context("fork").Pool() as pool:
        for row in pool.imap(compiled_row, TASKS):
            failed = row["spilled"] > 0 or row["shared"] > SHARED_LIMIT[row["arch"]]
            bad += failed
            rows.append(row)
            print(
                f"sm_{row['arch']:<4} {row['kernel']:24} {row['registers']:>4} registers "
                f"{row['shared']:>7} bytes shared {row['spilled']:>5} bytes spilled "
                f"{'FAILED ' if failed else ''} {row['case']}",
                flush=True,
            )
    print(f"Triton {triton.__version__}: {len(rows)} kernels compiled, {bad} failed")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
