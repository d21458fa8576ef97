"""A reward learns to tell, from a step's estimate, the score of the image that it leads to.

A curriculum from late steps to early ones, each a training of its own that begins with the weights
of the one before; the labels are the base reward's own scores of the finished images. Beside it, as
the honest baseline, a network that is no reward yet learns for as long on finished images alone.
"""

import dataclasses
import hashlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from oneshot_fast.errors import UserError, require
from oneshot_fast.generators.base import Conditioning
from oneshot_fast.generators.decoder import update_digest
from oneshot_fast.jobs.scale.labels import LABELS, described, read_labels, split
from oneshot_fast.jobs.scale.options import RewardTraining
from oneshot_fast.planning.costs import median_seconds
from oneshot_fast.planning.timing import Plan
from oneshot_fast.rewards import CONFIG, REWARDS, Reward, Setup, parse_reward
from oneshot_fast.rewards.noise_aware import CLASSIFIER, THRESHOLDS, ClassifierScore, network_of
from oneshot_fast.runtime.concurrency import Interrupts, ahead, stop
from oneshot_fast.runtime.files import (
    Json,
    read_json,
    read_metadata,
    read_safetensors,
    remove,
    write_json,
    write_jsonl,
    write_safetensors,
)
from oneshot_fast.runtime.folder import RunFolder
from oneshot_fast.runtime.ledger import carried_digest
from oneshot_fast.runtime.processes import processes
from oneshot_fast.runtime.progress import Tracker, progress, start_tracking
from oneshot_fast.runtime.seeds import derived_seed
from oneshot_fast.runtime.units import count_text, duration, size_text
from oneshot_fast.search.agreement import kendall, kept_best, spearman
from oneshot_fast.search.pruning import Floats
from oneshot_fast.training.batch import Batch, Rows, batches, steps_per_epoch
from oneshot_fast.training.checkpoints import load_state, save_state
from oneshot_fast.training.losses.base import total
from oneshot_fast.training.losses.score import ScoreLoss, predict
from oneshot_fast.training.options import TrainOptions, check_keeping
from oneshot_fast.training.trainer import BadStepsError, Trainer

SHARES = tuple(k / 20 for k in range(1, 20))  # that a prune keeps, of which is measured
CLEAN = "clean"  # the baseline
# published learning rates of TTSnap, and ours of the small networks
_RATES = {"imagereward": 3e-6, "pickscore": 5e-7, "hpsv2": 5e-7, "hpsv2.0": 5e-7, "hpsv2.1": 5e-7,
          "clip": 5e-7, CLASSIFIER: 3e-4, THRESHOLDS: 2e-2, "digit": 1e-4}  # fmt: skip


class HalvingOptions(TrainOptions):
    """A learning rate that falls to half, linearly."""

    def lr_at(self, step: int, steps: int) -> float:
        return self.lr * (1 - step / (2 * steps))


@dataclass(frozen=True)
class Phase:
    """A training of its own.

    Attributes:
        name: Of its files.
        step: Whose estimates are learnt from.
        epochs: Passes over the images.
        after: Phase whose weights it begins with; None: those of the base network.
    """

    name: str
    step: int
    epochs: int
    after: str | None

    @property
    def file(self) -> str:
        return f"{self.name}.safetensors"

    @property
    def state(self) -> str:
        """The file to resume from, of no other phase: one before may have to be trained again."""
        return f"state-{self.name}.safetensors"


