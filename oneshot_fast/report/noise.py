"""The report's section on the noises: is z still Gaussian?"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from oneshot_fast.noise.checks import LEVEL
from oneshot_fast.noise.diagnose import diagnose
from oneshot_fast.report import plots
from oneshot_fast.report.page import Cell, Plot, Row, Section, Table, number
from oneshot_fast.runtime.files import Json

_STORED = ("stored noise", "stored rotations")


def noise_section(folder: Path, of: str = "") -> Section | None:
    """Diagnostics of the assign run in ``folder``, measured anew; None if its noises are gone."""
    if not (folder / "manifest.jsonl").is_file() or not (folder / "noises").is_dir():
        return None
    found = diagnose(folder)
    table = checks_table(found["checks"])
    return Section(
        f"Is the assigned noise{of} still Gaussian?", _verdict(found), table, plots=_plots(found)
    )


def checks_table(checks: Sequence[Json]) -> Table:
    """Rows of ``Check``: what was measured beside what Gaussian noise allows."""
    rows = [
        Row(
            check["name"],
            [
                Cell(number(check["value"])),
                Cell(f"{number(check['low'])} to {number(check['high'])}"),
                Cell(number(check["p_value"]) if "p_value" in check else ""),
                Cell("within", "good") if check["ok"] else Cell("outside", "bad"),
            ],
            words=check["meaning"],
        )
        for check in checks
    ]
    allowed = f"allowed in {100 * (1 - LEVEL):g} % of cases"
    return Table(("", "measured", allowed, "p-value", "verdict"), rows, dense=True)


def _verdict(found: dict[str, Any]) -> list[str]:
    failed = [check["name"] for check in found["checks"] if not check["ok"]]
    damaged = [name for name in failed if name in _STORED]
    outside = [name for name in failed if name not in _STORED]
    count = len(found["checks"]) - len(_STORED)
    law = (
        f"{found['targets']} noises of {found['elements']} elements. Independent Gaussian noise of "
        f"this amount stays in each allowed range in {100 * (1 - LEVEL):g} % of cases."
    )
    if found["other_sizes"]:
        law += f" {found['other_sizes']} noises of other sizes are not among them."
    lines = [law]
    if damaged:
        lines.append(
            f"Damaged: {', '.join(damaged)}. These noises were not made from their base "
            "noises; do not train on them."
        )
    if not outside:
        lines.append(
            f"All {count} checks of the distribution are within what sampling noise allows."
        )
        return lines
    lines.append(
        f"Outside what sampling noise allows: {', '.join(outside)} ({len(outside)} of {count} "
        "checks). Each noise was chosen with its target in view, so together they need not pass as "
        "independent samples. What they have in common, a generator can learn to expect; whether "
        "that matters shows on random noise."
    )
    return lines


def _plots(found: dict[str, Any]) -> list[Plot]:
    checks = {check["name"]: check for check in found["checks"]}
    spectrum, base = found["eigenvalues"]["z"], found["moments"]["base"]
    angle = statistics.fmean(found["angles"])
    return [
        Plot(
            plots.eigenvalues(found["eigenvalues"]),
            "Variance of the patches along their principal directions, all targets together. Bad: "
            "the blue line leaves the band, so the noises share a preferred direction. Here "
            f"{number(spectrum[-1])} to {number(spectrum[0])}: "
            f"{_word(checks['patch covariance'])}.",
        ),
        Plot(
            plots.mean_shift(torch.tensor(found["mean_shift"])),
            "Mean of all noises at each latent pixel. Bad: a visible shape, which all noises "
            f"share; Gaussian noise shows only speckle. Here RMS "
            f"{checks['mean noise']['value']:.2f} standard errors (about 1 expected): "
            f"{_word(checks['mean noise'])}.",
        ),
        Plot(
            plots.norms(found["norms"], found["elements"]),
            "Energy of each noise. No method changes it, so it follows the base noise's law; bad: "
            f"a shift or a wider spread. Here: {_word(checks['norms'])}. Variance "
            f"{found['moments']['z']['variance']:.4f}, base noise {base['variance']:.4f}.",
        ),
        Plot(
            plots.angles(found["angles"]),
            f"How far the noises were turned, {angle:.0f} degrees on average. Chosen noises are "
            "not turned at all. Where gradients move them, bad is all near 0 (they hardly moved: "
            "raise lr); at the dashed line nothing of the base noise is left.",
        ),
    ]


def _word(check: dict[str, Any]) -> str:
    return "within what sampling noise allows" if check["ok"] else "outside the allowed range"
