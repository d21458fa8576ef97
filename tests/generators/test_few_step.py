"""Several steps: as diffusers' pipelines take them, and differentiable."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import family_samples
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from double_precision import float64_stays
from family_samples import CALLS, FAMILIES, side_of, tiny_pipeline
from torch import Tensor

from oneshot_fast.data.manifests import read_manifest
from oneshot_fast.data.noise_files import read_noise
from oneshot_fast.errors import ModelError, UserError
from oneshot_fast.generators import few_step
from oneshot_fast.generators.few_step import FewStepGenerator, Transition
from oneshot_fast.generators.loading import PIPELINES
from oneshot_fast.generators.options import ModelOptions
from oneshot_fast.generators.schedulers import CPSEulerScheduler, CPSScheduler
from oneshot_fast.generators.sdxl import SdxlGenerator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.run import AssignRun
from oneshot_fast.jobs.sft.options import SftOptions
from oneshot_fast.jobs.sft.plan import training_memory
from oneshot_fast.jobs.sft.run import SftRun
from oneshot_fast.runtime.seeds import derived_seed, gaussian, record_seed

PROMPTS, SEEDS = ["a handwritten digit one", "a handwritten digit seven"], [5, 6]
NAMES = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (4, 8, 8)
VECTORS = "rtdmd_vectors.json"  # of https://github.com/Harahan/RTDMD (Apache-2.0), run


class Flow(FlowMatchEulerDiscreteScheduler):
    """What SDXL's pipeline asks a scheduler for beside: nothing of it is a flow's."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: object) -> Tensor:
        return sample


class CPSFlow(CPSScheduler, Flow):
    pass


def trailing(kind: Any, **more: Any) -> Any:
    return kind(**NAMES, timestep_spacing="trailing", **more)


SCHEDULERS = {
    "Euler": trailing(EulerDiscreteScheduler),
    "Euler v": trailing(EulerDiscreteScheduler, prediction_type="v_prediction"),
    "Karras": trailing(EulerDiscreteScheduler, use_karras_sigmas=True),
    "EulerAncestral": trailing(EulerAncestralDiscreteScheduler),
    "LCM": LCMScheduler(**NAMES),
    "TCD": TCDScheduler(**NAMES),
    "DDIM": trailing(DDIMScheduler, clip_sample=False, set_alpha_to_one=True),
    "DDPM": trailing(DDPMScheduler, clip_sample=False),
    "FlowMatchEuler": Flow(shift=3.0),
    "CPS": CPSFlow(shift=3.0, eta=0.9),
    "CPSEuler": trailing(CPSEulerScheduler, eta=[0.2, 0.5, 1.0, 0.0]),
    "CPSEuler x0": trailing(CPSEulerScheduler, prediction_type="sample"),
}


@pytest.fixture
def made(tiny: Any) -> Iterator[Callable[..., Any]]:
    """The embedded generator with another scheduler and more steps."""
    before = tiny.pipe.scheduler

    def make(scheduler: Any, count: int = 4, **more: Any) -> FewStepGenerator:
        tiny.pipe.scheduler = scheduler
        return FewStepGenerator.over(tiny, count, **more)

    yield make
    tiny.pipe.scheduler = before


def theirs(
    monkeypatch: pytest.MonkeyPatch, pipe: Any, count: int, **call: Any
) -> tuple[Tensor, list[Tensor]]:
    """What diffusers' own pipeline makes, which draws our later noises, and each step's samples."""

    def draw(shape: Any, *_: object, **__: object) -> Tensor:
        return gaussian([derived_seed(seed, "step", len(steps) - 1) for seed in SEEDS], shape[1:])

    steps: list[Tensor] = []
    own = type(pipe.scheduler).step

    @functools.wraps(own)  # pipelines look whether it takes eta
    def step(self: Any, output: Tensor, t: Any, x: Tensor, *args: Any, **more: Any) -> Any:
        steps.append(x)
        return own(self, output, t, x, *args, **more)

    for kind in type(pipe.scheduler).__mro__:
        module = sys.modules[kind.__module__]
        if hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", draw)
    monkeypatch.setattr(type(pipe.scheduler), "step", step)
    with torch.no_grad():
        return pipe([*PROMPTS], num_inference_steps=count, **call).images, steps


