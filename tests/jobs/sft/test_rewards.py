"""Training on rewards: the reward rises, the preserve loss holds, found images become targets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from samples import PROMPTS

from oneshot_fast.data.manifests import read_manifest
from oneshot_fast.data.noise_files import read_noise
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.sft.plan import training_memory
from oneshot_fast.jobs.sft.rewards import RewardRun
from oneshot_fast.report.rewards import draw_histories, history
from oneshot_fast.rewards import load_rewards
from oneshot_fast.runtime.seeds import gaussian
from oneshot_fast.training.batch import Batch, Rows
from oneshot_fast.training.losses.base import shared_losses, total

Call = Callable[..., Any]
SHORT: dict[str, Any] = {
    "epochs": 2, "batch_size": 4, "lr": 1e-4, "preserve_pool_size": 16,
    "preserve_pixel_weight": 0.0,
}  # fmt: skip
FLAGS = (
    "--model_id tiny --reward thickness:0.5 --judge digit --epochs 2 --images_per_prompt 8 "
    "--eval_samples 12 --preserve_pool_size 4 --save_minutes 0"
)


def train(folder: Path, reward: str = "thickness", **options: Any) -> list[dict[str, Any]]:
    run = RewardRun(
        load_generator("tiny", master_weights=True),
        PROMPTS,
        folder,
        SftOptions(**{**SHORT, **options}),
        rewards=load_rewards([reward]),
        judge=load_rewards(["digit"]),
        images_per_prompt=12,
        eval_samples=12,
    )
    run.run()
    return history(folder)


@pytest.fixture(scope="module")
def histories(tmp_path_factory: pytest.TempPathFactory) -> dict[float, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("runs")
    return {w: train(folder / f"{w}", preserve_latent_weight=w) for w in (0.0, 30.0)}


def test_the_reward_rises_and_everything_is_reported(
    histories: dict[float, list[dict[str, Any]]], tmp_path: Path, plots: None
) -> None:
    rows = histories[0.0]
    assert [row["epoch"] for row in rows] == [0, 1, 2] and rows[2]["step"] == 12
    assert rows[0]["drift"] == 0 and rows[0]["judge digit"] > -0.5
    assert rows[2]["reward"] > rows[0]["reward"] + 0.5
    assert rows[2]["drift"] > rows[1]["drift"] > 0
    assert {"reward", "thickness", "judge digit", "drift", "diversity"} <= rows[0].keys()
    draw_histories({"": rows}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_preserve_loss_holds_the_generator_back(
    histories: dict[float, list[dict[str, Any]]],
) -> None:
    free, held = histories[0.0][-1], histories[30.0][-1]
    assert held["drift"] < 0.7 * free["drift"] and held["reward"] < free["reward"]
    assert free["preserve"] == 0 < held["preserve"]


def test_what_is_measured_is_what_is_kept(tmp_path: Path) -> None:
    options = {"use_ema": True, "ema_decay": 0.5, "save_dtype": "float32"}  # not rounded
    rows = train(tmp_path / "run", epochs=1, **options)
    other = RewardRun(
        load_generator(tmp_path / "run" / "checkpoint-final", master_weights=True),
        PROMPTS,
        tmp_path / "other",
        SftOptions(**SHORT),
        rewards=load_rewards(["thickness"]),
        eval_samples=12,
        images_per_prompt=1,
    )
    found = other.run()["base"]
    assert found["thickness"] == pytest.approx(rows[-1]["thickness"], rel=1e-4)
    assert rows[-1]["thickness"] > rows[0]["thickness"] + 0.1


def test_gradient_is_the_rewards() -> None:
    """Against a difference quotient along the gradient, over two parts of a batch."""
    generator, rewards = load_generator("tiny"), load_rewards(["thickness"])
    options = SftOptions(preserve_latent_weight=0.1, preserve_pixel_weight=0.0)
    noise = gaussian(range(5), generator.noise_shape(64, 64))
    texts = [PROMPTS[k % 2] for k in range(5)]
    prompts, latents = generator.encode_prompts(texts), torch.zeros(2, *noise.shape[1:])
    batch = Batch(
        matching=Rows(noise[:3], prompts.select(slice(3)), {"texts": texts[:3]}),
        preserve=Rows(noise[3:], prompts.select(slice(3, None)), {"latents": latents}),
    )
    weight = generator.denoiser.conv_out.weight.requires_grad_(True)

    def loss() -> torch.Tensor:
        of_rewards = options.loss(rewards)
        return sum(
            (total(shared_losses(of_rewards, generator, part)) for part in batch.split(2)),
            torch.zeros(()),
        )

    with torch.no_grad():
        made = generator.latents(noise, prompts)
        score = rewards(generator.decode(made[:3]), texts[:3]).mean()
        kept = 0.1 * made[3:].square().mean()
    (gradient,) = torch.autograd.grad(loss(), weight)
    assert loss().item() == pytest.approx((kept - score).item(), rel=1e-4)
    step = 1e-4 * gradient / gradient.norm()
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            weight.add_(sign * step)
            ends.append(loss().item())
            weight.sub_(sign * step)
    assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(gradient.norm().item(), rel=0.05)


def test_a_killed_training_of_an_adapter_ends_the_same(
    tmp_path: Path, prompts: Path, forks: Any
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*FLAGS.split(), "--prompt_file", prompts, "--lora_rank", 4, "--lr", "5e-3"]
    flags += ["--output_dir"]
    assert forks.run("sft", [*flags, whole], whole).code == 0
    for place in ("epoch-001.json", "lora-final"):
        assert forks.run("sft", [*flags, parts], parts, at=place).code == -9
    ended = forks.run("sft", [*flags, parts], parts)
    assert ended.code == 0, ended.err
    assert "judge digit" in ended.out and "lora-final" in ended.out
    for name in (
        "lora-final/pytorch_lora_weights",
        "checkpoint-final/unet/diffusion_pytorch_model",
    ):
        old, new = (load_file(f / f"{name}.safetensors") for f in (whole, parts))
        assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
    assert (whole / "history.jsonl").read_bytes() == (parts / "history.jsonl").read_bytes()
    rows = history(whole)
    assert rows[-1]["reward"] > rows[0]["reward"] and rows[-1]["drift"] > 0
    page = (whole / "report.html").read_text()
    assert "judge digit, which was not trained on" in page and page.count("<img") == 2
    assert (whole / "curves.png").is_file()
    assert not list(parts.rglob(".tmp-*"))


@pytest.mark.parametrize("method", ["best_of_n", "sphere"])
def test_found_images_become_targets_of_their_base_noises(
    tmp_path: Path, call: Call, method: str
) -> None:
    folder = tmp_path / "run"
    flags = ["--model_id", "tiny", "--reward", "digit", "--output_dir", folder, "--num_images", 3]
    flags += ["--method", method, "--candidates", 3, "--steps", 2, "--batch_size", 2]
    named = [flag for prompt in PROMPTS for flag in ("--prompt", prompt)]
    ended = call("optimize", *flags, *named, "--num_images_per_prompt", 2)
    manifest = folder / "training" / "manifest.jsonl"
    assert ended.code == 0 and f"--manifest_path {manifest}" in ended.out
    pairs, failures = read_manifest(manifest)
    assert not failures and [pair.prompt for pair in pairs] == [PROMPTS[0], *PROMPTS]
    found, missing = read_manifest(folder / "manifest.jsonl")
    assert len(missing) == 1
    for pair, best in zip(pairs, found, strict=True):
        assert pair.image_path.resolve() == best.image_path.resolve()
    rows = [json.loads(line) for line in manifest.open()]
    for pair, row in zip(pairs, rows, strict=True):
        assert torch.equal(
            read_noise(pair.noise_path, pair.noise_index), gaussian([row["seed"]], (4, 8, 8))[0]
        )
    trained = call(
        "sft", "--manifest_path", manifest, "--model_id", "tiny", "--output_dir", tmp_path / "sft",
        "--epochs", 1, "--preserve_pool_size", 4,
    )  # fmt: skip
    assert trained.code == 0, trained.err


def test_without_images_there_is_nothing_to_train_on(tmp_path: Path, call: Call) -> None:
    flags = ["--model_id", "tiny", "--reward", "digit", "--method", "best_of_n", "--num_images", 0]
    ended = call("optimize", *flags, "--prompt", PROMPTS[0], "--output_dir", tmp_path / "run")
    assert ended.code == 0 and "manifest_path" not in ended.out
    assert not (tmp_path / "run" / "training").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--reward", "python:optimize_samples.darkness"], "rewards with a gradient"),
        (["--reward", "thickness", "--noise", "random"], "no targets"),
        (["--reward", "thickness", "--images_per_prompt", "0"], "images_per_prompt"),
        (["--reward", "thickness", "--eval_samples", "1"], "eval_samples"),
        (["--reward", "thickness", "--manifest_path", "x.jsonl"], "exclude each other"),
        (["--judge", "digit"], "give --reward"),
        (["--reward", "thickness", "--judge", "thickness:2"], "cannot judge"),
        (
            ["--reward", "thickness", "--checkpointing", "full", "--selective_checkpointing"],
            "give one",
        ),
    ],
)
def test_bad_input(
    tmp_path: Path, prompts: Path, call: Call, flags: list[str], message: str
) -> None:
    place = ("--model_id", "tiny", "--prompt_file", prompts, "--output_dir", tmp_path / "run")
    ended = call("sft", *place, *flags)
    assert ended.code == 2 and message in ended.error
    assert not (tmp_path / "run").exists()


def test_a_dry_run_knows_the_rewards(tmp_path: Path, prompts: Path, call: Call) -> None:
    own = "python:optimize_samples.contrast"
    flags = [*FLAGS.split(), "--reward", own, "--prompt_file", prompts, "--dry_run"]
    ended = call("sft", *flags, "--output_dir", tmp_path / "run")
    assert ended.code == 0 and not (tmp_path / "run").exists()
    assert f"weights of {own}" in ended.out and "for 16 images and 8 steps" in ended.out
    generator, rewards = load_generator("tiny"), load_rewards(["digit", "thickness"])
    options = SftOptions(preserve_pixel_weight=0.0)
    plain = training_memory(generator, options, 64)
    judged = training_memory(generator, options, 64, by_reward=(rewards, PROMPTS[0]))
    assert judged.weights.items() > plain.weights.items()
    assert judged.held["activations"] > 1.05 * plain.held["activations"]
    assert judged.peak > plain.peak
    # what is kept of a prompt has values: steps are timed with it
    kept = rewards.features(rewards.by_name["digit"], PROMPTS[:1])
    assert kept is not None and kept.isfinite().all()


def test_a_reward_needs_prompts(tmp_path: Path, call: Call) -> None:
    ended = call("sft", "--reward", "thickness", "--output_dir", tmp_path / "run")
    assert ended.code == 2 and "--prompt_file" in ended.error
