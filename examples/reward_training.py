r"""Train the embedded generator on a reward, and look at what else changes.

The reward is stroke thickness; the judge, which is not trained on, is the digit classifier. With
little or no preserve loss the reward runs away within an epoch, while the judge no longer sees the
digits and images of a prompt grow alike: over-optimisation. With enough of it the reward rises a
little and the rest stays. Each training is the same as

    python -m oneshot_fast.sft --model_id tiny --reward thickness:0.2 --judge digit \
        --prompt_file digits.txt --images_per_prompt 16 --batch_size 8 --lr 1e-4 \
        --preserve_latent_weight 10 --preserve_pixel_weight 0 --output_dir DIR

with the ten prompts below in digits.txt.

    python examples/reward_training.py [picture.png [folder]]
"""

import sys
from pathlib import Path

from oneshot_fast.generators.loading import load_generator
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.sft.rewards import RewardRun
from oneshot_fast.report.rewards import draw_histories, history
from oneshot_fast.rewards import load_rewards

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = [f"a handwritten digit {digit}" for digit in DIGITS]


def main(
    picture="reward_training.png",
    folder="runs/reward_training",
    epochs=10,
    images_per_prompt=16,
    eval_samples=64,
    preserve=(0.0, 1.0, 10.0),
):
    """Return each run's measures, an epoch per row."""
    histories = {}
    for weight in preserve:
        name = f"preserve {weight:g}"
        options = SftOptions(
            epochs=epochs,
            batch_size=8,
            lr=1e-4,
            preserve_latent_weight=weight,
            preserve_pixel_weight=0.0,
        )
        place = Path(folder) / f"preserve-{weight:g}"
        run = RewardRun(
            load_generator("tiny", master_weights=True),
            PROMPTS,
            place,
            options,
            rewards=load_rewards(["thickness:0.2"]),
            judge=load_rewards(["digit"]),
            images_per_prompt=images_per_prompt,
            eval_samples=eval_samples,
        )
        run.run()
        histories[name] = rows = history(place)
        first, last = rows[0], rows[-1]
        print(
            f"{name}: thickness {first['thickness']:.2f} -> {last['thickness']:.2f}, judge "
            f"{first['judge digit']:.2f} -> {last['judge digit']:.2f}, drift {last['drift']:.3f}, "
            f"diversity {first['diversity']:.3f} -> {last['diversity']:.3f}"
        )
    draw_histories(histories, Path(picture))
    return histories


if __name__ == "__main__":
    main(*sys.argv[1:])
