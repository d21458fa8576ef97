"""Noise optimisation over many prompts, into one folder."""

import dataclasses
import time
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from oneshot_fast.data.found_pairs import write_training_pairs
from oneshot_fast.data.images import save_png
from oneshot_fast.data.records import Failure
from oneshot_fast.data.sizes import Resolution
from oneshot_fast.errors import require
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.optimize.options import OptimizeOptions
from oneshot_fast.jobs.optimize.plan import fitting_batch_size, optimize_plan
from oneshot_fast.jobs.optimize.search import Optimized, RewardSearch
from oneshot_fast.planning.timing import Plan
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.runtime.files import Json, read_json, write_json, write_jsonl
from oneshot_fast.runtime.processes import is_main
from oneshot_fast.runtime.seeds import content_id
from oneshot_fast.runtime.shards import ShardRun, mean, mean_curve
from oneshot_fast.search.samples import Sample, samples_of

_METRICS_EVERY = 30.0  # seconds between two writings of the metrics of all prompts


class OptimizeRun(ShardRun[Sequence[Sample], Optimized]):
    """Optimised noises of many prompts in one folder."""

    command = "optimize"
    outputs = (
        "noises", "images", "training", "logs", "manifest.jsonl", "pairs.jsonl", "failures.jsonl",
        "history.jsonl", "metrics_per_prompt.json", "metrics_summary.json", "diagnostics.json",
        "curves.png", "report.html",
    )  # fmt: skip
    summary_name = "metrics_summary.json"
    unlisted = ("losses", "scores")
    nothing_kept = "no reward was finite"
    save_image = staticmethod(save_png)

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[str],
        folder: Path | str,
        options: OptimizeOptions,
        *,
        rewards: WeightedRewards,
        reward_names: Sequence[str] | None = None,
        images_per_prompt: int = 1,
        seeds: Sequence[int] = (),
        seed: int = 0,
        batch_size: int | Literal["auto"] = 16,
        resolution: Resolution | None = None,
        save_steps: Sequence[int] = (),
        num_images: int = -1,
    ) -> None:
        """Describe the run.

        Args:
            generator: Its weights stay fixed.
            prompts: May repeat.
            folder: Where everything is written.
            options: How a noise is searched.
            rewards: Score images; differentiable unless the method is best_of_n.
            reward_names: How the rewards are called in the run's settings; by default by name and
                weight.
            images_per_prompt: Images of each prompt, each from a noise of its own.
            seeds: Instead: one seed per image of a prompt, the same for all prompts.
            seed: Seed of the run.
            batch_size: Images optimised at once; "auto" takes what fits on a GPU.
            resolution: Image side in pixels, or height and width; by default the generator's own.
            save_steps: Gradient steps whose images are saved, too.
            num_images: Images whose pictures are saved; -1 for all.

        Raises:
            UserError: If there is no prompt, an option makes no sense or does not fit the latent,
                or the method needs gradients and a reward has none.
        """
        self.samples = samples_of(prompts, images_per_prompt, seed, seeds)
        require(bool(self.samples), "there is no prompt")
        size = TargetImages(generator, resolution).size  # checks it
        self.search = RewardSearch(
            generator, rewards, options, resolution=size, save_steps=save_steps
        )
        first = self.samples[0]
        count = fitting_batch_size(self.search, first) if batch_size == "auto" else batch_size
        each = options.steps + 1 if options.mover else 0
        each += options.draws if options.choice else 0
        super().__init__(folder, count, len(self.samples), each)
        weighted = (f"{name}:{weight:g}" for name, weight in rewards.weights.items())
        self.reward_names = [*(weighted if reward_names is None else reward_names)]
        self.seed, self.num_images = seed, num_images

    def solve_all(self) -> None:
        for reader in (self.search.generator, self.search.rewards):
            reader.warn_of_cut(sample.prompt for sample in self.samples)
        super().solve_all()

    def settings(self) -> dict[str, Any]:
        search = self.search
        return {
            "command": self.command,
            **dataclasses.asdict(search.options),
            "rewards": self.reward_names,
            "save_steps": list(search.save_steps),
            "seed": self.seed,
            **search.generator.settings(search.size),
            "samples": self.total,
            "prompts": content_id(*((s.prompt, s.seed) for s in self.samples)),
        }

    def plan(self) -> Plan:
        """What the run will need; does nothing of it."""
        return optimize_plan(self.search, self.samples, self.batch_size)

    def is_finished(self) -> bool:
        """Whether the summary is the last one, not one written on the way."""
        path = self.folder / self.summary_name
        return super().is_finished() and read_json(path)["training_pairs"] is not None

    def batches(self, done: Container[str]) -> Iterator[Sequence[Sample]]:
        for start in range(0, len(self.samples), self.batch_size):
            batch = self.samples[start : start + self.batch_size]
            yield [sample for sample in batch if sample.id not in done]

    def solve(self, batches: Iterable[Sequence[Sample]]) -> Iterator[Sequence[Optimized]]:
        self.search.on_evaluations = self.on_evaluations
        self._written = time.perf_counter()
        return (self.search.solve(batch) for batch in batches if batch)

    def failure(self, found: Optimized) -> Json:
        reason = "its reward became NaN or infinite"
        return Failure(reason, id=found.sample.id, prompt=found.sample.prompt).row

    def images(self, found: Optimized) -> dict[str, Tensor]:
        """The first image, the best one, and those of the steps to save."""
        if 0 <= self.num_images <= found.index:
            return {}
        return {f"{found.sample.id}-{kind}.png": image for kind, image in found.images.items()}

    def row(self, found: Optimized, place: Mapping[str, Any]) -> Json:
        sample, last = found.sample, found.last
        return {
            "id": sample.id,
            "index": sample.index,
            "prompt": sample.prompt,
            "target_image_path": f"images/{sample.id}-best.png",
            **place,
            "seed": found.seed,
            "first_seed": sample.seed,
            "initial": found.initial,
            "best": found.best,
            "best_step": last.best_step,
            "angle": round(found.angle, 4),
            "energy": round(last.z.square().mean().item(), 6),
            "losses": last.losses,
            "scores": last.scores,
        }

    def means(self, rows: Collection[Json]) -> dict[str, float | None]:
        return mean_rewards(rows)

    def note(self, rows: Sequence[Json]) -> None:
        """Also write the metrics of all prompts now and then."""
        super().note(rows)
        now = time.perf_counter()
        if is_main() and now - self._written > _METRICS_EVERY:
            self.write_lists(len(self.failures), is_last=False)
            self._written = now

    def summary(self, rows: Collection[Json], is_last: bool) -> Json:
        """Means over all images; writes the metrics of each prompt, and in the end the pairs."""
        found = list(rows)
        write_json(self.folder / "metrics_per_prompt.json", metrics_per_prompt(found))
        with_image = [r for r in found if (self.folder / r["target_image_path"]).is_file()]
        pairs = [{"prompt": row["prompt"], "image": row["target_image_path"]} for row in with_image]
        write_jsonl(self.folder / "pairs.jsonl", pairs)
        count = None
        if is_last:
            count = write_training_pairs(self.folder, found, self.search.noise_shape)
        return {**summarise(found), "training_pairs": count}


