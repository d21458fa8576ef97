"""Given pairs of images: does what is learnt of some hold for others, and what does it cost?

96 pairs of the packaged digits: an image of a class's thickest third is preferred over one of its
thinnest, all drawn alike. 48 more, of other writers, are held out: "held-out" is the share of them
whose better image came closer to its noise, compared to the base generator, than the worse one to
its own, by squared distances of latents. Noises are assigned once; seeds are of the trainings.
What was measured is kept in runs/benchmark-prefer-offline, so that a stopped benchmark goes on.

python -m benchmarks.jobs.prefer_offline [--output benchmarks/results/prefer_offline.json]
"""

import json
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ROOT, mean_and_error, run_job, slug
from oneshot_fast.data.images import save_png
from oneshot_fast.data.manifests import MatchedPair, read_manifest
from oneshot_fast.data.noise_files import read_noise
from oneshot_fast.data.pairs import read_pairs
from oneshot_fast.data.preferences import noise_of, noises_by_image, read_preferences
from oneshot_fast.embedded.digits import BASE_STYLE, load_digits, prompt_of, render
from oneshot_fast.evaluation.random_noise import RandomNoiseMeasure, all_scores, classifier_for
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.run import AssignRun
from oneshot_fast.jobs.prefer.options import PreferOptions
from oneshot_fast.jobs.prefer.pairs import PairRun
from oneshot_fast.rewards import load_rewards
from oneshot_fast.rewards.thickness import ThicknessReward
from oneshot_fast.runtime.files import write_json, write_jsonl
from oneshot_fast.training.checkpoints import STUDENT

KEPT = ROOT / "runs" / "benchmark-prefer-offline"
COUNT = {"train": 96, "heldout": 48}  # pairs of a split
MEASURES = ("held-out", "thickness", "judge digit", "accuracy", "diversity", "drift")
ARMS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "dpo, --winner_weight 0": {"winner_weight": 0.0},
    "dpo, --pair_noise random": {"pair_noise": "random"},
    "pso, --loser_weight 0.5": {"objective": "pso", "loser_weight": 0.5},
}


def write_split(split: str) -> None:
    """Pairs in KEPT/split: preferences.jsonl, and pairs.jsonl with each image alone."""
    folder = KEPT / split
    if (folder / "pairs.jsonl").exists():
        return
    digits, labels = load_digits(split)
    images = render(digits, BASE_STYLE)
    thickness = ThicknessReward()(images, torch.empty(0))
    draw = torch.Generator().manual_seed([*COUNT].index(split))
    pairs: list[dict[str, str]] = []
    for digit in range(10):
        of = (labels == digit).nonzero()[:, 0]
        order, third = of[thickness[of].argsort()], len(of) // 3
        parts = (order[:third], order[-third:])
        thin, thick = (x[torch.randperm(third, generator=draw)] for x in parts)
        count = len(range(digit, COUNT[split], 10))
        # the first so many of the held-out writers served to choose the defaults
        thin, thick = thin[-count:], thick[-count:]
        for chosen in zip(thick.tolist(), thin.tolist(), strict=True):
            better, worse = (f"images/{k:04d}.png" for k in chosen)
            for k, name in zip(chosen, (better, worse), strict=True):
                save_png(folder / name, images[k])
            pairs.append({"prompt": prompt_of(digit), "image": better, "rejected": worse})
    write_jsonl(folder / "preferences.jsonl", pairs)
    names = ("image", "rejected")
    alone = [{"prompt": pair["prompt"], "image": pair[k]} for pair in pairs for k in names]
    write_jsonl(folder / "pairs.jsonl", alone)


def assigned(split: str) -> list[MatchedPair]:
    """The noises of a split's images, as the base generator has them."""
    write_split(split)
    folder = KEPT / split
    records, _ = read_pairs(folder)
    options = AssignOptions(max_angle=0.6)
    AssignRun(load_generator("tiny"), records, folder / "assign", options, num_images=0).run()
    return [*read_manifest(folder / "assign" / "manifest.jsonl")[0]]


