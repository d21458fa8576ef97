r"""Rewards raised on the embedded four-step student, with and without the matching term.

    python -m benchmarks.jobs.reinforce --model_id runs/distill/steps-4/checkpoint-final \
        --output_dir runs/rl

Writes benchmarks/results/reinforce.json and docs/images/reinforce.png. The reward is the strokes'
thickness, the judge the digits' own classifier, which is not trained on.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common import environment
from oneshot_fast.embedded.digits import prompt_of
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.jobs.reinforce.options import ReinforceOptions
from oneshot_fast.jobs.reinforce.run import ReinforceRun
from oneshot_fast.report.rewards import history
from oneshot_fast.rewards import load_rewards
from oneshot_fast.runtime.files import write_json

RESULTS, FIGURE = Path("benchmarks/results/reinforce.json"), Path("docs/images/reinforce.png")
PROMPTS = [prompt_of(digit) for digit in range(10)]
ARMS = {"no matching term": 0.0, "matching term": 20.0}
SHOWN = ("thickness", "judge digit", "accuracy", "diversity", "drift")


def few(name: str) -> FewStepGenerator:
    """A model by four steps."""
    generator: Any = load_generator(name)
    return FewStepGenerator.over(generator, 4, eta=0.9)


def draw(arms: dict[str, list[dict[str, Any]]]) -> None:
    """Reward against judge, and diversity and drift over the updates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, 3)
    for name, rows in arms.items():
        reward = [row["thickness"] for row in rows]
        for axes, other in zip(panels, ("judge digit", "diversity", "drift"), strict=True):
            axes.plot(reward, [row[other] for row in rows], marker="o", markersize=3, label=name)
            axes.set_xlabel("reward: thickness")
            axes.set_title(other, fontsize=10)
    panels[0].legend(fontsize=7)
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    """Run, or go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_id", required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--arms", nargs="+", choices=[*ARMS], default=[*ARMS])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    settings = {
        "batch_size": 40, "images_per_prompt": 8, "steps_per_epoch": 5, "epochs": given.epochs,
        "lr": 2e-5,
    }  # fmt: skip
    for name in given.arms:
        weight = ARMS[name]
        more = {"match_weight": weight, "teacher_guidance": 2.0} if weight else {}
        folder = given.output_dir / name.replace(" ", "-")
        run = ReinforceRun(
            few(given.model_id), PROMPTS, folder, ReinforceOptions(**settings, **more),
            rewards=load_rewards(["thickness"]), judge=load_rewards(["digit"]), eval_samples=100,
            teacher=few("tiny-teacher") if weight else None, seed=given.seed, save_minutes=1,
        )  # fmt: skip
        run.run()
        rows = history(folder)
        found[name] = [{key: row[key] for key in ("epoch", *SHOWN)} for row in rows]
        print(name, found[name][-1], flush=True)
    if len(found) < len(ARMS):
        return
    about = {"environment": environment("cpu", given.seed), "settings": settings, "arms": ARMS}
    write_json(RESULTS, about | {"rows": found})
    draw(found)


if __name__ == "__main__":
    main()
