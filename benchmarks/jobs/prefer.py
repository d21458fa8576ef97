"""What training on a reward raises, and what it costs: every objective for the same time.

Each training of the embedded generator gets the same CPU seconds of one thread, its own drawing and
scoring included: RAFT (best of 8 by ``optimize``, then ``sft`` on what was found), DRaFT-1 (``sft
--reward``, the only one that needs the reward's gradient) and the objectives of ``prefer``. The
reward is stroke thickness, the judge the digits' classifier; all are measured on the same fresh
noises. What was measured is kept in runs/benchmark-prefer, so that a stopped benchmark goes on.

python -m benchmarks.jobs.prefer [--output benchmarks/results/prefer.json]
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.common import ROOT, commit, mean_and_error, run_job
from oneshot_fast.data.manifests import read_manifest
from oneshot_fast.embedded.classifier import load_classifier
from oneshot_fast.evaluation.features import of_classifier
from oneshot_fast.evaluation.random_noise import RandomNoiseMeasure, all_scores, classifier_for
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.jobs.optimize.options import OptimizeOptions
from oneshot_fast.jobs.optimize.run import OptimizeRun
from oneshot_fast.jobs.prefer.options import PreferOptions
from oneshot_fast.jobs.prefer.run import PreferRun
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.sft.rewards import RewardRun
from oneshot_fast.jobs.sft.run import SftRun
from oneshot_fast.rewards import load_rewards
from oneshot_fast.runtime.files import write_json
from oneshot_fast.training.checkpoints import STUDENT

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = [f"a handwritten digit {word}" for word in WORDS]
KEPT = ROOT / "runs" / "benchmark-prefer"
MEASURES = ("thickness", "judge digit", "accuracy", "diversity", "drift")
LONG = 10**4  # more than there is time for
FREE: dict[str, Any] = {"preserve_latent_weight": 0.0, "preserve_pixel_weight": 0.0}
PREFER: dict[str, dict[str, Any]] = {
    "pso": {},
    "neighbor_grpo": {},
    "drpo": {},
    "drpo_long": {"lr": 1e-5},
    "rlcm": {},
    "rebel": {},
    "dpo": {},
    "d3po": {},
}  # the options of each beside its defaults
LONGER = {"drpo_long": 3}  # times the seconds
TITLES = {
    "base": "base", "raft": "RAFT", "draft": "DRaFT-1", "pso": "PSO", "rlcm": "RLCM (PPO)",
    "neighbor_grpo": "Neighbor-GRPO", "drpo": "DrPO", "rebel": "REBEL", "dpo": "DPO-1step",
    "d3po": "D3PO", "drpo_long": "DrPO, lr 1e-5, 3 x time",
}  # fmt: skip


def timed(run: Any, end: float) -> Any:
    """The same run, which ends with the first step after ``end``, of the process's CPU time."""
    over = run.is_over
    run.is_over = lambda: over() or time.process_time() > end
    return run


def train(name: str, generator: Generator, folder: Path, seconds: float, seed: int) -> Any:
    """Train for about so many CPU seconds; returns the run."""
    end = time.process_time() + seconds
    rewards = load_rewards(["thickness"])
    if name == "raft":
        options = OptimizeOptions(method="best_of_n", candidates=8)
        found = folder / "search"
        OptimizeRun(
            generator, PROMPTS, found, options, rewards=rewards, images_per_prompt=4, seed=seed,
        ).run()  # fmt: skip
        pairs, _ = read_manifest(found / "training" / "manifest.jsonl")
        rate = SftOptions(lr=1e-4, batch_size=8, epochs=LONG, **FREE)
        return timed(SftRun(generator, pairs, folder / "run", rate, seed=seed), end)
    if name == "draft":
        rate = SftOptions(
            lr=1e-4, batch_size=8, epochs=1, preserve_latent_weight=10.0,
            preserve_pixel_weight=0.0, preserve_pool_size=64,
        )  # fmt: skip
        run: Any = RewardRun(
            generator, PROMPTS, folder / "run", rate, rewards=load_rewards(["thickness:0.2"]),
            images_per_prompt=LONG, eval_samples=10, seed=seed,
        )  # fmt: skip
        return timed(run, end)
    objective: Any = name.removesuffix("_long")
    options_of = PreferOptions(
        objective=objective, epochs=1, batch_size=2, groups_per_prompt=LONG, **PREFER[name]
    )
    features = of_classifier(load_classifier()) if objective == "drpo" else None
    run = PreferRun(
        generator, PROMPTS, folder / "run", options_of, rewards=rewards, features=features,
        eval_samples=10, seed=seed,
    )  # fmt: skip
    return timed(run, end)


