"""A pool of one's own: images of each prompt, at all steps of a generator, and their scores."""

import functools
import io
import json
import math
import tarfile
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from oneshot_fast.data.images import save_png, to_pil
from oneshot_fast.data.records import Failure
from oneshot_fast.data.sizes import Resolution
from oneshot_fast.errors import require
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.scale.options import ScaleOptions
from oneshot_fast.jobs.scale.pools import Pool, write_pool
from oneshot_fast.jobs.scale.rules import Prune
from oneshot_fast.jobs.scale.simulate import agreement
from oneshot_fast.jobs.scale.walk import AWARE, Scored, Walker
from oneshot_fast.planning.timing import Plan
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.runtime.concurrency import in_background
from oneshot_fast.runtime.files import (
    TEMPORARY,
    Json,
    delete,
    remove,
    replacing,
    write_jsonl,
    write_text,
)
from oneshot_fast.runtime.seeds import content_id
from oneshot_fast.runtime.shards import ShardRun, mean
from oneshot_fast.runtime.units import duration
from oneshot_fast.search.samples import Sample, samples_of

POOL = "pool.safetensors"
PictureFormat = Literal["png", "tar"]


@dataclass(frozen=True)
class Pooled:
    """All images of one prompt."""

    sample: Sample
    seeds: list[int]
    scores: dict[str, list[list[float]]]  # by reward: a list per step, of a number per image
    aware: dict[str, list[list[float]]]  # the same of noise-aware rewards, without the last step

    @property
    def index(self) -> int:
        return self.sample.index

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Scores, [N, S, R] float32."""
        return {"scores": torch.tensor([*self.scores.values()]).permute(2, 1, 0).contiguous()}

    @property
    def is_finite(self) -> bool:
        of_all = [*self.scores.values(), *self.aware.values()]
        return all(math.isfinite(v) for values in of_all for step in values for v in step)


class DataRun(ShardRun[Sequence[Sample], Pooled]):
    """Images and scores of many prompts in one folder, and the pool that is made of them."""

    command = "scale_data"
    outputs = (
        "noises", "images", "manifest.jsonl", "failures.jsonl", "history.jsonl", "labels.jsonl",
        "labels.yaml", "summary.json", "logs", "report.html", POOL,
    )  # fmt: skip
    unlisted = ("scores", "noise_aware")
    nothing_kept = "no reward was finite"
    save_image = staticmethod(save_png)

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[str],
        folder: Path | str,
        *,
        rewards: WeightedRewards,
        reward_names: Sequence[str],
        candidates: int,
        prune_rewards: WeightedRewards | None = None,
        prune_reward_names: Sequence[str] = (),
        steps_saved: Sequence[int] | None = None,
        save_images: bool = True,
        picture_format: PictureFormat = "png",
        seed: int = 0,
        batch_size: int = 16,
        resolution: Resolution | None = None,
    ) -> None:
        """Describe the run.

        Args:
            generator: Its weights stay fixed.
            prompts: At least one.
            folder: Where everything is written.
            rewards: Score each image at each step.
            reward_names: How they are called in the run's settings.
            candidates: Images of each prompt.
            prune_rewards: Score estimates, too: one for each of ``rewards``, in their order.
            prune_reward_names: How those are called.
            steps_saved: Steps, from 0, whose estimates are kept; by default all. The last always
                is.
            save_images: Whether pictures are kept, too.
            picture_format: "png": a file for each; "tar": one WebDataset shard for each prompt.
            seed: Of the run; noises are those of `scale run` with this seed.
            batch_size: Images that are evaluated at once.
            resolution: Image side in pixels, or height and width; by default the generator's own.

        Raises:
            UserError: If there is no prompt, or a number makes no sense.
        """
        self.samples = samples_of(prompts, 1, seed)
        require(bool(self.samples), "there is no prompt")
        require(candidates >= 1, f"candidates is {candidates}; give at least 1")
        last = generator.num_inference_steps - 1
        steps = {*range(last + 1)} if steps_saved is None else {*steps_saved, last}
        for step in steps:
            require(0 <= step <= last, f"steps_saved has {step}; there are 0 to {last}")
        self.steps = sorted(steps)
        self.size = TargetImages(generator, resolution).size  # checks it
        self.walker = Walker(generator, rewards, self.size, batch_size)
        self.save_images, self.format = save_images, picture_format
        if prune_rewards is not None:
            weights, others = [*rewards.weights.values()], [*prune_rewards.weights.values()]
            require(
                weights == others,
                f"give a --prune_reward for each --reward, in their order and of their weights: "
                f"{weights}, not {others}",
            )
            prune_rewards.check_steps(last + 1)
            require(len(self.steps) > 1, "--prune_reward scores no step before the last here")
            self.walker.aware = prune_rewards
        self.n, self.seed, self.reward_names = candidates, seed, [*reward_names]
        self.prune_reward_names = [*prune_reward_names]
        wave = -(-batch_size // candidates)
        super().__init__(folder, wave, len(self.samples), candidates * (last + 1))

    def settings(self) -> dict[str, Any]:
        return {
            "command": self.command,
            "candidates": self.n,
            "steps_saved": self.steps,
            "save_images": self.save_images,
            "format": self.format,
            "rewards": self.reward_names,
            **({"prune_rewards": names} if (names := self.prune_reward_names) else {}),
            "seed": self.seed,
            **self.walker.generator.settings(self.size),
            "samples": self.total,
            "prompts": content_id(*((s.prompt, s.seed) for s in self.samples)),
        }

    def plan(self) -> Plan:
        """What the run will take, from counts and a few timed batches; does nothing of it."""
        images = self.n * len(self.samples)
        evaluation, _, verification = self.walker.seconds(self.samples[0])
        evaluations = images * self.walker.generator.num_inference_steps
        scored = images * len(self.steps)
        total = evaluations * evaluation + scored * verification
        pictures = f", pictures: {scored}" if self.save_images else ""
        aware = "" if self.walker.aware is None else ", --prune_reward not counted"
        lines = [
            f"prompts: {len(self.samples)}, images of each: {self.n}{pictures}",
            f"evaluations: {evaluations}, {duration(evaluation)} each",
            f"decoded and scored: {scored}, {duration(verification)} each{aware}",
            f"in all {duration(total)}",
        ]
        return Plan(lines, total)

    def batches(self, done: Container[str]) -> Iterator[Sequence[Sample]]:
        for start in range(0, len(self.samples), self.batch_size):
            wave = self.samples[start : start + self.batch_size]
            yield [sample for sample in wave if name_of(sample) not in done]

    def solve(self, batches: Iterable[Sequence[Sample]]) -> Iterator[Sequence[Pooled]]:
        self.walker.on_evaluations = self.on_evaluations
        return (self._wave(wave) for wave in batches if wave)

    def _wave(self, wave: Sequence[Sample]) -> list[Pooled]:
        generator = self.walker.generator
        keep_all = ScaleOptions(after=tuple(self.steps[:-1]), keep=(1.0,) * (len(self.steps) - 1))
        rule = Prune(keep_all, self.n, generator.num_inference_steps)
        # pictures are written as they come: a wave of them may not fit into memory
        with in_background(self._save) as save:
            self.walker.on_pictures = functools.partial(save, wave)
            trace = self.walker.walk(wave, rule).trace
        found = [self._pooled(trace, k, sample) for k, sample in enumerate(wave)]
        for one in found:
            self._finish_pictures(one)
        return found

    def _save(self, wave: Sequence[Sample], step: int, first: int, pictures: Tensor) -> None:
        """Write the pictures of some rows of a step, N of each sample."""
        if not self.save_images:
            return
        for row, picture in enumerate(pictures, first):
            sample, k = wave[row // self.n], row % self.n
            path = self._pictures(sample) / f"id{k:03d}" / f"s{step:02d}.png"
            if self.format == "png":
                save_png(path, picture)
            else:  # until the shard has it
                path.parent.mkdir(parents=True, exist_ok=True)
                to_pil(picture).save(path, "PNG")

    def _pictures(self, sample: Sample) -> Path:
        """Where a prompt's pictures are written."""
        temporary = TEMPORARY if self.format == "tar" else ""
        return self.folder / "images" / f"{temporary}{name_of(sample)}"

    def _finish_pictures(self, found: Pooled) -> None:
        """Drop the pictures of a prompt that failed; make a shard of them, where it is to be."""
        pictures = self._pictures(found.sample)
        if not found.is_finite:
            remove(pictures)
        elif self.format == "tar" and self.save_images:
            path = self.folder / "images" / f"{name_of(found.sample)}.tar"
            with replacing(path) as temporary, tarfile.open(temporary, "w") as shard:
                for k in range(self.n):
                    for step in self.steps:
                        data = (pictures / f"id{k:03d}" / f"s{step:02d}.png").read_bytes()
                        _add(shard, f"{name_of(found.sample)}-id{k:03d}.s{step:02d}.png", data)
                    label = json.dumps(self._label(self.row(found, {}), k), ensure_ascii=False)
                    _add(shard, f"{name_of(found.sample)}-id{k:03d}.json", label.encode())
            delete(pictures)

    def _pooled(self, trace: Sequence[Scored], k: int, sample: Sample) -> Pooled:
        names = [*self.walker.rewards.by_name]
        return Pooled(
            sample,
            [sample.seed_of(j) for j in range(self.n)],
            {name: [scored.scores[name][k].tolist() for scored in trace] for name in names},
            {
                name.removeprefix(AWARE): [one.scores[name][k].tolist() for one in trace[:-1]]
                for name in trace[0].scores
                if name.startswith(AWARE)
            },
        )

    def failure(self, found: Pooled) -> Json:
        reason = "a reward became NaN or infinite"
        return Failure(reason, id=name_of(found.sample), prompt=found.sample.prompt).row

    def images(self, found: Pooled) -> dict[str, Tensor]:
        return {}  # they are written as they come

    def row(self, found: Pooled, place: Mapping[str, Any]) -> Json:
        return {
            "id": name_of(found.sample),
            "index": found.index,
            "prompt": found.sample.prompt,
            **place,
            "seeds": found.seeds,
            "scores": found.scores,
            **({"noise_aware": found.aware} if found.aware else {}),
        }

    def _label(self, row: Json, j: int) -> Json:
        """What is said of one image of a prompt."""
        return {
            "id": f"{row['id']}/id{j:03d}",
            "prompt": row["prompt"],
            "seed": row["seeds"][j],
            "scores": {name: values[-1][j] for name, values in row["scores"].items()},
            "steps": self.steps,
            "scores_per_step": {
                name: [step[j] for step in values] for name, values in row["scores"].items()
            },
            **(
                {
                    "noise_aware_per_step": {
                        name: [step[j] for step in values]
                        for name, values in row["noise_aware"].items()
                    }
                }
                if "noise_aware" in row
                else {}
            ),
        }

    def means(self, rows: Collection[Json]) -> dict[str, float | None]:
        return {
            name: mean(value for row in rows for value in row["scores"][name][-1])
            for name in self.walker.rewards.by_name
        }

    def summary(self, rows: Collection[Json], is_last: bool) -> Json:
        """Means at the last step and how early scores agree with it; writes labels and pool."""
        labels, lines = [], list[str]()
        weights = self.walker.rewards.weights
        for row in rows:
            ends = {name: values[-1] for name, values in row["scores"].items()}
            total = [
                sum(weights[name] * values[j] for name, values in ends.items())
                for j in range(self.n)
            ]
            entries = ", ".join(f"id{j:03d}: {value!r}" for j, value in enumerate(total))
            lines.append(f"{row['id']}: {{{entries}}}\n")
            labels += [self._label(row, j) for j in range(self.n)]
        write_jsonl(self.folder / "labels.jsonl", labels)
        write_text(self.folder / "labels.yaml", "".join(lines))
        names = tuple(self.walker.rewards.by_name)
        aware = None
        if self.walker.aware is not None:
            aware = np.array([[*row["noise_aware"].values()] for row in rows])
        pool = Pool(
            # [P, R, S, N] before
            np.array([[*row["scores"].values()] for row in rows]).transpose(0, 3, 2, 1),
            tuple(self.steps),
            names,
            None if aware is None else aware.transpose(0, 3, 2, 1),
            () if aware is None else tuple(self.steps[:-1]),
            weights=tuple(float(weights[name]) for name in names),
        )
        write_pool(self.folder / POOL, pool)
        return {
            "candidates": self.n,
            "rewards": self.means(rows),
            "agreement": agreement(pool),
            "first_prompt": labels[0]["prompt"],
        }


def name_of(sample: Sample) -> str:
    """Folder of a prompt's images."""
    return f"p{sample.index:04d}"


def _add(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file, the same bytes on every machine."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    shard.addfile(info, io.BytesIO(data))
