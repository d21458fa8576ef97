"""The variants of benchmarks/sdxl/turbo.py: what each does in one turn."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.sdxl.config import Config
from benchmarks.sdxl.models import SIZES, build_pipeline, write_data
from benchmarks.sdxl.reference_recipe import ReferenceRecipe
from oneshot_fast.data.manifests import read_manifest
from oneshot_fast.data.pairs import read_pairs
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.sdxl import SdxlGenerator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.run import AssignRun
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.sft.run import SftRun
from oneshot_fast.runtime.files import write_jsonl, write_safetensors
from oneshot_fast.runtime.seeds import gaussian


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
        self.generators: dict[str, Generator] = {}

    def variants(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """Assignment's variants by name."""
        ours = {
            f"ours, batch {size}": lambda size=size: self.ours(size)
            for size in self.config.batch_sizes
        }
        size = max(self.config.batch_sizes)
        for option in self.config.options:
            ours[f"ours, batch {size}, {option}"] = lambda option=option: self.ours(size, option)
        return {
            "reference": lambda: self.reference(True),
            "reference, quiet": lambda: self.reference(False),
            **ours,
        }

    def training(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """The training's variants by name."""
        if not self.config.sft_steps:
            return {}
        frozen = "bfloat16" if self.config.device.startswith("cuda") else "float32"
        ours: dict[str, dict[str, Any]] = {
            "ours": {},
            "ours, LoRA 16": {"lora_rank": 16, "weights_dtype": frozen},
        }
        if importlib.util.find_spec("torchao"):
            ours["ours, least memory"] = {
                "gradient_checkpointing": True,
                "weights_dtype": "bfloat16",
                "optimizer": "adamw8bit",
                "optimizer_in_backward": True,
            }
        return {"reference": self.reference_sft} | {
            name: lambda flags=flags: self.ours_sft(**flags) for name, flags in ours.items()
        }

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

    def ours(self, batch_size: int, option: str = "") -> dict[str, Any]:
        """Some batches by the package: images read, encoded, matched, kept on disk."""
        generator = self._generator(option)
        count = min(len(self.records), max(batch_size, 4))
        folder = self._fresh(f"ours-{batch_size}")
        run = AssignRun(
            generator,
            self.records[:count],
            folder,
            self.options,
            resolution=self.side,
            seed=self.config.seed,
            batch_size=batch_size,
            num_images=0,
        )
        with Clock(self.config.device) as clock:
            summary = run.run()
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

    def ours_sft(self, **flags: Any) -> dict[str, Any]:
        """Training steps by the package; what is computed once before them is timed apart."""
        half = torch.bfloat16 if self.config.device.startswith("cuda") else None
        dtype = getattr(torch, flags.get("weights_dtype", "float32"))
        generator = SdxlGenerator(self.pipeline(dtype), autocast=half)
        steps = self.config.sft_steps
        options = SftOptions(
            epochs=1,
            batch_size=1,
            preserve_batch_size=1,
            preserve_pixel_weight=0,
            preserve_pool_size=steps,
            **flags,
        )
        pairs, _ = read_manifest(self._manifest(generator))
        targets, folder = TargetImages(generator, self.side), self._fresh("sft")
        with Clock(self.config.device) as clock:
            summary = SftRun(generator, pairs[:steps], folder, options, targets=targets).run()
        once = clock.seconds - summary["seconds"]
        return {"seconds": summary["seconds"], "once": once, "steps": summary["steps"]} | {
            "loss": summary["matched_loss_after"]
        }

    def _manifest(self, generator: Generator) -> Path:
        """Every image with a random noise: what a step costs does not depend on the match."""
        path, noises = self.folder / "pairs" / "manifest.jsonl", "noises.safetensors"
        if not path.exists():
            count = len(self.records)
            z = gaussian(range(count), generator.noise_shape(self.side, self.side))
            write_safetensors(path.parent / noises, {"z": z}, {})
            rows = [
                {
                    "prompt": record.prompt,
                    "target_image_path": str(record.image_path),
                    "noise_path": noises,
                    "noise_index": k,
                }
                for k, record in enumerate(self.records)
            ]
            write_jsonl(path, rows)
        return path

    def _generator(self, option: str) -> Generator:
        if option not in self.generators:
            half = option == "bf16" or self.config.device.startswith("cuda")
            generator = SdxlGenerator(self.pipeline(torch.bfloat16 if half else torch.float32))
            if option == "compiled":
                generator.compile()
            self.generators[option] = generator
        return self.generators[option]

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
