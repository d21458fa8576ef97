"""Assignment and SFT of SDXL-Turbo's architecture: the usual recipe beside ours, in one run.

The models have random weights of the real sizes, so nothing is downloaded. All variants do the same
number of steps on the same images with the same loss, in turn, round after round, so that other
load hits all of them alike. Writes benchmarks/results/sdxl_turbo-<device>-<arch>.json and .md.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.common import RESULTS, ROOT, environment, slug
from benchmarks.sdxl.config import Config
from benchmarks.sdxl.variants import Bench
from oneshot_fast.runtime.progress import silence_imports


def peak_memory(config: Config, kind: str, name: str) -> int | None:
    """Peak bytes of one turn in a process of its own: the GPU's allocations, or resident memory."""
    command = [sys.executable, "-m", "benchmarks.sdxl.turbo", "--only", f"{kind}: {name}"]
    command += [
        "--arch",
        config.arch,
        "--device",
        config.device,
        "--steps",
        "2",
        "--images",
        str(config.images),
    ]
    command += ["--sft-steps", "1", "--batch-sizes", *map(str, config.batch_sizes)]
    command += ["--options", *config.options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in ended.stdout.splitlines() if line.startswith("peak ")]
    return int(lines[-1].split()[1]) if ended.returncode == 0 and lines else None


def only(config: Config, bench: Bench) -> None:
    """One turn of the variant named, then its peak memory on stdout."""
    kind, name = str(config.only).split(": ", 1)
    (bench.variants() if kind == "assign" else bench.training())[name]()
    if config.device.startswith("cuda"):
        print("peak", torch.cuda.max_memory_allocated())
    else:
        # not getrusage's ru_maxrss, in which a new process starts with its parent's peak
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        for line in lines:
            if line.startswith("VmHWM:"):
                print("peak", int(line.split()[1]) << 10)


def measure(config: Config, bench: Bench) -> list[dict[str, Any]]:
    """Take all turns; one row per variant."""
    kinds = {"assign": bench.variants(), "sft": bench.training()}
    turns: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for number in range(config.rounds + 1):  # the first turn warms up
        for kind, variants in kinds.items():
            for name, run in variants.items():
                result = run()
                print(f"round {number} {kind:6} {name:26} {result['seconds']:.2f} s", flush=True)
                if number:
                    turns.setdefault((kind, name), []).append(result)
    rows = []
    for (kind, name), results in turns.items():
        unit = "images" if kind == "assign" else "steps"
        last = results[-1]
        rate = statistics.median(r[unit] / r["seconds"] for r in results)
        row = {"kind": kind, "variant": name, f"{unit}_per_second": rate, "loss": last["loss"]}
        row["peak_bytes"] = peak_memory(config, kind, name) if config.memory else None
        if kind == "assign":
            row |= {k: last[k] / last["images"] for k in ("files", "bytes")}
        rows.append(row)
    return rows


def markdown(results: dict[str, Any]) -> str:
    """Tables of both steps, each with its ratio to the reference."""
    lines = [
        f"`python -m benchmarks.sdxl.turbo --arch {results['arch']}` on {results['device']}, torch "
        f"{results['build']['torch_running']}, commit {results['commit']}, seed {results['seed']}, "
        f"{results['side']} pixels, {results['steps']} steps per image, "
        f"{results['threads']} CPU threads. Medians of {results['rounds']} turns each, in turn. "
        f"Peak memory is {results['memory']}, of a process of its own.",
        "",
        "| assignment | images/s | x | peak GiB | files/image | KiB/image | mean best loss |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["rows"]:
        if row["kind"] == "sft" and "| SFT" not in "".join(lines):
            lines += ["", "| SFT, batch 1 and 1 preserved | s/step | x | peak GiB | loss |"]
            lines += ["| --- | --- | --- | --- | --- |"]
        key = "images_per_second" if row["kind"] == "assign" else "steps_per_second"
        base = next(r[key] for r in results["rows"] if r["kind"] == row["kind"])
        peak = f"{row['peak_bytes'] / 2**30:.2f}" if row["peak_bytes"] else "-"
        value = row[key] if row["kind"] == "assign" else 1 / row[key]
        cells = [row["variant"], f"{value:.3g}", f"{row[key] / base:.1f}", peak]
        if row["kind"] == "assign":
            cells += [f"{row['files']:.1f}", f"{row['bytes'] / 1024:.0f}"]
        lines.append("| " + " | ".join([*cells, f"{row['loss']:.4g}"]) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    silence_imports()
    config = tyro.cli(Config, args=argv, description=__doc__)
    if config.short:
        config.rounds, config.images, config.sft_steps = 1, min(config.images, 8), 2
        config.options = ()
    if config.threads:
        torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(config, Path(folder))
        if config.only:
            only(config, bench)
            return 0
        rows = measure(config, bench)
    kind = "cuda" if config.device.startswith("cuda") else "cpu"
    results = environment(kind, config.seed) | {
        "arch": config.arch,
        "side": bench.side,
        "steps": config.steps,
        "rounds": config.rounds,
        "threads": torch.get_num_threads(),
        "memory": "that of torch's allocator" if kind == "cuda" else "resident memory",
        "rows": rows,
    }
    name = slug(results["device"]) if kind == "cuda" else kind
    output = config.output or RESULTS / f"sdxl_turbo-{name}-{config.arch}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    output.with_suffix(".md").write_text(markdown(results))
    print(markdown(results))
    bad = [row["variant"] for row in rows if not math.isfinite(row["loss"])]
    print(f"wrote {output} and .md" + (f"; losses are not finite: {bad}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
