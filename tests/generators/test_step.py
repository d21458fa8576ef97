"""The single step as schedulers take it: what it was before, where it starts, what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from family_samples import tiny_pipeline
from safetensors.torch import load_file, save_file

from oneshot_fast.errors import ModelError, UserError
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.generators.known import is_base, known_start
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.generators.sdxl import SdxlGenerator
from oneshot_fast.generators.step import single_step

BETAS = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing", "clip_sample": False,
}  # fmt: skip


@pytest.mark.parametrize("zero", [False, True], ids=["", "zero SNR"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
def test_what_run_folders_hashed_stays_to_the_last_digit(
    kind: Any, prediction: str, zero: bool
) -> None:
    scheduler = kind(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        timestep_spacing="trailing", prediction_type=prediction, rescale_betas_zero_snr=zero,
    )  # fmt: skip
    scheduler.set_timesteps(1)
    init, sigma = float(scheduler.init_noise_sigma), float(scheduler.sigmas[0])
    norm = math.sqrt(sigma**2 + 1)  # Karras et al. 2022, as it was written out
    coefficients = (init / norm, init, sigma)
    if prediction == "v_prediction":
        coefficients = init / norm, init / norm**2, sigma / norm
    scale, skip, sigma = coefficients
    expected = f"Step(timestep=tensor(999.), scale={scale!r}, skip={skip!r}, sigma={sigma!r})"
    assert str(single_step(scheduler)) == expected


def test_the_noise_of_others_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a scheduler draws: on the CPU, from seed 0, as if it had not, and not on a GPU."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    assert single_step(LCMScheduler(**BETAS))
    assert torch.equal(torch.get_rng_state(), before) and not seeded


@pytest.mark.parametrize("kind", [LCMScheduler, TCDScheduler, DDPMScheduler])
def test_a_step_from_another_timestep_is_that_of_the_pipeline(kind: Any) -> None:
    pipe = tiny_pipeline("StableDiffusionXLPipeline", kind)
    generator = SdxlGenerator(pipe, start=399)
    assert generator.step.timestep == 399
    eps = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        found = generator.latents(eps, generator.encode_prompts(["a photo"]))
        expected = pipe(
            "a photo", timesteps=[399], guidance_scale=0.0, latents=eps, output_type="latent",
            height=16, width=16,
        ).images  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


REFUSED: dict[str, tuple[Any, dict[str, Any], float | None, str]] = {
    "clipping": (DDIMScheduler, {"clip_sample": True}, None, 'not linear .*"clip_sample": True'),
    "thresholding": (
        DDPMScheduler, {"thresholding": True}, None, 'not linear .*"thresholding": True'
    ),
    "noise": (DDPMScheduler, {"variance_type": "fixed_large"}, None, "adds noise at its end"),
    "no signal": (
        LCMScheduler, {"rescale_betas_zero_snr": True}, None, 'not finite \\("rescale_betas_zero'
    ),
    "shift": (
        FlowMatchEulerDiscreteScheduler, {"shift_terminal": 0.1, "use_dynamic_shifting": True},
        None, 'not finite \\("shift_terminal": 0.1',
    ),
    "prediction": (TCDScheduler, {"prediction_type": "flow"}, None, "as flow must be one of"),
    "spacing": (
        DDIMScheduler, {"timestep_spacing": "leading"}, None, "starts at timestep 0, .*--timestep"
    ),
    "DDIM": (DDIMScheduler, {}, 399.0, "--timestep 399: the scheduler DDIMScheduler takes"),
    "half": (LCMScheduler, {}, 399.5, "--timestep 399.5: the scheduler LCM.* begins at 399 inst"),
    "zero": (LCMScheduler, {}, 0.0, "--timestep 0 is not between 0 and 1000"),
    "range": (LCMScheduler, {}, 1000.0, "--timestep 1000 is not between 0 and 1000"),
    "karras": (
        EulerDiscreteScheduler, {"use_karras_sigmas": True}, 399.0, "cannot be set: .*karras"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_steps_that_are_not_of_the_form_are_refused(name: str) -> None:
    kind, config, start, message = REFUSED[name]
    with pytest.raises(ModelError, match=message) as caught:
        single_step(kind.from_config({**BETAS, **config}), start)
    assert "\n" not in str(caught.value)


def test_a_start_is_taken_from_the_name_and_kept_with_the_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "dmd2_sdxl_1step"
    tiny_pipeline("StableDiffusionXLPipeline", LCMScheduler).save_pretrained(folder)
    generator = load_generator(folder)
    assert generator.step.timestep == 399  # type: ignore[attr-defined]
    assert f"{folder}: its one step begins at timestep 399, by its name" in capfd.readouterr().err
    generator.save(tmp_path / "saved")
    again = load_generator(tmp_path / "saved")
    assert again.fingerprint() == generator.fingerprint()
    assert "begins" not in capfd.readouterr().err
    assert isinstance(again, SdxlGenerator)
    with pytest.raises(UserError, match=r"begins at timestep 399.0; leave num_inference_steps"):
        FewStepGenerator.over(again, 4)
    other = load_generator(folder, timestep=999)
    assert other.step.timestep == 999  # type: ignore[attr-defined]
    assert other.fingerprint() != generator.fingerprint()
    flow = tmp_path / "flow"
    tiny_pipeline("ZImagePipeline").save_pretrained(flow)
    with pytest.raises(ModelError, match="--timestep 399: a ZImagePipeline takes none"):
        load_generator(flow, timestep=399)


def test_a_start_is_taken_from_what_the_files_say(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    tiny_pipeline("StableDiffusionXLPipeline", LCMScheduler).save_pretrained(folder)
    named = tmp_path / "named"
    for place in ("model_index.json", "unet/config.json"):
        shutil.copytree(folder, named)
        said = json.loads((named / place).read_text())
        (named / place).write_text(json.dumps({**said, "_name_or_path": "me/dmd2_sdxl_1step"}))
        step = load_generator(named).step  # type: ignore[attr-defined]
        assert step.timestep == 399
        shutil.rmtree(named)
    assert "me/dmd2_sdxl_1step: its one step begins at timestep 399" in capfd.readouterr().err
    (unet,) = (folder / "unet").glob("*.safetensors")
    file = tmp_path / "mine.safetensors"
    save_file(load_file(unet), file, {"modelspec.title": "Hyper-SDXL-1step-Unet"})
    read = load_generator(file, model_config=str(folder))
    assert read.step.timestep == 800  # type: ignore[attr-defined]


def test_a_start_of_the_name_gives_way_to_the_noisiest(tmp_path: Path) -> None:
    folder = tmp_path / "Hyper-SDXL-1step"
    tiny_pipeline("StableDiffusionXLPipeline").save_pretrained(folder)
    with pytest.raises(
        ModelError, match=r"by its name --timestep 800: .*--timestep 999 for the no"
    ):
        load_generator(folder)
    assert load_generator(folder, timestep=999).step.timestep == 999  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="--timestep 0 is not between"):
        load_generator(folder, timestep=0)
    (folder / "scheduler/oneshot_fast.json").write_text('{"timestep": "399"}')
    with pytest.raises(ModelError, match=r"oneshot_fast.json is damaged: timestep is 399, not"):
        load_generator(folder)


def test_known_models_are_told_by_their_names() -> None:
    for name, start in (
        ("tianweiy/dmd2_sdxl_1step_unet_fp16.bin", 399),
        ("dmd2_sdxl_4step_lora.safetensors", None),
        ("models/Hyper-SDXL-1step-Unet.safetensors", 800),
        ("Hyper-SD15-1step-lora.safetensors", None),
        ("PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512", 400),
        ("stabilityai/sdxl-turbo", None),
        ("hyper-sd-1step/checkpoint-final", None),
        ("dmd2_mix_v1-step00002000", None),
        ("hyper-sdxl-run1_step500.safetensors", None),
    ):
        assert known_start([name]) == start, name
    for name in (
        "stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "stabilityai/stable-diffusion-2-1-base", "black-forest-labs/FLUX.1-dev", "sd15",
        "stabilityai/stable-diffusion-3.5-large", "Tongyi-MAI/Z-Image", "models/sd-v1-4", "sdv1.5",
    ):  # fmt: skip
        assert is_base([name]), name
        assert not is_base([name, "pytorch_lora_turbo.safetensors"])
        assert not is_base(["my-model", name])
    for name in (
        "stabilityai/sd-turbo", "stabilityai/stable-diffusion-3.5-large-turbo", "my-model",
        "black-forest-labs/FLUX.1-schnell", "Tongyi-MAI/Z-Image-Turbo", "conv1.5", "my-lora-v1.5",
        "ssd1.5", "z-imagery", "sd1.55",
    ):  # fmt: skip
        assert not is_base([name]), name


def test_a_base_model_is_warned_of(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "stable-diffusion-xl-base-1.0"
    pipe = tiny_pipeline("StableDiffusionXLPipeline")
    pipe.save_pretrained(folder)
    load_generator(folder)
    said = capfd.readouterr().err
    assert "by its name; a base model makes nothing in one step" in said and "SDXL-Turbo" in said
    shutil.rmtree(folder / "scheduler")
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(
        (folder / "model_index.json").read_text().replace("EulerAncestralDiscrete", "DDIM")
    )
    with pytest.raises(ModelError, match=r"starts at timestep 0, .*; a base model makes nothing"):
        load_generator(folder)
