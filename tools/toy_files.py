"""Write drawn digits as files of MNIST and CIFAR-10: the small generators' commands without data.

``python tools/toy_files.py FOLDER`` writes FOLDER/MNIST/raw and FOLDER/cifar-10-batches-py with as
many images as the originals have: white strokes on black, and strokes of any colour on any ground.
"""

from __future__ import annotations

import argparse
import gzip
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from oneshot_fast.embedded.digits import load_digits, random_affine, random_style, render

Draw = Callable[[Tensor, torch.Generator], Tensor]


def white_on_black(digits: Tensor, draw: torch.Generator) -> Tensor:
    """Images [B, 28, 28] in [0, 1] of grey levels [B, 8, 8]."""
    padded = F.pad(digits[:, None], (2, 2, 2, 2))
    maps = random_affine(len(digits), 0.7, draw)
    grid = F.affine_grid(maps, [len(digits), 1, 28, 28], align_corners=False)
    grey = F.grid_sample(padded, grid, mode="bicubic", align_corners=False)
    return torch.sigmoid(14 * (grey - 0.35))[:, 0] - 3 / 255


def coloured(digits: Tensor, draw: torch.Generator) -> Tensor:
    """Images [B, 3, 32, 32] in [0, 1] RGB of grey levels [B, 8, 8]."""
    style = random_style(len(digits), draw)
    return F.avg_pool2d(render(digits, style, random_affine(len(digits), 0.7, draw)), 2)


def images(
    how: Draw, split: str, count: int, seed: int, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of ``count`` images of moved digits of a split, and their labels.

    Args:
        how: What draws them.
        split: "train" or "heldout".
        count: Number of images.
        seed: Of the choice of digits and the drawing.
        block: Images drawn at once.
    """
    digits, labels = load_digits(split)
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(digits), (count,), generator=draw)
    parts = [how(part, draw) for part in digits[chosen].split(block)]
    values = (torch.cat(parts) * 255).clamp(0, 255).round().byte()
    return values.numpy(), labels[chosen].byte().numpy()


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write bytes as a gzipped IDX file."""
    header = struct.pack(f">4B{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), 6, mtime=0))


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=10_000, help="images per test set")
    arguments = parser.parse_args()
    count = arguments.count
    raw, batches = arguments.folder / "MNIST" / "raw", arguments.folder / "cifar-10-batches-py"
    raw.mkdir(parents=True, exist_ok=True)
    batches.mkdir(exist_ok=True)
    for seed, (name, split, size) in enumerate(
        [("train", "train", 6 * count), ("t10k", "heldout", count)]
    ):
        pixels, labels = images(white_on_black, split, size, seed, 2000)
        write_idx(raw / f"{name}-images-idx3-ubyte.gz", pixels)
        write_idx(raw / f"{name}-labels-idx1-ubyte.gz", labels)
    for k in range(6):
        name, split = (f"data_batch_{k + 1}", "train") if k < 5 else ("test_batch", "heldout")
        pixels, labels = images(coloured, split, count, 10 + k, 500)
        found = {b"data": pixels.reshape(count, 3072), b"labels": labels.tolist()}
        (batches / name).write_bytes(pickle.dumps(found, protocol=2))


if __name__ == "__main__":
    main()
