"""MNIST and CIFAR-10, read from the files that their authors publish."""

import _codecs
import gzip
import math
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from oneshot_fast.errors import DataError, one_line, refused
from oneshot_fast.recipes.toy.data import DIGIT_PROMPTS, LabelledImages

_CIFAR_CLASSES = (
    "an airplane", "an automobile", "a bird", "a cat", "a deer", "a dog", "a frog", "a horse",
    "a ship", "a truck",
)  # fmt: skip
_MOST = 1 << 20  # images of a file; MNIST has 60,000
_WANTED = "--data_root is the folder that holds MNIST/raw or cifar-10-batches-py, unpacked"


def mnist(split: str, root: Path) -> LabelledImages:
    """MNIST, white on black, padded to 32 x 32 pixels.

    Source: http://yann.lecun.com/exdb/mnist, LeCun, Cortes and Burges. ``root`` holds MNIST/raw
    with the four IDX files, each as .gz or unpacked.

    Raises:
        DataError: If a file is missing or broken.
    """
    name = "train" if split == "train" else "t10k"
    folder = root / "MNIST" / "raw"
    images = _read_idx(folder / f"{name}-images-idx3-ubyte.gz", (None, 28, 28))
    labels = _read_idx(folder / f"{name}-labels-idx1-ubyte.gz", (len(images),))
    grey = F.pad(images, (2, 2, 2, 2))[:, None].float().div_(255)
    return _checked(grey.expand(-1, 3, 32, 32), labels.long(), DIGIT_PROMPTS, folder)


def _read_idx(path: Path, shape: tuple[int | None, ...]) -> Tensor:
    """Bytes of an IDX file: 0, 0, type 8 (bytes), number of sizes, sizes as big-endian int32.

    A file without .gz serves, too; None is any size.
    """
    found = path if path.exists() else path.with_suffix("")
    start, values = 4 + 4 * len(shape), b""
    sizes: tuple[int, ...] = ()
    try:
        with gzip.open(found) if found == path else found.open("rb") as file:
            header = file.read(start)
            if header[:4] == bytes((0, 0, 8, len(shape))) and len(header) == start:
                sizes = struct.unpack(f">{len(shape)}I", header[4:])
                wanted = zip(shape, sizes, strict=True)
                if all(size == want or (want is None and size <= _MOST) for want, size in wanted):
                    values = file.read(math.prod(sizes) + 1)  # it may unpack to far more
    except FileNotFoundError:
        raise DataError(f"no such file: {path} ({_WANTED})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{found}: {one_line(error)}") from None
    if not sizes or len(values) != math.prod(sizes):
        raise DataError(f"{found}: is no IDX file of bytes of the right shape, or cut off")
    array = numpy.frombuffer(values, numpy.uint8)
    return torch.from_numpy(array.reshape(sizes).copy())  # a copy: the bytes are read-only


def cifar10(split: str, root: Path) -> LabelledImages:
    """CIFAR-10, 32 x 32 pixels; ``root`` holds cifar-10-batches-py.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html, Krizhevsky 2009.

    Raises:
        DataError: If a file is missing or broken.
    """
    folder = root / "cifar-10-batches-py"
    names = [f"data_batch_{k}" for k in range(1, 6)] if split == "train" else ["test_batch"]
    parts = [_read_batch(folder / name) for name in names]
    images = torch.cat([part[0] for part in parts]).float().div_(255)
    prompts = tuple(f"a photo of {name}" for name in _CIFAR_CLASSES)
    return _checked(images, torch.cat([part[1] for part in parts]), prompts, folder)


def _read_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] uint8 and labels [N] int64."""
    if not path.is_file():
        raise DataError(f"no such file: {path} ({_WANTED})")
    with refused(DataError, f"{path}: is no batch of CIFAR-10: "), path.open("rb") as file:
        found = _ArraysOnly(file, encoding="bytes").load()
        pixels, labels = numpy.asarray(found[b"data"]), found[b"labels"]
        images = torch.from_numpy(pixels.astype(numpy.uint8).reshape(len(labels), 3, 32, 32))
        return images, torch.tensor(labels, dtype=torch.int64)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays and plain values; a pickle that asks for anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        # the function that remakes an array has moved between NumPy's modules
        allowed = {
            "_reconstruct": numpy.empty(0).__reduce__()[0],
            "ndarray": numpy.ndarray,
            "dtype": numpy.dtype,
            "encode": _codecs.encode,
        }
        if module.split(".")[0] in ("numpy", "_codecs") and name in allowed:
            return allowed[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _checked(
    images: Tensor, labels: Tensor, prompts: tuple[str, ...], folder: Path
) -> LabelledImages:
    if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= len(prompts):
        raise DataError(f"{folder}: has labels that are not 0 to {len(prompts) - 1}")
    return LabelledImages(images, labels, prompts)