def distances(generator: Generator) -> Tensor:
    """Mean squared distance of held-out images to what their noises give, [48, 2]."""
    noises = noises_by_image(assigned("heldout"))
    targets = TargetImages(generator)
    found = []
    for pair in read_preferences(KEPT / "heldout" / "preferences.jsonl")[0]:
        told = generator.encode_prompts([pair.prompt] * 2)
        images = (pair.image, pair.rejected)
        lines = [noise_of(noises, image, pair.prompt) for image in images]
        noise = torch.stack([read_noise(line.noise_path, line.noise_index) for line in lines])
        goals = torch.stack([targets.latent(image, "crop") for image in images])
        with torch.no_grad():
            apart = generator.latents(noise, told) - goals
        found.append(apart.square().flatten(1).mean(1))
    return torch.stack(found)


def options_of(name: str, epochs: int) -> PreferOptions:
    """How an arm is trained."""
    return PreferOptions(**{"objective": "dpo", "batch_size": 8, "epochs": epochs, **ARMS[name]})


def train(name: str, generator: Generator, folder: Path, epochs: int, seed: int) -> PairRun:
    """Train on the pairs; returns the run."""
    options = options_of(name, epochs)
    write_split("train")
    matched = assigned("train") if options.pair_noise == "assigned" else ()
    pairs, _ = read_preferences(KEPT / "train" / "preferences.jsonl")
    run = PairRun(generator, pairs, folder, options, matched=matched, eval_samples=10, seed=seed)
    run.run()
    return run


def row(name: str, seed: int, epochs: int, samples: int) -> dict[str, Any]:
    """What one training brought; from disk, if it was measured before."""
    named = "base"
    if name != "base":  # other options are another training
        settings = repr(options_of(name, epochs)).encode()
        named = f"{slug(name)}-{seed}-{sha256(settings).hexdigest()[:12]}"
    path = KEPT / f"{named}-{samples}.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    generator = load_generator("tiny", master_weights=True)
    prompts = [prompt_of(digit) for digit in range(10)]
    found: dict[str, Any] = {}
    if name != "base":
        before = distances(generator)
        with tempfile.TemporaryDirectory() as folder:
            run = train(name, generator, Path(folder), epochs, seed)
            found["steps"] = run.trainers[STUDENT].step
        gain = before - distances(generator)
        found["held-out"] = (gain[:, 0] > gain[:, 1]).float().mean().item()
    measure = RandomNoiseMeasure(
        prompts, generator.noise_shape(64, 64), samples=samples, seed=2026,
        classifier=classifier_for(generator, prompts),
        scores=all_scores(load_rewards(["thickness"]), load_rewards(["digit"])),
    )  # fmt: skip
    found |= measure.measure(generator, KEPT / f"measured-{samples}" / named)
    write_json(path, found)
    return found


def measure(epochs: int, seeds: int, samples: int) -> dict[str, Any]:
    """Measures of the base, once, and of each training by seed."""
    found = {"base": [row("base", 0, epochs, samples)]} | {name: [] for name in ARMS}
    for seed in range(seeds):
        for name in ARMS:
            found[name].append(row(name, seed, epochs, samples))
            print(name, seed, {key: round(found[name][-1][key], 3) for key in MEASURES}, flush=True)
    return found


def markdown(found: dict[str, Any]) -> str:
    """The table, with what it holds for."""
    run = found["settings"]
    lines = [
        f"`python -m benchmarks.jobs.prefer_offline` on {found['device']}, {run['threads']} "
        f"thread, torch {found['torch']}, commit {found['commit']}, {found['date']}. At most "
        f"{run['epochs']} epochs of {COUNT['train']} pairs in batches of 8; {COUNT['heldout']} "
        f"held-out pairs, {run['samples']} fresh noises; mean of {run['seeds']} seeds ± its "
        "standard error.",
        "",
        "| `--objective` | steps | held-out | thickness | judge | accuracy | diversity | drift |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, rows in found["results"].items():
        steps = "-".join(map(str, sorted({row["steps"] for row in rows if "steps" in row})))
        known = [[row[key] for row in rows if key in row] for key in MEASURES]
        cells = [mean_and_error(values) if values else "" for values in known]
        lines.append(f"| {name} | {steps} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Measure and write ``output`` and, beside it, the table as Markdown."""
    return run_job(__doc__, {"epochs": 2, "seeds": 3, "samples": 200}, measure, markdown, argv)


if __name__ == "__main__":
    raise SystemExit(main())