class RewardRun:
    """Training of a reward on the images of `scale data`, into one folder that is a reward then."""

    def __init__(
        self,
        folder: Path,
        data: Path,
        reward: str,
        options: RewardTraining,
        *,
        models_dir: Path = Path("models"),
        seed: int = 0,
        save_minutes: float = 5.0,
    ) -> None:
        """Describe the run.

        Args:
            folder: Where everything is written.
            data: A folder of `scale data`, with pictures.
            reward: Name of the base reward, one of those that scored the data.
            options: How it is trained.
            models_dir: Folder of downloaded models.
            seed: Of the split of the prompts and the order of the images.
            save_minutes: Minutes between saved states.

        Raises:
            UserError: If the data cannot be used, a step has no pictures, or the reward has no
                weights and no other network is named.
        """
        options.check()
        check_keeping(save_minutes)
        one = processes().num_processes == 1
        require(one, "train_reward takes one process; start it without accelerate or torchrun")
        name, weight = parse_reward(reward)
        require(weight == 1, f"a weight has no effect on the training of {name}; leave it out")
        require(name.partition(":")[0] in REWARDS, f"{name} is a trained reward; name its base")
        self.folder, self.reward, self.options = Path(folder), name, options
        self.labels = read_labels(Path(data), name)
        self.seed, self.save_minutes = seed, save_minutes
        self.train_rows, self.held_out = split(self.labels.prompts, options.holdout, seed)
        self.levels = options.levels_of(self.labels.steps)
        self.network = options.network or name
        fits = self.network != THRESHOLDS or name == "thickness"
        require(fits, f"--network {THRESHOLDS} is of reward thickness; name another for {name}")
        self.setup = Setup(models_dir, processes().device, torch.float32)
        digest = hashlib.sha256()
        update_digest(digest, "network", self._begin(None))
        self._network_id = digest.hexdigest()[:16]
        lr = _RATES.get(self.network) if options.lr is None else options.lr
        if lr is None:
            raise UserError(f"no learning rate is known for {self.network}; give --lr")
        # what a batch is of, where pairs are: images of one prompt
        self._kinds: list[int | None] = [None] * self._count
        if options.pair_weight:
            self._kinds = [k // self.labels.final.shape[1] for k in range(self._count)]
        self.training = HalvingOptions(
            batch_size=options.batch_size, lr=lr, weight_decay=options.weight_decay,
            max_grad_norm=options.max_grad_norm, preserve_latent_weight=0, preserve_pixel_weight=0,
        )  # fmt: skip
        self.training.check()
        self._data = described(self.labels, Path(data) / LABELS)
        self.phases = self._phases()

    @property
    def is_own(self) -> bool:
        """Whether the network is the reward itself, which is right for finished images."""
        return self.network == self.reward

    @property
    def _count(self) -> int:
        return len(self.train_rows) * self.labels.final.shape[1]

    def _phases(self) -> list[Phase]:
        epochs, last = self.options.epochs_per_level, self.labels.num_steps - 1
        steps = [*self.levels] if self.is_own else [last, *self.levels]
        steps = [*dict.fromkeys(steps)]
        found, before = list[Phase](), None
        for step in steps:
            found.append(Phase(f"level-{step:02d}", step, epochs, before))
            before = found[-1].name
        if self.options.baseline and not self.is_own and len(found) > 1:
            found.append(Phase(CLEAN, last, epochs * len(found), None))
        return found

    def settings(self) -> dict[str, Any]:
        """Everything the result depends on."""
        return {
            "command": "scale_train_reward",
            **dataclasses.asdict(self.options),
            "reward": self.reward,
            "network": self.network,
            "network_weights": self._network_id,
            "levels": [*self.levels],
            "lr": self.training.lr,
            "seed": self.seed,
            **self._data,
        }

    def plan(self) -> Plan:
        """What the run will take, from counts and a few timed steps; does nothing of it."""
        network, size = self._begin(None), self.options.batch_size
        weights = [*network.requires_grad_(True).parameters()]
        loss = ScoreLoss(self._deviation, self.options.pair_weight)
        rows = [(p, n) for p in self.train_rows for n in range(self.labels.final.shape[1])][:size]
        model: Any = SimpleNamespace(module=network)
        phase = self.phases[0]

        def step() -> None:
            found = total(loss(model, self._batch((phase.step, rows))))
            gradients = torch.autograd.grad(found, weights, allow_unused=True)
            _ = [gradient.cpu() for gradient in gradients if gradient is not None]

        each = median_seconds(step)
        per_epoch = steps_per_epoch(self._kinds, size)
        steps = per_epoch * sum(phase.epochs for phase in self.phases)
        count = sum(weight.numel() for weight in weights)
        lines = [
            f"images to learn from: {self._count}, of prompts: {len(self.train_rows)}, kept aside: "
            f"{len(self.held_out)}",
            f"trainings: {', '.join(phase.name for phase in self.phases)}",
            f"{count_text(count)} weights; with gradients and moments {size_text(16 * count)}",
            f"steps: {steps}, batch size {size}, {duration(each)} each",
            f"in all {duration(steps * each)}, and what is measured after each training",
        ]
        return Plan(lines, steps * each)

    @property
    def outputs(self) -> tuple[str, ...]:
        """What the run writes."""
        files = (name for phase in self.phases for name in (phase.file, phase.state))
        return (
            *files, CONFIG, "metrics.json", "history.jsonl", "summary.json", "report.html", "logs",
        )  # fmt: skip

    def run(
        self, *, overwrite: bool = False, report_to: str | Tracker = "none", verify: bool = False
    ) -> Json:
        """Train all levels, or those that are left.

        Args:
            overwrite: Start anew.
            report_to: As for ``start_tracking``.
            verify: Compare the hashes of all files that are there.

        Returns:
            The summary, as in summary.json.

        Raises:
            UserError: If the loss becomes NaN or infinite.
        """
        settings = self.settings()
        with RunFolder(self.folder, settings, self.outputs, overwrite, verify) as folder:
            folder.reopen("summary.json", lambda key: not key.startswith(("state", "report")))
            path = self.folder / "summary.json"
            if path.exists():
                self._remove_others()
                return dict(read_json(path))
            tracker = start_tracking(report_to, self.folder, settings)
            started = time.perf_counter()
            per_epoch = steps_per_epoch(self._kinds, self.options.batch_size)
            total = per_epoch * sum(phase.epochs for phase in self.phases)
            with progress(total, "train_reward", "step") as bar, Interrupts() as interrupts:
                for phase in self.phases:
                    steps = per_epoch * phase.epochs
                    if (self.folder / phase.file).exists():
                        remove(self.folder / phase.state)  # of one killed as it ended
                        bar.update(steps)
                        continue
                    self._train(phase, steps, bar, interrupts, tracker)
                    self._write_reward()
            summary = self._write_reward() | {
                "seconds": round(time.perf_counter() - started, 3),
                "steps": total,
                "failed": 0,
                "settings": settings,
            }
            write_json(path, summary)
            self._remove_others()
            tracker.finish()
            return summary

    def _remove_others(self) -> None:
        """With one network, drop those of earlier levels, which only the training needed."""
        if self.options.one_network:
            levels = [phase for phase in self.phases if phase.name != CLEAN]
            for phase in levels[:-1]:
                remove(self.folder / phase.file)

    def _begin(self, name: str | None) -> Reward:
        """The network with the weights of a phase that ended, or as it begins."""
        network = network_of(self.network, self.setup)
        if name is not None:
            network.load_state_dict(read_safetensors(self.folder / f"{name}.safetensors"))
        elif isinstance(network, ClassifierScore):
            train = self.labels.final[self.train_rows]
            network.mean.fill_(float(train.mean()))
            network.deviation.fill_(self._deviation)
        return network

    @property
    def _deviation(self) -> float:
        found = float(self.labels.final[self.train_rows].std())
        require(found > 0, f"all images have the same {self.reward}; nothing can be learnt")
        return found

    def _train(
        self, phase: Phase, total: int, bar: "tqdm[Any]", interrupts: Interrupts, tracker: Tracker
    ) -> None:
        """Train a phase to its end, measure it, and write its file."""
        network = self._begin(phase.after)
        # all that a trainer asks for without an adapter
        trainee: Any = SimpleNamespace(module=network)
        loss = ScoreLoss(self._deviation, self.options.pair_weight)
        seed = derived_seed(self.seed, phase.name)
        trainer = Trainer(trainee, loss, self.training, total, seed)
        trainer.chooses = False
        state, saved = self.folder / phase.state, time.monotonic()
        if state.exists():
            load_state(state, {phase.name: trainer})
        bar.update(trainer.step)
        per_epoch = total // phase.epochs
        with ThreadPoolExecutor(1) as executor:
            for batch in ahead(executor, self._batch, self._rows(phase, seed, trainer.step, total)):
                try:
                    trainer(batch)
                except BadStepsError:
                    save_state(state, {phase.name: trainer})
                    raise
                if trainer.step % per_epoch == 0:
                    row = trainer.end_epoch(trainer.step // per_epoch)
                    tracker.part(phase.name).log(row or {}, trainer.step)
                stopped = interrupts.pending
                if stopped or time.monotonic() - saved >= 60 * self.save_minutes:
                    save_state(state, {phase.name: trainer})
                    saved = time.monotonic()
                    if stopped:
                        stop(stopped)
                bar.update()
        trainer.close()
        require(bool(trainer.history), "no step had a finite loss and gradient; lower the lr")
        about = {"history": trainer.history, "skipped": trainer.skipped}
        about |= {"held_out": self._measured(network)}
        write_safetensors(self.folder / phase.file, network.state_dict(), {"about": about})
        remove(state)

    def _rows(
        self, phase: Phase, seed: int, start: int, total: int
    ) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """The step, and prompts and numbers, of every batch."""
        N = self.labels.final.shape[1]
        for found in batches(self._kinds, self.options.batch_size, seed, start, total):
            yield phase.step, [(self.train_rows[k // N], k % N) for k in found]

    def _batch(self, item: tuple[int, list[tuple[int, int]]]) -> Batch:
        step, rows = item
        images = self.labels.images(rows, step).to(self.setup.device)
        scores = torch.tensor([self.labels.final[row] for row in rows], dtype=torch.float32)
        extra = {
            "texts": [self.labels.prompts[p] for p, _ in rows],
            "scores": scores.to(images.device),
        }
        return Batch(images=Rows(images, Conditioning(images.new_empty(len(rows), 0)), extra))

    @torch.no_grad()
    def _measured(self, network: Reward) -> dict[str, Json]:
        """What a network tells of the prompts kept aside, by step."""
        last = self.labels.num_steps - 1
        return {
            str(step): measures(self._predicted(network, step), self.labels.final[self.held_out])
            for step in sorted({*self.levels, last})
        }

    def _predicted(self, network: Reward, step: int) -> Floats:
        """[P, N] of the prompts kept aside."""
        N = self.labels.final.shape[1]
        rows = [(p, n) for p in self.held_out for n in range(N)]
        size = self.options.batch_size
        parts = ((step, rows[k : k + size]) for k in range(0, len(rows), size))
        found = list[Tensor]()
        with ThreadPoolExecutor(1) as executor:
            for batch in ahead(executor, self._batch, parts):
                images = batch["images"]
                found.append(predict(network, images.noise, images.extra["texts"]).cpu())
        return torch.cat(found).double().numpy().reshape(-1, N)

    def _write_reward(self) -> Json:
        """Make a reward of the levels that are there; returns what is known of them."""
        done = [phase for phase in self.phases if (self.folder / phase.file).exists()]
        abouts = {p.name: read_metadata(self.folder / p.file, "about") for p in done}
        found = {name: about["held_out"] for name, about in abouts.items()}
        levels = [phase for phase in done if phase.name != CLEAN]
        last = levels[-1].name
        names = [last] if self.options.one_network else [phase.name for phase in levels]
        own = {str(phase.step): phase.name for phase in levels}
        final, last_step = self.labels.final[self.held_out], str(self.labels.num_steps - 1)
        base = {
            step: measures(self.labels.early(int(step))[self.held_out], final)
            for step in {**own, last_step: ""}
        }
        best = {step: max(names, key=lambda name: found[name][step]["kendall"]) for step in own}
        if not self.options.one_network:  # else where a network ranks better than the reward itself
            best = {
                step: name
                for step, name in best.items()
                if found[name][step]["kendall"] > base[step]["kendall"]
            }
        report = {
            "reward": self.reward,
            "network": self.network,
            "prompts": len(self.train_rows),
            "images": self._count,
            "held_out_prompts": len(self.held_out),
            "deviation": self._deviation,
            "best": best,
            "base": base,
            **({CLEAN: found[CLEAN]} if CLEAN in found else {}),
            "own_level": {step: found[name][step] for step, name in own.items()},
            "kept": {
                step: found[best[step]][step] if step in best else values
                for step, values in base.items()
            },
        }
        write_json(self.folder / "metrics.json", report | {"levels": found})
        write_jsonl(
            self.folder / "history.jsonl",
            ({"level": name, **row} for name, about in abouts.items() for row in about["history"]),
        )
        write_json(
            self.folder / CONFIG,
            {
                "reward": self.reward,
                "network": self.network,
                "num_steps": self.labels.num_steps,
                "files": {step: f"{name}.safetensors" for step, name in best.items()},
                "sha256": {
                    name: carried_digest(self.folder / f"{name}.safetensors")
                    for name in sorted({*best.values()})
                },
            },
        )
        return report


def measures(early: Floats, final: Floats) -> Json:
    """How well scores of a step tell those of the end, [P, N] each; means over prompts.

    ``tacc`` is how often the best image is among the share that is kept, ``tgap`` the best score
    minus the best that is kept, by share.
    """
    kept = {f"{share:.2f}": kept_best(early, final, share) for share in SHARES}
    return {
        "kendall": float(kendall(early, final).mean()),
        "spearman": float(spearman(early, final).mean()),
        "mse": float(np.square(early - final).mean()),
        "tacc": {share: float(accuracy.mean()) for share, (accuracy, _) in kept.items()},
        "tgap": {share: float(gap.mean()) for share, (_, gap) in kept.items()},
    }
