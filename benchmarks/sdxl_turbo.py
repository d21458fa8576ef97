"""Assignment and SFT of SDXL-Turbo's architecture: the usual recipe beside ours, in one run.

The models have random weights of the real sizes, so nothing is downloaded. All variants do the same
number of steps on the same images with the same loss, in turn, round after round, so that other
load hits all of them alike. Writes benchmarks/results/sdxl_turbo-<device>-<arch>.json and .md.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from reference_recipe import ReferenceRecipe
from results import RESULTS, environment, slug
from sdxl_models import SIZES, build_pipeline, write_data

from oneshot_fast.assign_run import AssignRun
from oneshot_fast.cli import silence_imports
from oneshot_fast.data import read_manifest, read_pairs
from oneshot_fast.generator import OneStepGenerator
from oneshot_fast.matching import AssignOptions
from oneshot_fast.sft_run import SftRun
from oneshot_fast.targets import Targets
from oneshot_fast.training import SftOptions


@dataclass
class Config:
    """What to run."""

    arch: Literal["full", "small", "tiny"] = "tiny"
    """full: SDXL-Turbo's sizes at 512 pixels; small: 57 million parameters at 256; tiny: the
    embedded sizes at 128."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""
    steps: int = 10
    """Gradient steps per image."""
    reference_lr: float = 0.02
    """Step size of the usual recipe's Adam; ours finds its own."""
    images: int = 16
    """Images of the data set; ours takes them in one batch, or in several."""
    batch_sizes: tuple[int, ...] = (1, 16)
    """Batch sizes of ours."""
    rounds: int = 3
    """How often each variant takes its turn."""
    sft_steps: int = 4
    """Training steps per turn; 0 leaves the training out."""
    short: bool = False
    """One round, few images: under four minutes on a GPU."""
    memory: bool = True
    """Also measure peak memory, each variant in a process of its own."""
    threads: int | None = None
    """CPU threads."""
    seed: int = 0
    """Seed."""
    output: Path | None = None
    """JSON file; by default in benchmarks/results."""
    only: str | None = None
    """One turn of one variant, for the peak memory of a process of its own."""


