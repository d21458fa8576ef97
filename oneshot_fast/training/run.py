"""A training into one folder: it resumes exactly, and leaves checkpoints.

What it learns from is said by a subclass, as the runs of jobs/sft: matched pairs, rewards.
"""

import contextlib
import dataclasses
import hashlib
import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from oneshot_fast.data.images import save_png, tile
from oneshot_fast.data.records import Failure
from oneshot_fast.data.sizes import Size
from oneshot_fast.errors import RunError, require
from oneshot_fast.generators.base import Generator
from oneshot_fast.runtime.concurrency import Interrupts, stop
from oneshot_fast.runtime.files import read_json, read_jsonl, remove, write_json, write_jsonl
from oneshot_fast.runtime.folder import RunFolder
from oneshot_fast.runtime.ledger import ledger_of, say
from oneshot_fast.runtime.processes import barrier, is_main, kept_by_main, largest, processes
from oneshot_fast.runtime.progress import Tracker, progress, start_tracking
from oneshot_fast.runtime.seeds import content_id_of, derived_seed, gaussian
from oneshot_fast.runtime.stored import StoredNumbers
from oneshot_fast.training.batch import Batch, Rows, batches, steps_per_epoch
from oneshot_fast.training.checkpoints import STUDENT, Checkpoints, load_state, save_state
from oneshot_fast.training.losses.base import Loss
from oneshot_fast.training.losses.preserve import POOL, PreservePool
from oneshot_fast.training.memory import offloaded
from oneshot_fast.training.optimizer import WeightOptimizer
from oneshot_fast.training.options import TrainOptions, check_keeping
from oneshot_fast.training.trainer import BadStepsError, Trainee, Trainer
from oneshot_fast.training.zero import check_engine

_NOTHING = "no step had a finite loss and gradient, or rewards that differ; lower the lr"
BEGUN = "begun.json"  # which examples an interrupted training has
_PROMPTS = "prompts"  # encodings, where they are too many for memory
LATENTS = "latents"  # of target images
_VALIDATION = "validation"  # pictures
_STATE = ("state.safetensors", BEGUN, _PROMPTS)


class Example(Protocol):
    """What a training is told of by name."""

    @property
    def id(self) -> str: ...

    @property
    def prompt(self) -> str: ...

    @property
    def line(self) -> int: ...


def contents_of(examples: Sequence[Example], noises: str, latents: str) -> dict[str, Any]:
    """What a training goes on with: how many, and hashes of all ids, noises and latents."""
    ids = content_id_of(example.id for example in examples)
    return {"count": len(examples), "ids": ids, "noises": noises, "latents": latents}


