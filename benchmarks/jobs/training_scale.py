"""The M-step on several processes, and on many pairs: memory of each process, time of a step.

Engines: SFT of the tiny model by one process, by DDP and by FSDP2, one thread each, in turns. The
bytes of weights and moments are counted in a process; they do not depend on the machine.
Pairs: made-up lines of a manifest, which name a few real noises and images over and over. Anonymous
memory of one process (RssAnon: without the files that it maps), without the model and what is
imported, after the list is read, after the latents are on disk, and after some steps' reading, and
the most of all that time, looked at ten times a second; and the time of each.
Writes benchmarks/results/training_scale.json and .md; what is left out stays as it was there, also
single lengths of manifests.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from torch import Tensor

from benchmarks.common import RESULTS, environment
from oneshot_fast.data.manifests import read_manifest, read_manifests
from oneshot_fast.embedded.digits import write_default_dataset
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.sft.pairs import Examples
from oneshot_fast.jobs.sft.run import SftRun
from oneshot_fast.runtime.processes import leave, processes
from oneshot_fast.runtime.sharded import own_part
from oneshot_fast.training.batch import batches
from oneshot_fast.training.run import contents_of

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}
VARIANTS = {"one": 1, "DDP 2": 2, "DDP 3": 3, "FSDP2 2": 2}


@dataclass
class Config:
    """What to run."""

    samples: int = 48
    """Matched pairs of the engines' trainings."""
    steps: int = 24
    """Steps of each."""
    batch_size: int = 8
    """Pairs of a step, of all processes together."""
    rounds: int = 3
    """How often each engine takes its turn; 0 leaves them out."""
    pairs: tuple[int, ...] = (1_000, 100_000)
    """Lengths of the made-up manifests; 1000000 takes a while; 0 leaves them out."""
    reads: int = 200
    """Batches that are read of each."""
    output: Path = RESULTS / "training_scale.json"
    """Where the results go; the table beside it."""


class Counted(SftRun):
    """A training that counts the bytes of a process's weights and moments."""

    held = 0

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        trainer = self.trainers["student"]
        states = [*trainer.optimizer._optimizers[0].state.values()]
        moments = [value for state in states for value in state.values() if value.ndim]
        self.held = _bytes([*trainer.parameters.values(), *moments])
        return {}


def _bytes(tensors: list[Tensor]) -> int:
    return sum(own_part(tensor).nbytes for tensor in tensors)


def train(folder: Path, config: Config) -> None:
    """One process of a training; writes what it was."""
    pairs, _ = read_manifest(folder / "assigned" / "manifest.jsonl")
    options = SftOptions(max_steps=config.steps, batch_size=config.batch_size, lr=1e-5)
    place = folder / f"run-{time.time_ns() if processes().num_processes == 1 else os.getppid()}"
    run = Counted(load_generator("tiny", master_weights=True), pairs, place, options)
    summary = run.run()
    if processes().is_main_process:
        found = {"steps_per_second": summary["steps_per_second"], "held": run.held}
        (folder / "found.json").write_text(json.dumps(found))
    leave()


