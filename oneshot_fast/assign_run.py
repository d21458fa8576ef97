"""The E-step over a data set: batches of targets, each kept as it finishes.

A batch is one safetensors shard whose header carries the manifest's rows, so that noises and rows
appear together or not at all; manifest.jsonl is made of the shards' rows.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oneshot_fast.data import DataError, Failure, Record, file_sha256
from oneshot_fast.errors import RunError, require
from oneshot_fast.images import save_png
from oneshot_fast.matching import Assignment, AssignOptions, assign_batch
from oneshot_fast.rotation import check_patching
from oneshot_fast.runs import (
    RunFolder,
    append_jsonl,
    mend_jsonl,
    read_json,
    read_metadata,
    write_json,
    write_jsonl,
    write_safetensors,
)
from oneshot_fast.seeds import derived_seed, gaussian
from oneshot_fast.tracking import progress, start_tracking

if TYPE_CHECKING:
    from accelerate import Accelerator

    from oneshot_fast.generator import OneStepGenerator
    from oneshot_fast.targets import Targets

OUTPUTS = (
    "noises", "images", "logs", "manifest.jsonl", "failures.jsonl", "history.jsonl",
    "summary.json", "diagnostics.json", "report.html",
)  # fmt: skip


class AssignRun:
    """Assignment of a whole data set into one folder, in batches that are kept as they finish."""

    def __init__(
        self,
        generator: OneStepGenerator,
        targets: Targets,
        folder: Path,
        options: AssignOptions,
        *,
        seed: int = 0,
        resize_mode: str = "crop",
        batch_size: int = 16,
        num_images: int = 16,
    ) -> None:
        """Describe the run.

        Args:
            generator: The generator; its weights stay fixed.
            targets: Reads and encodes the target images.
            folder: Where everything is written.
            options: How a noise is searched.
            seed: Seed of the run.
            resize_mode: "crop" or "squash".
            batch_size: Targets solved at once.
            num_images: Targets whose pictures are saved; -1 for all.

        Raises:
            UserError: If an option makes no sense or does not fit the latent.
        """
        options.check()
        require(batch_size >= 1, f"batch_size is {batch_size}; give at least 1")
        side = targets.resolution
        self.latent_shape = generator.latent_shape(side, side)
        check_patching(self.latent_shape[1:], options.patch_size, options.rotation_groups)
        self.generator, self.targets, self.folder = generator, targets, Path(folder)
        self.options, self.seed, self.resize_mode = options, seed, resize_mode
        self.batch_size, self.num_images = batch_size, num_images

    def settings(self, records: Sequence[Record]) -> dict[str, Any]:
        """Everything a result depends on."""
        return {
            "command": "assign",
            **dataclasses.asdict(self.options),
            "seed": self.seed,
            "resolution": self.targets.resolution,
            "resize_mode": self.resize_mode,
            "model": self.generator.fingerprint(),
            "device": self.generator.device.type,
            "samples": len(records),
            "data": f"{derived_seed(0, *(record.id for record in records)):016x}",
        }

    def run(
        self,
        records: Sequence[Record],
        failures: Sequence[Failure] = (),
        *,
        overwrite: bool = False,
        report_to: str = "none",
    ) -> dict[str, Any]:
        """Assign every record that has no result yet, then write manifest, summary and report.

        Args:
            records: The data set.
            failures: Records already given up; they are listed beside the run's own.
            overwrite: Start anew.
            report_to: Tracker.

        Returns:
            The summary, as in summary.json.
        """
        settings = self.settings(records)
        with RunFolder(self.folder, settings, OUTPUTS, overwrite):
            shards = sorted((self.folder / "noises").glob("*.safetensors"))
            done = {row["id"]: row for shard in shards for row in read_metadata(shard, "rows")}
            self._check_unchanged(records, done)
            pending = len(records) - len(done)
            summary_path = self.folder / "summary.json"
            if not pending and summary_path.exists():
                return read_json(summary_path)
            failures = list(failures)
            tracker = start_tracking(report_to, self.folder, settings)
            self._solve(records, done, failures, tracker)
            tracker.end_training()
            return self._finish(records, done, failures)

    def _check_unchanged(self, records: Sequence[Record], done: dict[str, Any]) -> None:
        for record in records:
            # Not by modification time, which a copied or restored file brings along.
            row = done.get(record.id)
            if row and file_sha256(record.image_path) != row["image_sha256"]:
                raise RunError(
                    f"{record.image} changed after its noise was assigned; restore it, or start "
                    "anew with --overwrite"
                )

    def _solve(
        self,
        records: Sequence[Record],
        done: dict[str, dict[str, Any]],
        failures: list[Failure],
        tracker: Accelerator,
    ) -> None:
        write_jsonl(self.folder / "manifest.jsonl", done.values())
        mend_jsonl(self.folder / "history.jsonl")
        pending = len(records) - len(done)
        with progress(pending * (self.options.steps + 1), "assign", "eval") as bar:
            for start in range(0, len(records), self.batch_size):
                chunk = range(start, min(start + self.batch_size, len(records)))
                batch = [(i, records[i]) for i in chunk if records[i].id not in done]
                if not batch:
                    continue
                started = time.perf_counter()
                rows = self._solve_batch(batch, failures, bar)
                if not rows:
                    continue
                done.update((row["id"], row) for row in rows)
                append_jsonl(self.folder / "manifest.jsonl", rows)
                event = {
                    "samples": len(done),
                    "initial_loss": statistics.fmean(row["initial_loss"] for row in rows),
                    "best_loss": statistics.fmean(row["best_loss"] for row in rows),
                    "seconds": round(time.perf_counter() - started, 3),
                }
                append_jsonl(self.folder / "history.jsonl", [event])
                tracker.log(event, step=len(done))

    def _solve_batch(
        self, batch: Sequence[tuple[int, Record]], failures: list[Failure], bar: Any
    ) -> list[dict[str, Any]]:
        """Solve, save the shard and return its manifest rows; failed targets are left out."""
        batch = self._readable(batch, failures)
        if not batch:
            return []
        prompts = self.generator.encode_prompts([record.prompt for _, record in batch])
        seeds = [derived_seed(self.seed, record.id) for _, record in batch]
        eps = gaussian(seeds, self.latent_shape).to(self.generator.device)
        paths = [(record.image_path, self.resize_mode) for _, record in batch]
        images = self.targets.images(paths) if self.options.pixel_l1_weight else None

        def on_step(loss: Tensor) -> None:
            bar.update(len(batch))
            if bar.n // len(batch) % 10 == 0:  # each postfix waits for the device
                bar.set_postfix(loss=f"{loss.mean().item():.4f}", refresh=False)

        result = assign_batch(
            self.generator, eps, prompts, self.targets.latents(paths), images, self.options, on_step
        )
        finite = result.losses.isfinite().all(0).tolist()
        for (_, record), good in zip(batch, finite, strict=True):
            if not good:
                failures.append(_failure(record, "its loss became NaN or infinite"))
        keep = [k for k, good in enumerate(finite) if good]
        return self._save(batch, seeds, result, keep) if keep else []

    def _readable(
        self, batch: Sequence[tuple[int, Record]], failures: list[Failure]
    ) -> list[tuple[int, Record]]:
        readable = []
        for index, record in batch:
            try:
                self.targets.latent(record.image_path, self.resize_mode)
                readable.append((index, record))
            except DataError as error:
                failures.append(_failure(record, str(error)))
        return readable

    def _save(
        self,
        batch: Sequence[tuple[int, Record]],
        seeds: Sequence[int],
        result: Assignment,
        keep: Sequence[int],
    ) -> list[dict[str, Any]]:
        # Named by the first sample it holds: a later batch never holds that sample again.
        noise_path = Path("noises") / f"{batch[keep[0]][0]:08d}.safetensors"
        curves = result.losses.T.tolist()
        rows = []
        for position, k in enumerate(keep):
            index, record = batch[k]
            rows.append(
                {
                    "id": record.id,
                    "index": index,
                    "prompt": record.prompt,
                    "prompt_truncated": self.generator.is_truncated(record.prompt),
                    "target_image_path": os.path.relpath(record.image_path, self.folder.resolve()),
                    "image_sha256": file_sha256(record.image_path),
                    "resize_mode": self.resize_mode,
                    "noise_path": noise_path.as_posix(),
                    "noise_index": position,
                    "seed": seeds[k],
                    "initial_loss": curves[k][0],
                    "best_loss": min(curves[k]),
                    "best_step": int(result.best_step[k]),
                    "losses": curves[k],
                }
            )
            if self.num_images < 0 or index < self.num_images:
                self._save_images(record, seeds[k], result.z[k])
        tensors = {"z": result.z[list(keep)], "q": result.q[list(keep)]}
        write_safetensors(self.folder / noise_path, tensors, {"rows": rows})
        return rows

    def _save_images(self, record: Record, seed: int, z: Tensor) -> None:
        prompts = self.generator.encode_prompts([record.prompt])
        eps = gaussian([seed], self.latent_shape).to(z.device)
        images = {"target": self.targets.image(record.image_path, self.resize_mode)}
        for name, noise in (("base", eps), ("assigned", z[None])):
            with torch.no_grad():
                images[name] = self.generator.decode(self.generator.latents(noise, prompts))[0]
        for name, image in images.items():
            save_png(self.folder / "images" / f"{record.id}-{name}.png", image)

    def _finish(
        self,
        records: Sequence[Record],
        done: dict[str, dict[str, Any]],
        failures: Sequence[Failure],
    ) -> dict[str, Any]:
        rows = [done[record.id] for record in records if record.id in done]
        write_jsonl(self.folder / "manifest.jsonl", rows)
        write_jsonl(
            self.folder / "failures.jsonl",
            [{k: v for k, v in dataclasses.asdict(f).items() if v is not None} for f in failures],
        )
        require(bool(rows), f"no target could be assigned; see {self.folder / 'failures.jsonl'}")
        seconds = sum(event["seconds"] for event in mend_jsonl(self.folder / "history.jsonl"))
        summary = {
            "samples": len(rows),
            "failed": len(failures),
            "truncated_prompts": sum(row["prompt_truncated"] for row in rows),
            "initial_loss": statistics.fmean(row["initial_loss"] for row in rows),
            "best_loss": statistics.fmean(row["best_loss"] for row in rows),
            "losses": [statistics.fmean(s) for s in zip(*(r["losses"] for r in rows), strict=True)],
            "seconds": round(seconds, 3),
            "images_per_second": round(len(rows) / max(seconds, 1e-9), 3),
            "settings": read_json(self.folder / "run.json"),
        }
        write_json(self.folder / "summary.json", summary)
        return summary


def _failure(record: Record, reason: str) -> Failure:
    return Failure(reason, record.line, record.id, record.prompt, record.image)
