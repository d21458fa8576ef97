"""The small generators: their data, the interface of a generator, and all commands on them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from oneshot_fast import ops
from oneshot_fast.errors import ModelError, UserError
from oneshot_fast.evaluation.random_noise import classifier_for
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.generators.toy import ToyGenerator
from oneshot_fast.generators.toy_networks import ToyConfig, ToyNetwork
from oneshot_fast.recipes.toy.commands import PairOptions, SftToyCommand
from oneshot_fast.recipes.toy.critics import Critic, HingeCritic, LogisticCritic
from oneshot_fast.recipes.toy.data import LabelledImages, digits, shapes
from oneshot_fast.recipes.toy.datasets import RECIPES
from oneshot_fast.sft import SftCommand

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a generator of digits that was hardly trained."""
    from oneshot_fast.toy import main

    folder = tmp_path_factory.mktemp("toy")
    flags = f"train --work_dir {folder} --steps 20 --width 8 --eval_samples 40"
    assert main(flags.split()) == 0
    return folder


@pytest.fixture(scope="module")
def generator(trained: Path) -> ToyGenerator:
    return ToyGenerator.load(trained / "train" / "model")


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


@pytest.mark.parametrize("kind", [HingeCritic, LogisticCritic])
def test_critics_learn_to_tell_real_from_made(kind: type[Critic]) -> None:
    torch.manual_seed(0)
    data, critic = digits("heldout").sample(40), kind(10, 16, 8)
    real, classes = data.images * 2 - 1, torch.eye(10)[data.labels]
    made = real.flip(-1)
    optimizer = torch.optim.Adam(critic.parameters(), 2e-3)
    for step in range(60):
        optimizer.zero_grad()
        critic.loss(real, made, classes, step).backward()
        optimizer.step()
    assert (critic(real, classes) > critic(made, classes)).float().mean() > 0.9
    assert critic.generator_loss(real, classes) < critic.generator_loss(made, classes)


def test_the_penalty_is_the_squared_gradient_per_image() -> None:
    torch.manual_seed(0)
    critic, classes = LogisticCritic(2, 16, 8, penalty=3.0).double(), torch.eye(2).double()
    real, made = torch.randn(2, 2, 3, 16, 16, dtype=torch.float64)
    slopes = []
    for k in range(2):
        x = real[k : k + 1].clone().requires_grad_()
        slopes += [torch.autograd.grad(critic(x, classes[k : k + 1]), x)[0].square().sum()]
    losses = [critic.loss(real, made, classes, step) for step in (0, 1)]
    expected = 8 * 3.0 / 2 * torch.stack(slopes).mean()
    torch.testing.assert_close(losses[0] - losses[1], expected)
    losses[0].backward()
    assert critic.head.weight.grad.abs().min() > 0


def test_the_step_gives_the_image(generator: ToyGenerator) -> None:
    eps = torch.randn(3, 64, 1, 1)
    prompts = generator.encode_prompts(["a handwritten digit three"] * 3)
    prediction = generator.predict(eps, prompts)
    target = torch.rand(3, 3, 16, 16) * 2 - 1
    loss = ops.latent_mse(prediction.output, prediction.x, target, prediction.sigma)
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
        again.denoiser.last.bias.add_(1)
    assert again.fingerprint() != generator.fingerprint()
    again.load_weights(tmp_path / "again")
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
    ended = call("toy", *flags, "--steps", 20)
    assert ended.code == 0 and "real images" in ended.out
    assert (trained / "train" / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert "steps: 20 then, 30 now" in call("toy", *flags, "--steps", 30).error


def test_assign_sft_and_direct_sft(trained: Path, call: Call) -> None:
    flags = ["--work_dir", trained, "--num_pairs", 12]
    ended = call("toy", "assign", *flags, "--steps", 3, "--assign_method", "rotation")
    assert ended.code == 0, ended.err
    rows = [json.loads(s) for s in (trained / "assign/manifest.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and all(row["best_loss"] <= row["initial_loss"] for row in rows)
    found = load_file(trained / "assign" / rows[0]["noise_path"])
    assert found["z"].shape == (12, 64, 1, 1) and found["q"].shape == (12, 64, 64)
    ended = call("toy", "sft", *flags, "--dry_run")
    assert "parameters of unet" in ended.out and "parameters of vae" not in ended.out
    epochs, mine = ["--epochs", 2, "--preserve_pool_size", 8], trained / "comparison" / "mine.txt"
    mine.parent.mkdir()
    mine.touch()
    for name in ("sft", "direct_sft"):
        ended = call("toy", name, *flags, *epochs)
        assert ended.code == 0, ended.err
        assert (trained / name / "report.html").is_file()
    assert all(name in ended.out for name in ("base", "sft", "direct_sft", "real images"))
    kept = {name: json.loads((trained / name / "run.json").read_text()) for name in ("sft",
            "direct_sft")}  # fmt: skip
    assert kept["sft"]["noise"] == "matched" and kept["direct_sft"]["noise"] == "random"
    found = json.loads((trained / "comparison" / "comparison.json").read_text())
    assert found["base"]["drift"] == 0 < found["sft"]["drift"]
    assert found["sft"] != found["direct_sft"] and mine.exists()


def test_what_toy_sft_has_is_what_sft_has() -> None:
    own, shared, given = (
        {field.name for field in dataclasses.fields(kind)}
        for kind in (SftToyCommand, PairOptions, SftCommand)
    )
    assert "keep" in own and own - shared <= given


def test_em_on_the_test_split(trained: Path, call: Call) -> None:
    flags = (
        "--num_pairs 8 --num_heldout 6 --eval_samples 20 --num_cycles 1 --assign_steps 2 "
        "--train_epochs 1 --preserve_pool_size 8 --test_split"
    )
    ended = call("toy", "em", "--work_dir", trained, *flags.split(), "--dry_run")
    assert ended.code == 0 and "parameters of unet" in ended.out
    ended = call("toy", "em", "--work_dir", trained, *flags.split())
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
    ended = call("toy", *argv)
    assert ended.code == 2 and message in ended.error


def test_options_that_do_not_apply_are_refused(trained: Path, data: Path, call: Call) -> None:
    flags = ["--model_id", trained / "train" / "model", "--data_root", data, "--output_dir", data]
    assert "has no decoder" in call("assign", *flags, "--decoder_tiling", 32).error
    assert "not compiled" in call("assign", *flags, "--compile").error
