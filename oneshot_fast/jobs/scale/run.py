"""Many noises of each prompt, of which few are followed to the end: into one folder."""

import copy
import dataclasses
import json
import math
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from oneshot_fast.data.found_pairs import write_training_pairs
from oneshot_fast.data.images import save_png
from oneshot_fast.data.records import Failure
from oneshot_fast.data.sizes import Resolution
from oneshot_fast.errors import require
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.scale.options import ScaleOptions
from oneshot_fast.jobs.scale.rules import METHODS, Counts, Rule
from oneshot_fast.jobs.scale.simulate import gain_of, interval
from oneshot_fast.jobs.scale.walk import Walked, Walker
from oneshot_fast.planning.costs import count_flops
from oneshot_fast.planning.timing import Plan
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.runtime.files import Json, read_json
from oneshot_fast.runtime.ledger import say
from oneshot_fast.runtime.processes import gather_objects, is_main
from oneshot_fast.runtime.seeds import content_id, gaussian
from oneshot_fast.runtime.shards import ShardRun, mean
from oneshot_fast.runtime.units import duration
from oneshot_fast.search.pruning import Floats, affordable
from oneshot_fast.search.samples import Sample, samples_of

TERA = 1e12
_ALIKE = 0.9  # Spearman's correlation of scores by two decoders below which is warned


@dataclass(frozen=True)
class Won:
    """The winner of one image, of the method or of Best-of-N beside it.

    Attributes:
        candidate: Number of its noise.
        seed: Of that noise.
        scores: By reward, and their weighted sum as "total".
        trace: Candidates, scores and who went on, by scored step.
        said: What the method tells besides.
        image: [3, H, W] uint8.
        counts: What was evaluated and verified.
        seconds: The wave's, shared equally.
    """

    candidate: int
    seed: int
    scores: dict[str, float]
    trace: list[dict[str, Any]]
    said: dict[str, Any]
    image: Tensor
    counts: Counts
    seconds: float


@dataclass(frozen=True)
class Scaled:
    """What was found for one sample; tensors are on the CPU."""

    sample: Sample
    won: Won
    beside: Won | None
    decoder_spearman: float | None
    noise_shape: tuple[int, ...]

    @property
    def index(self) -> int:
        return self.sample.index

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"z": gaussian([self.won.seed], self.noise_shape)[0]}

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, self.won.scores.values())) and (
            self.beside is None or math.isfinite(self.beside.scores["total"])
        )


