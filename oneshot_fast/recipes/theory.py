"""What rotations do to the law of Gaussian noise, shown on samples."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from oneshot_fast import ops
from oneshot_fast.data.manifests import read_manifest
from oneshot_fast.data.noise_files import read_noise
from oneshot_fast.errors import DataError, UserError, require
from oneshot_fast.noise.rotation import towards
from oneshot_fast.noise.statistics import PatchStatistics
from oneshot_fast.runtime.tensor_files import read_pickle, read_safetensors

_GRID = 8  # patches per side of a drawn noise
_CHUNK = 1 << 20  # elements drawn at once


def drawn_sets(
    channels: int, p: int, count: int, rotations: Tensor, seed: int, *, chosen: bool
) -> dict[str, PatchStatistics]:
    """Statistics of drawn noises: as they are, and rotated.

    Args:
        channels: C of the noises.
        p: Patch side, latent pixels.
        count: Patches to draw, rounded up to noises of 8 x 8 patches.
        rotations: That know nothing of the noises, [K, D, D] float32; chunks take turns.
        seed: Of the noises, and of the pattern for ``chosen``.
        chosen: Whether to turn each noise towards one and the same pattern, too.
    """
    shape = channels, _GRID * p, _GRID * p
    pattern = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))
    names = ["base", "fixed rotation", *(["chosen rotation"] if chosen else [])]
    sets = {name: PatchStatistics(shape, p) for name in names}
    for k, eps in enumerate(_draw(shape, -(-count // _GRID**2), seed)):
        sets["base"].add(eps)
        sets["fixed rotation"].add(ops.patch_rotate(eps, rotations[k % len(rotations)], p))
        if chosen:
            q = towards(pattern, eps, p)
            sets["chosen rotation"].add(ops.patch_rotate(eps, q, p))
    return sets


def _draw(shape: Sequence[int], count: int, seed: int) -> Iterator[Tensor]:
    """``count`` Gaussian noises [b, C, H, W] float32, a chunk after the other."""
    draw = torch.Generator().manual_seed(seed)
    size = max(1, _CHUNK // torch.Size(shape).numel())
    for start in range(0, count, size):
        yield torch.randn(min(size, count - start), *shape, generator=draw)


def random_rotation(D: int, seed: int) -> Tensor:
    """An orthogonal matrix from the Haar measure, [D, D] float32.

    Source: Mezzadri 2007 (arXiv math-ph/0609050), by QR with the signs of R's diagonal.
    """
    draw = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64, generator=draw))
    return (q * r.diagonal().sign()).float()


def load_rotations(path: Path, D: int) -> Tensor:
    """Rotations [K, D, D] float32 of a safetensors or .pt file: its "q", or PatchRotation's "skew".

    Raises:
        UserError: If the file holds none, or of another size, or a matrix is not orthogonal.
    """
    require(path.is_file(), f"no such adapter: {path}")
    tensors = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    name = next((name for name in ("q", "skew") if name in tensors), None)
    if name is None:
        raise DataError(f'{path}: has no tensor "q" or "skew" but {", ".join(tensors) or "none"}')
    matrices = tensors[name].double()
    if matrices.shape[-2:] != (D, D):
        raise DataError(
            f"{path}: {name} is {list(matrices.shape)}; --channels and --patch_size make {D} x {D}"
        )
    matrices = matrices.reshape(-1, D, D)
    q = ops.skew_exp(matrices) if name == "skew" else matrices
    defect = (q @ q.mT - torch.eye(D, dtype=q.dtype)).abs().max().item()
    if not defect < 1e-3:
        raise DataError(f"{path}: its matrices are not orthogonal: q q^T is off I by {defect:.1e}")
    return q.float()


def manifest_set(path: Path, channels: int, p: int) -> PatchStatistics:
    """Statistics of the noises, of ``channels`` and patches of side ``p``, of a manifest.

    Raises:
        UserError: If a noise has another shape, or there are too few.
    """
    pairs, _ = read_manifest(path)
    statistics: PatchStatistics | None = None
    for pair in pairs:
        noise = read_noise(pair.noise_path, pair.noise_index)
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
