"""Distillation: roles apart, memory, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from family_samples import tiny_pipeline
from torch import Tensor

from oneshot_fast.errors import UserError
from oneshot_fast.generators.adapters import add_adapter, role
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.generators.flux import FluxGenerator
from oneshot_fast.generators.levels import Levels
from oneshot_fast.generators.options import ModelOptions
from oneshot_fast.generators.sd3 import Sd3Generator
from oneshot_fast.generators.sdxl import SdxlGenerator
from oneshot_fast.jobs import training_plan
from oneshot_fast.jobs.distill.options import DistillOptions
from oneshot_fast.jobs.distill.plan import distill_memory
from oneshot_fast.jobs.distill.run import DistillRun, losses_of
from oneshot_fast.planning.memory import StepMemory
from oneshot_fast.runtime.files import read_json, read_jsonl
from oneshot_fast.training.checkpoints import STUDENT
from oneshot_fast.training.roles import FAKE, Roles

PROMPTS = ["a red bird", "a house by the sea"]
SMALL: dict[str, Any] = {
    "batch_size": 2, "epochs": 2, "ttur": 2, "lr": 1e-3, "teacher_guidance": 2.0
}  # fmt: skip


def few(name: str = "SDXL", steps: int = 2) -> FewStepGenerator:
    if name == "SDXL":
        generator: Any = SdxlGenerator(tiny_pipeline("StableDiffusionXLPipeline"))
    else:
        generator = Sd3Generator(tiny_pipeline("StableDiffusion3Pipeline"))
    return FewStepGenerator.over(generator, steps, eta=0.9 if steps > 1 else None)


def run_of(
    folder: Path, generator: Any = None, offload: bool = False, **options: Any
) -> DistillRun:
    torch.manual_seed(0)
    return DistillRun(
        generator or few(), PROMPTS, folder, DistillOptions(**{**SMALL, **options}),
        images_per_prompt=1, eval_samples=10, save_minutes=0, offload=offload,
    )  # fmt: skip


@pytest.mark.parametrize("rank", [0, 2])
def test_every_step_moves_its_own_network_alone(tmp_path: Path, rank: int) -> None:
    run = run_of(tmp_path, lora_rank=rank)
    generator = run.generator
    base = {k: v.clone() for k, v in generator.denoiser.state_dict().items()}
    noise = torch.randn(2, *run.noise_shape)
    told = generator.told(PROMPTS, [1, 2])

    def teacher() -> Tensor:
        with torch.no_grad(), run.roles("teacher") as net:
            return net.output_at(noise, torch.tensor(500), told, 2.0)

    before = teacher()
    run.trainers = {name: run.trainer(name, 4) for name in (STUDENT, FAKE)}
    for name, other in ((FAKE, STUDENT), (STUDENT, FAKE)):
        old = {
            of: {k: p.detach().clone() for k, p in run.trainers[of].parameters.items()}
            for of in (name, other)
        }
        if name == FAKE:
            with run.roles("fake"):
                run.trainers[FAKE](run._batch([0, 1], "fake", 0, 0))
        else:
            run.trainers[STUDENT](run.batch([0, 1], 0))
        moved = [not torch.equal(p, old[name][k]) for k, p in run.trainers[name].parameters.items()]
        assert any(moved) and run.trainers[name].skipped == 0, name
        assert all(torch.equal(p, old[other][k]) for k, p in run.trainers[other].parameters.items())
    assert torch.equal(teacher(), before)
    student = run.trainers[STUDENT]  # the authors' average stays in place of the weights on a CPU
    now = {k: p.detach().clone() for k, p in student.parameters.items()}
    for value in student.ema.shadow_params:
        value.add_(1)
    with student.ended():
        average = student.final()
        assert all(torch.equal(p, average[k]) for k, p in student.parameters.items())
        assert not all(torch.equal(p, now[k]) for k, p in student.parameters.items())
    assert all(torch.equal(p, now[k]) for k, p in student.parameters.items())
    if rank:  # one base in memory, as it was
        assert run.roles.fake.denoiser is generator.denoiser
        after = {
            k.replace(".base_layer", ""): v for k, v in generator.denoiser.state_dict().items()
        }
        assert all(torch.equal(after[k], v) for k, v in base.items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_role_changes_nothing_but_what_computes(checkpointing: bool) -> None:
    generator = few()
    net = generator.denoiser
    for name in ("default", "fake"):
        add_adapter(net, 2, None, seed=1, name=name)
    for key, parameter in net.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
        parameter.requires_grad_(".default." in key)
    if checkpointing:
        net.enable_gradient_checkpointing()
        net.train()
    flags = {k: p.requires_grad for k, p in net.named_parameters()}
    x, told = torch.randn(1, 4, 8, 8), generator.told(PROMPTS[:1], [1])

    def output() -> Tensor:
        return generator.output_at(x, torch.tensor(500), told)

    mine = output()
    with role(net, ["fake"]):
        other = output()
        with role(net, []):
            none = output()
        assert torch.equal(output(), other)
    assert torch.equal(output(), mine)
    assert not torch.equal(mine, other) and not torch.equal(none, other)
    assert flags == {k: p.requires_grad for k, p in net.named_parameters()}
    mine.sum().backward()
    have = {k for k, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert have and all(".default." in k for k in have)


@pytest.mark.parametrize(("name", "steps"), [("SDXL", 1), ("SD3", 2)])
def test_both_parametrisations_and_one_step(tmp_path: Path, name: str, steps: int) -> None:
    generator = few(name, steps)
    run = run_of(tmp_path, generator, epochs=1)
    levels = run.losses[FAKE].levels  # type: ignore[attr-defined]
    assert levels.is_flow == (name == "SD3") and levels.timesteps[-1] == 0
    if steps == 1:  # either objective is the same
        shape, found = generator.latent_shape(16, 16), []
        for objective in ("ac_dmd", "dmd"):
            options = DistillOptions(objective=objective, teacher_guidance=2.0)
            losses = losses_of(Roles.of_one(generator), generator, shape, options)
            found.append(losses[STUDENT](generator, run.batch([0, 1], 0))["dmd"])
        torch.testing.assert_close(*found)
    summary = run.run()
    assert summary["steps"] == 1 and summary["skipped_steps"] == 0
    (row,) = read_jsonl(tmp_path / "history.jsonl")
    assert row["fake loss"] > 0 and row["dmd"] > 0 and {"drift", "diversity"} <= row.keys()
    assert not (tmp_path / FAKE).exists() and (tmp_path / "checkpoint-final").is_dir()


def test_idle_networks_wait_elsewhere(tmp_path: Path) -> None:
    base = few()
    run_of(tmp_path / "here", copy.deepcopy(base)).run()
    run = run_of(tmp_path / "away", copy.deepcopy(base), offload=True)
    roles: Any = run.roles
    # in place of two devices: nothing can compute where they wait, and no value changes
    roles._home, roles._away = torch.float32, torch.float64
    take, kinds = run.take_step, set[torch.dtype]()

    def moments(name: str) -> set[torch.dtype]:
        found = run.trainers[name].optimizer.tensors()
        return {found[key].dtype for key in found if key != "updates"}

    def looks(rows: list[int], step: int) -> None:
        take(rows, step)
        idle = [roles._of[name].denoiser for name in ("fake", "teacher")]
        kinds.update(p.dtype for network in idle for p in network.parameters())
        kinds.update(moments(FAKE))
        assert moments(STUDENT) == {torch.float32}
        with roles("fake"), roles("fake"):
            assert next(idle[0].parameters()).dtype == torch.float32

    run.take_step = looks  # type: ignore[method-assign]
    run.run()
    assert kinds == {torch.float64}
    file = "checkpoint-final/unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "away" / file).read_bytes()


def test_memory_of_the_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, found = few(), list[StepMemory]()
    traced = training_plan.memory_of
    monkeypatch.setattr(
        training_plan, "memory_of", lambda *a: found.append(traced(*a)) or found[-1]
    )

    def of(offload: bool = False, **options: Any) -> StepMemory:
        chosen = DistillOptions(**{**SMALL, **options})

        def losses(*of: Any) -> Any:
            return losses_of(*of, chosen)

        size = generator.image_size
        return distill_memory(generator, chosen, losses, size, offload=offload)

    needs = [of(lora_rank=2), of()]
    steps = iter(found[2:])  # of the student and the fake, which are the same wherever they wait
    monkeypatch.setattr(training_plan, "memory_of", lambda *_: next(steps))
    needs.append(of(offload=True))
    adapted, whole, offloaded = (need.weights for need in needs)
    assert "the fake's adapter" in adapted and "the teacher" not in adapted
    assert adapted["the fake's adapter"] < 0.15 * whole["unet"]
    assert whole["the fake"] == whole["the teacher"] == whole["unet"]
    # one network and two moments less
    assert sum(whole.values()) - sum(offloaded.values()) == whole["unet"]
    assert needs[1].peak - needs[2].peak >= 3 * whole["unet"] and not needs[1].idle
    assert sum(needs[2].idle.values()) == 6 * whole["unet"]


def test_what_is_refused(tmp_path: Path, call: Callable[..., Any]) -> None:
    generator = few()
    for options, message in (
        ({"ttur": 0}, "ttur is 0"),
        ({"teacher_guidance": 0.5}, "teacher_guidance is 0.5"),
        ({"preserve_latent_weight": 0.5}, "the teacher is what is held on to"),
        ({"preserve_pool_size": 7}, "leave preserve_pool_size out"),
        ({"objective": "dmd", "consistency_weight": 3.0}, "no effect with objective dmd"),
        ({"fake_space": "noise"}, "noise is what auto is for this model"),
        ({"consistency_weight": -1.0}, "consistency_weight is -1"),
        ({"fake_lr": 0.0}, "fake_lr is 0"),
        ({"optimizer_in_backward": True}, "three roles share"),
        ({"offload": True, "lora_rank": 2}, "--offload has no effect where"),
    ):
        with pytest.raises(UserError, match=message):
            run_of(tmp_path, generator, **options)
    guided = copy.copy(generator)
    guided.guidance_scale = 2.0
    with pytest.raises(UserError, match="leave guidance_scale out"):
        run_of(tmp_path, guided)
    pipe = tiny_pipeline("StableDiffusionXLPipeline", DDIMScheduler)
    with pytest.raises(UserError, match="DDIMScheduler; this needs"):
        run_of(tmp_path, FewStepGenerator.over(SdxlGenerator(pipe), 2))
    assert run_of(tmp_path, FewStepGenerator.over(SdxlGenerator(pipe), 1, student=True))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    # before a model is loaded
    flags = ["--teacher", tmp_path / "none", "--output_dir", tmp_path / "run", "--prompt_file"]
    four = ["--num_inference_steps", 4, "--step_list"]
    for more, message in (
        ([tmp_path / "empty.txt"], "has no prompt"),
        ([tmp_path / "p.txt", "--guidance_scale", 2], "the student does without"),
        ([tmp_path / "p.txt", "--timestep", 399], "a student begins at the noisiest"),
        ([tmp_path / "p.txt", "--embedded_guidance", 1], "the student is told 1"),
        ([tmp_path / "p.txt", "--features", "vae"], "--features has no effect"),
        ([tmp_path / "p.txt", "--cps_eta", 1.5, "--num_inference_steps", 2], "eta is 1.5"),
        ([tmp_path / "p.txt", *four, 999, 499], "but step_list has 2 timesteps"),
        ([tmp_path / "p.txt", *four, 999, 499, 499, 1], "give falling timesteps"),
        ([tmp_path / "p.txt", "--save_minutes", -1, "--teacher", "tiny"], "save_minutes is -1"),
        ([tmp_path / "p.txt", "--offload", "--teacher", "tiny"], "no effect on the CPU"),
    ):
        ended = call("distill", *flags, *more)
        assert ended.code == 2 and message in ended.error, ended
    assert not (tmp_path / "run").exists()


def test_flux_is_told_its_guidance(tmp_path: Path) -> None:
    base = FluxGenerator(tiny_pipeline("FluxPipeline"))
    student = FewStepGenerator.over(base, 2, eta=0.9, student=True)
    shape = student.latent_shape(16, 16)
    levels, told = Levels(student, shape), student.told(PROMPTS[:1], [1])
    x, time, given = torch.randn(1, *shape), torch.tensor([600.0]), []
    inner = student.denoiser.forward

    def forward(*args: Any, guidance: Tensor, **more: Any) -> Any:
        given.append(guidance.tolist())
        return inner(*args, guidance=guidance, **more)

    student.denoiser.forward = forward
    with torch.no_grad():
        student.rollout(torch.randn(1, *shape), told)
        levels.estimates(student, x, time, told)
        levels.estimates(student, x, time, told, 3.5)  # of the teacher: one pass
        base.latents(torch.randn(1, *shape), told)
    assert given == [[1.0], [1.0], [1.0], [3.5], [3.5]]
    assert student.settings((16, 16))["embedded_guidance"] == 1.0
    assert student.fingerprint() != FewStepGenerator.over(base, 2, eta=0.9).fingerprint()
    student.save(tmp_path / "student")  # which keeps it
    again: Any = ModelOptions(num_inference_steps=2, cps_eta=0.9).load(str(tmp_path / "student"))
    assert again.embedded_guidance == 1.0
    told: Any = ModelOptions(embedded_guidance=2.0).load(str(tmp_path / "student"))
    assert told.embedded_guidance == 2.0
    with pytest.raises(UserError, match="tiny is told of no guidance"):
        ModelOptions(embedded_guidance=1.0).load("tiny")


# schedulers as published with SDXL-base and SD1.5
PUBLISHED = {
    "stable-diffusion-xl-base-1.0": ("StableDiffusionXLPipeline", EulerDiscreteScheduler, {}),
    "stable-diffusion-v1-5": (
        "StableDiffusionPipeline", PNDMScheduler,
        {"skip_prk_steps": True, "set_alpha_to_one": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("steps", [1, 4])
def test_published_teachers(
    tmp_path: Path, call: Callable[..., Any], name: str, steps: int
) -> None:
    family, scheduler, config = PUBLISHED[name]
    teacher = tmp_path / name
    tiny_pipeline(family, scheduler, timestep_spacing="leading", **config).save_pretrained(teacher)
    (tmp_path / "p.txt").write_text("a\nb\n")
    count = ["--num_inference_steps", steps]
    ended = call(
        "distill", "--teacher", teacher, "--prompt_file", tmp_path / "p.txt", *count,
        "--output_dir", tmp_path / "run", "--epochs", 1, "--batch_size", 2, "--ttur", 1,
        "--images_per_prompt", 1, "--eval_samples", 10, "--lora_rank", 2,
    )  # fmt: skip
    assert ended.code == 0, ended
    said = f"steps are those of EulerDiscreteScheduler, trailing, not of its {scheduler.__name__}"
    assert said in ended.err and "a base model" not in ended.err
    student = tmp_path / "run/checkpoint-final"
    found = ModelOptions(num_inference_steps=steps).load(str(student), student=True)
    assert isinstance(found, FewStepGenerator)
    times = [int(step.timestep) for step in found.steps(found.latent_shape(16, 16))]
    assert times == ([999] if steps == 1 else [999, 749, 499, 249])
    if steps > 1:
        # as the base model is used: its scheduler's own timesteps, with guidance
        few = ModelOptions(num_inference_steps=4, guidance_scale=5.0).load(str(teacher))
        assert isinstance(few, FewStepGenerator)
        times = [int(step.timestep) for step in few.steps(few.latent_shape(16, 16))]
        assert times == [751, 501, 251, 1]
        assert few.generate(["a"], seed=1)[0].size == (16, 16)
        with pytest.raises(UserError, match="starts at timestep 1, not at the noisiest"):
            ModelOptions().load(str(teacher))


def test_the_command(tmp_path: Path, call: Callable[..., Any]) -> None:
    (tmp_path / "p.txt").write_text("a handwritten digit one\na handwritten digit seven\n")
    flags = [
        "--teacher", "tiny-teacher", "--prompt_file", tmp_path / "p.txt", "--epochs", 1,
        "--batch_size", 2, "--ttur", 1, "--images_per_prompt", 1, "--eval_samples", 10,
        "--num_inference_steps", 2, "--teacher_guidance", 2, "--lora_rank", 2,
    ]  # fmt: skip
    ended = call("distill", *flags, "--dry_run")
    assert ended.code == 0 and "the fake's adapter" in ended.out, ended
    assert "one base network" in ended.out and "on the CPU while idle" not in ended.out
    ended = call("distill", *flags, "--output_dir", tmp_path / "run", "--judge", "digit")
    assert ended.code == 0 and "distilled in 1 steps" in ended.out, ended
    summary = read_json(tmp_path / "run/summary.json")
    assert {"accuracy", "diversity", "drift", "judge digit"} <= summary["final"].keys()
    # the last weights are the only ones: no loss says which are better
    assert not [*tmp_path.glob("run/*-best*")] and "best_epoch" not in summary
    assert (tmp_path / "run/report.html").exists() and (tmp_path / "run/lora-final").is_dir()
