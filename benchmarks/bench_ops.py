"""Time every op of ``OPS`` beside plain torch and torch.compile; prints ratios and writes JSON.

All variants of a case run in turn, round after round, so that other load on the machine hits each
of them alike; the ratios of their medians are the result.
"""

import json
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

import oneshot_fast
from oneshot_fast.ops import OPS
from oneshot_fast.ops._register import OpSpec

RESULTS = Path(__file__).parent / "results"
OTHERS = ("eager", "compile", "clone")


@dataclass
class Config:
    """What to run."""

    ops: list[str] = field(default_factory=lambda: [spec.name for spec in OPS])
    """Names of the ops."""
    threads: list[int] = field(default_factory=lambda: [1, 2])
    """Numbers of CPU threads."""
    seconds: float = 0.4
    """Time spent on each case and pass, in seconds."""
    compile: bool = True
    """Also time torch.compile of the reference."""
    seed: int = 0
    """Seed of the inputs."""
    output: Path | None = None
    """JSON file; by default benchmarks/results/ops-<cpu>.json."""


def main(argv: list[str] | None = None) -> int:
    """Run the benchmarks."""
    config = tyro.cli(Config, args=argv, description=__doc__)
    records = []
    ratios = "".join(f"{name:>8}" for name in OTHERS)
    print(f"{'case':<58}{'threads':>8} {'pass':<8}{'ours us':>10}{ratios}")
    for spec in OPS:
        for case in spec.large if spec.name in config.ops else ():
            torch.compiler.reset()
            for threads in config.threads:
                torch.set_num_threads(threads)
                for name, quantiles in bench_case(spec, case, config).items():
                    records.append(
                        {"op": spec.name, "case": repr(case), "threads": threads}
                        | {"pass": name, "microseconds": quantiles}
                    )
                    print_row(records[-1])
    output = config.output or RESULTS / f"ops-{oneshot_fast.build_info()['cpu_isa']}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    results = environment(config) | {"records": records}
    output.write_text(json.dumps(results, indent=1) + "\n")
    output.with_suffix(".md").write_text(markdown(results))
    print(
        f"wrote {output} and .md; ratios are other / ours, quantiles 0.2, 0.5, 0.8 are in the file"
    )
    return 0


def bench_case(spec: OpSpec, case: tuple[Any, ...], config: Config) -> dict[str, Any]:
    """Quantiles in microseconds by pass ("forward", "both") and variant."""
    torch.manual_seed(config.seed)
    args = [a.float() if isinstance(a, Tensor) else a for a in spec.inputs(*case)]
    variants = {"ours": spec.fn, "eager": spec.reference}
    if config.compile:
        variants["compile"] = torch.compile(spec.reference, dynamic=False)
    for a in args[: spec.trained]:
        a.requires_grad_()
    cotangent = torch.randn_like(spec.fn(*args))
    forward = {name: lambda f=f: no_grad(f, args) for name, f in variants.items()}
    both = {
        name: lambda f=f: torch.autograd.grad(f(*args), args[: spec.trained], cotangent)
        for name, f in variants.items()
    }
    clone = {"clone": lambda: args[0].detach().clone()}  # the memory bound: one read, one write
    return {
        "forward": interleave(forward | clone, config.seconds),
        "both": interleave(both | clone, config.seconds),
    }


def no_grad(fn: Callable[..., Tensor], args: list[Any]) -> Tensor:
    """Call without autograd."""
    with torch.no_grad():
        return fn(*args)


def interleave(variants: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Time the variants in turn for ``seconds``; 0.2, 0.5 and 0.8 quantiles in microseconds."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < 5:
        for name, run in variants.items():
            start = time.perf_counter_ns()
            run()
            times[name].append((time.perf_counter_ns() - start) / 1e3)
    return {name: np.quantile(t, [0.2, 0.5, 0.8]).round(2).tolist() for name, t in times.items()}


def print_row(record: dict[str, Any]) -> None:
    """One line of the table: our median, and the others' as multiples of it."""
    median = {name: quantiles[1] for name, quantiles in record["microseconds"].items()}
    ratios = [
        f"{median[name] / median['ours']:>8.2f}" if name in median else f"{'-':>8}"
        for name in OTHERS
    ]
    case = f"{record['op']} {record['case']}"
    print(
        f"{case:<58}{record['threads']:>8} {record['pass']:<8}{median['ours']:>10.1f}",
        *ratios,
        sep="",
        flush=True,
    )


def markdown(results: dict[str, Any]) -> str:
    """The whole table, with what it holds for."""
    build = results["build"]
    lines = [
        f"`make bench` on {results['device']}, {build['cpu_isa']}, torch {build['torch_running']}, "
        f"commit {results['commit']}, float32, seed {results['seed']}. Median time of ours; as "
        "multiples of it those of the reference in eager mode, of torch.compile of the reference "
        "and of `torch.clone` of the first input.",
        "",
        "| op and case | threads | pass | ours, us | eager | compile | clone |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in results["records"]:
        median = {name: quantiles[1] for name, quantiles in record["microseconds"].items()}
        cells = [f"{median[n] / median['ours']:.2f}" if n in median else "-" for n in OTHERS]
        case = f"{record['op']} `{record['case']}`"
        lines.append(
            f"| {case} | {record['threads']} | {record['pass']} | {median['ours']:.1f} | "
            + " | ".join(cells)
            + " |"
        )
    return "\n".join(lines) + "\n"


def environment(config: Config) -> dict[str, Any]:
    """What the numbers hold for."""
    git = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    models = (
        [
            line.split(":")[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        if cpuinfo.exists()
        else []
    )
    return {
        "device": models[0] if models else platform.processor(),
        "commit": commit or None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": config.seed,
        "dtype": "float32",
        "build": oneshot_fast.build_info(),
    }


if __name__ == "__main__":
    raise SystemExit(main())
