"""Noise optimisation over many prompts: batches that are kept as they finish.

A batch is one safetensors shard whose header carries its rows, so that noises and rows appear
together or not at all; every other file is made of the shards' rows.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from oneshot_fast.data.images import save_png
from oneshot_fast.errors import require
from oneshot_fast.jobs.optimize.pairs import write_training_pairs
from oneshot_fast.jobs.optimize.search import Optimized, RewardSearch, Sample
from oneshot_fast.runtime.files import (
    append_jsonl,
    mend_jsonl,
    read_json,
    read_metadata,
    write_json,
    write_jsonl,
    write_safetensors,
)
from oneshot_fast.runtime.folder import RunFolder
from oneshot_fast.runtime.progress import end_tracking, progress, start_tracking
from oneshot_fast.runtime.seeds import content_id, derived_seed

Row = dict[str, Any]
OUTPUTS = (
    "noises", "images", "training", "logs", "manifest.jsonl", "pairs.jsonl", "failures.jsonl",
    "history.jsonl", "metrics_per_prompt.json", "metrics_summary.json", "diagnostics.json",
    "curves.png", "report.html",
)  # fmt: skip
_METRICS_EVERY = 30.0  # seconds between two writings of the metrics of all prompts


def samples_of(
    prompts: Sequence[str], images_per_prompt: int, seed: int, seeds: Sequence[int] = ()
) -> list[Sample]:
    """The images to make, prompt by prompt.

    Args:
        prompts: May repeat.
        images_per_prompt: Images of each.
        seed: Seed of the run, from which every image's own follows.
        seeds: Instead, one seed per image of a prompt, the same for all prompts.
    """
    found: list[Sample] = []
    for k, prompt in enumerate(prompts):
        for j in range(len(seeds) or images_per_prompt):
            own = seeds[j] if seeds else derived_seed(seed, "optimize", k, prompt, j)
            found.append(Sample(f"{k:05d}-{j:02d}", len(found), prompt, own))
    return found


class OptimizeRun:
    """Optimised noises of many prompts in one folder."""

    def __init__(
        self,
        search: RewardSearch,
        folder: Path,
        *,
        batch_size: int = 16,
        seed: int = 0,
        num_images: int = -1,
        rewards: Sequence[str] = (),
    ) -> None:
        """Describe the run.

        Args:
            search: Finds the noises.
            folder: Where everything is written.
            batch_size: Images optimised at once.
            seed: Seed of the run.
            num_images: Images whose pictures are saved; -1 for all.
            rewards: How the rewards were named, for the run's settings.

        Raises:
            UserError: If an option makes no sense.
        """
        require(batch_size >= 1, f"batch_size is {batch_size}; give at least 1")
        self.search, self.folder, self.batch_size = search, Path(folder), batch_size
        self.seed, self.num_images, self.rewards = seed, num_images, list(rewards)

    def settings(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Everything a result depends on."""
        generator = self.search.generator
        return {
            "command": "optimize",
            **dataclasses.asdict(self.search.options),
            "rewards": self.rewards,
            "save_steps": list(self.search.save_steps),
            "seed": self.seed,
            "resolution": self.search.side,
            "model": generator.fingerprint(),
            "device": generator.device.type,
            "samples": len(samples),
            "prompts": content_id(*((s.prompt, s.seed) for s in samples)),
        }

    def run(
        self, samples: Sequence[Sample], *, overwrite: bool = False, report_to: str = "none"
    ) -> dict[str, Any]:
        """Optimise every sample that has no result yet, then write all files.

        Args:
            samples: What to make.
            overwrite: Start anew.
            report_to: Tracker.

        Returns:
            The summary, as in metrics_summary.json.
        """
        require(bool(samples), "there is no prompt")
        settings = self.settings(samples)
        with RunFolder(self.folder, settings, OUTPUTS, overwrite):
            done = self._done()
            if len(done) < len(samples) or not self._is_finished(done):
                tracker = start_tracking(report_to, self.folder, settings)
                mend_jsonl(self.folder / "history.jsonl")
                failures = self._solve(samples, done, tracker)
                end_tracking(tracker)
                write_jsonl(self.folder / "failures.jsonl", failures)
                require(bool(done), f"no reward was finite; see {self.folder / 'failures.jsonl'}")
                shape = self.search.noise_shape
                pairs = write_training_pairs(self.folder, _in_order(done), shape)
                self._write_metrics(done, len(failures), pairs)
            return dict(read_json(self.folder / "metrics_summary.json"))

    def _is_finished(self, done: dict[str, Row]) -> bool:
        """Whether the summary is the last one; those written on the way count fewer."""
        path = self.folder / "metrics_summary.json"
        summary = read_json(path) if path.exists() else {"training_pairs": None}
        return summary["training_pairs"] is not None and summary["samples"] == len(done)

    def _done(self) -> dict[str, Row]:
        """Rows of all shards by id."""
        shards = sorted((self.folder / "noises").glob("*.safetensors"))
        return {row["id"]: row for shard in shards for row in read_metadata(shard, "rows")}

    def _solve(self, samples: Sequence[Sample], done: dict[str, Row], tracker: Any) -> list[Row]:
        """Solve and keep what is not done; returns the failures."""
        failures: list[Row] = []
        options = self.search.options
        left = sum(sample.id not in done for sample in samples)
        each = options.gradient_steps + (options.gradient_steps > 0)
        each += options.draws if options.draws > 1 or not each else 0
        written = since = time.perf_counter()
        with progress(left * each, "optimize", "eval") as bar:
            self.search.on_evaluations = bar.update
            for batch in self._pending(samples, done):
                found = self.search.solve(batch)
                bad = [f.sample for f in found if not f.is_finite]
                failures += [
                    {"id": s.id, "prompt": s.prompt, "reason": "its reward became NaN or infinite"}
                    for s in bad
                ]
                rows = self._keep([f for f in found if f.is_finite])
                done.update((row["id"], row) for row in rows)
                now = time.perf_counter()
                event = {**_event(rows), "samples": len(done), "seconds": round(now - since, 3)}
                since = now
                append_jsonl(self.folder / "history.jsonl", [event])
                tracker.log({k: v for k, v in event.items() if v is not None}, step=len(done))
                if done and now - written > _METRICS_EVERY:
                    self._write_metrics(done, len(failures))
                    written = now
        return failures

    def _pending(self, samples: Sequence[Sample], done: dict[str, Row]) -> Iterator[list[Sample]]:
        """What is not done, in batches cut before: a resumed run solves the same ones together."""
        for start in range(0, len(samples), self.batch_size):
            batch = samples[start : start + self.batch_size]
            if left := [sample for sample in batch if sample.id not in done]:
                yield left

    def _keep(self, found: Sequence[Optimized]) -> list[Row]:
        """Write images, then noises with their rows."""
        if not found:
            return []
        name = f"noises/{found[0].sample.index:08d}.safetensors"
        for one in found:
            if self.num_images < 0 or one.sample.index < self.num_images:
                for kind, image in one.images.items():
                    path = self.folder / "images" / f"{one.sample.id}-{kind}.png"
                    save_png(path, image.float() / 255)
        rows = [_row(one, name, k) for k, one in enumerate(found)]
        tensors = {
            name: torch.stack([one.tensors[name] for one in found]) for name in found[0].tensors
        }
        write_safetensors(self.folder / name, tensors, {"rows": rows})
        return rows

    def _write_metrics(
        self, done: dict[str, Row], failed: int, training_pairs: int | None = None
    ) -> None:
        """Make all lists and metrics of the rows; ``training_pairs`` are counted at the end."""
        rows = _in_order(done)
        with_image = [r for r in rows if (self.folder / r["target_image_path"]).is_file()]
        pairs = [{"prompt": row["prompt"], "image": row["target_image_path"]} for row in with_image]
        hidden = ("losses", "scores")
        write_jsonl(
            self.folder / "manifest.jsonl",
            [{k: v for k, v in row.items() if k not in hidden} for row in rows],
        )
        write_jsonl(self.folder / "pairs.jsonl", pairs)
        write_json(self.folder / "metrics_per_prompt.json", metrics_per_prompt(rows))
        seconds = sum(event["seconds"] for event in mend_jsonl(self.folder / "history.jsonl"))
        summary = summarise(rows)
        summary |= {
            "failed": failed,
            "training_pairs": training_pairs,
            "seconds": round(seconds, 3),
            "images_per_second": round(len(rows) / max(seconds, 1e-9), 3),
            "settings": read_json(self.folder / "run.json"),
        }
        write_json(self.folder / "metrics_summary.json", summary)


