"""Training on preferences: every objective on drawn groups, resuming, early ends, refusals."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import feature_samples
import pytest
import torch
from safetensors.torch import load_file
from samples import PROMPTS
from torch import Tensor

from oneshot_fast.errors import UserError
from oneshot_fast.evaluation.features import Features, of_classifier
from oneshot_fast.evaluation.random_noise import classifier_for
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.generators.pipeline import PipelineGenerator
from oneshot_fast.jobs import judged
from oneshot_fast.jobs.prefer import rollout
from oneshot_fast.jobs.prefer import run as prefer_run
from oneshot_fast.jobs.prefer.options import Name, PreferOptions
from oneshot_fast.jobs.prefer.rollout import Rollout, compared
from oneshot_fast.jobs.prefer.run import PreferRun
from oneshot_fast.rewards import Reward, WeightedRewards, load_rewards
from oneshot_fast.training.batch import Batch, Rows
from oneshot_fast.training.losses.base import shared_losses, total
from oneshot_fast.training.losses.preference import Actions, CleanLatents, Steps, log_prob
from oneshot_fast.training.losses.pso import PSO
from oneshot_fast.training.reference import Reference
from oneshot_fast.training.trainer import BadStepsError

SMALL: dict[str, Any] = {"group": 4, "groups_per_prompt": 1, "batch_size": 2, "anchors": 2}
FLAGS = (
    "--model_id tiny --reward thickness --judge digit --group 4 --groups_per_prompt 1 "
    "--batch_size 1 --epochs 2 --eval_samples 10 --save_minutes 0"
)


def options(name: Any, **more: Any) -> PreferOptions:
    small = SMALL if name == "neighbor_grpo" else {**SMALL, "anchors": PreferOptions.anchors}
    return PreferOptions(objective=name, **{**small, **more})


def drawn(tiny: Generator, chosen: PreferOptions) -> Batch:
    """A batch of two groups, as a run draws it."""
    draws = Rollout(tiny, load_rewards(["thickness"]), chosen, (4, 8, 8))
    groups = [draws.group(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    extra = compared(groups, chosen.drawing == "pairs")
    noise = extra.pop("noise")
    return Batch(preference=Rows(noise, tiny.told(PROMPTS, [0, 1]), extra))


@pytest.mark.parametrize("name", get_args(Name))
def test_every_objective_on_what_is_drawn(name: str, tiny: Generator) -> None:
    chosen = options(name)
    chosen.check()
    batch = drawn(tiny, chosen)
    rows = batch["preference"]
    assert rows.noise.shape == (2, chosen.noises, 4, 8, 8)
    assert rows.extra["rewards"].shape == (2, 4) and rows.extra["ties"].tolist() == [0, 0]
    loss = chosen.loss(256)
    loss.reference = Reference(tiny, adapts=True)
    weight = tiny.denoiser.conv_out.weight.requires_grad_(True)
    try:
        found = loss(tiny, batch)
        gradient = torch.autograd.grad(total({"loss": found["preference"]}), weight)[0]
    finally:
        weight.requires_grad_(False)
    assert torch.isfinite(gradient).all() and gradient.norm() > 0
    assert {*loss.parts, *loss.measures} - {"preserve"} == {*found}
    assert found["moved"] == 0 and found["sampled max"] > found["sampled"]
    # two processes, or parts, give the same
    with torch.no_grad():
        pieces = [shared_losses(loss, tiny, piece) for piece in batch.split(2)]
    for key, value in found.items():
        torch.testing.assert_close(sum(piece[key] for piece in pieces), value.detach())


def test_many_images_are_decoded_some_at_a_time(
    tiny: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = options("neighbor_grpo", group=6)
    whole = drawn(tiny, chosen)["preference"].extra["rewards"]
    monkeypatch.setattr(rollout, "_AT_ONCE", 4)
    sizes, decode = [], tiny.decode
    monkeypatch.setattr(tiny, "decode", lambda x: sizes.append(len(x)) or decode(x))
    torch.testing.assert_close(drawn(tiny, chosen)["preference"].extra["rewards"], whole)
    assert sizes == [4, 2, 4, 2]


def test_the_images_of_a_group(tiny: Generator) -> None:
    rows = drawn(tiny, options("pso"))["preference"]
    again = drawn(tiny, options("pso"))["preference"]
    assert torch.equal(rows.extra["actions"], again.extra["actions"])
    with torch.no_grad():
        x0 = tiny.latents(rows.noise[0], tiny.encode_prompts([PROMPTS[0]] * 2))
    z = (rows.extra["actions"][0] - x0.repeat_interleave(2, 0)) / 0.3  # both around one latent
    assert z.std().item() == pytest.approx(1, abs=0.1) and z.mean().abs() < 0.1
    better = rows.extra["rewards"].unflatten(1, (2, 2)).argmax(2)
    assert torch.equal(rows.extra["preference"], 1.0 - 2 * better)
    coarse = drawn(tiny, options("rlcm", action_pool=4))["preference"]
    with torch.no_grad():
        x0 = tiny.latents(coarse.noise[0], tiny.encode_prompts([PROMPTS[0]]))
    z = ((coarse.extra["actions"][0] - x0) / 0.3).unflatten(2, (2, 4)).unflatten(4, (2, 4))
    torch.testing.assert_close(z, z[:, :, :, :1, :, :1].expand_as(z), rtol=0, atol=1e-5)
    # of 4 x 2 x 2 numbers, so that the log-ratio to another mean has twice its mean as variance
    chosen = options("rlcm", action_pool=4)
    assert chosen.drawn((4, 8, 8)) == 16 and chosen.drawn((4, 9, 7)) == 24
    draws = Rollout(tiny, load_rewards(["thickness"]), chosen, (4, 8, 8))
    policy = chosen.loss(16).policy
    assert isinstance(policy, Actions)
    actions = 0.3 * draws._actions(0, 4000)
    apart = 0.1 * torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    lp = [
        log_prob(policy.blocks(actions[None]), policy.blocks(m.expand_as(actions)[None]), 0.3)
        for m in (torch.zeros(4, 8, 8), apart)
    ]
    ratio, kl = lp[0] - lp[1], policy.distance(apart[None, None], {})
    assert ratio.mean().item() == pytest.approx(kl.item(), rel=0.1)
    assert ratio.var().item() == pytest.approx(2 * kl.item(), rel=0.1)
    near = drawn(tiny, options("neighbor_grpo"))["preference"]
    correlation = torch.corrcoef(near.noise[0].flatten(1))[0, 1]
    assert correlation.item() == pytest.approx(1 - 0.3**2, abs=0.05)


def test_the_reference_is_the_network_without_its_adapter(tiny: Generator) -> None:
    assert Reference(tiny, adapts=True)._generator is tiny
    with Reference(tiny, adapts=False).generator() as base:
        assert base.denoiser is not tiny.denoiser
        shared = [*tiny.networks.values()][1:], [*base.networks.values()][1:]
        assert all(a is b for a, b in zip(*shared, strict=True))
        theirs = dict(base.denoiser.named_parameters())
        assert all(torch.equal(v, theirs[k]) for k, v in tiny.denoiser.named_parameters())


def test_several_steps_have_likelihoods_of_their_own(tiny: Generator) -> None:
    assert isinstance(tiny, PipelineGenerator)
    few = FewStepGenerator.over(tiny, 3, eta="ancestral")
    steps = few.steps((4, 8, 8))
    for name in ("pso", "rlcm"):
        chosen = options(name)
        chosen.check_steps(few.draws_noise)
        batch = drawn(few, chosen)
        rows = batch["preference"]
        samples = rows.extra["samples"]
        assert samples.shape == (2, 4, 4, 4, 8, 8)
        shared = samples[:, 0, 0] == samples[:, 1, 0]  # the first noise, of a pair or of all
        assert shared.all() and not torch.equal(samples[:, 0, 1], samples[:, 1, 1])
        loss = chosen.loss(256, several=True)
        loss.reference = Reference(few, adapts=True)
        weight = few.denoiser.conv_out.weight.requires_grad_(True)
        try:
            found = loss(few, batch)
            gradient = torch.autograd.grad(found["preference"], weight)[0]
        finally:
            weight.requires_grad_(False)
        assert gradient.norm() > 0 and found["moved"] == 0
        if name == "pso":
            assert found["preference"].item() == pytest.approx(math.log(2), rel=1e-5)
    with torch.no_grad():
        lp, clean = Steps()(few, rows)
    assert lp.shape == (2, 4, 2) and clean.shape == (2, 4, 2, 4, 8, 8)  # the last draws nothing
    # what was drawn is N(0, 1): -|z|^2 / 2 over 256 elements
    assert (-2 * lp / 256).mean().item() == pytest.approx(1, abs=0.1)
    told = tiny.told([PROMPTS[0]] * 4, [0] * 4)
    x = samples[0, :, 1]
    with torch.no_grad():
        output = (few.transition(1, x, told).mean - steps[1].keep * x) / steps[1].change
    torch.testing.assert_close(clean[0, :, 1], steps[1].skip * x - steps[1].sigma * output)
    # the scale makes of a distance of clean latents the KL divergence of what is drawn
    apart = torch.randn(1, 1, 2, 4, 8, 8)
    means = [a * s.change / s.sigma for a, s in zip(apart[0, 0], steps[:2], strict=True)]
    kl = sum(m.square().sum() / (2 * s.noise**2) for m, s in zip(means, steps[:2], strict=True))
    scales = rows.extra["scales"][:1]
    torch.testing.assert_close(Steps().distance(apart, {"scales": scales})[0], kl)


def test_what_makes_no_sense_over_steps_is_refused(tiny: Generator, tmp_path: Path) -> None:
    assert isinstance(tiny, PipelineGenerator)
    for name, eta, said in (
        ("drpo", "ancestral", "--objective drpo is of one step"),
        ("pso", 0.0, "no noise has no likelihood: give --cps_eta"),
    ):
        few = FewStepGenerator.over(tiny, 2, eta=eta)
        with pytest.raises(UserError, match=said):
            PreferRun(few, PROMPTS, tmp_path, options(name), rewards=load_rewards(["thickness"]))
    with pytest.raises(UserError, match="--action_std has no effect on several steps"):
        options("pso", action_std=0.1).check_steps(True)


def test_one_step_never_asks_for_the_likelihood_of_a_step(
    tiny: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FewStepGenerator, "transition", None)
    monkeypatch.setattr(Steps, "__call__", None)
    chosen = options("pso")
    loss = chosen.loss(256)
    loss.reference = Reference(tiny, adapts=True)
    with torch.no_grad():
        assert torch.isfinite(loss(tiny, drawn(tiny, chosen))["preference"])


class Same(Reward):
    """Likes all images alike."""

    name = "same"
    differentiable = False

    def forward(self, images: Tensor, features: Tensor) -> Tensor:
        return images.new_ones(len(images))


@pytest.fixture(scope="module")
def trainable() -> Generator:
    return load_generator("tiny", master_weights=True)


def run(
    base: Generator, folder: Path, rewards: WeightedRewards, names: Sequence[str] = (), **more: Any
) -> PreferRun:
    chosen = options("pso", epochs=3, **more)
    return PreferRun(
        copy.deepcopy(base), PROMPTS, folder, chosen, rewards=rewards, eval_samples=10, names=names
    )


def test_rewards_that_are_all_equal_end_the_training(
    trainable: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judged, "FLAT", 2)
    job = run(trainable, tmp_path, WeightedRewards([(Same(), 1.0)]), names=["same"])
    before = {k: v.clone() for k, v in job.generator.denoiser.state_dict().items()}
    with pytest.raises(BadStepsError, match=r"2 steps in a row .* same says nothing of them"):
        job.run()
    after = job.generator.denoiser.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_drift_ends_the_training(trainable: Generator, tmp_path: Path) -> None:
    job = run(trainable, tmp_path, load_rewards(["thickness"]), max_drift=1e-3)
    summary = job.run()
    assert summary["steps"] == 2 < 3  # the first step begins at the base
    assert summary["stopped"].startswith("drift 0.") and "after step 2" in summary["stopped"]
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and rows[1]["moved"] > 1e-3 > rows[0]["moved"]
    assert run(trainable, tmp_path, load_rewards(["thickness"]), max_drift=1e-3).run() == summary


def test_a_killed_training_ends_the_same(tmp_path: Path, prompts: Path, forks: Any) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = [*FLAGS.split(), "--prompt_file", prompts, "--lora_rank", 4, "--lr", "5e-3"]
    flags += ["--output_dir"]
    assert forks.run("prefer", [*flags, whole], whole).code == 0
    for place in ("epoch-001.json", "lora-final"):
        assert forks.run("prefer", [*flags, parts], parts, at=place).code == -9
    ended = forks.run("prefer", [*flags, parts], parts)
    assert ended.code == 0, ended.err
    assert "judge digit" in ended.out and (parts / "report.html").exists()
    name = "lora-final/pytorch_lora_weights.safetensors"
    old, new = (load_file(folder / name) for folder in (whole, parts))
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
    rows = [(folder / "history.jsonl").read_text() for folder in (whole, parts)]
    assert rows[0] == rows[1]


def test_the_dry_run(call: Callable[..., Any], prompts: Path) -> None:
    flags = f"--model_id tiny --reward thickness --prompt_file {prompts} --group 4 --batch_size 1"
    ended = call("prefer", *flags.split(), "--dry_run")
    assert ended.code == 0, ended.err
    for part in ("peak of a step of 1 groups", "a second denoiser", "4 in each group"):
        assert part in ended.out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"group": 1}, "group is 1; preferences need at least 2"),
        ({"group": 5}, "group is 5; pso compares pairs: give an even number"),
        ({"beta": 0.0}, "beta is 0.0; give a finite positive number"),
        ({"action_std": -1.0}, "action_std is -1.0; give a finite"),
        ({"action_std": math.nan}, "action_std is nan; give a finite"),
        ({"eta": 2.0}, "--eta has no effect on --objective pso; leave it out"),
        ({"objective": "rlcm", "beta": 1.0}, "--beta has no effect on --objective rlcm"),
        ({"objective": "neighbor_grpo", "temperature": 0.0}, "temperature is 0.0"),
        ({"objective": "neighbor_grpo", "anchors": 17}, "anchors is 17, of a group of 16"),
        ({"objective": "drpo", "positives": 9}, "positives is 9; as many of the worst"),
        ({"objective": "d3po", "clip": 1.5}, "clip is 1.5; of ratios of means give less than 1"),
        ({"kl_weight": -1.0}, "kl_weight is -1.0; give a finite number, 0 or more"),
        ({"max_drift": 0.0}, "max_drift is 0.0"),
        ({"lora_from": Path("a")}, "merge it by --lora"),
        ({"beta": math.inf}, "beta is inf; give a finite positive number"),
        ({"action_std": math.inf}, "action_std is inf; give a finite"),
        ({"objective": "rebel", "eta": math.inf}, "eta is inf; give a finite"),
        ({"objective": "neighbor_grpo", "temperature": math.inf}, "temperature is inf"),
        ({"objective": "rlcm", "original_scale": True}, "--original_scale has no effect"),
        ({"original_scale": True, "clip": 25.0}, "of ratios of means give less than 1"),
    ],
)
def test_options_that_make_no_sense(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        dataclasses.replace(PreferOptions(), **flags).check()


def test_numbers_of_the_papers_and_what_takes_nats() -> None:
    PreferOptions(clip=math.inf, max_drift=math.inf).check()
    found = options("pso", original_scale=True).loss(64).objective
    assert found == PSO(beta=50.0, clip=0.1, form="original", scale=1 / 64)
    assert options("d3po").loss(64).objective == PSO(0.1, 0.1, "original", 1 / 64)
    assert options("pso", beta=2.0).loss(64).objective == PSO(beta=2.0)
    apart = torch.full((1, 1, 4, 8, 8), 0.1)
    for name in get_args(Name):
        distance = options(name).loss(256).policy.distance(apart, {}).item()
        nats = name in ("pso", "d3po", "rlcm", "rebel")
        assert distance == pytest.approx(256 * 0.01 / (2 * 0.3**2) if nats else 0.01, rel=1e-5)
    assert isinstance(PreferOptions(objective="pso").pair_loss().policy, CleanLatents)


def test_features_without_a_gradient_are_refused(
    call: Callable[..., Any], prompts: Path, tiny: Generator
) -> None:
    flags = ["--model_id", "tiny", "--prompt_file", prompts, "--reward", "thickness", "--dry_run"]
    flags += ["--objective", "drpo", "--batch_size", 1, "--group", 2, "--features"]
    for name, said in (
        ("vae", "carry no gradient, which drpo needs; name others, or --features latents"),
        ("python:feature_samples.rounded", "carry no gradient, which drpo needs"),
        ("python:json.dumps", "features python:json.dumps cannot be taken: Object of type"),
        ("python:feature_samples.counts", "error: features python:feature_samples.counts must be"),
    ):
        ended = call("prefer", *flags, name)
        assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1, ended.err
    classifier = classifier_for(tiny, PROMPTS)
    assert classifier is not None
    for features in (of_classifier(classifier), Features("rows", feature_samples.rows)):
        prefer_run._check_gradient(features, (64, 64), tiny)


def test_commands_that_make_no_sense(call: Callable[..., Any], prompts: Path) -> None:
    flags = ["--model_id", "tiny", "--prompt_file", prompts, "--output_dir", prompts.parent / "out"]
    for more, said in (
        ([], "give --prompt_file FILE and --reward NAME"),
        (["--reward", "digit", "--judge", "digit"], "digit cannot judge what is trained on it"),
    ):
        ended = call("prefer", *flags, *more)
        assert ended.code == 2 and said in ended.err and ended.err.count("\n") == 1
