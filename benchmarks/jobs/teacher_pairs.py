"""How many pairs a generator learns from, where every pair is as good as can be.

    python -m benchmarks.jobs.teacher_pairs [--output benchmarks/results/teacher_pairs.json]

The E-step looks for the noise that fits a target. Here it is known: the targets are what the
teacher of the letters (``recipes/drawn.py``) makes of ordinary noises, from which its one-step
student was distilled, too. The student goes on with a part of these pairs by the M-step's defaults
for own data; a classifier that no training has seen judges fresh noise, as in ``python -m
oneshot_fast.study --outcome``. Models and finished rows stay in runs/teacher_pairs.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import run_job
from oneshot_fast.generators.base import Generator
from oneshot_fast.jobs.em.options import EmOptions
from oneshot_fast.recipes.letters import PROMPTS
from oneshot_fast.recipes.study.run import kept
from oneshot_fast.recipes.study.subjects import Subject
from oneshot_fast.runtime.files import read_safetensors
from oneshot_fast.runtime.seeds import derived_seed
from oneshot_fast.training.batch import Batch, Rows
from oneshot_fast.training.trainer import Trainer

COUNTS = (96, 512, 2048, 4800)  # of the 4,800 that it was distilled from
FOLDER = Path("runs/teacher_pairs")


def measure(steps: int, samples: int, seeds: int, folder: Path = FOLDER) -> dict[str, Any]:
    """Of the base, and after ``steps`` of training on so many pairs: FD, accuracy, diversity."""
    subject = Subject("letters", folder / "letters", quick=False)
    made = read_safetensors(subject.base_folder.parent / "pairs.safetensors")

    def trained(count: int, seed: int) -> dict[str, float]:
        print(f"{count} pairs, seed {seed}", file=sys.stderr)
        generator = subject.base()
        loss = train(generator, made, count, steps, seed)
        return subject.judged(generator, samples) | {"loss": loss}

    label = f"{steps}-{samples}"
    return {
        "base": kept(
            folder / f"base-{samples}.json", lambda: subject.judged(subject.base(), samples)
        ),
        "pairs": {
            count: [
                kept(folder / f"{count}-{seed}-{label}.json", partial(trained, count, seed))
                for seed in range(seeds)
            ]
            for count in COUNTS
        },
    }


def train(
    generator: Generator, made: dict[str, torch.Tensor], count: int, steps: int, seed: int
) -> float:
    """Train on ``count`` of the teacher's pairs; the mean loss of the last steps."""
    options = EmOptions().resolve(generator.width).sft()
    draw = torch.Generator().manual_seed(derived_seed(seed, "pairs"))
    chosen = torch.randperm(len(made["eps"]), generator=draw)[:count]
    prompts = [PROMPTS[label] for label in made["labels"][chosen].tolist()]
    conditioning = generator.encode_prompts(prompts)
    trainer = Trainer(generator, options.loss(), options, steps, seed)
    losses, order = [], torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < options.batch_size:
            order = torch.cat((order, torch.randperm(count, generator=draw)))
        rows, order = order[: options.batch_size], order[options.batch_size :]
        pairs = chosen[rows]
        extra = {"latents": made["x0"][pairs]}
        trainer(Batch(matching=Rows(made["eps"][pairs], conditioning.select(rows), extra)))
        losses.append(trainer.last["matching"])
    trainer.close()
    tail = losses[-50:]
    return sum(tail) / len(tail)


def markdown(found: dict[str, Any]) -> str:
    """The table, with what it holds for."""
    run, base = found["settings"], found["results"]["base"]
    lines = [
        f"`python -m benchmarks.jobs.teacher_pairs` on {found['device']}, {run['threads']} thread, "
        f"torch {found['torch']}, commit {found['commit']}, {found['date']}. {run['steps']} steps "
        "of 8 pairs at the M-step's rate for own data; five sets of "
        f"{run['samples']} fresh noises, seed by seed.",
        "",
        "| pairs of the teacher | their loss in the end | FD to base | accuracy | diversity |",
        "| --- | --- | --- | --- | --- |",
        f"| base: FD {base['frechet_distance']:.1f} | | | {base['accuracy']:.3f} | "
        f"{base['diversity']:.3f} |",
    ]
    for count, rows in found["results"]["pairs"].items():
        change = [100 * (row["frechet_distance"] / base["frechet_distance"] - 1) for row in rows]
        cells = [
            ", ".join(f"{row['loss']:.4f}" for row in rows),
            ", ".join(f"{value:+.0f} %" for value in change),
        ]
        for key in ("accuracy", "diversity"):
            cells.append(", ".join(f"{row[key] - base[key]:+.3f}" for row in rows))
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Measure and write ``output`` and, beside it, the table as Markdown."""
    return run_job(__doc__, {"steps": 2560, "samples": 500, "seeds": 1}, measure, markdown, argv)


if __name__ == "__main__":
    raise SystemExit(main())