def _in_order(done: dict[str, Row]) -> list[Row]:
    return sorted(done.values(), key=lambda row: int(row["index"]))


def _row(found: Optimized, noise_path: str, position: int) -> Row:
    return {
        "id": found.sample.id,
        "index": found.sample.index,
        "prompt": found.sample.prompt,
        "target_image_path": f"images/{found.sample.id}-best.png",
        "noise_path": noise_path,
        "noise_index": position,
        "seed": found.seed,
        "first_seed": found.sample.seed,
        "initial": found.initial,
        "best": found.best,
        "best_step": found.last.best_step,
        "angle": round(found.angle, 4),
        "energy": round(found.last.z.square().mean().item(), 6),
        "losses": found.last.losses,
        "scores": found.last.scores,
    }


def _event(rows: Sequence[Row]) -> dict[str, float | None]:
    """Mean reward of a batch, before and after."""
    return {
        f"{name}_reward": statistics.fmean(row[name]["total"] for row in rows) if rows else None
        for name in ("initial", "best")
    }


def metrics_per_prompt(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """All images of each prompt with their scores at every step; the best of them named."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["id"].rpartition("-")[0], []).append(row)
    keys = ("id", "seed", "initial", "best", "best_step", "angle", "energy", "losses", "scores")
    return [
        {
            "prompt": group[0]["prompt"],
            "initial_reward": statistics.fmean(row["initial"]["total"] for row in group),
            "best_reward": max(row["best"]["total"] for row in group),
            "best_id": max(group, key=lambda row: row["best"]["total"])["id"],
            "images": [{key: row[key] for key in keys} for row in group],
        }
        for group in groups.values()
    ]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Means over all images: of every reward before, after and at every step."""
    names = list(rows[0]["best"])
    steps = range(len(rows[0]["losses"]))
    return {
        "samples": len(rows),
        "prompts": len({row["id"].rpartition("-")[0] for row in rows}),
        "initial_reward": statistics.fmean(row["initial"]["total"] for row in rows),
        "best_reward": statistics.fmean(row["best"]["total"] for row in rows),
        "improved": sum(row["best"]["total"] > row["initial"]["total"] for row in rows),
        "angle": statistics.fmean(row["angle"] for row in rows),
        "energy": statistics.fmean(row["energy"] for row in rows),
        "rewards": {
            name: {
                "initial": statistics.fmean(row["initial"][name] for row in rows),
                "best": statistics.fmean(row["best"][name] for row in rows),
                "per_step": [
                    statistics.fmean(row["scores"][name][k] for row in rows) for k in steps
                ],
            }
            for name in names
        },
    }
