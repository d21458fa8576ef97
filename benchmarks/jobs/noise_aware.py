"""A reward trained for the packaged teacher's estimates, beside the honest baseline.

    python -m benchmarks.jobs.noise_aware --output_dir runs/noise_aware --results docs/scale

Learns `thickness` from images of seven digits and measures on the other three, for four threes that
hold out every digit. Prints two tables of means over these splits and, with 95 % bootstraps over
the ten digits, how far Kendall's tau of each step's network is above the formula's; writes
noise_aware.json. Finished parts are kept; in the folder of benchmarks.jobs.scale the run that
--prune compares with is that one's.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks.jobs.scale import COMMON, ROOT, RUNS
from oneshot_fast.jobs.scale.labels import read_labels, split
from oneshot_fast.jobs.scale.run import by_prompt
from oneshot_fast.jobs.scale.simulate import gain_of
from oneshot_fast.rewards.base import Setup
from oneshot_fast.rewards.noise_aware import THRESHOLDS, network_of
from oneshot_fast.runtime.files import read_json, read_safetensors, write_json
from oneshot_fast.scale import main as scale
from oneshot_fast.search.agreement import kendall

COPIES, CANDIDATES, SEED = 24, 10, 2
MODEL = "--model_id tiny-teacher --num_inference_steps 20 --guidance_scale 2 --reward thickness"
DATA = f"data {MODEL} --candidates {CANDIDATES} --steps_saved 0:15,19 --format tar --seed {SEED}"
HOLDOUT, SPLITS = 0.3, (0, 10, 14, 16)  # seeds of splits that hold out every digit
TRAIN = f"train_reward --reward thickness --network {THRESHOLDS} --holdout {HOLDOUT}"
TRAIN += " --batch_size 16 --pair_weight 5"
ARMS = {
    "base": "`thickness` itself", "clean": "network, finished images only",
    "own_level": "network, curriculum: the step's level", "kept": "what is kept",
}  # fmt: skip
MEASURES = ("kendall", "spearman", "mse")
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


def differences(data: Path, rewards: dict[int, Path]) -> dict[str, dict[str, float]]:
    """Kendall's tau of each step's network minus the formula's, means over held-out digits."""
    labels = read_labels(data, "thickness")
    network = network_of(THRESHOLDS, Setup(Path("models"), torch.device("cpu"), torch.float32))
    found: dict[str, dict[str, list[float]]] = {step: defaultdict(list) for step in STEPS}
    for seed, reward in rewards.items():
        _, apart = split(labels.prompts, HOLDOUT, seed)
        for step in map(int, STEPS):
            network.load_state_dict(read_safetensors(reward / f"level-{step:02d}.safetensors"))
            for p in apart:
                images = labels.images([(p, n) for n in range(CANDIDATES)], step)
                told = network(images, images.new_empty(CANDIDATES, 0)).double().numpy()
                early, final = labels.early(step)[p], labels.final[p]
                ours, theirs = kendall(np.stack([told, early]), np.stack([final, final]))
                found[str(step)][labels.prompts[p]].append(float(ours - theirs))
    return {
        step: gain_of(np.array([np.mean(values) for values in of.values()]))
        for step, of in found.items()
    }


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
    rewards = {
        seed: finished(
            config.output_dir / f"reward-{seed}",
            *TRAIN.split(), "--seed", str(seed), "--data", str(data),
        )
        for seed in SPLITS
    }  # fmt: skip
    splits = [read_json(reward / "metrics.json") for reward in rewards.values()]
    arms = {
        arm: {
            step: {name: float(np.mean([found[arm][step][name] for found in splits]))
                   for name in MEASURES}
            for step in STEPS
        }
        for arm in ARMS
    }  # fmt: skip
    for measure in MEASURES[:2]:
        print(f"\n| {measure} at step | {' | '.join(STEPS)} |\n|{' --- |' * (len(STEPS) + 1)}")
        for arm, name in ARMS.items():
            values = [f"{arms[arm][step][measure]:.2f}" for step in STEPS]
            print(f"| {name} | {' | '.join(values)} |")
    above = differences(data, rewards)
    for step, gain in above.items():
        between = f"[{gain['low']:+.3f}, {gain['high']:+.3f}]"
        print(f"step {step}: above `thickness` by {gain['mean']:+.3f} {between}")
    first = rewards[SPLITS[0]]
    pruned = pruned_by(config.output_dir, first) if config.prune else None
    about = {name: splits[0][name] for name in ("prompts", "images", "held_out_prompts")}
    about["best"] = {seed: found["best"] for seed, found in zip(SPLITS, splits, strict=True)}
    numbers = about | {"arms": arms, "above": above, "pruned": pruned}
    write_json(config.results / "noise_aware.json", numbers)


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.OmitArgPrefixes,)))