def family_of(name: str) -> Any:
    module, kind = PIPELINES[name].split(".")
    return getattr(importlib.import_module(f"oneshot_fast.generators.{module}"), kind)


GUIDED = [(name, 2.5) for name in ("Euler", "FlowMatchEuler", "LCM")]


@pytest.mark.parametrize(("name", "guidance"), [*((name, 1.0) for name in SCHEDULERS), *GUIDED])
def test_four_steps_are_those_of_diffusers(
    made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, guidance: float
) -> None:
    ours = made(SCHEDULERS[name], guidance_scale=guidance)
    with torch.no_grad():
        latents = ours.latents(gaussian(SEEDS, SHAPE), ours.told(PROMPTS, SEEDS))
    call = {"guidance_scale": guidance, "output_type": "latent", "latents": gaussian(SEEDS, SHAPE)}
    expected, states = theirs(monkeypatch, ours.pipe, 4, **call)
    scale = expected.abs().max().clamp(min=1)
    torch.testing.assert_close(latents / scale, expected / scale, rtol=0, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 0.01 and len(states) == 4


@pytest.mark.parametrize("name", [name for name in FAMILIES if "XL" not in name])
def test_three_steps_of_every_family(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    family, side = family_of(name), side_of(name)
    for scheduler, config in family_samples.SCHEDULERS[name]:
        generator = family(tiny_pipeline(name, scheduler, **config))
        ours, pipe = FewStepGenerator.over(generator, 3), generator.pipe
        noise = gaussian(SEEDS, ours.latent_shape(side, side))
        with torch.no_grad():
            images = ours.images(ours.latents(noise, ours.told(PROMPTS, SEEDS)))
        packed = name == "FluxPipeline"
        given = pipe._pack_latents(noise, *noise.shape) if packed else noise.clone()
        more = CALLS[name] | {"height": side, "width": side, "output_type": "pt"}
        with monkeypatch.context() as patch:
            expected, states = theirs(patch, pipe, 3, latents=given.clone(), **more)
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
        assert len(states) == 3
    if name in ("SanaSprintPipeline", "LatentConsistencyModelPipeline"):  # guidance is told them
        with pytest.raises(UserError, match="give --embedded_guidance instead"):
            FewStepGenerator.over(generator, 3, guidance_scale=2.5)
        generator.embedded_guidance = 2.5
        told, _ = theirs(monkeypatch, pipe, 1, latents=given.clone(), guidance_scale=2.5, **more)
        with torch.no_grad():
            images = generator.images(generator.latents(noise, ours.told(PROMPTS, SEEDS)))
        torch.testing.assert_close(images, told, rtol=0, atol=1e-5)
        return
    ours = FewStepGenerator.over(generator, 3, guidance_scale=2.5)
    with torch.no_grad():
        images = ours.images(ours.latents(noise, ours.told(PROMPTS, SEEDS)))
    scale = "true_cfg_scale" if packed else "guidance_scale"
    more |= {scale: 2.5, "negative_prompt": ["", ""]}
    with monkeypatch.context() as patch:
        guided, _ = theirs(patch, pipe, 3, latents=given.clone(), **more)
    torch.testing.assert_close(images, guided, rtol=0, atol=1e-5)
    assert (guided - expected).abs().max() > 1e-3


def of_sampler(name: str) -> tuple[Any, dict[str, Any]]:
    """A tiny generator by its scheduler's name, and what its pipeline is called with."""
    kind = "SanaSprintPipeline" if name == "SCM" else "StableDiffusionPipeline"
    schedulers = family_samples.SCHEDULERS[kind]
    scheduler, config = next(one for one in schedulers if name in one[0].__name__)
    generator = family_of(kind)(tiny_pipeline(kind, scheduler, **config))
    side = side_of(kind)
    return generator, CALLS[kind] | {"height": side, "width": side, "output_type": "pt"}


# flags of ours, and the same of the pipeline's call
SETTINGS: dict[str, tuple[tuple[dict[str, Any], dict[str, Any]], ...]] = {
    "SCM": (
        ({}, {}),
        ({"step_list": (1.5, 1.1)}, {"max_timesteps": 1.5, "intermediate_timesteps": 1.1}),
        ({"step_list": (1.5, 0.75)}, {"max_timesteps": 1.5, "intermediate_timesteps": None}),
        ({"step_list": (1.4, 1.05, 0.7, 0.35)}, {"max_timesteps": 1.4}),
    ),
    "TCD": tuple(({"scheduler_eta": eta}, {"eta": eta}) for eta in (0.0, 0.3, 1.0)),
    "DDIM": (({"scheduler_eta": 0.5}, {"eta": 0.5}),),
}


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_what_schedulers_are_told_is_obeyed(
    monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    generator, call = of_sampler(name)
    made = []
    for flags, told in SETTINGS[name]:
        if len(flags.get("step_list", ())) not in (0, count):
            continue
        ours = FewStepGenerator.over(generator, count, **flags)
        side = call["height"]
        noise = gaussian(SEEDS, ours.latent_shape(side, side))
        with torch.no_grad():
            made.append(ours.images(ours.latents(noise, ours.told(PROMPTS, SEEDS))))
        if name == "SCM" and count == 2:
            call.pop("intermediate_timesteps", None)  # the pipeline's own
        with monkeypatch.context() as patch:
            expected, states = theirs(patch, generator.pipe, count, latents=noise, **call | told)
        torch.testing.assert_close(made[-1], expected, rtol=0, atol=1e-5)
        assert len(states) == count
        # the estimates of clean latents lie where the last step ends, and before it
        with torch.no_grad():
            found = ours.estimates(noise, ours.told(PROMPTS, SEEDS))
        assert all(one.isfinite().all() for one in found)
    assert all((one - made[0]).abs().max() > 1e-4 for one in made[1:])


@pytest.mark.parametrize("name", ["SCM", "TCD"])
def test_several_steps_are_differentiable_and_one_is_the_single_one(name: str) -> None:
    generator, call = of_sampler(name)
    eta = 0.5 if name == "TCD" else 0.0
    generator.pipe.to(torch.float64)
    shape = generator.latent_shape(call["height"], call["height"])
    noise = gaussian(SEEDS[:1], shape).double().requires_grad_()
    one = FewStepGenerator.over(generator, 1)
    told = one.told(PROMPTS[:1], SEEDS[:1])
    assert torch.equal(one.latents(noise, told), generator.latents(noise, told))
    few = FewStepGenerator.over(generator, 3, scheduler_eta=eta)
    assert few.draws_noise
    with float64_stays():
        assert torch.autograd.gradcheck(
            lambda eps: few.latents(eps, told), noise, fast_mode=True, eps=1e-6, atol=1e-6
        )
    last = FewStepGenerator.over(generator, 3, scheduler_eta=eta, backprop_steps=1)
    with torch.no_grad():
        assert torch.equal(last.latents(noise, told), few.latents(noise, told))
    weight = next(few.denoiser.parameters()).requires_grad_()
    whole, part = (
        torch.autograd.grad(g.latents(noise, told).square().sum(), [noise, weight])
        for g in (few, last)
    )
    assert all(
        a.abs().max() > 0 and not torch.allclose(a, b) for a, b in zip(whole, part, strict=True)
    )


def test_what_tcd_expects_is_clean() -> None:
    name = "StableDiffusionXLPipeline"
    generator = family_of(name)(tiny_pipeline(name, TCDScheduler))
    few, plain = (FewStepGenerator.over(generator, 4, scheduler_eta=eta) for eta in (0.3, 0.0))
    alphas = generator.pipe.scheduler.alphas_cumprod.double()
    for k, step in enumerate(few.steps(SHAPE)):
        alpha = alphas[int(step.timestep)].item()
        assert step.skip == pytest.approx(alpha**-0.5) and plain.steps(SHAPE)[k].noise == 0
        assert step.sigma == pytest.approx(((1 - alpha) / alpha) ** 0.5)
        assert (step.noise > 0) == (k < 3)


def test_one_step_is_the_one_step_generator_bit_by_bit(tiny: Any) -> None:
    few = FewStepGenerator.over(tiny, 1)
    noise, told = gaussian(SEEDS, SHAPE), few.told(PROMPTS, SEEDS)
    looped = copy.copy(few)  # the loop itself, which one step goes round
    looped.guidance_scale = 1.0 + 1e-12
    with torch.no_grad():
        expected = tiny.latents(noise, told)
        assert torch.equal(few.latents(noise, told), expected)
        torch.testing.assert_close(looped.latents(noise, told), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(few.estimates(noise, told)[0], tiny.latents(noise, told))
    assert isinstance(few, SdxlGenerator) and few.denoiser is tiny.denoiser


def test_the_estimates_of_all_steps(made: Callable[..., Any]) -> None:
    for name in ("EulerAncestral", "LCM", "FlowMatchEuler", "CPS"):
        ours = made(SCHEDULERS[name])
        noise, told = gaussian(SEEDS, SHAPE), ours.told(PROMPTS, SEEDS)
        with torch.no_grad():
            found = ours.estimates(noise, told)
            torch.testing.assert_close(found[-1], ours.latents(noise, told), rtol=1e-5, atol=1e-5)
        assert len(found) == 4 and (found[0] - found[-1]).abs().max() > 0.01


def test_samples_of_all_steps_and_their_log_probabilities(made: Callable[..., Any]) -> None:
    noise = gaussian(SEEDS, SHAPE)
    for name in ("Euler", "EulerAncestral", "LCM", "CPS"):
        ours = made(SCHEDULERS[name])
        told = ours.told(PROMPTS, SEEDS)
        with torch.no_grad():
            found = ours.rollout(noise, told)
            torch.testing.assert_close(found[-1], ours.latents(noise, told), rtol=1e-5, atol=1e-5)
            shared = ours.rollout(noise, told, lambda k, x: torch.full_like(x, k + 1.0))
            first = ours.transition(0, noise, told)
        assert len(found) == 5 and found[0] is noise
        torch.testing.assert_close(shared[1], first.mean + first.std)
        if name == "Euler":
            with pytest.raises(ValueError, match="draws nothing"):
                first.log_probability(found[1])
            continue
        normal = torch.distributions.Normal(first.mean, first.std)
        full = normal.log_prob(found[1]) - normal.log_prob(first.mean)
        expected = full.flatten(1).sum(1)
        torch.testing.assert_close(first.log_probability(found[1]), expected, rtol=1e-5, atol=0)


def test_log_probabilities_of_the_authors_code() -> None:
    vectors = json.loads((Path(family_samples.__file__).parent / VECTORS).read_text())
    for step in vectors["cps_logprob"]["steps"]:
        mean, found = (torch.tensor(step[name]) for name in ("mean", "prev"))
        std = step["std"][0]
        if not std:
            continue
        ours = Transition(mean, std).log_probability(found)
        theirs = torch.tensor(step["log_prob"]) * mean[0].numel() / (2 * std**2)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_likelihoods_of_steps_are_those_of_preference_learners(made: Callable[..., Any]) -> None:
    """Of PSO, D3PO and RLCM, which take means over a latent, with the Gaussian's constants."""
    known = json.loads(
        (Path(family_samples.__file__).parent / "preference_vectors.json").read_text()
    )
    for count, turbo in known["sdxl_turbo_schedule"].items():
        steps = made(SCHEDULERS["EulerAncestral"], int(count)).steps(SHAPE)
        assert [float(step.timestep) for step in steps] == turbo["timesteps"]
        assert [*(step.sigma for step in steps), 0] == pytest.approx(turbo["sigmas"], rel=1e-6)
        assert [step.noise for step in steps] == pytest.approx(turbo["sigma_up"], rel=1e-6)

    def same(step: Any, of: Any, theirs: Any, divided: float = 1.0, rel: float = 1e-6) -> None:
        x, output, after = (torch.tensor(of[name]) for name in ("x", "eps", "next"))
        mean = step.keep * x / divided + step.change * output
        found = Transition(mean, step.noise).log_probability(after) / mean[0].numel()
        found -= math.log(step.noise * math.sqrt(2 * math.pi))
        assert found.tolist() == pytest.approx(theirs, rel=rel)

    of = known["ancestral_logprob"]
    steps = made(SCHEDULERS["EulerAncestral"]).steps(SHAPE)
    for k, theirs in enumerate(of["steps"]):  # ours begin with noise of N(0, 1), not of sigma
        same(steps[k], of, theirs["log_prob"], steps[0].sigma if k == 0 else 1.0)
    of = known["ddim_logprob"]
    scheduler = DDIMScheduler(**NAMES, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    steps = made(scheduler, 20, scheduler_eta=1.0).steps(SHAPE)
    for theirs in of["steps_20_eta_1"]:
        (step,) = (step for step in steps if step.timestep == theirs["timestep"])
        # the last variance is a difference in float32 there
        same(step, of, theirs["log_prob"], rel=2e-5 if step is steps[-1] else 1e-6)
    steps = made(SCHEDULERS["LCM"]).steps(SHAPE)
    x, output = (torch.tensor(of[name]) for name in ("x", "eps"))
    for step, theirs in zip(steps[:2], known["lcm_logprob"]["steps"], strict=False):
        ours = step.skip * x - step.sigma * output
        torch.testing.assert_close(ours, torch.tensor(theirs["x0"]), rtol=1e-5, atol=1e-5)
    # the second one goes to another timestep there
    same(steps[0], of, known["lcm_logprob"]["steps"][0]["log_prob"])


def test_levels_and_samples_of_the_authors_code() -> None:
    vectors = json.loads((Path(family_samples.__file__).parent / VECTORS).read_text())
    for name, key, count, config in (
        ("StableDiffusion3Pipeline", "out", 4, {"shift": 3.0}),
        ("StableDiffusion3Pipeline", "one_step", 1, {"shift": 3.0}),
        ("FluxPipeline", "out", 4, {"shift": 3.0, "use_dynamic_shifting": True}),
    ):
        case = vectors["sigmas_flux1_512px" if name == "FluxPipeline" else "sigmas_sd3"]
        generator = family_of(name)(tiny_pipeline(name, FlowMatchEulerDiscreteScheduler, **config))
        few = FewStepGenerator.over(generator, count, eta=0.9, step_list=case["steps"])
        found = few.scheduler_set((4, 64, 64)).sigmas
        torch.testing.assert_close(found, torch.tensor([*case[key], 0.0]), rtol=0, atol=1e-6)
    case = vectors["cps_scheduler_rollout"]
    scheduler = CPSScheduler(shift=3.0, eta=case["eta"])
    scheduler.set_timesteps(sigmas=case["sigmas"][:-1])
    torch.testing.assert_close(scheduler.sigmas, torch.tensor(case["sigmas"]), rtol=0, atol=1e-6)
    x, v = (torch.tensor(vectors["cps_step"][name]) for name in ("x", "v"))
    draw = torch.Generator().manual_seed(7)
    for timestep, expected in zip(scheduler.timesteps, case["outs"], strict=True):
        x = scheduler.step(v, timestep, x, generator=draw).prev_sample
        torch.testing.assert_close(x, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_an_image_does_not_depend_on_its_batch(made: Callable[..., Any]) -> None:
    ours = made(SCHEDULERS["CPSEuler"])
    noise = gaussian(SEEDS, SHAPE)
    with torch.no_grad():
        both = ours.latents(noise, ours.told(PROMPTS, SEEDS))
        alone = ours.latents(noise[1:], ours.told(PROMPTS[1:], SEEDS[1:]))
        other = ours.latents(noise[1:], ours.told(PROMPTS[1:], [7]))
    torch.testing.assert_close(both[1:], alone, rtol=1e-5, atol=1e-5)
    assert (other - alone).abs().max() > 0.01
    with pytest.raises(UserError, match="tell the seeds"):
        ours.latents(noise, ours.encode_prompts(PROMPTS))
    assert len(ours.generate(PROMPTS, seed=1)) == 2


def test_the_fingerprint_is_the_same_in_every_process(made: Callable[..., Any]) -> None:
    ours = made(SCHEDULERS["Euler"])
    scheduler, before = ours._scheduler, ours.fingerprint()
    defaults = scheduler.config["_use_default_values"]  # a set's, in an order of the process
    scheduler.register_to_config(_use_default_values=defaults[::-1])
    assert len(defaults) > 1 and ours.fingerprint() == before
    assert made(SCHEDULERS["Karras"]).fingerprint() != before


def test_gradients_pass_all_steps_or_the_last(made: Callable[..., Any]) -> None:
    ours = made(SCHEDULERS["LCM"], 3)
    told, weight = ours.told(PROMPTS, SEEDS), next(ours.denoiser.parameters())

    def gradients(generator: FewStepGenerator, checkpoints: bool = True) -> list[Tensor]:
        noise = gaussian(SEEDS, SHAPE).requires_grad_()
        weight.requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            if not checkpoints:
                patch.setattr(few_step, "checkpoint", lambda run, *args, **_: run(*args))
            loss = generator.latents(noise, told).square().mean()
        found = torch.autograd.grad(loss, [noise, weight])
        weight.requires_grad_(False)
        return [*found]

    whole, kept = gradients(ours), gradients(ours, checkpoints=False)
    assert all(torch.equal(a, b) for a, b in zip(whole, kept, strict=True))

    # against differences, along a direction
    step, direction = 1e-3, gaussian([9, 10], SHAPE)
    with torch.no_grad():
        noise = gaussian(SEEDS, SHAPE)
        ends = [ours.latents(noise + s * step * direction, told).square().mean() for s in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close((whole[0] * direction).sum(), slope, rtol=2e-2, atol=1e-4)

    last = made(SCHEDULERS["LCM"], 3, backprop_steps=1)
    truncated = gradients(last)
    assert all(v.abs().max() > 0 for v in truncated)  # the noise's passes the sampler itself
    assert not torch.allclose(truncated[1], whole[1], rtol=1e-2)
    with torch.no_grad():
        assert torch.equal(last.latents(noise, told), ours.latents(noise, told))


def test_more_steps_keep_only_small_samples_more(made: Callable[..., Any]) -> None:
    def saved(count: int) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        ours = made(SCHEDULERS["Euler"], count)
        told, noise = ours.told(PROMPTS, SEEDS), gaussian(SEEDS, SHAPE).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            ours.latents(noise, told)
        return sum(sizes.values())

    two, six = saved(2), saved(6)
    sample = 4 * math.prod((len(SEEDS), *SHAPE))
    assert two > 100 * sample and six - two <= 4 * 4 * sample


def test_schedulers_of_another_form_are_refused(made: Callable[..., Any]) -> None:
    for scheduler, message in (
        (DPMSolverMultistepScheduler(), "DPMSolverMultistepScheduler; several steps are taken by"),
        (trailing(DDIMScheduler, clip_sample=True), '"clip_sample"'),
    ):
        with pytest.raises(ModelError, match=message):
            made(scheduler)
    angles = of_sampler("SCM")[0]
    for more in ({"eta": 0.9}, {"student": True}):
        with pytest.raises(ModelError, match="is SCMScheduler, neither a flow's nor in sigma sp"):
            FewStepGenerator.over(angles, 2, **more)
    with pytest.raises(UserError, match="step_list is 2, 1; give falling timesteps, from 1"):
        FewStepGenerator.over(angles, 2, step_list=(2.0, 1.0))
    for more, message in (
        ({"scheduler_eta": 0.5}, "--scheduler_eta: the steps of a EulerDiscreteScheduler take no"),
        ({"backprop_steps": 5}, "backprop_steps is 5"),
        ({"guidance_scale": 0.5}, "guidance_scale is 0.5"),
        ({"eta": 2.0}, "--cps_eta: eta is 2.0"),
    ):
        with pytest.raises(UserError, match=message):
            made(SCHEDULERS["Euler"], **more)


def test_fresh_noise_is_drawn_at_the_timesteps_of_the_scheduler(
    made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("Euler", "Karras", "LCM", "TCD", "DDIM", "FlowMatchEuler"):
        plain, fresh = (made(SCHEDULERS[name], eta=eta).steps(SHAPE) for eta in (None, 0.9))
        assert [step.timestep for step in fresh] == [step.timestep for step in plain]
        assert all(step.noise > 0 for step in fresh[:-1]) and fresh[-1].noise == 0
    assert [int(step.timestep) for step in made(SCHEDULERS["LCM"], eta=0.9).steps(SHAPE)] == [
        999, 759, 499, 259
    ]  # fmt: skip
    # it tells its scheduler levels, which are shifted
    pipe = tiny_pipeline("FluxPipeline", FlowMatchEulerDiscreteScheduler, shift=3.0)
    generator = family_of("FluxPipeline")(pipe)
    plain, fresh = (
        FewStepGenerator.over(generator, 3, eta=eta).steps(SHAPE) for eta in (None, 0.9)
    )
    assert [step.timestep for step in fresh] == [step.timestep for step in plain]
    with pytest.raises(ModelError, match="several steps are taken by"):
        made(DPMSolverMultistepScheduler(), eta=0.9)
    same = FewStepGenerator._own_schedule
    monkeypatch.setattr(FewStepGenerator, "_sampler_schedule", same)
    with pytest.raises(UserError, match=r"at 999, 666, 333, 0, and those of its LCMScheduler at"):
        made(SCHEDULERS["LCM"], eta=0.9)


def test_flags_without_effect_are_refused(made: Callable[..., Any], tmp_path: Path) -> None:
    options, few = SftOptions(optimizer_in_backward=True), made(SCHEDULERS["LCM"], 2)
    with pytest.raises(UserError, match="optimizer_in_backward keeps every gradient"):
        SftRun(few, [], tmp_path, options, targets=TargetImages(few, 64))
    last = made(SCHEDULERS["LCM"], 2, backprop_steps=1)
    SftRun(last, [], tmp_path, options, targets=TargetImages(last, 64))
    for flags in ("--guidance_scale 2", "--backprop_steps 1", "--cps_eta 0.5"):
        with pytest.raises(UserError, match="without --num_inference_steps"):
            name, value = flags.removeprefix("--").split()
            ModelOptions(**{name: float(value)}).load("tiny")
    with pytest.raises(UserError, match="num_inference_steps is 0"):
        ModelOptions(num_inference_steps=0).load("tiny")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_assigned_and_trained_through_the_loop(
    tmp_path: Path, small_model: Path, small_data: Path, call: Callable[..., Any], forks: Any
) -> None:
    flags = ["--model_id", small_model, "--num_inference_steps", 2, "--seed", 3]
    search = ["--steps", 3, "--max_samples", 3, "--num_images", 1]
    noises = tmp_path / "noises"
    ended = call("assign", *flags, *search, "--data_root", small_data, "--output_dir", noises)
    assert ended.code == 0, ended.err
    rows = rows_of(noises / "manifest.jsonl")
    assert all(row["best_loss"] < row["initial_loss"] for row in rows)
    # the loss that was found is that of diffusers' steps with the record's noise
    generator: Any = ModelOptions(num_inference_steps=2).load(str(small_model))
    assert generator.draws_noise  # SDXL-Turbo's scheduler is ancestral
    pair, row = read_manifest(noises / "manifest.jsonl")[0][0], rows[0]
    target = TargetImages(generator).latent(pair.image_path, "crop")
    noise = read_noise(pair.noise_path, pair.noise_index)[None]
    with torch.no_grad():
        made = generator.latents(noise, generator.told([pair.prompt], [record_seed(pair.id)]))
    loss = (made[0] - target).square().mean().item()
    assert loss == pytest.approx(row["best_loss"], rel=1e-4)
    training = ["--manifest_path", noises / "manifest.jsonl", "--epochs", 2, "--lr", "1e-4"]
    training += ["--preserve_pool_size", 4, "--output_dir"]
    assert call("sft", *flags, *training, tmp_path / "trained").code == 0
    summary = json.loads((tmp_path / "trained" / "summary.json").read_text(encoding="utf-8"))
    assert summary["matched_loss_after"] < summary["matched_loss_before"]
    assert summary["settings"]["num_inference_steps"] == 2
    mean = sum(row["best_loss"] for row in rows) / len(rows)
    assert summary["matched_loss_before"] == pytest.approx(mean, rel=1e-4)
    # killed after an epoch and resumed it ends with the same weights
    killed = [*flags, *training, tmp_path / "killed", "--save_minutes", 0]
    assert forks.run("sft", killed, tmp_path / "killed", at="history.jsonl").code == -9
    assert forks.run("sft", killed, tmp_path / "killed").code == 0
    file = "checkpoint-final/unet/diffusion_pytorch_model.safetensors"
    whole, resumed = ((tmp_path / name / file).read_bytes() for name in ("trained", "killed"))
    assert whole == resumed
    # other steps than the noises were found with are refused, unless these are not used
    for more, said in (
        (["--num_inference_steps", 3], "were found with num_inference_steps 2, not 3; give"),
        (["--num_inference_steps", 1], "were found with num_inference_steps 2, not 1"),
        ([*flags[2:], "--guidance_scale", 2], "were found with guidance_scale 1.0, not 2.0"),
        ([*flags[2:], "--cps_eta", 0.5], "were found with cps_eta None, not 0.5"),
        ([*flags[2:], "--step_list", 900, 500], "were found with step_list (), not (900.0, 500.0)"),
    ):
        other = call("sft", *flags[:2], *more, *training, tmp_path / "other")
        assert other.code == 2 and said in other.error and not (tmp_path / "other").exists()
    more = ["--num_inference_steps", 3, "--noise", "random", "--dry_run"]
    assert call("sft", *flags[:2], *more, *training, tmp_path / "other").code == 0
    plan = training_memory(generator, SftOptions(batch_size=2), 64)
    assert plan.held["gradients"] > 0
    other = family_of("ZImagePipeline")(tiny_pipeline("ZImagePipeline"))
    guided = FewStepGenerator.over(other, 2, guidance_scale=2.0)
    assert training_memory(guided, SftOptions(batch_size=2), 16).held["activations"] > 0
    with pytest.raises(UserError, match="best_of_n"):
        AssignRun(generator, [], tmp_path, AssignOptions(method="pool"))
