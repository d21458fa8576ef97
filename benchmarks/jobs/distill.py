"""The embedded teacher over its evaluations, beside students of 1, 2 and 4 steps.

    python -m benchmarks.jobs.distill --output_dir runs/distill

Writes benchmarks/results/distill.json and docs/images/distill.png. Students are distilled by
AC-DMD without its consistency term; an interrupted run goes on when the command is repeated.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment
from oneshot_fast.data.images import load_image, save_png, tile
from oneshot_fast.embedded.classifier import load_classifier
from oneshot_fast.embedded.digits import BASE_STYLE, load_digits, render
from oneshot_fast.evaluation.measures import (
    frechet_distance,
    pairwise_diversity,
    prompt_accuracy,
)  # fmt: skip
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.recipes.student import PROMPTS, SETTINGS, distilled
from oneshot_fast.runtime.files import read_json, write_json
from oneshot_fast.runtime.seeds import derived_seed, gaussian

RESULTS = Path("benchmarks/results/distill.json")
FIGURE, GRID = Path("docs/images/distill.png"), Path("docs/images/distill_samples.png")
TEACHER = [(1, 1.0), (2, 1.0), (4, 1.0), (1, 2.0), (2, 2.0), (4, 2.0), (8, 2.0), (20, 2.0)]
BATCH = 24


@torch.no_grad()
def measured(generator: FewStepGenerator, count: int, seed: int) -> tuple[dict[str, float], Any]:
    """Accuracy, Frechet distance to held-out digits and diversity of ``count`` images."""
    labels = torch.arange(count) % 10
    seeds = [derived_seed(seed, "benchmark", k) for k in range(count)]
    images = []
    for start in range(0, count, 20):
        part = slice(start, start + 20)
        told = generator.told([PROMPTS[k] for k in labels[part]], seeds[part])
        noise = gaussian(seeds[part], (4, 8, 8))
        images.append(generator.images(generator.latents(noise, told)))
    made, judge = torch.cat(images), load_classifier()
    real = render(load_digits("heldout")[0], BASE_STYLE)
    return {
        "samples": count,
        "accuracy": prompt_accuracy(judge(made), labels),
        "frechet": frechet_distance(judge.features(made), judge.features(real)),
        "diversity": pairwise_diversity(made, labels),
    }, made[:10]


def draw(rows: list[dict[str, Any]]) -> None:
    """The measures over the evaluations of the network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), ("accuracy", "frechet", "diversity"), strict=True):
        for kind in dict.fromkeys(row["kind"] for row in rows):
            found = [row for row in rows if row["kind"] == kind]
            xs, ys = [row["evaluations"] for row in found], [row[name] for row in found]
            axes.plot(xs, ys, marker="o", markersize=3, label=kind)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("evaluations of the network")
        axes.set_title(name, fontsize=10)
    axes.legend(fontsize=7)
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    """Run, or go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=170)
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4, 2])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    kept = given.output_dir / "rows.json"
    given.output_dir.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = read_json(kept, list) if kept.exists() else []

    def note(kind: str, steps: int, guidance: float, generator: FewStepGenerator) -> None:
        found, shown = measured(generator, given.samples, given.seed)
        evaluations = steps * (1 if guidance == 1 else 2)
        about = {"kind": kind, "steps": steps, "evaluations": evaluations, "guidance": guidance}
        rows.append(about | found)
        save_png(given.output_dir / f"{kind}-{steps}.png", tile(shown, 10))
        write_json(kept, rows)
        print(rows[-1], flush=True)

    def is_there(kind: str, steps: int) -> bool:
        return any(row["kind"] == kind and row["steps"] == steps for row in rows)

    for steps in given.steps:
        if not is_there("student", steps):
            folder = given.output_dir / f"steps-{steps}"
            model = load_generator(distilled(steps, given.updates, BATCH, folder, given.seed))
            eta = 0.9 if steps > 1 else None
            note("student", steps, 1.0, FewStepGenerator.over(model, steps, eta=eta))
    teacher = load_generator("tiny-teacher")
    for steps, guidance in TEACHER:
        kind = "teacher, guidance 2" if guidance > 1 else "teacher"
        if not is_there(kind, steps):
            few = FewStepGenerator.over(teacher, steps, guidance_scale=guidance)
            note(kind, steps, guidance, few)
    rows.sort(key=lambda row: (row["kind"], row["evaluations"]))
    settings = {
        "updates": given.updates, "batch_size": BATCH, "seed": given.seed, **SETTINGS,
    }  # fmt: skip
    write_json(
        RESULTS, {"environment": environment("cpu", given.seed), "settings": settings, "rows": rows}
    )
    draw(rows)
    names = ["teacher-1", "student-1", "student-2", "student-4", "teacher, guidance 2-20"]
    paths = [given.output_dir / f"{name}.png" for name in names]
    strips = [load_image(path, 64, 640) for path in paths if path.exists()]
    save_png(GRID, tile(torch.stack(strips), 1))


if __name__ == "__main__":
    main()
