"""The M-step on one manifest: a training that resumes exactly, and its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from oneshot_fast import ops
from oneshot_fast.checkpoints import Checkpoints
from oneshot_fast.data import Failure, MatchedPair, file_sha256
from oneshot_fast.errors import require
from oneshot_fast.examples import Examples
from oneshot_fast.interrupts import Interrupts
from oneshot_fast.offloading import encoders, offloaded, offloads_by_default
from oneshot_fast.processes import is_main, kept_by_main, main_first, processes
from oneshot_fast.runs import RunFolder, read_json, write_json, write_jsonl
from oneshot_fast.seeds import derived_seed, gaussian
from oneshot_fast.tracking import end_tracking, progress, start_tracking
from oneshot_fast.trainer import BadStepsError, Trainer
from oneshot_fast.training import Batch, PreservePool, SftOptions, batches
from oneshot_fast.training_step import TrainingStep

if TYPE_CHECKING:
    from accelerate import Accelerator

    from oneshot_fast.generator import OneStepGenerator
    from oneshot_fast.targets import Targets

OUTPUTS = (
    "checkpoint-best", "checkpoint-final", "lora-best", "lora-final", "logs", "failures.jsonl",
    "history.jsonl", "preserve.safetensors", "state.safetensors", "summary.json", "report.html",
)  # fmt: skip


class SftRun:
    """Training on one manifest into one folder."""

    def __init__(
        self,
        generator: OneStepGenerator,
        targets: Targets,
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
            targets: Reads and encodes the target images.
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
        self.generator, self.targets, self.folder = generator, targets, Path(folder)
        self.options, self.seed, self.save_minutes = options, seed, save_minutes
        self.checkpoints = Checkpoints(generator, self.folder, keep_checkpoints)
        self.offloads = offload_encoders
        if offload_encoders is None:
            self.offloads = offloads_by_default(generator)

    def settings(self, pairs: Sequence[MatchedPair]) -> dict[str, Any]:
        """Everything the result depends on."""
        paths = {path for pair in pairs for path in (pair.image_path, pair.noise_path)}
        files = {path: file_sha256(path) for path in paths}
        contents: dict[str, list[tuple[object, ...]]] = {
            "prompts": [(pair.id, pair.prompt) for pair in pairs],
            "images": [(files[pair.image_path], pair.resize_mode) for pair in pairs],
            "noises": [(files[pair.noise_path], pair.noise_index) for pair in pairs],
        }
        return {
            "command": "sft",
            **dataclasses.asdict(self.options),
            "seed": self.seed,
            "resolution": self.targets.resolution,
            "model": self.generator.fingerprint(),
            "device": self.generator.device.type,
            "samples": len(pairs),
            **{key: f"{derived_seed(0, *value):016x}" for key, value in contents.items()},
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
        settings = self.settings(pairs)
        outputs = (*OUTPUTS, *self.checkpoints.intermediate())
        with kept_by_main(RunFolder(self.folder, settings, outputs, overwrite)):
            final = self.folder / "checkpoint-final"
            if (self.folder / "summary.json").exists() and final.exists():
                if is_main():
                    (self.folder / "state.safetensors").unlink(missing_ok=True)
                self.generator.load_unet(final)
                return read_json(self.folder / "summary.json")
            tracker = start_tracking(report_to, self.folder, settings)
            failures = list(failures)
            usable = Examples.load(self.generator, self.targets, pairs, failures)
            if self.options.preserves and pool is None:
                pool = main_first(lambda: self._build_pool(usable))
            summary = self._train(usable, pool, tracker)
            end_tracking(tracker)
            summary |= {"failed": len(failures), "settings": settings}
            if is_main():
                self._finish(summary, failures)
            return summary

    def _finish(self, summary: dict[str, Any], failures: Sequence[Failure]) -> None:
        rows = [{k: v for k, v in vars(f).items() if v is not None} for f in failures]
        write_jsonl(self.folder / "failures.jsonl", rows)
        write_json(self.folder / "summary.json", summary)
        (self.folder / "state.safetensors").unlink(missing_ok=True)

    def _build_pool(self, examples: Examples) -> PreservePool:
        return PreservePool.build(
            self.generator,
            [pair.prompt for pair in examples.pairs],
            examples.noises.shape[1:],
            self.options.preserve_pool_size,
            self.seed,
            self.folder / "preserve.safetensors",
        )

    def _train(
        self, examples: Examples, pool: PreservePool | None, tracker: Accelerator
    ) -> dict[str, Any]:
        before = self._matched_loss(examples)
        unet = self.generator.unet
        dtype, trainer = unet.dtype, Trainer(unet, self.options, self.seed)
        if self.options.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        state = self.folder / "state.safetensors"
        if state.exists():
            trainer.load(state)
        started, resumed_at = time.perf_counter(), trainer.step
        try:
            with self._only_needed(examples, pool):
                self._steps(trainer, examples, pool, tracker)
        finally:
            trainer.close()
        seconds = time.perf_counter() - started
        unet.disable_gradient_checkpointing()
        require(bool(trainer.best), "no step had a finite loss and gradient; lower the lr")
        trainer.load_weights(trainer.final())
        after = self._matched_loss(examples)
        if is_main():
            write_jsonl(self.folder / "history.jsonl", trainer.history)
        self.checkpoints.finish(trainer, dtype)
        return {
            "samples": len(examples.pairs),
            "steps": trainer.step,
            "skipped_steps": trainer.skipped,
            "matched_loss_before": before,
            "matched_loss_after": after,
            "best_epoch": min(trainer.history, key=lambda row: row["loss"])["epoch"],
            "seconds": round(seconds, 3),
            "steps_per_second": round((trainer.step - resumed_at) / max(seconds, 1e-9), 3),
        }

    def _steps(
        self,
        trainer: Trainer,
        examples: Examples,
        pool: PreservePool | None,
        tracker: Accelerator,
    ) -> None:
        take_step = TrainingStep(self.generator, trainer)
        count = len(examples.pairs)
        per_epoch = math.ceil(count / self.options.batch_size)
        total = self.options.epochs * per_epoch
        saved = time.monotonic()
        with progress(total, "sft", "step") as bar, Interrupts() as interrupts:
            bar.update(trainer.step)
            for rows in batches(count, self.options.batch_size, self.seed, trainer.step, total):
                try:
                    take_step(self._batch(examples, rows, pool, trainer.step))
                except BadStepsError:
                    self._save(trainer)
                    raise
                if trainer.step % per_epoch == 0:
                    row = trainer.end_epoch(trainer.step // per_epoch)
                    self.checkpoints.keep(trainer)
                    if row is not None:
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

    def _batch(
        self, examples: Examples, rows: list[int], pool: PreservePool | None, step: int
    ) -> Batch:
        """The pairs at ``rows``, then the preserve noises of this step."""
        options, generator = self.options, self.generator
        pairs = [examples.pairs[k] for k in rows]
        prompts = [pair.prompt for pair in pairs]
        noise, latents = [examples.noises[rows]], [examples.latents[rows]]
        shape = noise[0].shape[1:]
        if options.noise == "random":
            seeds = [derived_seed(self.seed, "direct", step, pair.id) for pair in pairs]
            noise = [gaussian(seeds, shape)]
        if pool is not None:
            count = options.preserve_batch_size or options.batch_size
            drawn = pool.draw(count, derived_seed(self.seed, "preserve step", step))
            prompts += [pool.prompts[k] for k in drawn]
            noise.append(gaussian([pool.seeds[k] for k in drawn], shape))
            latents.append(pool.latents[drawn])
        images = None
        if options.pixel_l1_weight:
            images = self.targets.images([(pair.image_path, pair.resize_mode) for pair in pairs])
        device = generator.device
        return Batch(
            torch.cat(noise).to(device),
            generator.encode_prompts(prompts),
            torch.cat(latents).to(device),
            images,
            len(pairs),
        )

    @contextlib.contextmanager
    def _only_needed(self, examples: Examples, pool: PreservePool | None) -> Iterator[None]:
        """Keep what only encodes off the device, once the prompts are encoded."""
        if not self.offloads or not encoders(self.generator, self.options.decodes):
            yield
            return
        prompts = {pair.prompt for pair in examples.pairs} | {*(pool.prompts if pool else ())}
        for prompt in sorted(prompts):
            self.generator.encode_prompts([prompt], cache_size=len(prompts))
        with offloaded(self.generator, keep_decoder=self.options.decodes):
            yield

    @torch.no_grad()
    def _matched_loss(self, examples: Examples) -> float:
        """Mean latent loss of all pairs on their matched noises, weighted as in training."""
        generator, losses = self.generator, []
        for start in range(0, len(examples.pairs), self.options.batch_size):
            part = slice(start, start + self.options.batch_size)
            prompts = generator.encode_prompts([pair.prompt for pair in examples.pairs[part]])
            eps_hat, x = generator.predict(examples.noises[part].to(generator.device), prompts)
            target = examples.latents[part].to(generator.device)
            losses.append(ops.latent_mse(eps_hat, x, target, generator.step.sigma))
        return torch.cat(losses).mean().item()
