"""A training into one folder: it resumes exactly, and leaves checkpoints.

What it learns from is said by a subclass: matched pairs (sft_run.py), rewards (reward_training.py).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oneshot_fast.errors import require
from oneshot_fast.runtime.concurrency import Interrupts
from oneshot_fast.runtime.files import read_json, write_json, write_jsonl
from oneshot_fast.runtime.folder import RunFolder
from oneshot_fast.runtime.processes import is_main, kept_by_main, processes
from oneshot_fast.runtime.progress import end_tracking, progress, start_tracking
from oneshot_fast.runtime.seeds import derived_seed, gaussian
from oneshot_fast.training.batch import Batch, PreservePool, SftOptions, batches, sft_losses
from oneshot_fast.training.checkpoints import Checkpoints
from oneshot_fast.training.memory import checkpoint_activations
from oneshot_fast.training.offloading import offloaded, offloads_by_default
from oneshot_fast.training.trainer import BadStepsError, Trainer
from oneshot_fast.training.training_step import TrainingStep

if TYPE_CHECKING:
    from accelerate import Accelerator

    from oneshot_fast.generators.base import Generator


class TrainingRun:
    """A training into one folder; a subclass gives the batches, and what is measured."""

    outputs: tuple[str, ...] = (
        "checkpoint-best", "checkpoint-final", "lora-best", "lora-final", "logs", "failures.jsonl",
        "history.jsonl", "preserve.safetensors", "state.safetensors", "summary.json", "report.html",
    )  # fmt: skip

    def __init__(
        self,
        generator: Generator,
        resolution: int,
        folder: Path,
        options: SftOptions,
        *,
        seed: int = 0,
        save_minutes: float = 5.0,
        keep_checkpoints: int = 0,
        offload_encoders: bool | None = None,
    ) -> None:
        """Describe the run.

        Args:
            generator: The generator to train, in place; float32 weights.
            resolution: Image side in pixels.
            folder: Where everything is written.
            options: Losses and schedule.
            seed: Seed of the run.
            save_minutes: Minutes between saved states.
            keep_checkpoints: How many of the epochs' checkpoints are kept, the newest.
            offload_encoders: Move what only encodes to the CPU while training; by default on a GPU.

        Raises:
            UserError: If an option makes no sense.
        """
        options.check()
        require(
            not options.optimizer_in_backward or processes().num_processes == 1,
            "optimizer_in_backward cannot add up the gradients of several processes; leave it out",
        )
        require(keep_checkpoints >= 0, "keep_checkpoints must not be negative")
        require(
            generator.autocast != torch.float16,
            "float16 loses small gradients; train with --dtype bfloat16 or float32",
        )
        self.generator, self.resolution, self.folder = generator, resolution, Path(folder)
        self.options, self.seed, self.save_minutes = options, seed, save_minutes
        self.checkpoints = Checkpoints(generator, self.folder, keep_checkpoints)
        self.offloads = offload_encoders
        if offload_encoders is None:
            self.offloads = offloads_by_default(generator)
        self.pool: PreservePool | None = None

    def batch(self, rows: list[int], step: int) -> Batch:
        """The examples at ``rows``, and the preserve noises of this step."""
        raise NotImplementedError

    def losses(
        self, generator: Generator, batch: Batch, options: SftOptions
    ) -> tuple[Tensor, Tensor]:
        """Matching and preserve loss, two scalars, of a part of a batch."""
        return sft_losses(generator, batch, options)

    def after_epoch(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Add what is measured after an epoch to its ``row`` of the history."""

    def at_end(self, trainer: Trainer) -> dict[str, Any]:
        """What the summary says of the generator, which has its final weights."""
        return {}

    @property
    def decodes(self) -> bool:
        """Whether the decoder is needed while training."""
        return self.options.decodes

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """Of a noise, [C, h, w]."""
        return self.generator.noise_shape(self.resolution, self.resolution)

    def _common_settings(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "resolution": self.resolution,
            "model": self.generator.fingerprint(),
            "device": self.generator.device.type,
        }

    def _keep(
        self,
        settings: dict[str, Any],
        learn: Callable[[Accelerator], dict[str, Any]],
        overwrite: bool,
        report_to: str,
    ) -> dict[str, Any]:
        """The summary of the folder's run, which ``learn`` does unless it is finished."""
        outputs = (*self.outputs, *self.checkpoints.intermediate())
        with kept_by_main(RunFolder(self.folder, settings, outputs, overwrite)):
            final, path = self.folder / "checkpoint-final", self.folder / "summary.json"
            state = self.folder / "state.safetensors"
            if path.exists() and final.exists():
                if is_main():
                    state.unlink(missing_ok=True)
                self.generator.load_denoiser(final)
                return dict(read_json(path))
            tracker = start_tracking(report_to, self.folder, settings)
            summary = learn(tracker)
            end_tracking(tracker)
            summary |= {"settings": settings}
            if is_main():
                write_json(path, summary)
                state.unlink(missing_ok=True)
            return summary

    def _make_pool(self, prompts: Sequence[str]) -> None:
        """Preserve targets of the generator as it is now, if none are there."""
        if self.options.preserves and self.pool is None:
            self.pool = PreservePool.build(
                self.generator,
                prompts,
                self.noise_shape,
                self.options.preserve_pool_size,
                self.seed,
                self.folder / "preserve.safetensors",
            )

    def _train(self, prompts: Sequence[str], tracker: Accelerator) -> dict[str, Any]:
        """Train on one example per prompt; the generator ends with the final weights."""
        unet = self.generator.denoiser
        dtype, trainer = unet.dtype, Trainer(unet, self.options, self.seed)
        checkpoint_activations(unet, self.options)
        state = self.folder / "state.safetensors"
        if state.exists():
            trainer.load(state)
        started, resumed_at = time.perf_counter(), trainer.step
        try:
            with self._only_needed(prompts):
                self._steps(trainer, len(prompts), tracker)
        finally:
            trainer.close()
        seconds = time.perf_counter() - started
        unet.disable_gradient_checkpointing()
        require(bool(trainer.best), "no step had a finite loss and gradient; lower the lr")
        trainer.load_weights(trainer.final())
        measured = self.at_end(trainer)
        if is_main():
            write_jsonl(self.folder / "history.jsonl", trainer.history)
        self.checkpoints.finish(trainer, dtype)
        return {
            "samples": len(prompts),
            "steps": trainer.step,
            "skipped_steps": trainer.skipped,
            **measured,
            "best_epoch": min(trainer.history, key=lambda row: row["loss"])["epoch"],
            "seconds": round(seconds, 3),
            "steps_per_second": round((trainer.step - resumed_at) / max(seconds, 1e-9), 3),
        }

    def _steps(self, trainer: Trainer, count: int, tracker: Accelerator) -> None:
        take_step = TrainingStep(self.generator, trainer, self.losses)
        per_epoch = math.ceil(count / self.options.batch_size)
        total = self.options.epochs * per_epoch
        saved = time.monotonic()
        with progress(total, "sft", "step") as bar, Interrupts() as interrupts:
            bar.update(trainer.step)
            for rows in batches(count, self.options.batch_size, self.seed, trainer.step, total):
                try:
                    take_step(self.batch(rows, trainer.step))
                except BadStepsError:
                    self._save(trainer)
                    raise
                if trainer.step % per_epoch == 0:
                    row = trainer.end_epoch(trainer.step // per_epoch)
                    self.checkpoints.keep(trainer)
                    if row is not None:
                        self.after_epoch(trainer, row)
                        bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                        tracker.log(row, step=trainer.step)
                if interrupts.pending or time.monotonic() - saved >= 60 * self.save_minutes:
                    self._save(trainer)
                    saved = time.monotonic()
                interrupts.check()
                bar.update()

    def _save(self, trainer: Trainer) -> None:
        if not is_main():
            return
        trainer.save(self.folder / "state.safetensors")
        write_jsonl(self.folder / "history.jsonl", trainer.history)

    def _with_preserve(
        self,
        noise: Tensor,
        latents: Tensor,
        prompts: Sequence[str],
        step: int,
        *,
        images: Tensor | None = None,
        texts: Sequence[str] = (),
    ) -> Batch:
        """These examples, then the preserve noises of ``step``."""
        options, generator, encoded = self.options, self.generator, [*prompts]
        noises, targets = [noise], [latents]
        if self.pool is not None:
            count = options.preserve_batch_size or options.batch_size
            drawn = self.pool.draw(count, derived_seed(self.seed, "preserve step", step))
            encoded += [self.pool.prompts[k] for k in drawn]
            noises.append(gaussian([self.pool.seeds[k] for k in drawn], noise.shape[1:]))
            targets.append(self.pool.latents[drawn])
        return Batch(
            torch.cat(noises).to(generator.device),
            generator.encode_prompts(encoded),
            torch.cat(targets).to(generator.device),
            images,
            len(prompts),
            texts,
        )

    @contextlib.contextmanager
    def _only_needed(self, prompts: Sequence[str]) -> Iterator[None]:
        """Keep what only encodes off the device, once the prompts are encoded."""
        if not self.offloads or not self.generator.encoders(self.decodes):
            yield
            return
        needed, generator = {*prompts, *(self.pool.prompts if self.pool else ())}, self.generator
        generator.keep_prompts(sorted(needed))
        with offloaded(generator, keep_decoder=self.decodes):
            yield
