"""Time every op beside plain torch and torch.compile; prints a table and writes JSON.

All variants of a case run in turn, round after round, so that other load on the machine hits each
of them alike; the ratios of their medians are the result. On a GPU the inputs are cold and the time
is the GPU's own, see timing.py. An op whose tests fail is not reported. With ``--base REV`` the
package at another commit is measured as well, see compare.py.
"""

import argparse
import gc
import importlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.common import RESULTS
from benchmarks.ops.compare import compare, failing_ops
from benchmarks.ops.results import about, has_kernels, header, markdown, row
from benchmarks.ops.timing import (
    Job,
    Times,
    copy_bandwidth,
    cpu_times,
    cuda_times,
    input_sets,
    launch_microseconds,
)
from oneshot_fast import ops
from oneshot_fast.ops import OPS
from oneshot_fast.ops._register import OpSpec

# Measured first on a GPU; the other sizes are those of the SPECs. torch.compile is timed here only,
# unless told otherwise, since it takes seconds to compile each.
TARGETS: dict[str, list[tuple[Any, ...]]] = {
    "patch_rotate": [((64, 4, 64, 64), 2, (64,)), ((256, 4, 128, 128), 2, (256,))],
    "patch_outer": [((64, 4, 64, 64), 2, (64,)), ((256, 4, 128, 128), 2, (256,))],
    "skew_exp": [((64, D, D), 1.0) for D in (16, 64, 256)],
    "cayley": [((64, D, D), 1.0) for D in (16, 64, 256)],
    "latent_mse": [((64, 4, 64, 64), 14.6), ((256, 4, 128, 128), 14.6)],
    "pixel_l1": [((16, 3, 512, 512),)],
    "rotation_step": [((64, D, D),) for D in (16, 64)],
}


def _step(step: Callable[..., None]) -> Callable[..., Tensor]:
    """A step of rotations in place, with the matrices as its value."""

    def stepped(q: Tensor, *state: Tensor) -> Tensor:
        step(q, *state, lr=0.01)
        return q

    return stepped