def digest_of(tensors: Sequence[Tensor]) -> str:
    """Hash of tensors on the CPU."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def _is_vital(key: str) -> bool:
    """Whether a finished training without this file has to train again."""
    others = f"preserve|state|history|failures|captions|validation|{LATENTS}/"
    return re.match(rf"(.*/)?checkpoint-\d+/|eval/|{others}", key) is None


class TrainingRun(ABC):
    """A training into one folder; a subclass gives loss and batches, and what is measured.

    More may be trained beside the generator, such as a critic: a subclass adds to ``trainees`` and
    ``losses``, and says in ``take_step`` whose turn it is. All have one state to resume from; the
    checkpoints of the others lie in folders of their names.

    Attributes:
        trainees: What is trained, by name; the generator is "student".
        losses: What each lowers.
        trainers: Made of both when the training begins.
        pool: Preserve targets; by default made from the generator as it is when it is run.
        begins_anew: Whether what lies in the folder does not count.
        passing: Names of trainees that end with the training, and leave no checkpoint.
        shards: Whether FSDP2 can train it: nothing of it is evaluated by one process alone.
    """

    passing: frozenset[str] = frozenset()
    shards = False

    outputs: tuple[str, ...] = (
        "checkpoint-best", "checkpoint-final", "checkpoint-best.safetensors",
        "checkpoint-final.safetensors", "lora-best", "lora-final", "logs", "failures.jsonl",
        "history.jsonl", POOL, "summary.json", "report.html", _VALIDATION,
        *_STATE, LATENTS,
    )  # fmt: skip

    def __init__(
        self,
        generator: Generator,
        loss: Loss,
        size: Size,
        folder: Path,
        options: TrainOptions,
        *,
        seed: int = 0,
        save_minutes: float = 5.0,
        keep_checkpoints: int = 0,
        offload_encoders: bool | None = None,
    ) -> None:
        """Describe the run.

        Args:
            generator: The generator to train, in place; float32 weights.
            loss: What it lowers.
            size: Height and width of the images, pixels.
            folder: Where everything is written.
            options: Schedule.
            seed: Seed of the run.
            save_minutes: Minutes between saved states.
            keep_checkpoints: How many of the epochs' checkpoints are kept, the newest.
            offload_encoders: Move what only encodes to the CPU while training; by default on a GPU.

        Raises:
            UserError: If an option makes no sense.
        """
        options.check()
        check_engine(options, generator, self.shards)
        require(
            not options.optimizer_in_backward or processes().num_processes == 1,
            "optimizer_in_backward cannot add up the gradients of several processes; leave it out",
        )
        require(
            not options.optimizer_in_backward or generator.backprop_steps == 1,
            "optimizer_in_backward keeps every gradient until the first of several steps has added "
            "to it; leave it out, or give --backprop_steps 1",
        )
        check_keeping(save_minutes, keep_checkpoints)
        require(
            generator.autocast != torch.float16,
            "float16 loses small gradients; train with --dtype bfloat16 or float32",
        )
        if options.save_single_file:
            generator.check_single_file()
        if options.lora_format == "kohya":
            generator.check_kohya()
        options = _going_on(options, generator)
        dtype = options.save_dtype
        generator.save_dtype = None if dtype == "auto" else getattr(torch, dtype)
        self.generator, self.size, self.folder = generator, size, Path(folder)
        self.options, self.seed, self.save_minutes = options, seed, save_minutes
        self.trainees: dict[str, Trainee] = {STUDENT: generator}
        self.losses: dict[str, Loss] = {STUDENT: loss}
        self.trainers: dict[str, Trainer] = {}
        self.pool: PreservePool | None = None  # one that is given, as em's, else its own
        self._pool: PreservePool | None = None
        self.begins_anew = False
        self.per_epoch = 0  # steps of the student
        self.tracker = Tracker()
        self.needed_prompts: Sequence[str] = ()  # of what is measured
        self._shown: list[str] = []  # prompts of validation images
        on_gpu = generator.device.type != "cpu"  # there is memory to free
        self.offloads = on_gpu if offload_encoders is None else offload_encoders
        self._keep_checkpoints = keep_checkpoints

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything the result depends on."""

    @abstractmethod
    def learn(self) -> dict[str, Any]:
        """Read the data and ``train``; returns the summary."""

    @abstractmethod
    def batch(self, rows: list[int], step: int) -> Batch:
        """The examples at ``rows``, and the preserve noises of this step."""

    def trainer(self, name: str, steps: int) -> Trainer:
        """A new trainer of one of the trainees for ``steps`` of the student."""
        return Trainer(self.trainees[name], self.losses[name], self.options, steps, self.seed)

    def take_step(self, rows: list[int], step: int) -> None:
        """Let the trainers whose turn it is take a step; the student has one each time."""
        self.trainers[STUDENT](self.batch(rows, step))

    def is_over(self) -> bool:
        """Whether the training ends with the step that was just taken."""
        return False

    def is_resumable(self, step: int) -> bool:
        """Whether a training can be resumed after so many steps; else it is not saved there."""
        return True

    def after_epoch(self, epoch: int) -> dict[str, Any]:
        """What is measured after an epoch, for its row of the history."""
        return {}

    def at_end(self) -> dict[str, Any]:
        """What the summary says of the generator, which has its final weights."""
        return {}

    def is_mended(self) -> bool:
        """Whether more can be read now than the finished training was given."""
        return False

    def begun(self, examples: Iterable[Example]) -> tuple[dict[str, Any] | None, list[Failure]]:
        """What an interrupted training began with, ``begin``'s contents; None if none goes on.

        Besides, which of the examples it does not have, and why: what was mended meanwhile waits
        for the end, see ``is_mended``.
        """
        path = self.folder / BEGUN
        if is_main() and not path.exists():
            for name in _STATE:  # of which examples it is, is lost; latents are kept
                remove(self.folder / name)
        barrier()
        if not (self.folder / "state.safetensors").exists():
            return None, []
        failed = read_jsonl(self.folder / "failures.jsonl")
        said = {row.get(key): row["reason"] for row in failed for key in ("id", "line")}
        said.pop(None, None)
        return read_json(path), [
            Failure(said.get(x.id) or said[x.line], x.line or None, x.id, x.prompt)
            for x in examples
            if x.id in said or x.line in said
        ]

    def begin(
        self, begun: dict[str, Any] | None, contents: dict[str, Any], failures: Sequence[Failure]
    ) -> None:
        """Note what the training has, ``contents_of`` its examples, and what failed.

        Raises:
            RunError: If it goes on, and had something else when it was interrupted.
        """
        if begun not in (None, contents):
            raise RunError(
                f"{self.folder}: {begun.get('count', 'other')} pairs were there when the training "
                f"began, {contents['count']} of them now, or files of theirs changed; restore or "
                "start anew with --overwrite"
            )
        if is_main():
            write_json(self.folder / BEGUN, contents)
            write_jsonl(self.folder / "failures.jsonl", [failure.row for failure in failures])

    @property
    def decodes(self) -> bool:
        """Whether the decoder is needed while training."""
        return self.options.decodes

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """Of a noise, [C, h, w]."""
        return self.generator.noise_shape(*self.size)

    def run(
        self,
        *,
        overwrite: bool = False,
        report_to: str | Tracker = "none",
        verify: bool = False,
    ) -> dict[str, Any]:
        """Train, or finish an interrupted training; all trainees end with their final weights.

        Args:
            overwrite: Start anew.
            report_to: As for ``start_tracking``.
            verify: Compare the hashes of all files that are there.

        Returns:
            The summary, as in summary.json.

        Raises:
            UserError: If nothing can be trained on, or the loss becomes NaN or infinite.
        """
        self.begins_anew = overwrite or self._is_mended()
        settings = self.settings()
        others = (name for name in self._kept if name != STUDENT)
        outputs = (*self.outputs, *others, *self._checkpoints(STUDENT).intermediate())
        folder = RunFolder(self.folder, settings, outputs, self.begins_anew, verify)
        with kept_by_main(folder):
            if is_main():
                folder.reopen("summary.json", _is_vital)
            barrier()
            path = self.folder / "summary.json"
            if self.is_finished:
                if is_main():
                    self._drop_state()
                for name in self._kept:
                    self.trainees[name].load_weights(self._home(name) / "checkpoint-final")
                return dict(read_json(path))
            self.tracker = start_tracking(report_to, self.folder, settings)
            summary = self.learn() | {"settings": settings}
            self.tracker.finish()
            if is_main():
                write_json(path, summary)
                self._drop_state()
            return summary

    @property
    def is_finished(self) -> bool:
        """Whether the folder holds a training that has come to its end."""
        finals = (self._home(name) / "checkpoint-final" for name in self._kept)
        return (self.folder / "summary.json").exists() and all(path.exists() for path in finals)

    def _is_mended(self) -> bool:
        """Whether this training is finished, and records that failed can be read now."""
        found = self.is_finished and not RunFolder(self.folder, self.settings(), ()).is_other()
        found = found and self.is_mended()
        barrier()  # until all have seen it
        if found and is_main():
            say("records that failed can be read now: trained anew")
        return found

    def train(
        self, count: int, prompts: Iterable[str], kinds: Sequence[Hashable] | None = None
    ) -> dict[str, Any]:
        """Train on ``count`` examples of these prompts; all trainees end with final weights.

        ``prompts`` are gone through several times; ``kinds`` has what each of them is, such as its
        size; no batch has two.
        """
        self.generator.warn_of_cut(prompts)
        self._shown = [*self.options.validation_prompt] or [*dict.fromkeys(islice(prompts, 1000))][
            :4
        ]
        kinds = [None] * count if kinds is None else kinds
        self.per_epoch = steps_per_epoch(kinds, self.options.batch_size)
        steps = self.options.steps(self.per_epoch)
        self.trainers = {name: self.trainer(name, steps) for name in self.trainees}
        student, state = self.trainers[STUDENT], self.folder / "state.safetensors"
        if state.exists():
            load_state(state, self.trainers)
        started, resumed_at = time.perf_counter(), student.step
        try:
            with self._only_needed(prompts):
                self._steps(kinds, steps)
        finally:
            for trainer in self.trainers.values():
                trainer.close()
        seconds = time.perf_counter() - started
        for trainer in self.trainers.values():
            require(bool(trainer.history), _NOTHING)
            trainer.gather()
        measured = self.at_end()
        if is_main():
            write_jsonl(self.folder / "history.jsonl", student.history)
        for name in self._kept:
            self._checkpoints(name).finish(self.trainers[name])
        best = min(student.history, key=lambda row: row["loss"])["epoch"]
        return {
            "samples": count,
            "steps": student.step,
            "skipped_steps": student.skipped,
            **measured,
            **({"best_epoch": best} if student.chooses else {}),
            "seconds": round(seconds, 3),
            "steps_per_second": round((student.step - resumed_at) / max(seconds, 1e-9), 3),
        }

    def make_pool(self, prompts: Sequence[str]) -> None:
        """Preserve targets of the generator as it is now, if none were given."""
        self._pool = self.pool or PreservePool.build(
            self.generator, self.options, prompts, self.size, self.seed, self.folder
        )

    def preserved(self, step: int) -> dict[str, Rows]:
        """The preserve noises of ``step``, as a group of a batch."""
        if self._pool is None:
            return {}
        count = self.options.preserve_batch_size or self.options.batch_size
        seed = derived_seed(self.seed, "preserve step", step)
        return {"preserve": self._pool.rows(self.generator, count, seed)}

    @property
    def optimizers(self) -> dict[str, WeightOptimizer]:
        """Of the trainers, by name."""
        return {name: trainer.optimizer for name, trainer in self.trainers.items()}

    @property
    def _kept(self) -> list[str]:
        """Names of the trainees that leave checkpoints."""
        return [name for name in self.trainees if name not in self.passing]

    def _home(self, name: str) -> Path:
        return self.folder if name == STUDENT else self.folder / name

    def _checkpoints(self, name: str) -> Checkpoints:
        return Checkpoints(self._home(name), self._keep_checkpoints)

    def _steps(self, kinds: Sequence[Hashable], total: int) -> None:
        student = self.trainers[STUDENT]
        saved = time.monotonic()
        with progress(total, "train", "step") as bar, Interrupts() as interrupts:
            bar.update(student.step)
            for rows in batches(kinds, self.options.batch_size, self.seed, student.step, total):
                try:
                    self.take_step(rows, student.step)
                except BadStepsError:
                    self._save()
                    raise
                self._validate(student)
                over = self.is_over()
                if student.step % self.per_epoch == 0 or over or student.step == total:
                    row = self._end_epoch(math.ceil(student.step / self.per_epoch))
                    if row is not None:
                        row |= self.after_epoch(row["epoch"])
                        bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                        self.tracker.log(row, step=student.step)
                if over:  # not saved before, so that a resumed run ends here, too
                    return
                # all processes save, and end, after the same step
                due = time.monotonic() - saved >= 60 * self.save_minutes
                asked = largest(2 * interrupts.pending + due)
                if asked and self.is_resumable(student.step):
                    self._save()
                    saved = time.monotonic()
                    if asked > 1:
                        stop(asked // 2)
                bar.update()

    def _validate(self, trainer: Trainer) -> None:
        """Show images of the generator as the training would end now, where that is due."""
        every, step = self.options.validation_steps, trainer.step
        if not every or step % every:
            return
        with trainer.ended():
            if is_main():
                self._show(step)

    @torch.no_grad()
    def _show(self, step: int) -> None:
        """Make images of some prompts, for people and the tracker."""
        seeds = [derived_seed(self.seed, "validation", k) for k, _ in enumerate(self._shown)]
        noise = gaussian(seeds, self.noise_shape).to(self.generator.device)
        latents = self.generator.latents(noise, self.generator.told(self._shown, seeds))
        images = self.generator.decode(latents)
        path = self.folder / _VALIDATION / f"{step:08d}.png"
        save_png(path, tile(images, math.ceil(math.sqrt(len(images)))))
        self.tracker.images([path], step, _VALIDATION)

    def _end_epoch(self, epoch: int) -> dict[str, Any] | None:
        """The student's row of the history, and the others' losses; None if all was bad."""
        row = None
        for name, trainer in self.trainers.items():
            found = trainer.end_epoch(epoch)
            if name in self._kept:
                self._checkpoints(name).keep(trainer)
            if name == STUDENT:
                row = found
            elif row is not None and found is not None:
                row |= {f"{name} {key}": found[key] for key in ("loss", *trainer.loss.parts)}
        return row

    def _save(self) -> None:
        save_state(self.folder / "state.safetensors", self.trainers)
        if is_main():
            write_jsonl(self.folder / "history.jsonl", self.trainers[STUDENT].history)

    def _drop_state(self) -> None:
        """Remove what only an interrupted training goes on from."""
        latents = self.folder / LATENTS
        if ledger := ledger_of(latents):
            ledger.reread()  # others wrote some of them
        for path in latents.glob("*.safetensors"):
            if re.fullmatch(r"\d{8}", path.stem):  # what others put there stays
                remove(path)
        with contextlib.suppress(OSError):
            latents.rmdir()
        for name in _STATE:
            remove(self.folder / name)

    @contextlib.contextmanager
    def _only_needed(self, prompts: Iterable[str]) -> Iterator[None]:
        """Keep what only encodes off the device, once the prompts are encoded."""
        if not self.offloads or not self.generator.encoders(self.decodes):
            yield
            return
        pooled = self._pool.prompts if self._pool else ()
        needed, generator = StoredNumbers(), self.generator
        for prompt in chain(prompts, pooled, self.needed_prompts, self._shown):
            needed[prompt] = 1
        with (
            generator.kept_prompts(needed, self.folder / _PROMPTS),
            offloaded(generator, keep_decoder=self.decodes),
        ):
            yield


def _going_on(options: TrainOptions, generator: Generator) -> TrainOptions:
    """Options with rank and alpha of the adapter that a training goes on with."""
    if options.lora_from is None:
        return options
    start = generator.read_adapter(options.lora_from)
    for name, given in (("rank", options.lora_rank or None), ("alpha", options.lora_alpha)):
        found = getattr(start, name)
        require(
            given in (None, found),
            f"--lora_from {options.lora_from} has {name} {found:g}; leave --lora_{name} out",
        )
    return dataclasses.replace(options, lora_rank=start.rank, lora_alpha=start.alpha)
