"""Train the embedded generator on a reward, and look at what else changes.

The reward is stroke thickness; the judge, which is not trained on, is the digit classifier. With
little or no preserve loss the reward runs away within an epoch, while the judge no longer sees the
digits and images of a prompt grow alike: over-optimisation. With enough of it the reward rises a
little and the rest stays.

    python examples/reward_training.py [picture.png]
"""

import sys
from pathlib import Path

from oneshot_fast.loading import load_generator
from oneshot_fast.report.reward_training import draw_histories
from oneshot_fast.reward_training import RewardTrainingOptions, train_on_rewards
from oneshot_fast.rewards import load_rewards

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = [f"a handwritten digit {digit}" for digit in DIGITS]


def main(
    picture="reward_training.png", epochs=10, steps=20, measured=80, preserve=(0.0, 1.0, 10.0)
):
    """Return each run's rows, an epoch per row."""
    histories = {}
    for weight in preserve:
        options = RewardTrainingOptions(
            epochs=epochs, steps=steps, measured=measured, preserve_weight=weight
        )
        histories[f"preserve {weight:g}"] = rows = train_on_rewards(
            load_generator("tiny"),
            load_rewards(["thickness:0.2"]),
            PROMPTS,
            options,
            judge=load_rewards(["digit"]),
        )
        first, last = rows[0], rows[-1]
        print(
            f"preserve {weight:g}: thickness {first['thickness']:.2f} -> {last['thickness']:.2f}, "
            f"judge {first['judge digit']:.2f} -> {last['judge digit']:.2f}, drift "
            f"{last['drift']:.3f}, diversity {first['diversity']:.3f} -> {last['diversity']:.3f}"
        )
    draw_histories(histories, Path(picture))
    return histories


if __name__ == "__main__":
    main(*sys.argv[1:])
