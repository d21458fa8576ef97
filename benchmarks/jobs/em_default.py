"""Run the embedded default with the direct-SFT baseline and publish it in docs/em_default/.

Writes summary.json, report.html, README.md (the table) and the before/after picture of the README.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image

from benchmarks.common import ROOT, processor
from oneshot_fast.em import main as em
from oneshot_fast.runtime.files import mend_jsonl, read_json

DOCS = ROOT / "docs"
ROWS = (
    ("prompt accuracy", "accuracy", "{:.1%}"),
    ("Frechet distance to the held-out targets", "frechet_distance", "{:.2f}"),
    ("diversity (mean pixel distance within a prompt)", "diversity", "{:.3f}"),
    ("drift from the base (RMS in latents)", "drift", "{:.3f}"),
)


def write_table(summary: dict[str, Any], path: Path) -> None:
    """Write the committed run's numbers as Markdown."""
    noise = summary["random_noise"] | {"real": summary["real"]}
    columns = {"base": "base", "final": "after EM", "direct": "direct SFT", "real": "real held-out"}
    lines = [
        "# The embedded default, one committed run",
        f"`python -m benchmarks.jobs.em_default`, seed {summary['settings']['seed']}, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads of {processor()}; "
        f"{summary['seconds']:.0f} s in all, the direct-SFT baseline included. "
        "The whole [report](report.html) and [summary.json](summary.json) lie here.",
        "",
        f"On {noise['base']['samples']} fresh random noises, which is what users get:",
        "",
        "| | " + " | ".join(columns.values()) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for label, key, form in ROWS:
        cells = [form.format(noise[c][key]) if key in noise[c] else "-" for c in columns]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += ["", "Latent loss (mean squared error):", ""]
    lines += [
        "| cycle | base noise | after the E-step | after the M-step |",
        "| --- | --- | --- | --- |",
    ]
    for row in summary["cycles"]:
        assign, after = row["assign"], row["sft"]["matched_loss_after"]
        cells = (assign["initial_loss"], assign["best_loss"], after)
        lines.append(f"| {row['cycle']} | " + " | ".join(f"{cell:.4f}" for cell in cells) + " |")
    held = summary["heldout"]
    change = held["final"]["best_loss"] / held["base"]["best_loss"] - 1
    lines += [
        "",
        f"{held['samples']} held-out pairs, assigned with equal effort: "
        f"{held['base']['best_loss']:.4f} with the base model, {held['final']['best_loss']:.4f} "
        f"with the final one ({change:+.0%}).",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw_before_after(work: Path, path: Path, columns: int = 10) -> None:
    """Targets, and samples on the same random noises before and after, as one labelled picture."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = mend_jsonl(work / "data" / "train" / "pairs.jsonl")[:columns]
    targets = [np.asarray(Image.open(work / "data" / "train" / row["image"])) for row in rows]
    strips = [("targets", np.concatenate(targets, 1))]
    for label, name in (("before", "base"), ("after EM", f"cycle-{last_cycle(work):02d}")):
        grid = np.asarray(Image.open(work / "eval" / f"{name}.png"))
        strips.append((label, grid[: 2 * targets[0].shape[0]]))
    heights = [strip.shape[0] for _, strip in strips]
    figure, axes = plt.subplots(
        len(strips), 1, figsize=(9, 5.2), dpi=120, gridspec_kw={"height_ratios": heights}
    )
    for axis, (label, strip) in zip(axes, strips, strict=True):
        axis.imshow(strip, interpolation="lanczos")
        axis.set_title(label, fontsize=11, loc="left")
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(path)


def last_cycle(work: Path) -> int:
    """Number of the run's last cycle."""
    return len(read_json(work / "summary.json")["cycles"])


def main() -> None:
    """Run and publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/em_default"))
    work = parser.parse_args().work_dir
    if em(["--work_dir", str(work), "--compare_direct"]) != 0:
        raise SystemExit("the run failed")
    out = DOCS / "em_default"
    out.mkdir(parents=True, exist_ok=True)
    for name in ("summary.json", "report.html"):
        shutil.copyfile(work / name, out / name)
    write_table(read_json(work / "summary.json"), out / "README.md")
    draw_before_after(work, DOCS / "images" / "before_after.png")


if __name__ == "__main__":
    main()
