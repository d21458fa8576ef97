"""Command line: a fixed rotation keeps Gaussian noise Gaussian, a chosen one need not."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oneshot_fast.cli import OK, run_command
from oneshot_fast.errors import DataError, UserError, require

if TYPE_CHECKING:
    from torch import Tensor

_GRID = 8  # patches per side of a drawn noise
_CHUNK = 1 << 20  # elements drawn at once
OUTPUTS = ("theory.json", "theory.png", "report.html")


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
    from oneshot_fast import ops
    from oneshot_fast.noise.statistics import PatchStatistics

    started = time.perf_counter()
    p, shape = command.patch_size, _drawn_shape(command)
    rotations, pattern = _rotations(command), _pattern(command)
    names = ["base", "fixed rotation", *(() if command.manifest_path else ("chosen rotation",))]
    sets = {name: PatchStatistics(shape, p) for name in names}
    for k, eps in enumerate(_draw(command)):
        sets["base"].add(eps)
        sets["fixed rotation"].add(ops.patch_rotate(eps, rotations[k % len(rotations)], p))
        if "chosen rotation" in sets:
            q = towards(pattern, eps, p)
            sets["chosen rotation"].add(ops.patch_rotate(eps, q, p))
    drawn = time.perf_counter() - started
    if command.manifest_path is not None:
        sets["assigned noises"] = _assigned(command.manifest_path, command.channels, p)
    settings = dataclasses.asdict(command)
    return {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()},
        "rotations": len(rotations),
        "seconds": round(drawn, 3),
        "sets": {name: statistics.result() for name, statistics in sets.items()},
    }


def towards(pattern: Tensor, eps: Tensor, p: int) -> Tensor:
    """Orthogonal matrices that turn the patches of each noise closest to those of ``pattern``.

    The orthogonal Procrustes problem: with sum t e^T = U S V^T over the patches, q = U V^T.
    Source: Schoenemann 1966, A generalized solution of the orthogonal Procrustes problem.

    Args:
        pattern: [C, H, W] float32.
        eps: Noises, [B, C, H, W] float32.
        p: Patch side, latent pixels.

    Returns:
        q, [B, D, D] float32.
    """
    import torch

    from oneshot_fast import ops

    sums = ops.patch_outer(pattern.expand_as(eps).contiguous(), eps, p, (len(eps),))
    left, _, right = torch.linalg.svd(sums)
    return left @ right


def _drawn_shape(command: TheoryCommand) -> tuple[int, int, int]:
    side = _GRID * command.patch_size
    return command.channels, side, side


def _draw(command: TheoryCommand) -> Iterator[Tensor]:
    """Gaussian noises [b, C, 8 p, 8 p] float32, a chunk after the other."""
    import torch

    source = torch.Generator().manual_seed(command.seed)
    shape = _drawn_shape(command)
    left = -(-command.num_samples // _GRID**2)
    size = max(1, _CHUNK // (shape[0] * shape[1] * shape[2]))
    while left:
        count = min(size, left)
        yield torch.randn(count, *shape, generator=source)
        left -= count


def _pattern(command: TheoryCommand) -> Tensor:
    import torch

    return torch.randn(
        _drawn_shape(command), generator=torch.Generator().manual_seed(command.seed + 1)
    )


def _rotations(command: TheoryCommand) -> Tensor:
    """The fixed rotations, [K, D, D] float32: the adapter's, or one from the Haar measure.

    Source: Mezzadri 2007 (arXiv math-ph/0609050), by QR with the signs of R's diagonal.
    """
    import torch

    D = command.channels * command.patch_size**2
    if command.adapter is not None:
        return load_rotations(command.adapter, D)
    source = torch.Generator().manual_seed(command.seed + 2)
    square = torch.randn(D, D, dtype=torch.float64, generator=source)
    q, r = torch.linalg.qr(square)
    return (q * r.diagonal().sign())[None].float()


def load_rotations(path: Path, D: int) -> Tensor:
    """Saved rotations, [K, D, D] float32.

    Args:
        path: safetensors or .pt file with "q", or with "skew" of ``rotation.PatchRotation``.
        D: Elements of a patch.

    Raises:
        UserError: If the file holds none, or of another size, or a matrix is not orthogonal.
    """
    import torch

    from oneshot_fast import ops
    from oneshot_fast.runtime.tensor_files import read_pickle, read_safetensors

    require(path.is_file(), f"no such adapter: {path}")
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    name = next((name for name in ("q", "skew") if name in tensors), None)
    if name is None:
        raise DataError(f'{path}: has no tensor "q" or "skew" but {", ".join(tensors) or "none"}')
    found = tensors[name].double()
    if found.shape[-2:] != (D, D):
        raise DataError(
            f"{path}: {name} is {list(found.shape)}; --channels and --patch_size make {D} x {D}"
        )
    found = found.reshape(-1, D, D)
    q = ops.skew_exp(found) if name == "skew" else found
    defect = (q @ q.mT - torch.eye(D, dtype=q.dtype)).abs().max().item()
    if not defect < 1e-3:
        raise DataError(f"{path}: its matrices are not orthogonal: q q^T is off I by {defect:.1e}")
    return q.float()


def _assigned(path: Path, channels: int, p: int) -> Any:
    """Statistics of the noises of a manifest, read one after the other."""
    from oneshot_fast.data.manifests import load_noise
    from oneshot_fast.data.pairs import read_manifest
    from oneshot_fast.noise.statistics import PatchStatistics

    pairs, _ = read_manifest(path)
    statistics: PatchStatistics | None = None
    for pair in pairs:
        noise = load_noise(pair)
        C, H, W = noise.shape
        if channels != C or H % p or W % p:
            raise UserError(
                f"{path}: noise {pair.id} is {C} x {H} x {W}; --channels {channels} "
                f"--patch_size {p} do not fit it"
            )
        statistics = statistics or PatchStatistics(noise.shape, p)
        if noise.shape != statistics.shape:
            raise UserError(f"{path}: noise {pair.id} is {C} x {H} x {W}, others are not")
        statistics.add(noise[None])
    assert statistics is not None
    vectors, D = statistics.vectors, statistics.D
    require(vectors > D, f"{path}: {vectors} patches are too few for a covariance of {D} elements")
    return statistics


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m oneshot_fast.theory``."""
    return run_command("theory", TheoryCommand, execute, argv)


if __name__ == "__main__":
    sys.exit(main())
