r"""Rewards raised on the embedded four-step student, alone, or held by terms against drift.

    python -m benchmarks.jobs.reinforce --model_id runs/distill/steps-4/checkpoint-final \
        --output_dir runs/rl

Prints three tables and writes benchmarks/results/reinforce.json and docs/images/reinforce.png. The
reward is the strokes' thickness, the judge the digits' own classifier, which is not trained on.
Finished runs are kept. An hour of one core.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator

from benchmarks.common import environment
from oneshot_fast.embedded.digits import prompt_of
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.jobs.reinforce.options import ReinforceOptions
from oneshot_fast.jobs.reinforce.run import ReinforceRun
from oneshot_fast.report.rewards import history
from oneshot_fast.rewards import load_rewards
from oneshot_fast.runtime.files import read_json, write_json

RESULTS, FIGURE = Path("benchmarks/results/reinforce.json"), Path("docs/images/reinforce.png")
PROMPTS = [prompt_of(digit) for digit in range(10)]
ARMS: dict[str, dict[str, float]] = {
    "reward alone": {},
    "matching term": {"match_weight": 20.0, "teacher_guidance": 2.0},
    "preserve": {"preserve_latent_weight": 2.0},
    "last step": {"final_reward_weight": 0.5},
    "last step, preserve": {"final_reward_weight": 0.5, "preserve_latent_weight": 5.0},
}
SHOWN = ("thickness", "judge digit", "accuracy", "diversity", "drift")
AFTER = 8  # epochs: 40 updates
AT = (10.0, 11.0, 12.0, 13.0, 14.0)  # thickness at which the arms are compared
Rows = list[dict[str, Any]]


def few(name: str) -> FewStepGenerator:
    """A model by four steps."""
    generator: Any = load_generator(name)
    return FewStepGenerator.over(generator, 4, eta=0.9)


def draw(arms: dict[str, list[Rows]]) -> None:
    """Judge, diversity and drift against the reward, a line for every seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, 3)
    for colour, (name, seeds) in zip(("C0", "C1", "C2", "C3", "C4"), arms.items(), strict=True):
        for k, rows in enumerate(seeds):
            reward = [row["thickness"] for row in rows]
            for axes, other in zip(panels, ("judge digit", "diversity", "drift"), strict=True):
                label = None if k else name
                axes.plot(reward, [row[other] for row in rows], colour, label=label, linewidth=1)
                axes.set_xlabel("reward: thickness")
                axes.set_title(other, fontsize=10)
    for axes, (low, high) in zip(panels, ((-0.6, 0), (0.18, 0.225), (0, 0.8)), strict=True):
        axes.set(xlim=(8.8, 15), ylim=(low, high))  # beyond, no digit can be read
    panels[0].legend(fontsize=7)
    figure.savefig(FIGURE, dpi=110)


def spread(values: list[float]) -> str:
    """Mean and range."""
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def print_tables(arms: dict[str, list[Rows]]) -> None:
    """Where the runs end, and what each pays for the same reward."""
    print(f"\n| at the end | updates | {' | '.join(SHOWN)} |\n|{' --- |' * (len(SHOWN) + 2)}")
    for name, seeds in arms.items():
        cells = (spread([rows[-1][key] for rows in seeds]) for key in SHOWN)
        print(f"| {name} | {5 * seeds[0][-1]['epoch']} | {' | '.join(cells)} |")
    print(f"\n| at thickness | {' | '.join(map(str, AT))} |\n|{' --- |' * (len(AT) + 1)}")
    for key in SHOWN[1:]:
        for name, seeds in arms.items():
            cells = (spread([at(rows, x, key) for rows in seeds]) for x in AT)
            print(f"| {key}, {name} | {' | '.join(cells)} |")
    print(
        f"\n| after {5 * AFTER} updates | thickness | judge, less that of the reward alone there |"
    )
    print("| --- | --- | --- |")
    for name, seeds in arms.items():
        last = [rows[AFTER] for rows in seeds]
        more = [
            row["judge digit"] - along(alone, row["thickness"])
            for row, alone in zip(last, arms["reward alone"], strict=True)
        ]
        print(f"| {name} | {spread([row['thickness'] for row in last])} | {spread(more)} |")


def along(rows: Rows, thickness: float) -> float:
    """The judge where the reward passes a value, by monotone cubics: straight lines lie below."""
    curve = ([row[key] for row in rows[: AFTER + 1]] for key in ("thickness", "judge digit"))
    return float(PchipInterpolator(*curve)(thickness))


def at(rows: Rows, thickness: float, key: str) -> float:
    """A measure where the reward passes a value, between two epochs; NaN where it does not."""
    return float(
        np.interp(
            thickness, *([row[name] for row in rows] for name in ("thickness", key)), right=np.nan
        )
    )


def main() -> None:
    """Run, or go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_id", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=list(ARMS), help="others stay as they were"
    )
    given = parser.parse_args()
    settings = {
        "batch_size": 40, "images_per_prompt": 8, "steps_per_epoch": 5, "lr": 2e-5,
    }  # fmt: skip
    kept = read_json(RESULTS)["rows"] if RESULTS.exists() else {}
    found: dict[str, list[Rows]] = {name: kept.get(name, []) for name in ARMS}
    found |= {name: [] for name in given.arms}
    for seed in given.seeds:
        for name in given.arms:
            terms = ARMS[name]
            folder = given.output_dir / f"seed-{seed}" / name.replace(" ", "-")
            run = ReinforceRun(
                few(given.model_id), PROMPTS, folder,
                ReinforceOptions(epochs=given.epochs, **settings, **terms),
                rewards=load_rewards(["thickness"]), judge=load_rewards(["digit"]),
                teacher=few("tiny-teacher") if "match_weight" in terms else None,
                eval_samples=100, seed=seed, save_minutes=1,
            )  # fmt: skip
            run.run()
            rows = history(folder)
            found[name].append([{key: row[key] for key in ("epoch", *SHOWN)} for row in rows])
    about = {"environment": environment("cpu", given.seeds[0]), "seeds": given.seeds}
    write_json(RESULTS, about | {"settings": settings, "arms": ARMS, "rows": found})
    print_tables(found)
    draw(found)


if __name__ == "__main__":
    main()
