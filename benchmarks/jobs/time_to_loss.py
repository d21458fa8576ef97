"""Time to equal loss: the usual assignment script, and ours until it has as low a mean loss.

The usual script (``benchmarks.sdxl.reference_recipe``) turns the noise of one image at a time by a
rotation of its 2 x 2 patches, Adam on the skew matrix, 40 steps, here without pictures per step. It
runs at its default learning rate and at the best of several. Ours is ``assign_noise`` at its
defaults, all images at once, with as few steps as reach the same mean of the best losses. Data and
model are the embedded ones; rounds alternate in one process.

python -m benchmarks.jobs.time_to_loss [--output benchmarks/results/time_to_loss.json]
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import run_job
from benchmarks.sdxl.reference_recipe import ReferenceRecipe
from oneshot_fast.data.pairs import read_pairs
from oneshot_fast.embedded.digits import write_default_dataset
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.jobs.assign.in_memory import assign_noise
from oneshot_fast.jobs.assign.options import AssignOptions

DEFAULT_LR, OTHERS = 5e-4, (5e-3, 2e-2, 5e-2, 1e-1, 2e-1)


def measure(targets: int, steps: int, rounds: int) -> dict[str, Any]:
    """CPU seconds and evaluations (a backward pass counts two) to the usual script's losses."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_default_dataset(folder)
        records = read_pairs(folder / "train")[0][:targets]
        prompts = [record.prompt for record in records]
        paths = [Path(str(record.image_path)) for record in records]
        script = ReferenceRecipe(load_generator("tiny").pipe, 64)
        generator = load_generator("tiny")

        def usual(lr: float) -> float:
            torch.manual_seed(0)
            pairs = zip(paths, prompts, strict=True)
            found = (script.assign(*pair, steps, lr, folder / "out", False) for pair in pairs)
            return statistics.fmean(found)

        def ours(steps: int) -> torch.Tensor:
            generator._prompts.clear()
            options = AssignOptions(steps=steps)
            return assign_noise(generator, prompts, paths, options, batch_size=targets).losses

        curve = ours(steps).cummin(0).values.mean(1).tolist()
        losses = {lr: usual(lr) for lr in (DEFAULT_LR, *OTHERS)}
        best = min(losses, key=lambda lr: losses[lr])
        rows = {}
        for title, lr in (("default", DEFAULT_LR), ("best", best)):
            reached = [k for k, loss in enumerate(curve) if loss <= losses[lr]]
            row: dict[str, Any] = {"lr": lr, "loss": losses[lr], "usual_nfe": 3 * steps}
            rows[title] = row
            if not reached:
                continue
            few = max(1, reached[0])
            row |= {"ours_steps": few, "ours_nfe": 3 * few + 1, "ours_loss": curve[few]}
            row |= alternate(lambda lr=lr: usual(lr), lambda few=few: ours(few), rounds)  # type: ignore[misc]
    return {"lr": losses, "rows": rows}


def alternate(usual: Callable[[], Any], ours: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """CPU seconds of both in turns, and the median of their ratio."""
    seconds: dict[str, list[float]] = {"usual_seconds": [], "ours_seconds": []}
    for _ in range(rounds):
        for run, times in zip((usual, ours), seconds.values(), strict=True):
            started = time.process_time()
            run()
            times.append(time.process_time() - started)
    ratios = [u / o for u, o in zip(*seconds.values(), strict=True)]
    return {**seconds, "faster": statistics.median(ratios)}


def markdown(found: dict[str, Any]) -> str:
    """The table, with what it holds for."""
    run = found["settings"]
    lines = [
        f"`python -m benchmarks.jobs.time_to_loss` on {found['device']}, {run['threads']} thread, "
        f"torch {found['torch']}, commit {found['commit']}, {found['date']}. {run['targets']} "
        f"images, the embedded generator, {run['steps']} steps of the usual script; median of "
        f"{run['rounds']} rounds in turns, CPU time of the process, encoding included. NFE: "
        "generator evaluations per image, a backward pass counts two.",
        "",
        "| usual script at | its mean loss | its NFE | ours | NFE | CPU seconds | times faster |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for title, row in found["results"]["rows"].items():
        start = f"| its {title} learning rate, {row['lr']:g} | {row['loss']:.4f} |"
        if "faster" not in row:
            lines.append(f"{start} {row['usual_nfe']} | not reached | | | |")
            continue
        usual, ours = (statistics.median(row[f"{who}_seconds"]) for who in ("usual", "ours"))
        reached = f"{row['ours_loss']:.4f} after {row['ours_steps']} steps"
        lines.append(
            f"{start} {row['usual_nfe']} | {reached} | {row['ours_nfe']} | "
            f"{usual:.2f} : {ours:.2f} | {row['faster']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Measure and write ``output`` and, beside it, the table as Markdown."""
    return run_job(__doc__, {"targets": 32, "steps": 40, "rounds": 3}, measure, markdown, argv)


if __name__ == "__main__":
    raise SystemExit(main())