def _steps(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Rotations, a gradient, moments and step counts in the midst of a run."""
    a, g, m = torch.randn(3, *shape, dtype=torch.float64)
    v = (m - m.mT).square()
    return torch.linalg.matrix_exp(a - a.mT), g, m - m.mT, v, torch.full(shape[:-2], 7.0).double()


# no function with a gradient, so none of OPS
_ROTATION_STEP = OpSpec(
    name="rotation_step",
    fn=_step(ops.rotation_step),
    reference=_step(importlib.import_module("oneshot_fast.ops.rotation_step").reference),
    inputs=_steps,
    small=[],
    large=[((B, D, D),) for B, D in ((1, 16), (64, 16), (1, 64), (64, 64), (1, 256))],
    trained=0,
)
BENCHED = (*OPS, _ROTATION_STEP)

Variant = tuple[Callable[..., Any], Any]
"""A function, and what makes the context in which it is called."""

PASSES = {"cpu": ("forward", "both"), "cuda": ("forward", "backward", "both")}
DTYPES = {"cpu": ["float32"], "cuda": ["float32", "bfloat16"]}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """What to run. By argparse, since a machine with a GPU may have torch and little else."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    names = [spec.name for spec in BENCHED]
    dtypes = ["float32", "bfloat16", "float16", "float64"]
    every = ["all", "targets", "none"]
    add = parser.add_argument
    add("--ops", nargs="*", default=names, help=f"which of {', '.join(names)}")
    add("--device", default="cuda" if on_gpu else "cpu", choices=["cpu", "cuda"], help="where")
    add(
        "--dtypes",
        nargs="+",
        choices=dtypes,
        help="float32, and on a GPU bfloat16 too, if left out",
    )
    add("--threads", nargs="+", type=int, default=[1, 2], help="numbers of threads, on a CPU")
    add("--cases", default="all", choices=every[:2], help="which sizes")
    add("--seconds", type=float, default=0.4, help="spent on each case and pass")
    add(
        "--budget",
        type=float,
        default=math.inf,
        help="seconds after which no case is begun; no compilation after three quarters of them",
    )
    help = "cases in which torch.compile of the reference is timed as well"
    add("--compile", default="targets" if on_gpu else "all", choices=every, help=help)
    add(
        "--tests",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="first run the ops' tests of values and gradients, and leave out ops that fail",
    )
    add("--base", help="commit of this repository to compare with")
    add("--rounds", type=int, default=3, help="runs of each commit, in turn, when comparing")
    add("--seed", type=int, default=0, help="of the inputs")
    add("--output", type=Path, help="JSON file; benchmarks/results/<device>.json if left out")
    config = parser.parse_args(argv)
    if unknown := [name for name in config.ops if name not in names]:
        said = f"no ops {', '.join(unknown)}; there are {', '.join(names)}"
        if config.tests:
            parser.error(said)
        print(said)  # with --base, the other commit may lack some
    return config


def main(argv: list[str] | None = None) -> int:
    """Run the benchmarks; 1 where an op's tests fail."""
    config = parse(argv)
    if config.device == "cuda" and not torch.cuda.is_available():
        print("skipped: there is no CUDA device")
        return 0
    failing = failing_ops(config.ops, config.device) if config.tests else {}
    for name, why in failing.items():
        print(f"{name}: not measured, since {why}")
    config.ops = [name for name in config.ops if name not in failing]
    if config.base:
        compare(config, config.base)
        return 1 if failing else 0
    results = about(config.device, config.seed)
    if config.device == "cuda":
        with torch.cuda.stream(torch.cuda.Stream()):  # the default stream cannot be captured
            results |= {"copy_bandwidth": copy_bandwidth(), "launch": launch_microseconds()}
            print(f"copy: {results['copy_bandwidth'] / 1e12:.3f} TB/s read plus written")
            print(f"launch in a graph: {results['launch']:.2f} us")
            results["records"] = run(config, results)
    else:
        results["records"] = run(config, results)
    output = config.output or RESULTS / f"{results['name']}.json"
    write(results, output)
    print(f"wrote {output} and .md; ratios are other / ours; the file has the quantiles")
    return 1 if failing else 0


def write(results: dict[str, Any], output: Path) -> None:
    """The results as JSON, and as a table beside it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    output.with_suffix(".md").write_text(markdown(results))


def run(config: argparse.Namespace, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Measure everything that the time allows."""
    start, records, left_out = time.monotonic(), [], 0
    print(header(results))
    for spec, case, target in cases(config):
        for dtype in config.dtypes or DTYPES[config.device]:
            spent = (time.monotonic() - start) / config.budget
            if spent > 1:
                left_out += 1
                continue
            compiled = config.compile == "all" or (config.compile == "targets" and target)
            torch.compiler.reset()
            for threads in config.threads if config.device == "cpu" else [None]:
                named = {"op": spec.name, "case": repr(case), "dtype": dtype}
                if threads:
                    torch.set_num_threads(threads)
                    named["threads"] = threads
                try:
                    for record in bench_case(spec, case, dtype, config, compiled and spent < 0.75):
                        records.append(named | record)
                        print(row(records[-1], results), flush=True)
                except RuntimeError as error:  # of one case, some of them torch's own
                    print(f"{' '.join(map(str, named.values()))} fails: {error}", flush=True)
    if left_out:
        print(f"out of time: {left_out} cases are not measured")
    return records


def cases(config: argparse.Namespace) -> Iterator[tuple[OpSpec, tuple[Any, ...], bool]]:
    """Op, case and whether it is a target; on a GPU the targets first."""
    chosen = [spec for spec in BENCHED if spec.name in config.ops]
    if config.device == "cuda" or config.cases == "targets":
        yield from ((spec, case, True) for spec in chosen for case in TARGETS.get(spec.name, []))
    if config.cases == "all":
        for spec in chosen:
            first = TARGETS.get(spec.name, []) if config.device == "cuda" else []
            yield from ((spec, case, False) for case in spec.large if case not in first)


def bench_case(
    spec: OpSpec, case: tuple[Any, ...], dtype: str, config: argparse.Namespace, compiled: bool
) -> Iterator[dict[str, Any]]:
    """A record for each pass."""
    args = arguments(spec, case, dtype, config.device, config.seed)
    with torch.no_grad():
        cotangent = torch.randn_like(spec.reference(*args))
    read = sum(a.nbytes for a in args if isinstance(a, Tensor))
    gradients = sum(a.nbytes for a in args[: spec.trained])
    moved = {
        "forward": read + cotangent.nbytes,
        "backward": read + cotangent.nbytes + gradients,
        "both": read + 2 * cotangent.nbytes + gradients,
    }
    sets = [
        ([leaf(a, i < spec.trained) for i, a in enumerate(args)], cotangent.clone())
        for _ in range(input_sets(config.device, read))
    ]
    measure = cpu_times if config.device == "cpu" else cuda_times
    for name in PASSES[config.device] if spec.trained else ("forward",):
        jobs = jobs_of(name, variants(spec, config.device, compiled), sets, spec.trained)
        if spec.name == "patch_rotate" and config.device == "cpu":
            jobs["bmm"] = bmm(name, args[0], args[1], cotangent)
        gc.freeze()  # every capture collects garbage, and torch has many objects to look at
        times: Times = measure(jobs, len(sets), config.seconds)
        yield {"pass": name, "bytes": moved[name], "sets": len(sets), **times}


def arguments(spec: OpSpec, case: tuple[Any, ...], dtype: str, device: str, seed: int) -> list[Any]:
    """The arguments of a case, random by ``seed``; of a step only the gradient is narrower."""
    torch.manual_seed(seed)
    given = getattr(torch, dtype)
    state = given if spec.trained else torch.promote_types(given, torch.float32)
    return [
        a.to(device, given if i == 1 else state) if isinstance(a, Tensor) else a
        for i, a in enumerate(spec.inputs(*case))
    ]


def leaf(a: Any, trained: bool) -> Any:
    return a.clone().requires_grad_(trained) if isinstance(a, Tensor) else a


def variants(spec: OpSpec, device: str, compiled: bool) -> dict[str, Variant]:
    """What is timed: functions and the contexts they need; ours first."""
    names = getattr(ops, "backends", tuple)() if has_kernels(spec) else ()
    backends = [name for name in names if name != "reference"] if device == "cuda" else []
    ours = {name: (spec.fn, partial(ops.use_backend, name)) for name in backends}
    found = ours or {"ours": (spec.fn, nullcontext)}
    found["eager"] = (spec.reference, nullcontext)
    if compiled:
        torch._functorch.config.donated_buffer = False  # a repeated backward pass needs them
        found["compile"] = (torch.compile(spec.reference, dynamic=False), nullcontext)
    return found


def jobs_of(
    name: str,
    functions: dict[str, Variant],
    sets: list[tuple[list[Any], Tensor]],
    trained: int,
) -> dict[str, Job]:
    """Calls of a pass by variant; ``clone`` is the memory bound: one read, one write."""

    def forward(fn: Callable[..., Tensor], i: int) -> Tensor:
        with torch.no_grad():
            return fn(*sets[i][0])

    def both(fn: Callable[..., Tensor], i: int) -> Any:
        args, cotangent = sets[i]
        return torch.autograd.grad(fn(*args), args[:trained], cotangent)

    def backward(values: list[Tensor], i: int) -> Any:
        args, cotangent = sets[i]
        return torch.autograd.grad(values[i], args[:trained], cotangent, retain_graph=True)

    jobs = {}
    for variant, (fn, context) in functions.items():
        if name == "backward":
            with context():
                jobs[variant] = Job(partial(backward, [fn(*args) for args, _ in sets]), context)
        else:
            jobs[variant] = Job(partial(forward if name == "forward" else both, fn), context)
    return jobs | {"clone": Job(lambda i: sets[i][0][0].detach().clone())}


def bmm(name: str, x: Tensor, q: Tensor, cotangent: Tensor) -> Job:
    """The products of ``patch_rotate`` by torch.bmm, of patches that lie ready: [B, D, N]."""
    patches, grad = (t.reshape(q.shape[0], q.shape[-1], -1) for t in (x, cotangent))
    inputs = [leaf(q, True), leaf(patches, True)]
    return jobs_of(name, {"bmm": (torch.bmm, nullcontext)}, [(inputs, grad.clone())], 2)["bmm"]


if __name__ == "__main__":
    raise SystemExit(main())
