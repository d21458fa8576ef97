"""Losses from outside the package, more than one trainee, and averages of weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from oneshot_fast.data.manifests import read_manifest
from oneshot_fast.errors import RunError
from oneshot_fast.generators.base import Conditioning, Generator, Prediction
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.sft.run import SftRun
from oneshot_fast.training.batch import Batch, Rows
from oneshot_fast.training.losses.base import OneStepLoss, shared_losses, total
from oneshot_fast.training.trainer import Trainer

FREE: dict[str, Any] = {
    "batch_size": 4, "preserve_latent_weight": 0.0, "preserve_pixel_weight": 0.0,
}  # fmt: skip


class Brightness:
    """Makes images bright: a loss that evaluates the generator itself."""

    parts = ("brightness",)

    def __call__(self, model: Generator, batch: Batch) -> dict[str, Tensor]:
        """Minus the mean of the images."""
        rows = batch["matching"]
        return {"brightness": -model.images(model.latents(rows.noise, rows.conditioning)).mean()}


def contrast(generator: Generator, made: Prediction, rows: Rows) -> Tensor:
    """Minus the mean deviation of the latents: a term, which shares the evaluation."""
    return -made.latents.flatten(1).std(1).mean()


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_a_loss_from_elsewhere_trains_the_generator(
    small_model: Path, small_assigned: Path, tmp_path: Path
) -> None:
    pairs, _ = read_manifest(small_assigned / "manifest.jsonl")
    options = SftOptions(epochs=3, lr=1e-3, **FREE)

    def run(loss: Any) -> SftRun:
        generator = load_generator(small_model, master_weights=True)
        return SftRun(generator, pairs, tmp_path / "run", options, loss=loss)

    run(Brightness()).run()
    first, *_, last = rows_of(tmp_path / "run")
    assert last["brightness"] == last["loss"] < first["brightness"] - 0.05
    with pytest.raises(RunError, match="loss: Brightness then"):
        run(None).run()


def test_terms_share_one_evaluation_and_parts_add_up(tiny: Generator) -> None:
    noise, latents = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = tiny.encode_prompts([f"a handwritten digit {k}" for k in ("one", "two")] * 2 + [""])
    batch = Batch(
        matching=Rows(noise[:3], prompts.select(slice(3)), {"latents": latents[:3]}),
        contrast=Rows(noise[3:], prompts.select(slice(3, None))),
    )
    terms = SftOptions(**FREE).loss().terms
    loss, evaluated = OneStepLoss(matching=terms["matching"], contrast=contrast), []
    hook = tiny.denoiser.register_forward_pre_hook(lambda *_: evaluated.append(1))
    with torch.no_grad():
        whole = loss(tiny, batch)
        assert list(whole) == list(loss.parts) == ["matching", "contrast"] and len(evaluated) == 1
        for parts in (2, 3, 9):
            pieces = batch.split(parts)
            assert [len(pieces), sum(piece.size for piece in pieces)] == [min(parts, 3), 5]
            found = sum(total(shared_losses(loss, tiny, piece)) for piece in pieces)
            torch.testing.assert_close(found, total(whole))
    hook.remove()


class Critic:
    """A second trainee: tells latents of targets from those that the generator makes."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.module = nn.Sequential(nn.Flatten(), nn.Linear(256, 1))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        save_file(self.module.state_dict(), folder / "critic.safetensors")

    def load_weights(self, folder: Path) -> None:
        self.module.load_state_dict(load_file(folder / "critic.safetensors"))

    def save_adapter(self, weights: Any, folder: Path) -> None:
        raise NotImplementedError

    def fingerprint(self) -> str:
        return ""


class CriticLoss:
    """Least squares (Mao et al. 2016, arXiv 1611.04076)."""

    parts = ("real", "fake")

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def __call__(self, model: Critic, batch: Batch) -> dict[str, Tensor]:
        rows = batch["matching"]
        with torch.no_grad():
            made = self.generator.latents(rows.noise, rows.conditioning)
        real, fake = (model.module(latents) for latents in (rows.extra["latents"], made))
        return {"real": (real - 1).square().mean(), "fake": fake.square().mean()}


class AdversarialRun(SftRun):
    """Both are trained in every step."""

    def __init__(self, generator: Generator, *args: Any, **more: Any) -> None:
        critic = Critic()

        def convince(generator: Generator, made: Prediction, rows: Rows) -> Tensor:
            value: Tensor = critic.module(made.latents)
            return (value - 1).square().mean()

        super().__init__(generator, *args, loss=OneStepLoss(matching=convince), **more)
        self.trainees["critic"], self.losses["critic"] = critic, CriticLoss(generator)

    def take_step(self, rows: list[int], step: int) -> None:
        batch = self.batch(rows, step)
        for name in ("critic", "student"):
            self.trainers[name](batch)


