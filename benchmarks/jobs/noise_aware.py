"""A reward trained for the packaged teacher's estimates, beside the honest baseline.

    python -m benchmarks.jobs.noise_aware --output_dir runs/noise_aware --results docs/scale

Learns `thickness` from images of seven digits, measures on the other three, prints two tables and
writes noise_aware.json. Finished parts are kept; in the folder of benchmarks.jobs.scale the run
that --prune compares with is that one's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.jobs.scale import COMMON, ROOT, RUNS
from oneshot_fast.jobs.scale.run import by_prompt
from oneshot_fast.jobs.scale.simulate import gain_of
from oneshot_fast.runtime.files import read_json, write_json
from oneshot_fast.scale import main as scale

COPIES, CANDIDATES, SEED = 24, 10, 2
MODEL = "--model_id tiny-teacher --num_inference_steps 20 --guidance_scale 2 --reward thickness"
DATA = f"data {MODEL} --candidates {CANDIDATES} --steps_saved 0:15,19 --format tar --seed {SEED}"
TRAIN = "train_reward --reward thickness --network classifier --holdout 0.3"
TRAIN += " --batch_size 16"
ARMS = {
    "base": "`thickness` itself", "clean": "network, finished images only",
    "own_level": "network, curriculum: the step's level", "kept": "what is kept",
}  # fmt: skip
STEPS = ("0", "2", "4", "6", "8", "11", "14")


@dataclass(frozen=True)
class Config:
    """Train a reward for estimates and prune by it, on the packaged teacher."""

    output_dir: Path
    """Folder of data, reward and runs."""
    results: Path
    """Folder of noise_aware.json."""
    prune: bool = False
    """Also prune by it for real, beside pruning by thickness and Best-of-8."""


def finished(folder: Path, *flags: str) -> Path:
    """The folder of a command that has run to its end."""
    assert scale([*flags, "--output_dir", str(folder)]) == 0
    return folder


def pruned_by(root: Path, reward: Path) -> dict[str, Any]:
    """Prune for real by ``thickness`` and by the trained reward; paired differences."""
    runs: dict[str, list[Any]] = {}
    alone = RUNS["pruned"].removesuffix(" --compare best_of_n")
    for name, flags in (
        ("pruned", RUNS["pruned"]),
        ("noise_aware", f"{alone} --prune_reward {reward}"),
    ):
        folder = finished(root / name, *COMMON.split(), *flags.split())
        runs[name] = [json.loads(line) for line in (folder / "manifest.jsonl").open()]
    plain = [row["best"]["total"] for row in runs["pruned"]]
    pruned = [row["best"]["total"] for row in runs["noise_aware"]]
    best = [row["compare"]["best"]["total"] for row in runs["pruned"]]
    gains: dict[str, Any] = {}
    for other, those in (("Best-of-8", best), ("pruned by thickness", plain)):
        differences = [a - b for a, b in zip(pruned, those, strict=True)]
        gains[other] = gain_of(by_prompt(runs["noise_aware"], differences))
    cost = runs["noise_aware"][0]["flops"] / 1e9
    mean = sum(pruned) / len(pruned)
    print(f"\npruned by the trained reward: {mean:.3f} at {cost:.1f} GFLOP")
    for other, gain in gains.items():
        print(f"against {other}: {gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]")
    return {"reward": mean, "gflop": cost, "against": gains}


def main(config: Config) -> None:
    """Run what is not there, print the tables and write the numbers."""
    prompts = (ROOT / "docs/scale/prompts.txt").read_text(encoding="utf-8")
    config.output_dir.mkdir(parents=True, exist_ok=True)
    file = config.output_dir / "prompts.txt"
    file.write_text(prompts * COPIES, encoding="utf-8")
    data = finished(config.output_dir / "data", *DATA.split(), "--prompt_file", str(file))
    reward = finished(config.output_dir / "reward", *TRAIN.split(), "--data", str(data))
    found = read_json(reward / "metrics.json")
    for measure in ("kendall", "spearman"):
        print(f"\n| {measure} at step | {' | '.join(STEPS)} |\n|{' --- |' * (len(STEPS) + 1)}")
        for arm, name in ARMS.items():
            values = [f"{found[arm][step][measure]:.2f}" for step in STEPS]
            print(f"| {name} | {' | '.join(values)} |")
    pruned = pruned_by(config.output_dir, reward) if config.prune else None
    kept = {arm: {step: found[arm].get(step) for step in STEPS} for arm in ARMS}
    about = {name: found[name] for name in ("prompts", "images", "held_out_prompts", "best")}
    write_json(config.results / "noise_aware.json", about | {"arms": kept, "pruned": pruned})


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.OmitArgPrefixes,)))
