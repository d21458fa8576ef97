"""Command line: a fixed rotation keeps Gaussian noise Gaussian, a chosen one need not."""

import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oneshot_fast.cli import OK, public, run_command
from oneshot_fast.errors import require


@dataclass(frozen=True)
class TheoryCommand:
    """Show on samples what rotations do to the law of Gaussian noise.

    A rotation fixed beforehand keeps it. One that is chosen with the noise in view need not: a data
    set of assigned noises (--manifest_path) shows how far it departs; without one, rotations that
    turn each noise towards one and the same pattern do.
    """

    output_dir: Path = Path("runs/theory")
    """Folder of theory.json, theory.png and report.html."""
    channels: int = 4
    """Latent channels C."""
    patch_size: int = 2
    """Patch side p in latent pixels; a rotation acts on D = C p p elements."""
    num_samples: int = 65536
    """Patches to draw, rounded up to noises of 8 x 8 patches."""
    manifest_path: Path | None = None
    """manifest.jsonl of assigned or optimised noises, to test them, too."""
    adapter: Path | None = None
    """Saved rotation: safetensors or .pt with orthogonal "q" or unconstrained "skew" [..., D, D];
    of several, noises take turns. By default one is drawn at random."""
    seed: int = 0
    """Seed of all samples."""


def execute(command: TheoryCommand) -> int:
    """Run the command; see ``run_command`` for exit codes."""
    require(command.channels >= 1, f"channels is {command.channels}; give at least 1")
    require(command.patch_size >= 1, f"patch_size is {command.patch_size}; give at least 1")
    D = command.channels * command.patch_size**2
    require(D <= 1024, f"a patch has {D} elements; at most 1024 are supported")
    require(
        command.num_samples >= 10 * D,
        f"num_samples is {command.num_samples}; a covariance of {D} elements needs {10 * D}",
    )

    from oneshot_fast.report.theory import write_theory_report
    from oneshot_fast.runtime.files import write_json

    found = measure(command)
    command.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(command.output_dir / "theory.json", found)
    write_theory_report(command.output_dir, found)
    for name, part in found["sets"].items():
        outside = [check["name"] for check in part["checks"] if not check["ok"]]
        verdict = f"outside: {', '.join(outside)}" if outside else "all checks within"
        print(f"{name}: {part['patches']} patches, KL {part['kl']:.2e} nats a patch; {verdict}")
    print(f"report: {command.output_dir / 'report.html'}")
    return OK


def measure(command: TheoryCommand) -> dict[str, Any]:
    """Statistics of drawn, rotated and chosen noises, as theory.json keeps them."""
    from oneshot_fast.recipes import theory

    started = time.perf_counter()
    C, p, manifest = command.channels, command.patch_size, command.manifest_path
    D, seed = C * p * p, command.seed
    if command.adapter is None:
        rotations = theory.random_rotation(D, seed + 2)[None]
    else:
        rotations = theory.load_rotations(command.adapter, D)
    sets = theory.drawn_sets(C, p, command.num_samples, rotations, seed, chosen=manifest is None)
    drawn = time.perf_counter() - started
    if manifest is not None:
        sets["assigned noises"] = theory.manifest_set(manifest, C, p)
    return {
        "settings": public(command),
        "rotations": len(rotations),
        "seconds": round(drawn, 3),
        "sets": {name: statistics.result() for name, statistics in sets.items()},
    }


main = functools.partial(run_command, "theory", TheoryCommand, execute)

if __name__ == "__main__":
    sys.exit(main())
