"""The M-step on one manifest of matched pairs."""

import heapq
from collections.abc import Iterable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from oneshot_fast import ops
from oneshot_fast.data.manifests import MatchedPair
from oneshot_fast.data.records import Failure
from oneshot_fast.generators.base import Conditioning, Generator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.sft.pairs import Examples, Texts, can_be_read, size_of_pairs
from oneshot_fast.jobs.sft.plan import sft_plan
from oneshot_fast.planning.timing import Plan
from oneshot_fast.runtime.files import read_jsonl, write_jsonl
from oneshot_fast.runtime.folder import list_settings
from oneshot_fast.runtime.ledger import say
from oneshot_fast.runtime.processes import is_main, map_over_processes
from oneshot_fast.runtime.seeds import (
    content_id,
    content_id_of,
    derived_seed,
    gaussian,
    record_seed,
)
from oneshot_fast.runtime.stored import View
from oneshot_fast.training.batch import Batch, Rows, in_order, steps_per_epoch
from oneshot_fast.training.losses.base import Loss
from oneshot_fast.training.run import LATENTS, TrainingRun

CAPTIONS = "captions.jsonl"
_LATENT_BYTES = 64 << 20  # in memory: they are read from disk, but neighbours may share an image


class SftRun(TrainingRun):
    """Training on matched pairs into one folder.

    Where pairs have several captions, or ``caption_dropout`` is above 0, the prompt of each pair is
    drawn anew in every epoch. captions.jsonl has a row per epoch: by each pair's id the number of
    its caption, from 0, or -1 for the empty prompt.
    """

    outputs = (*TrainingRun.outputs, CAPTIONS)
    shards = True
    options: SftOptions

    def __init__(
        self,
        generator: Generator,
        pairs: Sequence[MatchedPair],
        folder: Path,
        options: SftOptions,
        *,
        targets: TargetImages | None = None,
        failures: Sequence[Failure] = (),
        loss: Loss | None = None,
        **more: Any,
    ) -> None:
        """Describe the run.

        Args:
            generator: The generator to train, in place; float32 weights.
            pairs: Matched pairs.
            folder: Where everything is written.
            options: Losses and schedule.
            targets: Reads and encodes the target images; by default in the size of the noises.
            failures: Lines of the manifest that could not be used.
            loss: Another loss than ``options.loss()``; of its own options only the class is
                compared when a run resumes. Its batches have the groups "matching" (with "latents",
                and "images" where there is a pixel weight) and "preserve" ("latents").
            **more: As for ``TrainingRun``.

        Raises:
            UserError: If an option makes no sense, or no noise can be read.
        """
        if targets is None:
            targets = TargetImages(generator, size_of_pairs(generator, pairs), _LATENT_BYTES)
        super().__init__(generator, loss or options.loss(), targets.size, folder, options, **more)
        self.pairs, self.targets, self.failures = pairs, targets, failures
        self._own_loss = None if loss is None else type(loss).__qualname__
        self._examples: Examples | None = None
        self._hashes = dict[tuple[int, ...], str]()
        if options.caption_dropout:
            generator.encode_prompts([""])  # some models do not know it

    def settings(self) -> dict[str, Any]:
        failed = sorted(failure.line for failure in self.failures if failure.line)

        return {
            "command": "sft",
            **self.options.settings(),
            **({"loss": self._own_loss} if self._own_loss else {}),
            "seed": self.seed,
            **self.generator.settings(self.size),
            "samples": len(self.pairs) + len(self.failures),
            **list_settings(
                None if self.begins_anew else self.folder,
                failed,
                lambda without: self._hash_of(tuple(without)),
            ),
            **({"pool": content_id(*self.pool.prompts)} if self.pool else {}),
        }

    def _hash_of(self, without: tuple[int, ...]) -> str:
        """Changes with the list, but for lines without."""
        if without in self._hashes:
            return self._hashes[without]
        failed: list[Any] = sorted(self.failures, key=_line)
        pairs: Iterable[Any] = self.pairs  # in order, and there may be millions
        listed = heapq.merge(pairs, failed, key=_line)
        kept = (item for item in listed if item.line not in without)
        found = content_id_of((x.id, x.prompt, x.digest or vars(x)) for x in kept)
        return self._hashes.setdefault(without, found)

    def plan(self) -> Plan:
        """What the run will need; does nothing of it."""
        return sft_plan(
            self.generator,
            self.options,
            resolution=self.size,
            samples=len(self.pairs),
            offload_encoders=self.offloads,
        )

    def learn(self) -> dict[str, Any]:
        """Read and encode the pairs, and train on them.

        Raises:
            RunError: If the training was interrupted and its pairs are not those of then.
        """
        begun, left_out = self.begun(self.pairs)
        bad = [*self.failures, *left_out]
        self._examples = Examples(
            self.generator,
            self.targets,
            self.pairs,
            bad,
            self.folder / LATENTS,
            {failure.id for failure in left_out if failure.id},
        )
        self.begin(begun, self._examples.contents, bad)
        pairs = self._examples.pairs
        sizes, (height, width) = {shape for shape, _ in self._examples.kinds}, self.size
        if len(sizes) > 1 and is_main():
            say(
                f"the pairs are of {len(sizes)} sizes; preserve losses and what is measured on "
                f"fresh noise are of {width} x {height} pixels alone"
            )
        self.make_pool(View(pairs, attrgetter("prompt")))
        before = self._matched_loss()
        empty = [""] if self.options.caption_dropout else []
        if is_main() and (empty or any(pair.prompts for pair in pairs)):
            per_epoch = steps_per_epoch(self._examples.kinds, self.options.batch_size)
            epochs = range(self.options.passes(per_epoch))
            drawn = ({pair.id: self._caption(pair, k) for pair in pairs} for k in epochs)
            rows = ({"epoch": k, "captions": row} for k, row in enumerate(drawn, 1))
            write_jsonl(self.folder / CAPTIONS, rows)
        prompts = Texts(pairs, empty)
        summary = self.train(len(pairs), prompts, self._examples.kinds)
        summary |= {"matched_loss_before": before}
        return summary | {"failed": len(bad), "cut_images": self._examples.cut_images}

    def is_mended(self) -> bool:
        """Whether a pair that failed in the finished training can be read now."""
        rows = read_jsonl(self.folder / "failures.jsonl")
        failed = {row.get(key) for row in rows for key in ("id", "line")} - {None}
        pairs = [pair for pair in self.pairs if {pair.id, pair.line} & failed]
        return any(can_be_read(self.generator, self.targets, pairs))

    def batch(self, rows: list[int], step: int) -> Batch:
        assert self._examples is not None
        generator, pairs = self.generator, [self._examples.pairs[k] for k in rows]
        later = [record_seed(pair.record_id) for pair in pairs]
        if self.options.noise == "random":
            seeds = later = [derived_seed(self.seed, "direct", step, pair.id) for pair in pairs]
            noise = gaussian(seeds, self._examples.shape(rows[0]))
        else:
            noise = self._examples.noises(rows)
        extra = {"latents": self._examples.latents(rows).to(generator.device)}
        if self.options.pixel_l1_weight:
            extra["images"] = self.targets.images([pair.place for pair in pairs])
        texts = [self._prompt(pair, step // self.per_epoch) for pair in pairs]
        prompts = self._told(pairs, texts, later)
        learned = Rows(noise.to(generator.device), prompts, extra)
        return Batch(matching=learned, **self.preserved(step))

    def _told(
        self, pairs: Sequence[MatchedPair], texts: Sequence[str], seeds: Sequence[int]
    ) -> Conditioning:
        """Conditioning of these prompts for the pairs' images."""
        told = self.generator.told(texts, seeds)
        frames = [pair.frame for pair in pairs if pair.frame is not None]
        return self.generator.framed(told, frames) if frames else told

    def _caption(self, pair: MatchedPair, epoch: int) -> int:
        """Number of the caption that an epoch, from 0, trains a pair on; -1: the empty prompt."""
        dropped = derived_seed(self.seed, "caption dropout", epoch, pair.id) / 2**63
        if dropped < self.options.caption_dropout:
            return -1
        return derived_seed(self.seed, "caption", epoch, pair.id) % max(1, len(pair.prompts))

    def _prompt(self, pair: MatchedPair, epoch: int) -> str:
        k = self._caption(pair, epoch)
        return "" if k < 0 else pair.prompts[k] if pair.prompts else pair.prompt

    def at_end(self) -> dict[str, Any]:
        return {"matched_loss_after": self._matched_loss()}

    @torch.no_grad()
    def _matched_loss(self) -> float:
        """Mean latent loss of all pairs on their matched noises, weighted as in training."""
        assert self._examples is not None
        examples, generator = self._examples, self.generator
        total, count = 0.0, 0

        def losses(rows: list[int]) -> torch.Tensor:
            pairs = [examples.pairs[k] for k in rows]
            later = [record_seed(pair.record_id) for pair in pairs]
            prompts = self._told(pairs, [pair.prompt for pair in pairs], later)
            noise = examples.noises(rows).to(generator.device)
            target = examples.latents(rows).to(generator.device)
            made = generator.predict(noise, prompts)
            return ops.latent_mse(made.output, made.x, target, made.sigma).cpu()

        parts = in_order(examples.kinds, self.options.batch_size)
        for found in map_over_processes(losses, parts):
            total, count = total + found.double().sum().item(), count + len(found)
        return total / count


def _line(item: MatchedPair | Failure) -> int:
    return item.line or 0
