"""The small generators: data readers, the interface of a generator, and all commands on them."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from oneshot_fast import ops
from oneshot_fast.errors import DataError, ModelError, UserError
from oneshot_fast.evaluate import classifier_for
from oneshot_fast.loading import load_generator
from oneshot_fast.toy.data import LabelledImages, digits, shapes
from oneshot_fast.toy.files import cifar10, mnist
from oneshot_fast.toy.model import ToyGenerator
from oneshot_fast.toy.networks import ToyConfig, ToyNetwork
from oneshot_fast.toy.recipes import RECIPES

Call = Callable[..., Any]
COUNT = 40


def write_idx(path: Path, array: np.ndarray, cut: int = 0) -> None:
    """An IDX file of bytes, ``cut`` bytes short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
    body = (header + array.tobytes())[: -cut or None]
    path.write_bytes(gzip.compress(body) if path.suffix == ".gz" else body)


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "grey": random.integers(0, 256, (COUNT, 28, 28), np.uint8),
        "colour": random.integers(0, 256, (COUNT, 3072), np.uint8),
        "labels": np.arange(COUNT, dtype=np.uint8) % 10,
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, np.ndarray]) -> Path:
    """A folder with small files in the formats of MNIST and CIFAR-10."""
    root = tmp_path_factory.mktemp("root")
    for name, suffix in (("train", ".gz"), ("t10k", "")):
        write_idx(root / f"MNIST/raw/{name}-images-idx3-ubyte{suffix}", arrays["grey"])
        write_idx(root / f"MNIST/raw/{name}-labels-idx1-ubyte{suffix}", arrays["labels"])
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    batch = {b"data": arrays["colour"], b"labels": arrays["labels"].tolist()}
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a generator of digits that was hardly trained."""
    from oneshot_fast.toy.__main__ import main

    folder = tmp_path_factory.mktemp("toy")
    flags = f"train --work_dir {folder} --steps 20 --width 8 --eval_samples 40"
    assert main(flags.split()) == 0
    return folder


@pytest.fixture(scope="module")
def generator(trained: Path) -> ToyGenerator:
    return ToyGenerator.load(trained / "train" / "model")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_mnist(root: Path, arrays: dict[str, np.ndarray], split: str) -> None:
    data = mnist(split, root)
    assert data.images.shape == (COUNT, 3, 32, 32) and data.images.dtype == torch.float32
    inner = (data.images[:, :, 2:-2, 2:-2] * 255).round().byte().numpy()
    assert (inner == arrays["grey"][:, None]).all()
    assert data.images[:, :, :2].max() == 0
    assert data.labels.tolist() == arrays["labels"].tolist()
    assert data.prompts[3] == "a handwritten digit three"


def test_cifar10(root: Path, arrays: dict[str, np.ndarray]) -> None:
    data, heldout = cifar10("train", root), cifar10("heldout", root)
    assert len(data.images) == 5 * COUNT and len(heldout.images) == COUNT
    expected = arrays["colour"].reshape(COUNT, 3, 32, 32) / 255  # red, green, blue planes by rows
    np.testing.assert_allclose(heldout.images.numpy(), expected, atol=1e-7)
    assert heldout.labels.tolist() == arrays["labels"].tolist()
    assert data.prompts[:3] == ("a photo of an airplane", "a photo of an automobile",
                                "a photo of a bird")  # fmt: skip


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("cifar-10-batches-py/test_batch", pickle.dumps(Evil()), "it asks for posix.mkdir"),
        ("cifar-10-batches-py/test_batch", pickle.dumps({b"data": 1}), "labels"),
        ("cifar-10-batches-py/test_batch", b"junk", "no batch of CIFAR-10"),
        ("cifar-10-batches-py/test_batch", None, "no such file"),
        ("MNIST/raw/t10k-images-idx3-ubyte.gz", b"junk", "Not a gzipped file"),
        ("MNIST/raw/t10k-images-idx3-ubyte.gz", gzip.compress(bytes(99)), "no IDX file"),
        ("MNIST/raw/t10k-labels-idx1-ubyte", b"", "no IDX file"),
        ("MNIST/raw/t10k-labels-idx1-ubyte", None, "no such file"),
    ],
)
def test_broken_files_are_refused(
    tmp_path: Path,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes | None,
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in root.rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        (cifar10 if "cifar" in name else mnist)("heldout", tmp_path)
    assert not (tmp_path / "executed").exists()


def test_cut_and_mislabelled_files_are_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray]
) -> None:
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw / "train-labels-idx1-ubyte.gz", arrays["labels"])
    write_idx(raw / "train-images-idx3-ubyte.gz", arrays["grey"], cut=1)
    with pytest.raises(DataError, match="cut off"):
        mnist("train", tmp_path)
    write_idx(raw / "train-images-idx3-ubyte.gz", arrays["grey"])
    write_idx(raw / "train-labels-idx1-ubyte.gz", arrays["labels"] + 1)
    with pytest.raises(DataError, match="labels that are not 0 to 9"):
        mnist("train", tmp_path)


@pytest.mark.parametrize("read", [digits, lambda split: shapes(split, count=200)])
def test_data_in_the_repository(read: Callable[[str], LabelledImages]) -> None:
    train, again, heldout = read("train"), read("train"), read("heldout")
    assert torch.equal(train.images, again.images)
    assert train.images.min() >= 0 and train.images.max() <= 1
    assert set(train.labels.tolist()) == set(range(len(train.prompts)))
    assert not (heldout.images[:, None] == train.images[None, :50]).flatten(2).all(2).any()


def test_samples_are_disjoint_parts_of_one_order() -> None:
    data = digits("heldout")
    parts = [data.sample(150, start=start).images for start in (0, 150, 300)]
    assert [len(part) for part in parts] == [150, 150, 100]
    assert torch.equal(torch.cat(parts).sum(0), data.sample(400).images.sum(0))
    assert torch.equal(torch.cat(parts), data.sample(400).images)


@pytest.mark.parametrize("name", ["digits", "shapes", "mnist", "cifar10"])
def test_networks_have_the_sizes_of_their_data(name: Any) -> None:
    recipe, size = RECIPES[name], 16 if name in ("digits", "shapes") else 32
    network = ToyNetwork(ToyConfig(("a", "b"), size, recipe.noise_shape, 8))
    noise, classes = torch.randn(2, *recipe.noise_shape), torch.eye(2)
    image = network(noise, classes)
    assert image.shape == (2, 3, size, size) and image.abs().max() <= 1
    network.enable_gradient_checkpointing()
    again = network(noise.requires_grad_(), classes)
    assert torch.equal(again, image)
    assert torch.autograd.grad(again.sum(), noise)[0].abs().min() > 0


def test_the_step_gives_the_image(generator: ToyGenerator) -> None:
    eps = torch.randn(3, 64, 1, 1)
    prompts = generator.encode_prompts(["a handwritten digit three"] * 3)
    eps_hat, x = generator.predict(eps, prompts)
    target = torch.rand(3, 3, 16, 16) * 2 - 1
    loss = ops.latent_mse(eps_hat, x, target, generator.step.sigma)
    made = generator.latents(eps, prompts)
    torch.testing.assert_close(loss, (made - target).square().mean((1, 2, 3)))
    image = generator.decode(made)
    torch.testing.assert_close(generator.encode_image(image[0]), made[0])
    assert generator.latent_shape(16, 16) == (3, 16, 16) != generator.noise_shape(16, 16)
    with pytest.raises(UserError, match="16 x 16 pixels only"):
        generator.latent_shape(32, 32)
    with pytest.raises(UserError, match="knows only prompts like"):
        generator.encode_prompts(["a cat"])


def test_save_and_load(trained: Path, generator: ToyGenerator, tmp_path: Path) -> None:
    generator.save(tmp_path / "again")
    again = load_generator(tmp_path / "again")
    assert again.fingerprint() == generator.fingerprint()
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(again.classifier(images), generator.classifier(images))  # type: ignore
    with torch.no_grad():
        again.unet.last.bias.add_(1)
    assert again.fingerprint() != generator.fingerprint()
    again.load_unet(tmp_path / "again")
    assert again.fingerprint() == generator.fingerprint()
    (tmp_path / "again" / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match="cannot use small model"):
        load_generator(tmp_path / "again")
    with pytest.raises(ModelError, match="takes no --dtype"):
        load_generator(trained / "train" / "model", dtype=torch.bfloat16)


def test_the_classifier_comes_with_the_generator(generator: Any, tiny: Any) -> None:
    known = list(generator.config.prompts)
    assert classifier_for(generator, known) is generator.classifier
    assert generator.classifier.label_of(known[4]) == 4
    assert classifier_for(generator, ["a cat"]) is None
    judge = classifier_for(tiny, known)
    assert judge is not None and judge.label_of(known[4]) == 4


def test_train_resumes_and_refuses_other_settings(trained: Path, call: Call) -> None:
    summary = json.loads((trained / "train" / "summary.json").read_text())
    assert summary["generator"].keys() >= {"accuracy", "diversity", "frechet_distance"}
    assert summary["real images"]["frechet_distance"] < summary["generator"]["frechet_distance"]
    flags = ["train", "--work_dir", trained, "--width", 8, "--eval_samples", 40]
    before = (trained / "train" / "model" / "model.safetensors").stat().st_mtime_ns
    ended = call("toy.__main__", *flags, "--steps", 20)
    assert ended.code == 0 and "real images" in ended.out
    assert (trained / "train" / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert "steps: 20 then, 30 now" in call("toy.__main__", *flags, "--steps", 30).error


def test_assign_sft_and_direct_sft(trained: Path, call: Call) -> None:
    flags = ["--work_dir", trained, "--num_pairs", 12]
    ended = call("toy.__main__", "assign", *flags, "--steps", 3, "--assign_method", "rotation")
    assert ended.code == 0, ended.err
    rows = [json.loads(s) for s in (trained / "assign/manifest.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and all(row["best_loss"] <= row["initial_loss"] for row in rows)
    found = load_file(trained / "assign" / rows[0]["noise_path"])
    assert found["z"].shape == (12, 64, 1, 1) and found["q"].shape == (12, 64, 64)
    ended = call("toy.__main__", "sft", *flags, "--dry_run")
    assert "parameters of unet" in ended.out and "parameters of vae" not in ended.out
    epochs = ["--epochs", 2, "--preserve_pool_size", 8]
    for name in ("sft", "direct_sft"):
        ended = call("toy.__main__", name, *flags, *epochs)
        assert ended.code == 0, ended.err
        assert (trained / name / "report.html").is_file()
    assert all(name in ended.out for name in ("base", "sft", "direct_sft", "real images"))
    kept = {name: json.loads((trained / name / "run.json").read_text()) for name in ("sft",
            "direct_sft")}  # fmt: skip
    assert kept["sft"]["noise"] == "matched" and kept["direct_sft"]["noise"] == "random"
    found = json.loads((trained / "comparison" / "comparison.json").read_text())
    assert found["base"]["drift"] == 0 < found["sft"]["drift"]
    assert found["sft"] != found["direct_sft"]


def test_em_on_the_test_split(trained: Path, call: Call) -> None:
    flags = (
        "--num_pairs 8 --num_heldout 6 --eval_samples 20 --num_cycles 1 --assign_steps 2 "
        "--train_epochs 1 --preserve_pool_size 8 --test_split"
    )
    ended = call("toy.__main__", "em", "--work_dir", trained, *flags.split(), "--dry_run")
    assert ended.code == 0 and "parameters of unet" in ended.out
    ended = call("toy.__main__", "em", "--work_dir", trained, *flags.split())
    assert ended.code == 0, ended.err
    prompts = []
    for name in ("test-0-8", "test-8-14"):
        lines = (trained / "data" / name / "pairs.jsonl").read_text().splitlines()
        prompts += [json.loads(line)["prompt"] for line in lines]
    labels = digits("heldout").sample(14).labels.tolist()
    assert [digits("heldout").prompts[k] for k in labels] == prompts
    summary = json.loads((trained / "em" / "summary.json").read_text())
    assert summary["heldout"]["samples"] == 6
    assert "accuracy" in summary["random_noise"]["final"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--dataset", "mnist"], "give --data_root DIR"),
        (["assign"], "train it first: python -m oneshot_fast.toy train --dataset digits"),
        (["train", "--steps", "0"], "must be at least 1"),
        (["sft"], "assign first: python -m oneshot_fast.toy assign --dataset digits"),
        ([], "Expected one of {train, assign, sft, direct_sft, em}"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call, argv: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = call("toy.__main__", *argv)
    assert ended.code == 2 and message in ended.error


def test_options_that_do_not_apply_are_refused(trained: Path, data: Path, call: Call) -> None:
    flags = ["--model_id", trained / "train" / "model", "--data_root", data, "--output_dir", data]
    assert "has no decoder" in call("assign", *flags, "--decoder_tiling", 32).error
    assert "not compiled" in call("assign", *flags, "--compile").error


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_train_on_files(root: Path, tmp_path: Path, call: Call, name: str) -> None:
    flags = f"--dataset {name} --data_root {root} --work_dir {tmp_path} --steps 2 --width 4"
    ended = call("toy.__main__", "train", *flags.split(), "--eval_samples", 20)
    assert ended.code == 0, ended.err
    assert load_generator(tmp_path / "train" / "model").image_size == 32