def test_two_trainees_resume_together(
    small_model: Path, small_assigned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, _ = read_manifest(small_assigned / "manifest.jsonl")
    options = SftOptions(epochs=2, lr=1e-3, **FREE)

    def train(folder: Path) -> AdversarialRun:
        generator = load_generator(small_model, master_weights=True)
        run = AdversarialRun(generator, pairs, folder, options, save_minutes=0)
        run.run()
        return run

    whole, update = train(tmp_path / "whole"), Trainer.update

    def dying(self: Trainer) -> None:
        if self.step == 2 and isinstance(self.trainee, Generator):  # the critic has its third step
            raise KeyboardInterrupt
        update(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "update", dying)
        train(tmp_path / "parts")
    resumed = train(tmp_path / "parts")
    again = train(tmp_path / "parts")  # is finished: all take over their weights
    for name, trainee in whole.trainees.items():
        expected = trainee.module.state_dict()
        for run in (resumed, again):
            found = run.trainees[name].module.state_dict()
            assert all(torch.equal(found[key], expected[key]) for key in expected)
    one, two = (rows_of(tmp_path / name) for name in ("whole", "parts"))
    assert one == two and one[1]["critic loss"] == one[1]["critic real"] + one[1]["critic fake"]
    names = {path.name for path in (tmp_path / "parts" / "critic").iterdir()}
    assert names == {"checkpoint-best", "checkpoint-final"}


def test_the_average_follows_the_weights_of_every_step(small_model: Path) -> None:
    generator = load_generator(small_model, master_weights=True)
    options = SftOptions(use_ema=True, ema_decay=0.3, lr=1e-3, **FREE)
    trainer = Trainer(generator, Brightness(), options, 6)
    name, weight = next(iter(trainer.parameters.items()))
    expected = weight.detach().clone()
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = Batch(matching=Rows(noise, generator.encode_prompts(["a", "b"])))
    for t in range(1, 7):
        trainer(batch)
        kept = min(0.3, t / (t + 9)) if t > 1 else 0.0
        expected = kept * expected + (1 - kept) * weight.detach()
    assert not torch.equal(expected, weight)
    torch.testing.assert_close(trainer.final()[name], expected)


def test_each_process_has_a_row_of_every_group_and_all_count_once(tiny: Generator) -> None:
    """Five rows and one, for three processes."""
    told = tiny.encode_prompts(["a photo of the digit one"] * 5)
    rows = Rows(torch.arange(5.0).view(5, 1, 1, 1), told, {"place": list(range(5))})
    batch = Batch(matching=rows, preserve=rows.select(slice(1)))
    batch["preserve"] = replace(batch["preserve"], share=1.0)
    pieces = [batch.of_process(k, 3) for k in range(3)]
    assert [piece["matching"].extra["place"] for piece in pieces] == [[0, 1], [2, 3], [4]]
    assert [piece.share("matching") for piece in pieces] == pytest.approx([0.4, 0.4, 0.2])
    assert [len(piece["preserve"]) for piece in pieces] == [1, 1, 1]
    assert [piece.share("preserve") for piece in pieces] == [1, 0, 0]


@pytest.mark.parametrize(("first", "second"), [(5, 2), (2, 5), (1, 4), (3, 3)])
def test_parts_of_a_batch_add_up_whatever_is_in_whose(first: int, second: int) -> None:
    """Of groups that divide unevenly among processes, and among the parts of each step."""
    told = Conditioning(torch.zeros(first + second, 1, 1))
    values = torch.randn(first + second, 1, 1, 1, dtype=torch.float64)
    kept = told.select(slice(first, None))
    batch = Batch(rollout=Rows(values[:first], told.select(slice(first))),
                  preserve=Rows(values[first:], kept))  # fmt: skip

    def loss(_: Any, batch: Batch) -> dict[str, Tensor]:
        means = {name: rows.noise.mean() for name, rows in batch.items()}
        found = {"preserve": means["preserve"]} if "preserve" in means else {}
        if "rollout" in means:  # parts and measures of other names
            found |= {"policy": 2 * means["rollout"], "clipped": means["rollout"] + 1}
        return found

    whole = loss(None, batch)
    for parts, count in ((1, 2), (1, 3), (2, 3), (3, 2), (4, 1)):
        sums = dict.fromkeys(whole, torch.zeros((), dtype=torch.float64))
        for piece in batch.split(parts):
            for k in range(count):
                for name, value in shared_losses(loss, None, piece.of_process(k, count)).items():
                    sums[name] = sums[name] + value
        torch.testing.assert_close(sums, whole, rtol=1e-12, atol=1e-12)