class Bench:
    """Model, data and the variants; a variant is a function that returns what a turn did."""

    def __init__(self, config: Config, folder: Path) -> None:
        """Build the model and the data set in ``folder``."""
        self.config, self.folder = config, folder
        self.side = SIZES[config.arch]["image"] if config.arch in SIZES else 128
        half = torch.float16 if config.device.startswith("cuda") else torch.float32
        self.data = folder / "data"
        if not self.data.exists():
            write_data(self.data, config.images, self.side)
        self.records, _ = read_pairs(self.data)
        self.options = AssignOptions(steps=config.steps)
        self.half, self.turn = half, 0

    def variants(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """Assignment's variants by name."""
        ours = {
            f"ours, batch {size}": lambda size=size: self.ours(size)
            for size in self.config.batch_sizes
        }
        return {
            "reference": lambda: self.reference(True),
            "reference, quiet": lambda: self.reference(False),
            **ours,
        }

    def training(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """The training's variants by name."""
        if not self.config.sft_steps:
            return {}
        return {"reference": self.reference_sft, "ours": self.ours_sft}

    def pipeline(self, dtype: torch.dtype) -> Any:
        """A fresh pipeline."""
        return build_pipeline(self.config.arch, self.config.device, dtype)

    def reference(self, show: bool) -> dict[str, Any]:
        """One image by the usual recipe."""
        if not hasattr(self, "recipe"):
            self.recipe = ReferenceRecipe(self.pipeline(self.half), self.side)
        record = self.records[self.turn % len(self.records)]
        folder = self._fresh("reference")
        with Clock(self.config.device) as clock:
            loss = self.recipe.assign(
                record.image_path,
                record.prompt,
                self.config.steps,
                self.config.reference_lr,
                folder,
                show,
            )
        return self._turn(clock, 1, loss, folder)

    def ours(self, batch_size: int) -> dict[str, Any]:
        """Some batches by the package: images read, encoded, matched, kept on disk."""
        generator = self._generator()
        count = min(len(self.records), max(batch_size, 4))
        folder = self._fresh(f"ours-{batch_size}")
        run = AssignRun(
            generator,
            Targets(generator, self.side),
            folder,
            self.options,
            seed=self.config.seed,
            batch_size=batch_size,
            num_images=0,
        )
        with Clock(self.config.device) as clock:
            summary = run.run(self.records[:count])
        return self._turn(clock, count, summary["best_loss"], folder)

    def reference_sft(self) -> dict[str, Any]:
        """Training steps by the usual recipe."""
        if not hasattr(self, "sft_recipe"):
            self.sft_recipe = ReferenceRecipe(self.pipeline(self.half), self.side)
            self.sft_recipe.trainer(1e-5)
        recipe, side = self.sft_recipe, self.side // 8
        with Clock(self.config.device) as clock:
            for record in self.records[: self.config.sft_steps]:
                z = torch.randn(1, 4, side, side, device=self.config.device)
                loss = recipe.train_step(record.image_path, record.prompt, z, 0.5)
        return {"seconds": clock.seconds, "steps": self.config.sft_steps, "loss": loss}

    def ours_sft(self) -> dict[str, Any]:
        """Training steps by the package; what is computed once before them is timed apart."""
        if not hasattr(self, "manifest"):
            self.ours(min(self.config.batch_sizes))
            self.manifest = self.folder / f"ours-{min(self.config.batch_sizes)}" / "manifest.jsonl"
        if not hasattr(self, "trained"):
            dtype = torch.bfloat16 if self.config.device.startswith("cuda") else None
            self.trained = OneStepGenerator(self.pipeline(torch.float32), autocast=dtype)
        steps = self.config.sft_steps
        pairs, _ = read_manifest(self.manifest)
        options = SftOptions(
            epochs=1,
            batch_size=1,
            preserve_batch_size=1,
            preserve_pixel_weight=0,
            preserve_pool_size=steps,
        )
        folder = self._fresh("sft")
        targets = Targets(self.trained, self.side)
        with Clock(self.config.device) as clock:
            summary = SftRun(self.trained, targets, folder, options).run(pairs[:steps])
        self.trained.unet.requires_grad_(False)
        once = clock.seconds - summary["seconds"]
        return {"seconds": summary["seconds"], "once": once, "steps": summary["steps"]} | {
            "loss": summary["matched_loss_after"]
        }

    def _generator(self) -> OneStepGenerator:
        if not hasattr(self, "generator"):
            dtype = torch.bfloat16 if self.config.device.startswith("cuda") else torch.float32
            self.generator = OneStepGenerator(self.pipeline(dtype))
        return self.generator

    def _fresh(self, name: str) -> Path:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.folder / name

    def _turn(self, clock: Clock, images: int, loss: float, folder: Path) -> dict[str, Any]:
        self.turn += 1
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
        return {
            "seconds": clock.seconds,
            "images": images,
            "loss": loss,
            "files": len(files),
            "bytes": sum(path.stat().st_size for path in files),
        }


class Clock:
    """Wall-clock seconds of a block, with the device's work done."""

    def __init__(self, device: str) -> None:
        """Name the device to wait for."""
        self.device, self.seconds = device, 0.0

    def __enter__(self) -> Clock:
        """Start."""
        self._wait()
        self.seconds = -time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop."""
        self._wait()
        self.seconds += time.perf_counter()

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


def peak_memory(config: Config, kind: str, name: str) -> int | None:
    """Peak bytes of one turn in a process of its own: the GPU's allocations, or resident memory."""
    command = [sys.executable, __file__, "--only", f"{kind}: {name}", "--arch", config.arch]
    command += ["--device", config.device, "--steps", "2", "--images", str(config.images)]
    command += ["--sft-steps", "1", "--batch-sizes", *map(str, config.batch_sizes)]
    ended = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in ended.stdout.splitlines() if line.startswith("peak ")]
    return int(lines[-1].split()[1]) if ended.returncode == 0 and lines else None


def only(config: Config, bench: Bench) -> None:
    """One turn of the variant named, then its peak memory on stdout."""
    import resource

    kind, name = str(config.only).split(": ", 1)
    (bench.variants() if kind == "assign" else bench.training())[name]()
    if config.device.startswith("cuda"):
        print("peak", torch.cuda.max_memory_allocated())
    else:
        print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10)


def measure(config: Config, bench: Bench) -> list[dict[str, Any]]:
    """Take all turns; one row per variant."""
    kinds = {"assign": bench.variants(), "sft": bench.training()}
    turns: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for number in range(config.rounds + 1):  # the first turn warms up
        for kind, variants in kinds.items():
            for name, run in variants.items():
                result = run()
                print(f"round {number} {kind:6} {name:20} {result['seconds']:.2f} s", flush=True)
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
        f"`benchmarks/sdxl_turbo.py --arch {results['arch']}` on {results['device']}, torch "
        f"{results['build']['torch_running']}, commit {results['commit']}, seed {results['seed']}, "
        f"{results['side']} pixels, {results['steps']} steps per image, "
        f"{results['threads']} CPU threads. Medians of {results['rounds']} turns each, in turn. "
        f"Peak memory is {results['memory']}, of a process of its own.",
        "",
        "| assignment | images/s | x | peak GiB | files/image | KiB/image | mean best loss |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in results["rows"]:
        if row["kind"] == "sft" and lines[-1].startswith("| ours"):
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
