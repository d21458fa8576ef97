"""Many noises of each of some images through the steps of a generator, of which few live on."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from oneshot_fast.data.sizes import Size
from oneshot_fast.errors import UserError
from oneshot_fast.generators.base import Conditioning, Generator
from oneshot_fast.jobs.scale.rules import Rule
from oneshot_fast.planning.costs import median_seconds
from oneshot_fast.rewards import WeightedRewards
from oneshot_fast.runtime.seeds import derived_seed, gaussian
from oneshot_fast.search.pruning import Floats, Ints
from oneshot_fast.search.samples import Sample

_COMPARED = 64  # rows that both decoders decode
AWARE = "aware "  # begins the names of scores by ``Walker.aware``


@dataclass(frozen=True)
class Scored:
    """What was scored after a step; W images, M rows of each.

    Attributes:
        step: From 0.
        candidates: [W, M], numbers of the noises that the rows came from.
        totals: [W, M], weighted sums of their rewards.
        kept: [W, m], positions of the rows that went on; in the end of the winner.
        scores: The rewards, [W, M] each by name, and their sum as "total".
    """

    step: int
    candidates: Ints
    totals: Floats
    kept: Ints
    scores: dict[str, Floats] = field(default_factory=dict)

    def of(self, image: int) -> dict[str, Any]:
        """What is kept of one image."""
        candidates = self.candidates[image]
        return {
            "step": self.step,
            "candidates": candidates.tolist(),
            "scores": self.totals[image].tolist(),
            "kept": candidates[self.kept[image]].tolist(),
        }


@dataclass(frozen=True)
class Walked:
    """The winners of W images.

    Attributes:
        rule: What chose them.
        trace: What was scored on the way, and in the end.
        scores: Of the winners, by reward and in all as "total", [W] each.
        images: Of the winners, [W, 3, H, W] uint8; none if ``Walker.on_pictures`` takes all.
        evaluations: Rows that the denoiser was run on.
        early: Rows that were decoded and scored on the way.
        last: Those after the last step.
        seconds: In all.
    """

    rule: Rule
    trace: list[Scored]
    scores: dict[str, Floats]
    images: Tensor
    evaluations: int
    early: int
    last: int
    seconds: float

    @property
    def winners(self) -> Ints:
        """[W], numbers of their noises."""
        end = self.trace[-1]
        return np.take_along_axis(end.candidates, end.kept, 1)[:, 0]


class Walker:
    """Takes waves of images through the steps; rows of all images share the batches."""

    def __init__(
        self,
        generator: Generator,
        rewards: WeightedRewards,
        size: Size,
        batch_size: int,
        *,
        early: Generator | None = None,
        early_rewards: WeightedRewards | None = None,
    ) -> None:
        """Bind what all waves share.

        Args:
            generator: Its weights stay as they are.
            rewards: Select in the end.
            size: Height and width of the images in pixels.
            batch_size: Rows that are evaluated at once; halved where memory runs out.
            early: Decodes on the way; by default as in the end.
            early_rewards: Score on the way; by default those of the end.

        Raises:
            UserError: If a reward was trained for another number of steps.
        """
        self.generator, self.rewards = generator, rewards
        self.shape = generator.noise_shape(*size)
        self.batch_size = batch_size
        self.early, self.early_rewards = early or generator, early_rewards or rewards
        for judges in (self.rewards, self.early_rewards):
            judges.check_steps(generator.num_inference_steps)
        self.on_evaluations: Callable[[int], object] = lambda count: None
        self.compares_decoders = False
        self.aware: WeightedRewards | None = None  # scores on the way, too, and decides nothing
        # takes all that is decoded: step, number of the first row, [B, 3, H, W] uint8
        self.on_pictures: Callable[[int, int, Tensor], object] | None = None
        self.decoder_spearman: float | None = None

    @torch.no_grad()
    def seconds(self, sample: Sample) -> tuple[float, float, float]:
        """Of an evaluation and of both verifications of one row, in whole batches of one prompt."""
        generator, size = self.generator, self.batch_size
        prompts = [sample.prompt] * size
        told = generator.told(prompts, [0] * size)
        z = gaussian([sample.seed_of(k) for k in range(size)], self.shape).to(generator.device)
        latents = generator.evaluate(0, z, told).latents

        def evaluate() -> None:
            generator.evaluate(0, z, told).latents.cpu()

        def verify(decoder: Generator, rewards: WeightedRewards) -> None:
            rewards(decoder.images(latents), prompts).cpu()

        found = [median_seconds(evaluate)]
        for pair in ((self.early, self.early_rewards), (generator, self.rewards)):
            found.append(median_seconds(functools.partial(verify, *pair)))
        evaluation, early, last = (seconds / size for seconds in found)
        return evaluation, early, last

    @torch.no_grad()
    def walk(self, samples: Sequence[Sample], rule: Rule) -> Walked:
        """Take a wave to its end.

        Raises:
            UserError: If not even one row fits into memory.
        """
        started, generator, W = time.perf_counter(), self.generator, len(samples)
        prompts = [sample.prompt for sample in samples]
        told = generator.told(prompts, [0] * W)
        M = rule.n * rule.branches(0)
        candidates: Ints = np.tile(np.arange(M), (W, 1))
        seeds = [[sample.seed_of(k) for k in range(M)] for sample in samples]
        x = gaussian(_flat(seeds), self.shape).to(generator.device)
        trace, evaluations, early = list[Scored](), 0, 0
        for step in range(rule.steps):
            is_last, is_scored = step == rule.steps - 1, step in rule.scored
            output, latents = self._evaluate(step, x, self._told(told, seeds), is_scored)
            evaluations += len(x)
            if is_scored:
                owners = np.repeat(np.arange(W), M).tolist()
                of = [prompts[k] for k in owners]
                scores, pixels = self._score(latents, of, step, is_last)
                totals = scores["total"].reshape(W, M)
                kept = rule.choose(step, totals)
                all_scores = {name: value.reshape(W, M) for name, value in scores.items()}
                trace.append(Scored(step, candidates, totals, kept, all_scores))
                early += 0 if is_last else len(x)
                if self.compares_decoders and not is_last:
                    compared = slice(_COMPARED)
                    self._compare_decoders(latents[compared], of[compared], step, scores)
                rows = (kept + M * np.arange(W)[:, None]).ravel()
                candidates = np.take_along_axis(candidates, kept, 1)
                if rule.keeps_seeds:
                    seeds = [[own[k] for k in k_s] for own, k_s in zip(seeds, kept, strict=True)]
                M = kept.shape[1]
                if is_last:
                    break
                index = torch.from_numpy(rows).to(x.device)
                x, output = x[index], output[index]
            later = seeds
            if (branches := rule.branches(step + 1)) > 1:
                later = [
                    [derived_seed(one, "branch", step, m) for one in own for m in range(branches)]
                    for own in seeds
                ]
                x, output = (v.repeat_interleave(branches, 0) for v in (x, output))
                candidates, M = candidates.repeat(branches, 1), M * branches
            x = generator.advance(step, x, output, self._told(told, later))
            seeds = later
        best = {name: values[rows] for name, values in scores.items()}
        images = pixels[rows] if len(pixels) else pixels
        seconds = time.perf_counter() - started
        return Walked(rule, trace, best, images, evaluations, early, len(latents), seconds)

    def _compare_decoders(
        self, latents: Tensor, prompts: Sequence[str], step: int, scores: dict[str, Floats]
    ) -> None:
        """Note, once, how alike the decoders of the way and of the end make the ranks of rows."""
        self.compares_decoders = False
        images = torch.cat([self.generator.images(row) for row in latents.split(1)])
        full = self.early_rewards.at_step(step)(images, prompts).cpu()
        found = scipy.stats.spearmanr(full, scores["total"][: len(full)]).statistic
        self.decoder_spearman = float(found) if np.isfinite(found) else None

    def _told(self, told: Conditioning, seeds: Sequence[Sequence[int]]) -> Conditioning:
        """That of every row, with the seed of its later noises."""
        owners = [k for k, own in enumerate(seeds) for _ in own]
        rows = told.select(torch.tensor(owners, device=told.embeds.device))
        if rows.seeds is None:
            return rows
        return replace(rows, seeds=torch.tensor(_flat(seeds), device=rows.seeds.device))

    def _evaluate(
        self, step: int, x: Tensor, told: Conditioning, is_scored: bool
    ) -> tuple[Tensor, Tensor]:
        """Output of every row, and where it is scored the clean latents of its estimate."""
        outputs, latents = list[Tensor](), list[Tensor]()

        def run(rows: slice) -> None:
            found = self.generator.evaluate(step, x[rows], told.select(rows))
            if is_scored:
                latents.append(found.latents)
            outputs.append(found.output)

        self._in_batches(len(x), run)
        self.on_evaluations(len(x))
        return torch.cat(outputs), torch.cat(latents) if latents else x[:0]

    def _score(
        self, latents: Tensor, prompts: Sequence[str], step: int, is_last: bool
    ) -> tuple[dict[str, Floats], Tensor]:
        """Rewards of every row, and their weighted sum as "total"; pixels in the end, if kept."""
        generator, rewards = self.early, self.early_rewards
        if is_last:
            generator, rewards = self.generator, self.rewards
        rewards = rewards.at_step(step)
        found, pixels = list[dict[str, Tensor]](), list[Tensor]()
        wants_pixels = is_last or self.on_pictures is not None

        def run(rows: slice) -> None:
            images = generator.images(latents[rows])
            scores = rewards.scores(images, prompts[rows])
            scores["total"] = rewards.total(scores)
            if self.aware is not None and not is_last:
                more = self.aware.at_step(step).scores(images, prompts[rows])
                scores |= {f"{AWARE}{name}": value for name, value in more.items()}
            shown = (images * 255).round().to(torch.uint8).cpu() if wants_pixels else None
            found.append({name: value.double().cpu() for name, value in scores.items()})
            if shown is not None:  # after all that can be out of memory
                if self.on_pictures is None:
                    pixels.append(shown)
                else:
                    self.on_pictures(step, rows.start, shown)

        self._in_batches(len(latents), run)
        scores = {name: torch.cat([one[name] for one in found]).numpy() for name in found[0]}
        return scores, torch.cat(pixels) if pixels else latents.new_empty(0)

    def _in_batches(self, count: int, run: Callable[[slice], None]) -> None:
        done = 0
        while done < count:
            rows = slice(done, min(done + self.batch_size, count))
            try:
                run(rows)
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise UserError(
                        "one image does not fit into memory; use a smaller --resolution"
                    ) from None
                self.batch_size //= 2
                continue
            done = rows.stop


def _flat(seeds: Sequence[Sequence[int]]) -> list[int]:
    return [seed for own in seeds for seed in own]
