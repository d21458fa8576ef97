"""The M-step on one manifest of matched pairs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from oneshot_fast import ops
from oneshot_fast.data.pairs import Failure, MatchedPair, file_sha256
from oneshot_fast.jobs.sft.pairs import Examples
from oneshot_fast.runtime.files import write_jsonl
from oneshot_fast.runtime.processes import is_main, map_over_processes
from oneshot_fast.runtime.seeds import content_id, derived_seed, gaussian
from oneshot_fast.training.batch import Batch, PreservePool, SftOptions
from oneshot_fast.training.run import TrainingRun
from oneshot_fast.training.trainer import Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator

    from oneshot_fast.generators.base import Generator
    from oneshot_fast.generators.target_images import TargetImages


class SftRun(TrainingRun):
    """Training on one manifest into one folder."""

    def __init__(
        self,
        generator: Generator,
        targets: TargetImages,
        folder: Path,
        options: SftOptions,
        **more: Any,
    ) -> None:
        """Describe the run.

        Args:
            generator: The generator to train, in place; float32 weights.
            targets: Reads and encodes the target images.
            folder: Where everything is written.
            options: Losses and schedule.
            **more: As for ``TrainingRun``.

        Raises:
            UserError: If an option makes no sense.
        """
        super().__init__(generator, targets.resolution, folder, options, **more)
        self.targets = targets
        self._examples: Examples | None = None
        self._before = math.nan

    def settings(self, pairs: Sequence[MatchedPair]) -> dict[str, Any]:
        """Everything the result depends on."""
        # in the same order in every process
        paths = list(dict.fromkeys(path for p in pairs for path in (p.image_path, p.noise_path)))
        hashes = map_over_processes(lambda k: file_sha256(paths[k]), len(paths))
        files = dict(zip(paths, hashes, strict=True))
        contents: dict[str, list[tuple[object, ...]]] = {
            "prompts": [(pair.id, pair.prompt) for pair in pairs],
            "images": [(files[pair.image_path], pair.resize_mode) for pair in pairs],
            "noises": [(files[pair.noise_path], pair.noise_index) for pair in pairs],
        }
        return {
            "command": "sft",
            **dataclasses.asdict(self.options),
            **self._common_settings(),
            "samples": len(pairs),
            **{key: content_id(*value) for key, value in contents.items()},
        }

    def run(
        self,
        pairs: Sequence[MatchedPair],
        failures: Sequence[Failure] = (),
        *,
        pool: PreservePool | None = None,
        overwrite: bool = False,
        report_to: str = "none",
    ) -> dict[str, Any]:
        """Train, or finish an interrupted training; the generator ends with the final weights.

        Args:
            pairs: Matched pairs.
            failures: Lines of the manifest that could not be used.
            pool: Preserve targets; by default made from the generator as it is now.
            overwrite: Start anew.
            report_to: Tracker.

        Returns:
            The summary, as in summary.json.

        Raises:
            UserError: If no pair can be used, or the loss becomes NaN or infinite.
        """
        self.pool = pool

        def learn(tracker: Accelerator) -> dict[str, Any]:
            bad = list(failures)
            self._examples = examples = Examples.load(self.generator, self.targets, pairs, bad)
            prompts = [pair.prompt for pair in examples.pairs]
            self._make_pool(prompts)
            self._before = self._matched_loss()
            summary = self._train(prompts, tracker)
            if is_main():
                rows = [{k: v for k, v in vars(f).items() if v is not None} for f in bad]
                write_jsonl(self.folder / "failures.jsonl", rows)
            return summary | {"failed": len(bad)}

        return self._keep(self.settings(pairs), learn, overwrite, report_to)

    def batch(self, rows: list[int], step: int) -> Batch:
        """The pairs at ``rows``, then the preserve noises of this step."""
        assert self._examples is not None
        pairs, noise = [self._examples.pairs[k] for k in rows], self._examples.noises[rows]
        if self.options.noise == "random":
            seeds = [derived_seed(self.seed, "direct", step, pair.id) for pair in pairs]
            noise = gaussian(seeds, noise.shape[1:])
        images = None
        if self.options.pixel_l1_weight:
            images = self.targets.images([(pair.image_path, pair.resize_mode) for pair in pairs])
        latents, prompts = self._examples.latents[rows], [pair.prompt for pair in pairs]
        return self._with_preserve(noise, latents, prompts, step, images=images)

    def at_end(self, trainer: Trainer) -> dict[str, Any]:
        """The loss of the pairs, before and after."""
        return {
            "matched_loss_before": self._before,
            "matched_loss_after": self._matched_loss(),
        }

    @torch.no_grad()
    def _matched_loss(self) -> float:
        """Mean latent loss of all pairs on their matched noises, weighted as in training."""
        assert self._examples is not None
        examples, generator, rows = self._examples, self.generator, self.options.batch_size

        def losses(k: int) -> torch.Tensor:
            part = slice(rows * k, rows * (k + 1))
            prompts = generator.encode_prompts([pair.prompt for pair in examples.pairs[part]])
            made = generator.predict(examples.noises[part].to(generator.device), prompts)
            target = examples.latents[part].to(generator.device)
            return ops.latent_mse(made.output, made.x, target, made.sigma).cpu()

        return (
            torch.cat(map_over_processes(losses, math.ceil(len(examples.pairs) / rows)))
            .mean()
            .item()
        )
