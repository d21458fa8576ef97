r"""Best-of-N, pruned and steered at equal FLOP on the packaged teacher: figures of docs/scale.md.

    python -m benchmarks.jobs.scale --output_dir runs/scale --figures docs/images \
        --results docs/scale

8 seeds of each of 10 prompts, reward `thickness`, 20 steps with guidance 2. Finished runs are kept.
Prints a table and writes scale.json; intervals are 95 % bootstraps over prompts of paired
differences.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

from oneshot_fast.data.images import load_image
from oneshot_fast.embedded.classifier import load_classifier
from oneshot_fast.jobs.scale.run import by_prompt
from oneshot_fast.jobs.scale.simulate import gain_of
from oneshot_fast.report.plots import BLUE, GREEN, GREY, ORANGE, new_axes
from oneshot_fast.runtime.files import write_json
from oneshot_fast.scale import main as scale

ROOT = Path(__file__).parents[2]
COMMON = (
    "run --model_id tiny-teacher --num_inference_steps 20 --guidance_scale 2 --reward thickness"
)
COMMON += f" --num_images_per_prompt 8 --prompt_file {ROOT / 'docs/scale/prompts.txt'}"
STEERED = "--after 4 8 12 16 --cps_eta ancestral"
RUNS = {
    "pruned": "--candidates 21 --after 2 6 11 --keep 0.4 0.4 0.5 --compare best_of_n",
    "fk": f"--method fk --candidates 6 --inverse_temperature 6 --compare best_of_n {STEERED}",
    "svdd": f"--method svdd --candidates 3 --branches 4 {STEERED}",
}
SIDE = 64


@dataclass(frozen=True)
class Config:
    """Run Best-of-N, pruning, FK steering and SVDD on the packaged teacher."""

    output_dir: Path
    """Folder of the runs."""
    figures: Path
    """Folder of scale-gains.png and scale-images.png."""
    results: Path
    """Folder of scale.json, which has what the table says."""
    seeds: tuple[int, ...] = ()
    """Also prune with these seeds."""


def arms_of(runs: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Rows of every arm, Best-of-N by either sampler included."""
    beside = {name: [row["compare"] for row in runs[name]] for name in ("pruned", "fk")}
    return {
        "Best-of-8": beside["pruned"], "pruned, 21 noises": runs["pruned"],
        "Best-of-8, ancestral": beside["fk"], "FK, 6 particles": runs["fk"],
        "SVDD, 3 lines of 4": runs["svdd"],
    }  # fmt: skip


def recognised(folder: Path, kind: str, rows: list[Any]) -> float:
    """Share of a run's images whose digit the packaged classifier sees: no reward asked for it."""
    classifier, right = load_classifier(), 0
    for row in rows:
        image = load_image(folder / "images" / f"{row['id']}-{kind}.png", SIDE, SIDE)
        right += int(classifier(image[None]).argmax()) == classifier.label_of(row["prompt"])
    return right / len(rows)


def pruned_gain(root: Path, seed: int) -> dict[str, float]:
    """What pruning gains over Best-of-8 with another seed."""
    folder = root / f"pruned-seed-{seed}"
    flags = [*COMMON.split(), *RUNS["pruned"].split(), "--seed", str(seed)]
    assert scale([*flags, "--output_dir", str(folder)]) == 0
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").open()]
    differences = [row["best"]["total"] - row["compare"]["best"]["total"] for row in rows]
    gain = gain_of(by_prompt(rows, differences))
    print(f"seed {seed}: {gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]")
    return gain


def main(config: Config) -> None:
    """Run what is not there, print the table and draw the figures."""
    runs = {}
    for name, flags in RUNS.items():
        folder = config.output_dir / name
        assert scale([*COMMON.split(), *flags.split(), "--output_dir", str(folder)]) == 0
        runs[name] = [json.loads(line) for line in (folder / "manifest.jsonl").open()]
    rows, arms = runs["pruned"], arms_of(runs)
    totals = {name: np.array([row["best"]["total"] for row in arm]) for name, arm in arms.items()}
    places = [("pruned", "best_of_n"), ("pruned", "best"), ("fk", "best_of_n"), ("fk", "best")]
    places.append(("svdd", "best"))
    print(
        "| arm | GFLOP per image | reward | against Best-of-8 | against Best-of-8, ancestral "
        "| recognised |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    plain, ancestral = "Best-of-8", "Best-of-8, ancestral"
    gains, table = {}, []
    for (name, values), (run, kind) in zip(totals.items(), places, strict=True):
        cells = [name, f"{arms[name][0]['flops'] / 1e9:.1f}", f"{values.mean():.3f}"]
        for base in (plain, ancestral):
            gain = gain_of(by_prompt(rows, (values - totals[base]).tolist()))
            gains[name, base] = gain
            shown = f"{gain['mean']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"
            cells.append("" if name == base else shown)
        share = recognised(config.output_dir / run, kind, rows)
        cells.append(f"{share:.1%}")
        table.append({
            "arm": name, "gflop": arms[name][0]["flops"] / 1e9, "reward": float(values.mean()),
            "recognised": share, **{f"against {b}": gains[name, b] for b in (plain, ancestral)},
        })  # fmt: skip
        print(f"| {' | '.join(cells)} |")
    others = {str(seed): pruned_gain(config.output_dir, seed) for seed in config.seeds}
    about = {"flags": RUNS, "rows": table, "pruned with other seeds": others}
    write_json(config.results / "scale.json", about)
    left = [len({*row["steps"][-1]["candidates"]}) for row in runs["fk"]]
    print(f"\nfirst noises of FK with a descendant in the end: {np.mean(left):.1f} of 6")
    shown = [("pruned, 21 noises", plain), ("FK, 6 particles", ancestral)]
    shown.append(("SVDD, 3 lines of 4", ancestral))
    figure, axes = new_axes("reward above that of Best-of-8 with the same sampler", "", (6.4, 2))
    for place, (pair, color) in enumerate(zip(shown, (BLUE, ORANGE, GREEN), strict=True)):
        gain = gains[pair]
        ends = [[gain["mean"] - gain["low"]], [gain["high"] - gain["mean"]]]
        axes.errorbar([gain["mean"]], [place], xerr=ends, fmt="o", color=color, capsize=4)
    axes.axvline(0, color=GREY, linestyle="--", linewidth=1)
    axes.set_yticks(range(3), [name for name, _ in shown])
    axes.invert_yaxis()
    axes.margins(y=0.3)
    figure.savefig(config.figures / "scale-gains.png", dpi=120)
    first = [row["id"] for row in rows if row["id"].endswith("-00")]
    kinds = ("pruned", "best_of_n"), ("pruned", "best"), ("fk", "best"), ("svdd", "best")
    sheet = Image.new("RGB", (SIDE * len(first), SIDE * len(kinds)))
    for y, (run, kind) in enumerate(kinds):
        for x, name in enumerate(first):
            with Image.open(config.output_dir / run / "images" / f"{name}-{kind}.png") as image:
                sheet.paste(image, (SIDE * x, SIDE * y))
    sheet.save(config.figures / "scale-images.png")


if __name__ == "__main__":
    main(tyro.cli(Config, config=(tyro.conf.OmitArgPrefixes,)))