class ScaleRun(ShardRun[Sequence[Sample], Scaled]):
    """Pruned or steered sampling of many prompts in one folder."""

    command = "scale"
    outputs = (
        "noises", "images", "training", "logs", "manifest.jsonl", "failures.jsonl",
        "history.jsonl", "metrics_summary.json", "curves.png", "report.html",
    )  # fmt: skip
    summary_name = "metrics_summary.json"
    unlisted = ("seconds", "compare_seconds")
    nothing_kept = "no reward was finite"
    save_image = staticmethod(save_png)

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[str],
        folder: Path | str,
        options: ScaleOptions,
        *,
        rewards: WeightedRewards,
        reward_names: Sequence[str] | None = None,
        prune_rewards: WeightedRewards | None = None,
        prune_reward_names: Sequence[str] = (),
        score_decoder_id: str | None = None,
        images_per_prompt: int = 1,
        seeds: Sequence[int] = (),
        seed: int = 0,
        batch_size: int = 16,
        resolution: Resolution | None = None,
        begins_anew: bool = False,
    ) -> None:
        """Describe the run.

        Args:
            generator: Its weights stay fixed; ``num_inference_steps`` are its steps.
            prompts: May repeat.
            folder: Where everything is written.
            options: How a budget is spent.
            rewards: Select in the end, and without ``prune_rewards`` on the way, too.
            reward_names: How the rewards are called in the run's settings; by default by name and
                weight.
            prune_rewards: Score on the way.
            prune_reward_names: How those are called.
            score_decoder_id: Tiny decoder that decodes on the way.
            images_per_prompt: Images of each prompt, each with noises of its own.
            seeds: Instead: one seed per image of a prompt, the same for all prompts.
            seed: Seed of the run.
            batch_size: Rows that are evaluated at once.
            resolution: Image side in pixels, or height and width; by default the generator's own.
            begins_anew: Whether to ``run`` with overwrite: then seconds that an earlier run in the
                folder measured do not count.

        Raises:
            UserError: If there is no prompt, an option makes no sense, or the budget is below one
                candidate.
        """
        self.samples = samples_of(prompts, images_per_prompt, seed, seeds)
        require(bool(self.samples), "there is no prompt")
        require(batch_size >= 1, f"batch_size is {batch_size}; give at least 1")
        options = options.checked(generator.num_inference_steps, generator.draws_noise)
        on_the_way = bool(options.pruning.after) or options.method == "svdd"
        for flag, given in (
            ("prune_reward", prune_rewards is not None),
            ("score_decoder_id", score_decoder_id is not None),
        ):
            require(
                on_the_way or not given,
                f"--{flag} has no effect where nothing is scored on the way; leave it out",
            )
        self.size = TargetImages(generator, resolution).size  # checks it
        self.options, self.seed = options, seed
        early = generator
        if score_decoder_id is not None:
            early = copy.copy(generator)  # the same networks with another decoder
            early.tune_decoder(score_decoder_id, None, False, 0)
        self.walker = Walker(
            generator, rewards, self.size, batch_size, early=early, early_rewards=prune_rewards
        )
        self._has_decoder = score_decoder_id is not None
        self._steps = generator.num_inference_steps
        self.flops = self._count()
        weighted = (f"{name}:{weight:g}" for name, weight in rewards.weights.items())
        self.reward_names = [*(weighted if reward_names is None else reward_names)]
        self._more = {
            "prune_rewards": [*prune_reward_names],
            "score_decoder": early.fingerprint() if self._has_decoder else None,
        }
        known = None if begins_anew else Path(folder)
        # the same in all processes, and so what a budget pays
        self._each = each = gather_objects([self._units(known) if is_main() else (0.0,) * 3])[0]
        self.n = options.candidates or affordable(
            lambda n: self._rule(n).counts().cost(*each), options.budget or 0.0
        )
        self.counts = self._rule(self.n).counts()
        self.beside: int | None = None
        if options.compare == "best_of_n":
            one = self._rule(1, "best_of_n").counts().cost(*each)
            self.beside = max(1, math.ceil(self.counts.cost(*each) / one * (1 - 1e-9)))
        wave = -(-batch_size // self.counts.last)
        evaluations = self.counts.evaluations + (self.beside or 0) * self._steps
        super().__init__(folder, wave, len(self.samples), evaluations)

    def _rule(self, n: int, method: str | None = None, seeds: Sequence[int] = (0,)) -> Rule:
        """Of ``n`` candidates, by the method of the options or by Best-of-N."""
        options = self.options if method is None else ScaleOptions("best_of_n")
        return METHODS[options.method](options, n, self._steps, seeds)

    def _count(self) -> tuple[float, float, float]:
        """FLOP of an evaluation, and of a verification on the way and in the end."""
        walker = self.walker
        prompt = self.samples[0].prompt
        work = count_flops(walker.generator, walker.rewards, self.size, prompt)
        early = work.verification
        if (walker.early, walker.early_rewards) != (walker.generator, walker.rewards):
            parts = walker.early, walker.early_rewards
            early = count_flops(*parts, self.size, prompt).verification
        return work.evaluation, early, work.verification

    def _units(self, folder: Path | None) -> tuple[float, float, float]:
        """The same in the budget's unit; seconds are those that this run began with, if it did."""
        if self.options.cost_unit == "evaluations":
            return 1.0, 0.0, 0.0
        if self.options.cost_unit == "flops":
            evaluation, early, last = (value / TERA for value in self.flops)
            return evaluation, early, last
        if folder is not None and (path := folder / "run.json").is_file():
            then, now = read_json(path), json.loads(json.dumps(self._given()))
            if all(then.get(key) == value for key, value in now.items()):
                evaluation, early, last = then["cost_seconds"]
                return evaluation, early, last
        return self.walker.seconds(self.samples[0])

    def solve_all(self) -> None:
        walker = self.walker
        for reader in (walker.generator, walker.rewards, walker.early_rewards):
            reader.warn_of_cut(sample.prompt for sample in self.samples)
        super().solve_all()

    def settings(self) -> dict[str, Any]:
        found = self._given() | {"candidates": self.n, "compare_candidates": self.beside}
        if self.options.cost_unit == "seconds":
            found["cost_seconds"] = list(self._each)
        return found

    def _given(self) -> dict[str, Any]:
        """Settings that do not follow from the cost of an image."""
        found = {
            "command": self.command,
            **dataclasses.asdict(self.options),
            "rewards": self.reward_names,
            **self._more,
            "flops": list(self.flops),
            "seed": self.seed,
            **self.walker.generator.settings(self.size),
            "samples": len(self.samples),
            "prompts": content_id(*((s.prompt, s.seed) for s in self.samples)),
        }
        del found["candidates"]
        return found

    def plan(self) -> Plan:
        """What the run will cost, from counts and a few timed batches; does nothing of it."""
        seconds, lines, total = self.walker.seconds(self.samples[0]), [], 0.0
        evaluation, early, last = (value / TERA for value in self.flops)
        lines.append(f"evaluation {evaluation:.4g} TFLOP, {duration(seconds[0])}")
        lines.append(f"verification on the way {early:.4g} TFLOP, {duration(seconds[1])}")
        lines.append(f"verification in the end {last:.4g} TFLOP, {duration(seconds[2])}")
        arms = ((self.options.method, None, self.n), ("best_of_n", "best_of_n", self.beside))
        for name, method, n in arms:
            if n is not None:
                counts = self._rule(n, method).counts()
                took = counts.cost(*seconds) * len(self.samples)
                total += took
                lines.append(
                    f"{name}, {n} candidates: {counts.evaluations} evaluations, "
                    f"{counts.early + counts.last} verifications, "
                    f"{counts.cost(evaluation, early, last):.4g} TFLOP per image; "
                    f"{len(self.samples)} images: {duration(took)}"
                )
        return Plan(lines, total)

    def batches(self, done: Container[str]) -> Iterator[Sequence[Sample]]:
        for start in range(0, len(self.samples), self.batch_size):
            wave = self.samples[start : start + self.batch_size]
            yield [sample for sample in wave if sample.id not in done]

    def solve(self, batches: Iterable[Sequence[Sample]]) -> Iterator[Sequence[Scaled]]:
        self.walker.on_evaluations = self.on_evaluations
        return (self._wave(wave) for wave in batches if wave)

    def _wave(self, wave: Sequence[Sample]) -> list[Scaled]:
        seeds = [sample.seed for sample in wave]
        self.walker.compares_decoders = self._has_decoder and wave[0].index == 0
        walked = self.walker.walk(wave, self._rule(self.n, None, seeds))
        beside = None
        if self.beside is not None:
            beside = self.walker.walk(wave, self._rule(self.beside, "best_of_n", seeds))
        return [
            Scaled(
                sample,
                _won(walked, k, sample, len(wave)),
                None if beside is None else _won(beside, k, sample, len(wave)),
                self.walker.decoder_spearman if sample.index == 0 else None,
                self.walker.shape,
            )
            for k, sample in enumerate(wave)
        ]

    def failure(self, found: Scaled) -> Json:
        reason = "no candidate's reward was finite"
        return Failure(reason, id=found.sample.id, prompt=found.sample.prompt).row

    def images(self, found: Scaled) -> dict[str, Tensor]:
        """The winner, and that of Best-of-N."""
        beside = {} if found.beside is None else {"best_of_n": found.beside.image}
        pictures = {"best": found.won.image, **beside}
        return {f"{found.sample.id}-{kind}.png": image for kind, image in pictures.items()}

    def row(self, found: Scaled, place: Mapping[str, Any]) -> Json:
        sample, won, beside = found.sample, found.won, found.beside
        row = {
            "id": sample.id,
            "index": sample.index,
            "prompt": sample.prompt,
            "target_image_path": f"images/{sample.id}-best.png",
            **place,
            "first_seed": sample.seed,
            **self._told(won),
            "seconds": won.seconds,
        }
        if beside is not None:
            row |= {"compare": self._told(beside), "compare_seconds": beside.seconds}
        if found.decoder_spearman is not None:
            row["decoder_spearman"] = found.decoder_spearman
        return row

    def _told(self, won: Won) -> Json:
        return {
            "seed": won.seed,
            "candidate": won.candidate,
            "best": won.scores,
            "steps": won.trace,
            **won.said,
            "evaluations": won.counts.evaluations,
            "verifications": won.counts.early + won.counts.last,
            "flops": won.counts.cost(*self.flops),
        }

    def means(self, rows: Collection[Json]) -> dict[str, float | None]:
        return {"best_reward": mean(row["best"]["total"] for row in rows)}

    def summary(self, rows: Collection[Json], is_last: bool) -> Json:
        """Means with 95 % intervals, what was paid, and Best-of-N beside it; writes the pairs."""
        everything = list(rows)
        pairs = write_training_pairs(self.folder, everything, self.walker.shape)
        found = summarise(everything) | {"training_pairs": pairs}
        alike = found.get("decoder_spearman")
        if alike is not None and alike < _ALIKE:
            say(
                f"warning: the scores of the tiny decoder rank as those of the full one with a "
                f"correlation of {alike:.2f} only; leave --score_decoder_id out"
            )
        return found


def _won(walked: Walked, k: int, sample: Sample, wave: int) -> Won:
    candidate = int(walked.winners[k])
    return Won(
        candidate,
        sample.seed_of(candidate),
        {name: float(values[k]) for name, values in walked.scores.items()},
        [scored.of(k) for scored in walked.trace],
        walked.rule.said(k),
        walked.images[k],
        Counts(walked.evaluations // wave, walked.early // wave, walked.last // wave),
        walked.seconds / wave,
    )


def by_prompt(rows: Sequence[Json], values: Sequence[float]) -> Floats:
    """Means of the values of each prompt; the values themselves where there is one prompt."""
    groups: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        groups.setdefault(row["id"].rpartition("-")[0], []).append(value)
    if len(groups) == 1:
        return np.array(values)
    return np.array([np.mean(group) for group in groups.values()])


def summarise(rows: Sequence[Json]) -> dict[str, Any]:
    """Means over all images with intervals over prompts, and differences to Best-of-N."""
    found = {
        "samples": len(rows),
        "prompts": len({row["id"].rpartition("-")[0] for row in rows}),
        **_arm(rows, rows),
    }
    if "compare" in rows[0]:
        others = [{**row["compare"], "seconds": row["compare_seconds"]} for row in rows]
        totals = [[row["best"]["total"] for row in arm] for arm in (rows, others)]
        gains = [  # another batch rounds otherwise: that is the same image
            0.0 if math.isclose(a, b, rel_tol=1e-6) else a - b for a, b in zip(*totals, strict=True)
        ]
        found["compare"] = _arm(rows, others) | {
            "gain": gain_of(by_prompt(rows, gains)),
            "better": sum(gain > 0 for gain in gains),
            "equal": sum(gain == 0 for gain in gains),
        }
    if "decoder_spearman" in rows[0]:
        found["decoder_spearman"] = rows[0]["decoder_spearman"]
    return found


def _arm(rows: Sequence[Json], arms: Sequence[Json]) -> dict[str, Any]:
    totals = [arm["best"]["total"] for arm in arms]
    low, high = interval(by_prompt(rows, totals))
    return {
        "best_reward": mean(totals),
        "low": low,
        "high": high,
        "rewards": {name: mean(arm["best"][name] for arm in arms) for name in arms[0]["best"]},
        "candidates": len({*arms[0]["steps"][0]["candidates"]}),
        "evaluations": sum(arm["evaluations"] for arm in arms),
        "verifications": sum(arm["verifications"] for arm in arms),
        "tflop_per_image": mean(arm["flops"] / TERA for arm in arms),
        "seconds_per_image": mean(arm["seconds"] for arm in arms),
    }