def metrics_per_prompt(rows: Sequence[Json]) -> list[dict[str, Any]]:
    """All images of each prompt with their scores at every step; the best of them named."""
    groups: dict[str, list[Json]] = {}
    for row in rows:
        groups.setdefault(row["id"].rpartition("-")[0], []).append(row)
    keys = ("id", "seed", "initial", "best", "best_step", "angle", "energy", "losses", "scores")
    return [
        {
            "prompt": group[0]["prompt"],
            "initial_reward": mean(row["initial"]["total"] for row in group),
            "best_reward": max(row["best"]["total"] for row in group),
            "best_id": max(group, key=lambda row: row["best"]["total"])["id"],
            "images": [{key: row[key] for key in keys} for row in group],
        }
        for group in groups.values()
    ]


def mean_rewards(rows: Collection[Json]) -> dict[str, float | None]:
    """Of all images, before and after."""
    names = ("initial", "best")
    return {f"{name}_reward": mean(row[name]["total"] for row in rows) for name in names}


def summarise(rows: Sequence[Json]) -> dict[str, Any]:
    """Means over all images: of every reward before, after and at every step."""
    names = list(rows[0]["best"])
    return {
        "samples": len(rows),
        "prompts": len({row["id"].rpartition("-")[0] for row in rows}),
        **mean_rewards(rows),
        "improved": sum(row["best"]["total"] > row["initial"]["total"] for row in rows),
        "angle": mean(row["angle"] for row in rows),
        "energy": mean(row["energy"] for row in rows),
        "rewards": {
            name: {
                "initial": mean(row["initial"][name] for row in rows),
                "best": mean(row["best"][name] for row in rows),
                "per_step": mean_curve([row["scores"][name] for row in rows]),
            }
            for name in names
        },
    }
