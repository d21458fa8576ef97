"""MNIST and CIFAR-10 as their authors publish them: small files with the same bytes around them."""

from __future__ import annotations

import gzip
import os
import pickle
import runpy
import shutil
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oneshot_fast.errors import DataError
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.recipes.toy.files import cifar10, mnist

Call = Callable[..., Any]
COUNT = 40


def idx(array: np.ndarray) -> bytes:
    """An IDX file of bytes."""
    return struct.pack(f">4B{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def batch(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    """A batch of CIFAR-10 in the opcodes of Python 2 and NumPy 1: protocol 2, texts as bytes.

    Today's pickle module cannot write the opcodes U and T.
    """
    count, length = len(labels), struct.pack("<i", pixels.nbytes)
    kept = b"".join(b"K%c" % int(label) for label in labels)
    names = b"".join(b"U\x0afrog_%d.png" % (k % 10) for k in range(count))
    return (
        (b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03" + b"U\x06labels")
        + (b"q\x04]q\x05(" + kept + b"eU\x04dataq\x06")
        + (b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87R")
        + (b"q\x09(K\x01K%cM\x00\x0c\x86cnumpy\ndtype\nq\x0aU\x02u1K\x00K\x01\x87Rq\x0b(" % count)
        + (b"K\x03U\x01|NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00tb\x89T" + length)
        + (pixels.tobytes() + b"tbU\x09filenamesq\x0c]q\x0d(" + names + b"eu.")
    )


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "grey": random.integers(0, 256, (COUNT, 28, 28), np.uint8),
        "colour": random.integers(0, 256, (COUNT, 3072), np.uint8),
        "labels": np.arange(COUNT, dtype=np.uint8) % 10,
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, np.ndarray]) -> Path:
    """A folder with small files in the formats of MNIST and CIFAR-10."""
    root = tmp_path_factory.mktemp("files")
    raw, batches = root / "MNIST" / "raw", root / "cifar-10-batches-py"
    raw.mkdir(parents=True)
    batches.mkdir()
    for kind, array in (("images-idx3", arrays["grey"]), ("labels-idx1", arrays["labels"])):
        (raw / f"train-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
        (raw / f"t10k-{kind}-ubyte").write_bytes(idx(array))
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        (batches / name).write_bytes(batch(arrays["colour"], arrays["labels"]))
    return root


@pytest.fixture
def root(tmp_path: Path, files: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(files, tmp_path / "root"))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_mnist(files: Path, arrays: dict[str, np.ndarray], split: str) -> None:
    data = mnist(split, files)
    assert data.images.shape == (COUNT, 3, 32, 32) and data.images.dtype == torch.float32
    inner = (data.images[:, :, 2:-2, 2:-2] * 255).round().byte().numpy()
    assert (inner == arrays["grey"][:, None]).all()
    assert data.images[:, :, :2].max() == 0
    assert data.labels.tolist() == arrays["labels"].tolist()
    assert data.prompts[3] == "a handwritten digit three"


def test_cifar10(files: Path, arrays: dict[str, np.ndarray]) -> None:
    data, heldout = cifar10("train", files), cifar10("heldout", files)
    assert len(data.images) == 5 * COUNT and len(heldout.images) == COUNT
    expected = arrays["colour"].reshape(COUNT, 3, 32, 32) / 255  # red, green, blue planes by rows
    np.testing.assert_allclose(heldout.images.numpy(), expected, atol=1e-7)
    assert heldout.labels.tolist() == arrays["labels"].tolist()
    assert data.prompts[:3] == ("a photo of an airplane", "a photo of an automobile",
                                "a photo of a bird")  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_batch_saved_again_is_read(
    root: Path, arrays: dict[str, np.ndarray], protocol: int
) -> None:
    path = root / "cifar-10-batches-py" / "test_batch"
    expected = cifar10("heldout", root)
    found = {b"data": arrays["colour"], b"labels": arrays["labels"].tolist()}
    path.write_bytes(pickle.dumps(found, protocol=protocol))
    assert torch.equal(cifar10("heldout", root).images, expected.images)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


LABELS = "MNIST/raw/t10k-labels-idx1-ubyte"
IMAGES = "MNIST/raw/t10k-images-idx3-ubyte.gz"
BATCH = "cifar-10-batches-py/test_batch"
DAMAGED = bytearray(gzip.compress(bytes(9999), mtime=0))
DAMAGED[12] ^= 255


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (BATCH, pickle.dumps(Evil()), "it asks for posix.mkdir"),
        (BATCH, pickle.dumps({b"data": 1}), "labels"),
        (BATCH, b"junk", "no batch of CIFAR-10"),
        (BATCH, None, "no such file.*folder that holds MNIST/raw or cifar-10-batches-py"),
        (IMAGES, b"junk", "Not a gzipped file"),
        (IMAGES, bytes(DAMAGED), "decompressing"),
        (IMAGES, gzip.compress(bytes(99), mtime=0), "no IDX file"),
        (IMAGES, gzip.compress(idx(np.zeros((COUNT, 27, 28), np.uint8)), mtime=0), "no IDX file"),
        (LABELS, b"", "no IDX file"),
        (LABELS, b"\0\0\x08\x01\0\0", "idx1-ubyte: is no IDX file"),
        (LABELS, idx(np.zeros(COUNT, np.uint8))[:-1], "cut off"),
        (LABELS, idx(np.full(COUNT, 10, np.uint8)), "labels that are not 0 to 9"),
        (LABELS, None, "no such file.*folder that holds MNIST/raw or cifar-10-batches-py"),
    ],
)
def test_broken_files_are_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | None, reason: str
) -> None:
    monkeypatch.chdir(root)
    if content is None:
        (root / name).unlink()
    else:
        (root / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        (cifar10 if name == BATCH else mnist)("heldout", root)
    assert not (root / "executed").exists()


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_train_on_files(files: Path, tmp_path: Path, call: Call, name: str) -> None:
    flags = f"--dataset {name} --data_root {files} --work_dir {tmp_path} --steps 2 --width 4"
    ended = call("toy", "train", *flags.split(), "--eval_samples", 20)
    assert ended.code == 0, ended.err
    assert load_generator(tmp_path / "train" / "model").image_size == 32


def test_drawn_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = str(Path(__file__).parents[2] / "tools" / "toy_files.py")
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path), "--count", "20"])
    runpy.run_path(script, run_name="__main__")
    grey, colour = mnist("train", tmp_path), cifar10("train", tmp_path)
    assert len(grey.images) == 120 and len(mnist("heldout", tmp_path).images) == 20
    assert len(colour.images) == 100 and len(cifar10("heldout", tmp_path).images) == 20
    assert grey.images[:, :, 0].max() == 0 and grey.images.amax((1, 2, 3)).min() > 0.9
    assert torch.equal(grey.images[:, 0], grey.images[:, 1])
    assert not torch.equal(colour.images[:, 0], colour.images[:, 1])


def test_what_a_gzip_unpacks_to_is_bounded_by_its_header(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for count in (2, 1 << 31):
        body = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28) + bytes(1 << 26)
        (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(body, 1))
        tracemalloc.start()
        with pytest.raises(DataError, match="is no IDX file"):
            mnist("train", tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
        tracemalloc.stop()