def stream(folder: Path, count: int, config: Config) -> dict[str, Any]:
    """Memory and times of a process that reads so many pairs."""
    source = (folder / "assigned" / "manifest.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in source]
    manifest = folder / "assigned" / f"{count}.jsonl"
    with manifest.open("w") as file:
        for k in range(count):
            row = rows[k % len(rows)] | {"id": f"{k:012x}", "prompt": f"a made-up prompt, {k}"}
            file.write(json.dumps(row) + "\n")
    generator = load_generator("tiny")
    first = read_manifest(folder / "assigned" / "manifest.jsonl")[0][0]
    TargetImages(generator).latent(*first.place)
    before, started, most = _resident(), time.perf_counter(), list[int]()
    threading.Thread(target=_watch, args=(most,), daemon=True).start()
    pairs, _ = read_manifests([manifest])
    found: dict[str, Any] = {"pairs": count, "listed": _resident() - before}
    found["list_seconds"], started = time.perf_counter() - started, time.perf_counter()
    run = SftRun(generator, pairs, folder / str(count), SftOptions())
    run.settings()
    examples = Examples(generator, run.targets, pairs, [], folder / f"latents-{count}")
    contents_of(examples.pairs, "", "")
    found |= {"encoded": _resident() - before, "encode_seconds": time.perf_counter() - started}
    order, times = batches(examples.kinds, config.batch_size, 0, 0, config.reads), list[float]()
    for batch in order:
        started = time.perf_counter()
        examples.noises(batch)
        examples.latents(batch)
        times.append(time.perf_counter() - started)
    found |= {"trained": _resident() - before, "batch_seconds": statistics.median(times)}
    return found | {"most": max(*most, _resident()) - before}


def _watch(most: list[int]) -> None:
    """Note the memory of this process, again and again."""
    while True:
        most.append(_resident())
        time.sleep(0.1)


def _resident() -> int:
    """Bytes of memory of this process, without the files that it maps."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def start(folder: Path, config: Config, variant: str = "", count: int = 0) -> dict[str, Any]:
    """One turn in processes of its own; what it found."""
    number = VARIANTS.get(variant, 1)
    launcher = [sys.executable, "-m"]
    if number > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(number), "-m"]
    given = json.dumps(dataclasses.asdict(config), default=str)
    argv = [*launcher, "benchmarks.jobs.training_scale", "--worker", str(folder), given, str(count)]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    load = os.getloadavg()[0]
    subprocess.run(
        argv, env=environ | (FSDP2 if "FSDP2" in variant else {}), check=True, capture_output=True
    )
    found: dict[str, Any] = json.loads((folder / "found.json").read_text()) | {"load": load}
    print(variant or count, found, flush=True)
    return found


def markdown(results: dict[str, Any]) -> str:
    """The tables, with what they hold for."""
    tables = {"engines": _engines_table, "pairs": _pairs_table}
    lines = ["`python -m benchmarks.jobs.training_scale`"]
    for name, part in results.items():
        lines += ["", *tables[name](part, part["turns"])]
    return "\n".join(lines) + "\n"


def _engines_table(part: dict[str, Any], engines: dict[str, list[dict[str, Any]]]) -> list[str]:
    config = part["config"]
    lines = [
        f"Tiny model, {config['steps']} steps of {config['batch_size']} pairs, one thread per "
        f"process, medians of {config['rounds']} turns. "
        + _about(part, [turn for turns in engines.values() for turn in turns]),
        "",
        "| engine | steps per second | weights and moments per process, MB |",
        "| --- | --- | --- |",
    ]
    for name, turns in engines.items():
        speed = statistics.median(turn["steps_per_second"] for turn in turns)
        lines.append(f"| {name} | {speed:.2f} | {turns[0]['held'] / 1e6:.2f} |")
    return lines


def _pairs_table(part: dict[str, Any], turns: list[dict[str, Any]]) -> list[str]:
    names = ["list read", "latents on disk", "steps read", "most"]
    heads = ["pairs", *(f"{name}, MB" for name in names), "a pair more, bytes"]
    heads += ["list, s", "latents, s", "a batch, ms", "commit"]
    lines = [
        "Anonymous memory of one process beside the model, where made-up pairs are read, and the "
        f"bytes of the most that a pair more takes. {_about(part, turns)}",
        "",
        f"| {' | '.join(heads)} |",
        "| --- " * len(heads) + "|",
    ]
    before: dict[str, Any] | None = None
    for found in turns:
        sizes = [f"{found[name] / 1e6:.1f}" for name in ("listed", "encoded", "trained", "most")]
        more = [found[name] - before[name] for name in ("most", "pairs")] if before else None
        each = f"{more[0] / more[1]:.1f}" if more else ""
        times = [f"{found[name]:.1f}" for name in ("list_seconds", "encode_seconds")]
        cells = [f"{found['pairs']:,}", *sizes, each, *times, f"{1e3 * found['batch_seconds']:.2f}"]
        cells.append(found["commit"])
        lines.append(f"| {' | '.join(cells)} |")
        before = found
    return lines


def _about(part: dict[str, Any], turns: list[dict[str, Any]]) -> str:
    """What a part of the numbers holds for."""
    loads = [turn["load"] for turn in turns]
    return (
        f"On {part['device']}, {part['cpus']} CPUs, torch {part['build']['torch_running']}, commit "
        f"{part['commit']}, {part['date'][:10]}; load average before the turns {min(loads):.1f} to "
        f"{max(loads):.1f}: above {part['cpus']} times say little."
    )


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    config = tyro.cli(Config, args=argv, description=__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_default_dataset(folder / "data")
        flags = f"--model_id tiny --steps 2 --num_images 0 --max_samples {config.samples}"
        place = ["--data_root", folder / "data" / "train", "--output_dir", folder / "assigned"]
        command = [sys.executable, "-m", "oneshot_fast.assign", *flags.split(), *map(str, place)]
        subprocess.run(command, check=True, capture_output=True)
        turns = [name for _ in range(config.rounds) for name in VARIANTS]
        engines: dict[str, list[dict[str, Any]]] = {}
        for variant in turns:
            engines.setdefault(variant, []).append(start(folder, config, variant))
        pairs = [start(folder, config, count=count) for count in config.pairs if count]
    settings = {key: value for key, value in vars(config).items() if key != "output"}
    about = environment("cpu", 0) | {"cpus": os.cpu_count(), "config": settings}
    results = json.loads(config.output.read_text()) if config.output.exists() else {}
    lengths = {turn["pairs"]: turn for turn in results.get("pairs", {}).get("turns", [])}
    lengths |= {turn["pairs"]: turn | {"commit": about["commit"]} for turn in pairs}
    pairs = [lengths[count] for count in sorted(lengths)] if pairs else []
    for name, found in (("engines", engines), ("pairs", pairs)):
        results |= {name: about | {"turns": found}} if found else {}
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(json.dumps(results, indent=1) + "\n")
    config.output.with_suffix(".md").write_text(markdown(results))
    print(markdown(results))
    return 0


def worker(folder: str, given: str, count: str) -> int:
    """One process of one turn."""
    config = Config(**json.loads(given))
    if not int(count):
        train(Path(folder), config)
        return 0
    found = stream(Path(folder), int(count), config)
    (Path(folder) / "found.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(worker(*sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main())