def row(name: str, seed: int, seconds: float, samples: int) -> dict[str, Any]:
    """What one training brought; from disk, if it was measured before."""
    path = KEPT / f"{name}-{seed}-{seconds}-{samples}.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    generator = load_generator("tiny", master_weights=True)
    score = all_scores(load_rewards(["thickness"]), load_rewards(["digit"]))
    measure = RandomNoiseMeasure(
        PROMPTS, generator.noise_shape(64, 64), samples=samples, seed=2026,
        classifier=classifier_for(generator, PROMPTS), scores=score,
    )  # fmt: skip
    found: dict[str, Any] = {}
    if name != "base":
        with tempfile.TemporaryDirectory() as folder:
            run = train(name, generator, Path(folder), seconds, seed)
            run.run()
            trainer = run.trainers[STUDENT]
            found["steps"], found["moved"] = trainer.step, trainer.last.get("moved")
    named = "base" if name == "base" else path.stem  # drift is measured against it
    found |= measure.measure(generator, KEPT / f"measured-{samples}" / named)
    found["commit"] = commit()
    write_json(path, found)
    return found


def measure(seconds: int, seeds: int, samples: int) -> dict[str, Any]:
    """Measures of the base, once, and of each training by seed."""
    KEPT.mkdir(parents=True, exist_ok=True)
    base = row("base", 0, 0, samples)
    names = ["raft", "draft", *PREFER]
    rows: dict[str, list[Any]] = {name: [] for name in names}
    for seed in range(seeds):
        for name in names:
            taken = LONGER.get(name, 1) * seconds
            rows[name].append(row(name, seed, taken, samples))
            print(name, seed, {key: round(rows[name][-1][key], 3) for key in MEASURES}, flush=True)
    found = {"base": [base], **rows}
    draw(found, KEPT / "prefer.png")
    return found


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Write a picture of the judge against the reward: a point for each seed, a cross for means."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes: Any = figure.subplots()
    for k, (name, rows) in enumerate(found.items()):
        color = "black" if name == "base" else f"C{k - 1}"
        points = [[row[key] for row in rows] for key in ("thickness", "judge digit")]
        axes.scatter(*points, s=12, alpha=0.5, color=color)
        means = [statistics.fmean(values) for values in points]
        axes.scatter(*means, s=70, marker="X", color=color, label=TITLES[name])
    axes.set_xlabel("reward: stroke thickness in pixels, on fresh noise")
    axes.set_ylabel("judge: log-probability of the digit")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)


def markdown(found: dict[str, Any]) -> str:
    """The table, with what it holds for."""
    run = found["settings"]
    commits = sorted({row["commit"] for rows in found["results"].values() for row in rows})
    lines = [
        f"`python -m benchmarks.jobs.prefer` on {found['device']}, {run['threads']} thread, torch "
        f"{found['torch']}, rows of commits {', '.join(commits)}. {run['seconds']} CPU s "
        f"for each training of the embedded generator; {run['samples']} fresh noises; mean of "
        f"{run['seeds']} seeds ± its standard error.",
        "",
        "| | steps | thickness | judge | accuracy | diversity | drift |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, rows in found["results"].items():
        taken = [row["steps"] for row in rows if "steps" in row]
        steps = "-".join(map(str, sorted({min(taken), max(taken)}))) if taken else ""
        cells = [mean_and_error([row[key] for row in rows]) for key in MEASURES]
        lines.append(f"| {TITLES[name]} | {steps} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Measure and write ``output`` and, beside it, the table as Markdown."""
    return run_job(__doc__, {"seconds": 12, "seeds": 3, "samples": 200}, measure, markdown, argv)


if __name__ == "__main__":
    raise SystemExit(main())
