"""Assignment and SFT of the tiny model by one process and by two, side by side in one run.

Every process has one thread. Two separate jobs at the same time show what the machine can give to
two processes at best: two virtual CPUs may be two threads of one core. The variants take their
turns, round after round, so that other load hits all of them alike. Times are those of a run in its
folder, from run.json to summary.json: imports and the loading of the model are not counted.
Writes benchmarks/results/two_processes.json and .md.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.common import RESULTS, environment
from oneshot_fast.embedded.digits import write_default_dataset


@dataclass
class Config:
    """What to run."""

    samples: int = 48
    """Targets, and matched pairs."""
    steps: int = 10
    """Gradient steps per target."""
    batch_size: int = 4
    """Targets per batch, and pairs per training step."""
    epochs: int = 2
    """Passes over the pairs."""
    rounds: int = 3
    """How often each variant takes its turn."""
    output: Path = RESULTS / "two_processes.json"
    """Where the results go; the table beside it."""


def start(processes: int, command: str, *flags: object) -> subprocess.Popen[bytes]:
    """Start a command with so many processes of one thread each."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        launcher += ["-m"]
    return subprocess.Popen(
        [*launcher, f"oneshot_fast.{command}", *map(str, flags)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def seconds(folder: Path) -> float:
    """Time that a run took in its folder."""
    ends = [(folder / name).stat().st_mtime_ns for name in ("run.json", "summary.json")]
    return (ends[1] - ends[0]) / 1e9


def turn(variant: str, command: str, flags: list[object], folder: Path) -> dict[str, Any]:
    """One turn of a variant: seconds per job, and the load that it began with."""
    load = os.getloadavg()[0]
    folders = [folder / name for name in ("a", "b")[: 2 if variant == "apart" else 1]]
    processes = 2 if variant == "two" else 1
    jobs = [start(processes, command, *flags, "--output_dir", each) for each in folders]
    errors = [job.communicate()[1].decode() for job in jobs]
    if any(job.returncode for job in jobs):
        raise SystemExit("\n".join(errors)[-3000:])
    # two jobs at once are two jobs in the time of the slower one
    return {"seconds": max(map(seconds, folders)) / len(folders), "load": load}


def measure(config: Config, folder: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """All turns, by command and variant."""
    write_default_dataset(folder / "data")
    common: list[object] = ["--model_id", "tiny", "--batch_size", config.batch_size]
    limits = ["--max_samples", config.samples, "--num_images", 0]
    manifest = folder / "pairs" / "manifest.jsonl"
    flags: dict[str, list[object]] = {
        "assign": [
            "--data_root", folder / "data" / "train", *limits, "--steps", config.steps, *common
        ],
        "sft": ["--manifest_path", manifest, "--epochs", config.epochs, *common],
    }  # fmt: skip
    pairs = start(1, "assign", *flags["assign"], "--output_dir", manifest.parent)
    if pairs.wait():
        raise SystemExit(f"assign failed: {pairs.stderr and pairs.stderr.read().decode()[-3000:]}")
    turns: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for number in range(config.rounds):
        for command in flags:
            for variant in ("one", "two", "apart"):
                place = folder / f"{command}-{variant}-{number}"
                result = turn(variant, command, flags[command], place)
                turns.setdefault(command, {}).setdefault(variant, []).append(result)
                print(
                    f"round {number} {command:6} {variant:5} {result['seconds']:.1f} s", flush=True
                )
    return turns


def threads_per_core() -> str:
    """As lscpu says."""
    try:
        listed = subprocess.run(["lscpu"], capture_output=True, text=True).stdout
    except OSError:
        return "unknown"
    found = [line.split(":")[1].strip() for line in listed.splitlines() if "per core" in line]
    return found[0] if found else "unknown"


def markdown(results: dict[str, Any]) -> str:
    """The table, with what it holds for."""
    config, loads = results["config"], results["loads"]
    lines = [
        f"`python -m benchmarks.jobs.two_processes` on "
        f"{results['device']}, {results['cpus']} CPUs, "
        f"{results['threads_per_core']} threads per core as the system tells (virtual CPUs may be "
        f"threads of one core all the same), torch {results['build']['torch_running']}, commit "
        f"{results['commit']}, {results['date'][:10]}. Tiny model, {config['samples']} targets in "
        f"batches of {config['batch_size']}, {config['steps']} steps each; SFT on these pairs, "
        f"{config['epochs']} epochs. One thread per process, medians (and ranges) of "
        f"{config['rounds']} turns. "
        f"Load average before the turns: {min(loads):.1f} to {max(loads):.1f}; this run itself "
        f"makes up to 2 of it, the rest is other work on the machine. Above {results['cpus']} the "
        "times are those of a changing part of the machine, and ratios say little.",
        "",
        "| job | one process, s | two processes, s | times as fast "
        "| two separate jobs, s per job | times as fast |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for command, turns in results["turns"].items():
        times = {name: [each["seconds"] for each in some] for name, some in turns.items()}
        median = {name: statistics.median(some) for name, some in times.items()}
        cells = {
            name: f"{median[name]:.1f} ({min(some):.1f} to {max(some):.1f})"
            for name, some in times.items()
        }
        two, apart = (f"{median['one'] / median[name]:.2f}" for name in ("two", "apart"))
        row = [command, cells["one"], cells["two"], two, cells["apart"], apart]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    config = tyro.cli(Config, args=argv, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        turns = measure(config, Path(folder))
    all_turns = [each for variants in turns.values() for some in variants.values() for each in some]
    settings = {key: value for key, value in vars(config).items() if key != "output"}
    results = environment("cpu", 0) | {
        "cpus": os.cpu_count(),
        "threads_per_core": threads_per_core(),
        "config": settings,
        "loads": [each["load"] for each in all_turns],
        "turns": turns,
    }
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps(results, indent=1) + "\n")
    config.output.with_suffix(".md").write_text(markdown(results))
    print(markdown(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
