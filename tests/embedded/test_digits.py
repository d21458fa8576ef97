"""The packaged digits and the data set that is drawn from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from oneshot_fast.embedded import digits as dataset


def read_pairs(folder: Path) -> list[dict[str, str]]:
    lines = (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_default_dataset_is_complete_disjoint_balanced_and_deterministic(tmp_path):
    dataset.write_default_dataset(tmp_path / "a")
    dataset.write_default_dataset(tmp_path / "b")
    seen: dict[str, set[bytes]] = {}
    for split, least in (("train", 96), ("heldout", 48)):
        pairs = read_pairs(tmp_path / "a" / split)
        assert len(pairs) >= least
        assert pairs == read_pairs(tmp_path / "b" / split)
        counts = np.bincount([dataset.digit_of(pair["prompt"]) for pair in pairs], minlength=10)
        assert counts.max() - counts.min() <= 1
        seen[split] = set()
        for pair in pairs:
            path = tmp_path / "a" / split / pair["image"]
            assert path.read_bytes() == (tmp_path / "b" / split / pair["image"]).read_bytes()
            with Image.open(path) as image:
                assert (image.size, image.mode) == ((64, 64), "RGB")
            seen[split].add(path.read_bytes())
        assert len(seen[split]) == len(pairs)
    assert not seen["train"] & seen["heldout"]


def test_default_dataset_keeps_what_is_there_and_refuses_a_foreign_folder(tmp_path):
    dataset.write_default_dataset(tmp_path)
    pairs = tmp_path / "train" / "pairs.jsonl"
    stamp = pairs.stat().st_mtime_ns
    dataset.write_default_dataset(tmp_path)
    assert pairs.stat().st_mtime_ns == stamp
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heldout", "train"]

    foreign = tmp_path / "foreign"
    (foreign / "train").mkdir(parents=True)
    (foreign / "train" / "mine.txt").write_text("mine")
    with pytest.raises(OSError, match="train"):
        dataset.write_default_dataset(foreign)
    assert [path.name for path in foreign.iterdir()] == ["train"]


def test_packaged_digits_are_those_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.datasets").load_digits()
    parts = [dataset.load_digits(split) for split in ("train", "heldout")]
    images, labels = (torch.cat(both) for both in zip(*parts, strict=True))
    assert np.array_equal(images.numpy() * 16, sklearn.images)
    assert np.array_equal(labels.numpy(), sklearn.target)


def test_no_writer_is_both_in_training_and_held_out():
    train, _ = dataset.load_digits("train")
    heldout, _ = dataset.load_digits("heldout")
    assert (len(train), len(heldout)) == (1397, 400)
    with pytest.raises(KeyError, match="test"):
        dataset.load_digits("test")


@pytest.mark.parametrize(
    ("prompt", "digit"),
    [
        ("a handwritten digit three", 3),
        ("A Handwritten Digit THREE.", 3),
        ("the number 7", 7),
        ("three or four", None),
        ("someone is often alone", None),
        ("42", None),
        ("", None),
    ],
)
def test_digit_of(prompt, digit):
    assert dataset.digit_of(prompt) == digit
