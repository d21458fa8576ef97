"""Training through the few-step loop against the usual diffusion loss, on other data each time.

A model is given 96 digits in a style that it does not make, and is then judged by the images of
fresh noise in as many steps as it is used with, against other digits in that style. Each way to
train has the learning rate that was best on data which is not in the table, among the same ones;
where there is but one, nothing is chosen.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from oneshot_fast.data.images import load_image, save_png, tile
from oneshot_fast.data.manifests import read_manifest
from oneshot_fast.data.pairs import read_pairs, write_pairs
from oneshot_fast.embedded.classifier import load_classifier
from oneshot_fast.embedded.digits import TARGET_STYLE, load_digits, prompt_of, render
from oneshot_fast.evaluation.measures import frechet_distance, pairwise_diversity, prompt_accuracy
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.run import AssignRun
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.sft.run import SftRun
from oneshot_fast.recipes.student import distilled
from oneshot_fast.recipes.study.outcome import interval
from oneshot_fast.recipes.study.run import kept
from oneshot_fast.runtime.files import write_folder, write_json, write_text
from oneshot_fast.runtime.ledger import say
from oneshot_fast.runtime.seeds import derived_seed, gaussian
from oneshot_fast.training.batch import Batch
from oneshot_fast.training.losses.base import Loss

STUDENT = "student"  # of the packaged teacher
SUBJECTS = {  # steps, rates
    STUDENT: (4, (1e-4,)),
    "tiny-teacher": (4, (3e-5, 1e-4, 3e-4, 1e-3)),
    "tiny": (1, (1e-3,)),
}
TARGETS, BATCH_SIZE, EPOCHS, ASSIGN_STEPS = 96, 8, 15, 10
MEASURES = ("frechet_distance", "accuracy", "diversity")


class DiffusionLoss:
    """The noise that was added to a target at a random timestep, by mean squared error."""

    parts = ("matching",)

    def __init__(self, timesteps: Sequence[int]) -> None:
        """Draw from ``timesteps`` with equal probability."""
        self.timesteps = torch.tensor([*timesteps])

    def __call__(self, model: FewStepGenerator, batch: Batch) -> dict[str, Tensor]:
        """See ``Loss``; the timesteps are drawn by the seeds of the later noise."""
        rows = batch["matching"]
        assert rows.conditioning.seeds is not None
        seeds = rows.conditioning.seeds.tolist()
        t = self.timesteps[[derived_seed(k, "timestep") % len(self.timesteps) for k in seeds]]
        alpha = model.pipe.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        x = alpha.sqrt() * rows.extra["latents"] + (1 - alpha).sqrt() * rows.noise
        return {"matching": F.mse_loss(model._denoise(x, t, rows.conditioning), rows.noise)}


@dataclass(frozen=True)
class Row:
    """A way to train.

    Attributes:
        assigns: Whether the noises are assigned; else they are drawn anew for every update.
        timesteps: Whether it is the diffusion loss, and at which; None: through the sampler's loop.
        is_longer: Whether it may take as many evaluations as the first row does in all.
    """

    assigns: bool = False
    timesteps: Literal["all", "sampler"] | None = None
    is_longer: bool = False


ROWS = {
    "matched, through the loop": Row(assigns=True),
    "diffusion loss": Row(timesteps="all"),
    "diffusion loss, equal compute": Row(timesteps="all", is_longer=True),
    "diffusion loss at the sampler's timesteps": Row(timesteps="sampler"),
}


class Subject:
    """A model, its steps and learning rates, and held-out digits in the target style."""

    def __init__(self, name: str, folder: Path, quick: bool) -> None:
        """Keep everything in ``folder``; with ``quick`` small."""
        self.folder = folder
        self.steps, rates = SUBJECTS[name]
        self.rates = rates[-1:] if quick else rates
        self.count, self.epochs = (20, 1) if quick else (TARGETS, EPOCHS)
        self.assign = AssignOptions("sphere", steps=2 if quick else ASSIGN_STEPS, max_angle=0.6)
        self.model: str | Path = name
        if name == STUDENT:
            self.model = distilled(self.steps, 5 if quick else 240, 12, folder / "distillation")
        self.judge = load_classifier()
        digits, self.labels = load_digits("heldout")
        self.images = render(digits, TARGET_STYLE)

    def base(self) -> FewStepGenerator:
        """The model, loaded anew."""
        generator: Any = load_generator(self.model, device="cpu", master_weights=True)
        return FewStepGenerator.over(generator, self.steps)

    def targets(self, seed: int) -> tuple[list[Any], Tensor]:
        """Pairs of a seed, all digits in equal shares, and which images [400] they are."""
        draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.labels), generator=draw)
        ranks = torch.stack([order[self.labels[order] == k][:10] for k in range(10)], 1)
        chosen = ranks.flatten()[: self.count]
        folder = self.folder / f"targets-{seed}"
        if not folder.exists():
            with write_folder(folder) as temporary:
                names = [f"{k:03d}.png" for k in range(self.count)]
                prompts = map(prompt_of, self.labels[chosen].tolist())
                write_pairs(temporary, prompts, names, self.images[chosen])
        is_target = torch.zeros(len(self.labels), dtype=torch.bool)
        is_target[chosen] = True
        return read_pairs(folder)[0], is_target

    @torch.no_grad()
    def samples(self, generator: FewStepGenerator, count: int) -> tuple[Tensor, Tensor]:
        """Images [count, 3, 64, 64] of all digits in turn on fresh noise, and their labels."""
        labels, images = torch.arange(count) % 10, []
        for k in range(0, count, 100):
            part = labels[k : k + 100].tolist()
            seeds = [derived_seed(0, "few-step sample", i) for i in range(k, k + len(part))]
            told = generator.told([*map(prompt_of, part)], seeds)
            latents = generator.latents(gaussian(seeds, generator.noise_shape(64, 64)), told)
            images.append(generator.decode(latents))
        return torch.cat(images), labels

    def judged(self, samples: tuple[Tensor, Tensor] | None, seed: int) -> dict[str, float]:
        """Measures of images and their labels, against the digits that a seed does not train on.

        Without any they are of the seed's targets.
        """
        _, is_target = self.targets(seed)
        images, labels = samples or (self.images[is_target], self.labels[is_target])
        real = self.judge.features(self.images[~is_target])
        found = (
            frechet_distance(self.judge.features(images), real),
            prompt_accuracy(self.judge(images), labels),
            pairwise_diversity(images, labels),
        )
        return dict(zip(MEASURES, found, strict=True))

    def loss(self, generator: FewStepGenerator, row: Row) -> Loss | None:
        """What a row lowers; None for the usual loss of matched pairs."""
        if row.timesteps is None:
            return None
        if row.timesteps == "all":
            return DiffusionLoss(range(generator.pipe.scheduler.config.num_train_timesteps))
        steps = generator.steps(generator.noise_shape(64, 64))
        return DiffusionLoss([int(step.timestep) for step in steps])

    def train(self, row: Row, lr: float, seed: int, samples: int, grid: Path) -> dict[str, Any]:
        """Train a new model as ``row`` says; its measures, and a picture of ten images."""
        generator, (records, _) = self.base(), self.targets(seed)
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        found = self.assign if row.assigns else AssignOptions("best_of_n", 1)
        AssignRun(
            generator, records, work / "noises", found, seed=seed, num_images=0, batch_size=32
        ).run()
        pairs, _ = read_manifest(work / "noises" / "manifest.jsonl")
        loop = 3 * self.steps  # a forward pass is one evaluation, a backward pass two
        each, epochs = loop if row.timesteps is None else 3, self.epochs
        if row.is_longer:
            epochs = round(loop * (self.epochs + self.assign.steps) / each)
        options = SftOptions(
            epochs=epochs, batch_size=BATCH_SIZE, lr=lr, lr_scheduler="linear",
            preserve_latent_weight=0, preserve_pixel_weight=0,
            noise="matched" if row.assigns else "random",
        )  # fmt: skip
        trained = SftRun(
            generator, pairs, work / "sft", options, loss=self.loss(generator, row), seed=seed,
            save_minutes=1e9,
        ).run()  # fmt: skip
        save_png(grid, tile(self.samples(generator, 10)[0], columns=10))
        shutil.rmtree(work)
        evaluations = each * epochs + row.assigns * loop * self.assign.steps
        return {
            "lr": lr,
            "seed": seed,
            "updates": trained["steps"],
            "evaluations": evaluations,
            **self.judged(self.samples(generator, samples), seed),
        }


def few_step(name: str, folder: Path, *, quick: bool, seeds: int, samples: int) -> dict[str, Any]:
    """All runs of one model, each kept as it is finished: "base", "targets", "rates", "rows".

    In the folder is samples.png, ten images each of the base and, with the first seed, of each row.

    Args:
        name: Of ``SUBJECTS``.
        folder: For data, pictures and results.
        quick: Whether all is cut to almost nothing.
        seeds: Of data and run, from 0; the rates are chosen on the next one.
        samples: Fresh noises per measure.
    """
    subject, results = Subject(name, folder, quick), folder / "results"

    def label_of(row: str, lr: float, seed: int) -> str:
        return f"{re.sub('[^a-z]+', '-', row)}-{lr:g}-{seed}"

    def trained(row: str, lr: float, seed: int) -> dict[str, Any]:
        label = label_of(row, lr, seed)
        say(f"[{name}] {label}")
        path, grid = results / f"{label}.json", results / f"{label}.png"
        return kept(path, lambda: subject.train(ROWS[row], lr, seed, samples, grid))

    results.mkdir(parents=True, exist_ok=True)
    base, grids = subject.base(), [results / "base.png"]
    save_png(grids[0], tile(subject.samples(base, 10)[0], columns=10))
    found: dict[str, Any] = {"steps": subject.steps, "rates": {}, "rows": {}}
    drawn = subject.samples(base, samples)
    found["base"] = [subject.judged(drawn, seed) for seed in range(seeds)]
    found["targets"] = [subject.judged(None, seed) for seed in range(seeds)]
    for row in ROWS:
        if ROWS[row].is_longer and subject.steps == 1:  # the loop takes no more per update
            continue
        best, tried = subject.rates[0], []
        if len(subject.rates) > 1:
            tried = [trained(row, lr, seeds) for lr in subject.rates]
            best = min(tried, key=lambda one: one["frechet_distance"])["lr"]
        found["rates"][row] = tried
        found["rows"][row] = [trained(row, best, seed) for seed in range(seeds)]
        grids.append(results / f"{label_of(row, best, 0)}.png")
    images = [load_image(path, 64, 640) for path in grids]
    save_png(folder / "samples.png", torch.cat(images, 1))
    return found


def write_few_step(folder: Path, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write few_step.json, and few_step.md with a table per model."""
    write_json(folder / "few_step.json", {"settings": settings, "results": found})
    lines = [f"Settings: {', '.join(f'{k} {v}' for k, v in settings.items() if k != 'command')}."]
    for name, results in found.items():
        lines += ["", f"## {name}, steps: {results['steps']}", "", *few_step_table(results)]
    write_text(folder / "few_step.md", "\n".join(lines) + "\n")


def few_step_table(results: Mapping[str, Any]) -> list[str]:
    """Markdown: means over the seeds with Student's 95 % intervals."""
    lines = [
        "| training | updates | evaluations per target | lr | FD | accuracy | diversity |",
        "|" + " --- |" * 7,
        f"| none | | | | {_cells(results['base'])} |",
    ]
    for name, runs in results["rows"].items():
        first = runs[0]
        told = f"{first['updates']} | {first['evaluations']} | {first['lr']:g}"
        lines.append(f"| {name} | {told} | {_cells(runs)} |")
    return [*lines, f"| the targets | | | | {_cells(results['targets'])} |"]


def _cells(runs: Sequence[Mapping[str, Any]]) -> str:
    seeds, digits = range(len(runs)), ("{:.2f}", "{:.3f}", "{:.3f}")
    measures = zip(MEASURES, digits, strict=True)
    return " | ".join(interval([run[key] for run in runs], seeds, form) for key, form in measures)
