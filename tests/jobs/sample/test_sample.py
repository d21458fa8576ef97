"""Images by the command: of any generator, and of RTDMD's YAML file with its LoRA files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from family_samples import tiny_pipeline
from PIL import Image

from oneshot_fast.data.images import load_image
from oneshot_fast.errors import UserError
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.generators.lora_files import LoraFile
from oneshot_fast.generators.sd3 import Sd3Generator
from oneshot_fast.jobs.sample.config import read_config
from oneshot_fast.jobs.sample.run import SampleRun
from oneshot_fast.runtime.files import read_jsonl
from oneshot_fast.runtime.seeds import derived_seed, gaussian

PROMPTS = [f"a handwritten digit {word}" for word in ("one", "seven", "three")]


def lora(path: Path, transformer: Any, seed: int) -> None:
    """A file as RTDMD leaves it, rank 4."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for key in ("to_q", "to_out.0", "add_k_proj"):
        module = transformer.transformer_blocks[0].attn.get_submodule(key)
        name = f"transformer_blocks.0.attn.{key}"
        A = torch.randn(4, module.in_features, generator=draw)
        found[f"{name}.lora_A.default.weight"] = 0.1 * A
        B = torch.randn(module.out_features, 4, generator=draw)
        found[f"{name}.lora_B.default.weight"] = 0.1 * B
    torch.save(found, path)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, two LoRA files, and the YAML file that names them."""
    folder = tmp_path_factory.mktemp("published")
    pipe = tiny_pipeline("StableDiffusion3Pipeline")
    pipe.save_pretrained(folder / "base")
    for k, name in enumerate(("cold_start", "rtdmd")):
        (folder / name).mkdir()
        lora(folder / name / "generator_ema.pt", pipe.transformer, k)
    (folder / "dataset/drawbench").mkdir(parents=True)
    (folder / "dataset/drawbench/test.txt").write_text("\n".join(PROMPTS))
    config = {
        "pretrained_path": f"{folder / 'base'}", "model_type": "sd35", "dtype": "fp32",
        "image_resolution": 16, "mode": "distilled",
        "lora_paths": [f"{folder / name}/generator_ema.pt" for name in ("cold_start", "rtdmd")],
        "lora_rank": 4, "lora_alpha": 8, "num_steps": 4,
        "denoising_step_list": [1000, 750, 500, 250], "cps_eta": 0.9, "guidance_scale": 1.0,
        "seed": 42, "batch_size": 4, "eval_prompt_source": "dataset", "dataset": "drawbench",
        "dataset_path": f"{folder / 'dataset'}", "output_dir": f"{folder / 'images'}",
        "eval_reward": True, "preload_reward_models": True, "num_media_images": 64,
        "reward_fn": {"pickscore": 1.0, "geneval": 1.0}, "reward_dataset_map": {"geneval": "x"},
        "reward_ckpt_path": "/path", "distributed": False, "strategy": "fsdp",
    }  # fmt: skip
    (folder / "sd35m.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_the_published_yaml_makes_images(published: Path, call: Callable[..., Any]) -> None:
    flags = ["--config", published / "sd35m.yaml", "--override"]
    ended = call("sample", *flags, "eval_reward=false")
    assert ended.code == 0 and "not used here: preload_reward_models" in ended.err, ended
    rows = read_jsonl(published / "images/samples.jsonl")
    assert [row["prompt"] for row in rows] == PROMPTS
    # the same by hand: base, both files, alpha 2 x rank, the steps' levels, no guidance
    files = [published / name / "generator_ema.pt" for name in ("cold_start", "rtdmd")]
    base: Any = load_generator(published / "base", lora=tuple(map(LoraFile, files)))
    few = FewStepGenerator.over(base, 4, eta=0.9, step_list=[1000, 750, 500, 250])
    assert [round(float(step.timestep)) for step in few.steps((4, 8, 8))] == [1000, 900, 750, 500]
    seeds = [derived_seed(42, "sample", n, 0) for n in range(3)]
    with torch.no_grad():
        latents = few.latents(gaussian(seeds, (4, 8, 8)), few.told(PROMPTS, seeds))
    for row, image in zip(rows, few.decode(latents), strict=True):
        found = load_image(published / "images" / row["image"], 16, 16)
        torch.testing.assert_close(found, image, rtol=0, atol=1.5 / 255)
    # fewer steps are the first of the list and 0; an image does not depend on the others
    more = ["num_steps=2", "--override", "eval_reward=false", "--output_dir", published / "two"]
    assert call("sample", *flags, *more, "--prompt", PROMPTS[0]).code == 0
    two = FewStepGenerator.over(base, 2, eta=0.9, step_list=[1000, 750, 500, 250])
    with torch.no_grad():
        latents = two.latents(gaussian(seeds[:1], (4, 8, 8)), two.told(PROMPTS[:1], seeds[:1]))
    found = load_image(published / "two/images/00000-00.png", 16, 16)
    torch.testing.assert_close(found, two.decode(latents)[0], rtol=0, atol=1.5 / 255)
    assert not torch.equal(found, load_image(published / "images/images/00000-00.png", 16, 16))


def test_what_a_yaml_file_cannot_say(
    published: Path, call: Callable[..., Any], tmp_path: Path
) -> None:
    path = published / "sd35m.yaml"
    of_file = ["eval_reward=false", "eval_prompt_source=prompt_file"]
    for overrides, message in (
        (["step=3"], "unknown key step"),
        (["eval_reward=true"], "geneval are not here"),
        (["eval_reward=false", "num_steps=5"], "denoising_step_list has 4"),
        (["eval_reward=false", "model_type=flux2_klein"], "only these are read: sd35, flux"),
        (["eval_reward=false", "lora_rank=32"], "generator_ema.pt has 4"),
        (["eval_reward=false", "lora_paths=none.pt"], "no such file"),
        (["eval_reward=false", "dataset=other"], "has none of test.txt"),
        (["mode=fast"], "give distilled or normal"),
        (["seed"], "give KEY=VALUE"),
        (["seed=[1"], "--override seed="),
        (["seed=2024-99-99"], "--override seed="),
        (["pretrained_path=' '"], "name the base model"),
        (["mode=normal", "guidance_scale=abc"], "guidance_scale is 'abc': give a number from 1"),
        (["mode=normal", "guidance_scale=[1]"], "give a number from 1"),
        (["cps_eta=abc"], "give a number from 0 to 1"),
        (["cps_eta=2"], "give a number from 0 to 1"),
        (["eval_reward=false", "lora_alpha=abc"], "lora_alpha is 'abc': give a number from 0"),
        (["denoising_step_list=[a,b]"], "give a number from 0 to 1000"),
        (["denoising_step_list=[500,750]", "num_steps=2"], "give falling timesteps"),
        (["denoising_step_list=[1000,.nan]"], "give a number from 0 to 1000"),
        (["reward_fn={pickscore: abc}"], "give numbers"),
        (["eval_reward='no'"], "give true or false"),
        (["lora_paths=[1]"], "lora_paths is .1.: give a list of texts"),
        ([*of_file, "prompts=[1,2]"], "give a list of texts"),
        ([*of_file, "prompts=[[a]]"], "give a list of texts"),
        (of_file, "name the file of the prompts"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read_config(path, overrides)
        assert "\n" not in str(caught.value)
    found = read_config(path, ["mode=normal", "num_steps=20", "eval_reward=false", "lora_paths="])
    assert found.model["num_inference_steps"] == 20 and not found.model["lora"]
    assert "cps_eta" not in found.model and found.prompts == PROMPTS
    found = read_config(path, ["reward_fn={clipscore: 2}"], ["mine"])
    assert found.rewards == ("clip",) and found.prompts == ["mine"]
    for flags, message in (
        (["--config", path, "--model_id", "tiny"], "--model_id: with --config give --override"),
        (["--config", path, "--cps_eta", 0.5], "--cps_eta: with --config give --override"),
        (["--config", path, "--seed", 3], "--override seed=VALUE"),
        (["--config", path, "--num_inference_steps", 3], "--override num_steps=VALUE"),
        (["--config", path, "--backprop_steps", 1], "--backprop_steps is for gradients"),
        (["--config", path, "--width", 16], "--width and --height go together"),
        (["--config", path, "--override", "eval_reward=no", "--compile_mode", "max-autotune"],
         "--compile_mode is for --compile"),
        (["--model_id", "tiny", "--output_dir", tmp_path, "--prompt", "x",
          "--decoder_checkpointing"], "--decoder_checkpointing is for gradients"),
        (["--config", path, "--override", "eval_reward=no", "--override", "model_type=flux"],
         "is a StableDiffusion3Pipeline, not a FluxPipeline"),
        (["--override", "a=b"], "no effect without --config"),
        (["--model_id", "tiny", "--output_dir", tmp_path], "give --prompt TEXT"),
        (["--model_id", "tiny", "--output_dir", tmp_path, "--prompt", "x", "--lora_alpha", 3],
         "--lora_alpha has no effect"),
        (["--model_id", "tiny", "--output_dir", tmp_path, "--prompt", "x", "--step_list", 999],
         "--step_list has no effect"),
    ):  # fmt: skip
        ended = call("sample", *flags)
        assert ended.code == 2 and message in ended.err, ended


def test_flux_is_told_guidance_where_it_embeds_it(
    published: Path, call: Callable[..., Any], tmp_path: Path
) -> None:
    pipe = tiny_pipeline("FluxPipeline")
    pipe.save_pretrained(tmp_path / "dev")
    config = pipe.transformer.config | {"guidance_embeds": False}
    pipe.transformer = type(pipe.transformer).from_config(config)
    pipe.save_pretrained(tmp_path / "schnell")
    for name, told in (("dev", 1.0), ("schnell", None)):
        out, model = tmp_path / f"{name}-images", tmp_path / name
        flags = ["model_type=flux", f"pretrained_path={model}", "lora_paths=", "eval_reward=no"]
        flags = [part for one in flags for part in ("--override", one)]
        flags += ["--config", published / "sd35m.yaml", "--prompt", PROMPTS[0], "--output_dir", out]
        ended = call("sample", *flags)
        assert ended.code == 0, ended.err
        generator: Any = load_generator(model)
        generator.embedded_guidance = told
        few = FewStepGenerator.over(generator, 4, eta=0.9, step_list=[1000, 750, 500, 250])
        seed = derived_seed(42, "sample", 0, 0)
        with torch.no_grad():
            latents = few.latents(gaussian([seed], (4, 8, 8)), few.told(PROMPTS[:1], [seed]))
        found = load_image(out / "images/00000-00.png", 16, 16)
        torch.testing.assert_close(found, few.decode(latents)[0], rtol=0, atol=1.5 / 255)


def test_prompts_and_guidance_as_the_original_has_them(
    published: Path, call: Callable[..., Any], tmp_path: Path
) -> None:
    def read(*overrides: str) -> Any:
        return read_config(published / "sd35m.yaml", ["eval_reward=false", *overrides])

    # inline and named prompts are of the other source
    (tmp_path / "mine.txt").write_text("of a file\nanother")
    others = ("prompts=[a cat]", f"eval_prompt_path={tmp_path / 'mine.txt'}")
    assert read(*others).prompts == PROMPTS
    assert read("num_media_images=2").prompts == PROMPTS[:2]
    # FLUX.1-dev is told of guidance
    assert read("model_type=flux").guidance == 1.0 and read().guidance is None
    normal = read("model_type=flux", "mode=normal", "guidance_scale=3.5")
    assert normal.guidance == 3.5 and "guidance_scale" not in normal.model
    source = "eval_prompt_source=prompt_file"
    assert read(*others, source).prompts == ["a cat"]
    assert read(others[1], source, "num_media_images=1").prompts == ["of a file"]
    assert read("prompts=a cat, red", source).prompts == ["a cat, red"]
    # of a data set's files the first of this order
    folder = tmp_path / "set"
    folder.mkdir()
    for name, text in (
        ("metadata.jsonl", '{"text": "6"}'), ("prompts.txt", "5"), ("prompts.json", '["4"]'),
        ("test_metadata.jsonl", '{"prompt": "3"}'), ("test.jsonl", '{"prompt": "2"}'),
    ):  # fmt: skip
        (folder / name).write_text(text)
        found = read(f"dataset_path={tmp_path}", "dataset=set").prompts
        assert found == [text.strip('{}[]"').split('"')[-1]], name
    # guidance is of the other mode
    assert "guidance_scale" not in read("guidance_scale=7").model
    assert read("guidance_scale=7", "mode=normal").model["guidance_scale"] == 7
    flags = ["--config", published / "sd35m.yaml", "--override", "eval_reward=false"]
    more = (x for one in (*others, "guidance_scale=7") for x in ("--override", one))
    ended = call("sample", *flags, *more,
                 "--width", 16, "--height", 32, "--output_dir", tmp_path / "out")  # fmt: skip
    assert ended.code == 0 and ended.err.count("not used here:") == 1, ended
    assert "guidance_scale, prompts, eval_prompt_path" in ended.err
    assert Image.open(tmp_path / "out/images/00000-00.png").size == (16, 32)


def test_what_is_not_finite_is_no_image(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any]
) -> None:
    kind, usual = type(tiny), type(tiny).latents
    bad = {0}

    def latents(self: Any, eps: torch.Tensor, told: Any) -> torch.Tensor:
        found = usual(self, eps, told)
        found[[n for n in range(len(eps)) if n in bad]] = torch.nan
        return found

    monkeypatch.setattr(kind, "latents", latents)
    flags = ["--model_id", "tiny", "--output_dir", tmp_path, "--prompt", PROMPTS[0]]
    flags += ["--prompt", PROMPTS[1], "--reward", "thickness"]
    for _ in range(2):  # the second finds it done
        ended = call("sample", *flags)
        assert ended.code == 1 and "1 failed: " in ended.err, ended
    (row,) = read_jsonl(tmp_path / "samples.jsonl")
    assert row["image"] == "images/00001-00.png" and row["thickness"] > 0
    (failed,) = read_jsonl(tmp_path / "failures.jsonl")
    assert failed["image"] == "images/00000-00.png" and "NaN" in failed["reason"]
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["00001-00.png"]
    bad.add(1)
    ended = call("sample", *flags, "--overwrite")
    assert ended.code == 2 and "no image could be made; the first: it became NaN" in ended.err


def test_step_lists_that_make_no_sense() -> None:
    generator = Sd3Generator(tiny_pipeline("StableDiffusion3Pipeline"))
    for steps, count in (([500, 750], 2), ([1001, 500], 2), ([500, 0], 2), ([1000], 2)):
        with pytest.raises(UserError, match=r"give falling timesteps|has 1 timesteps"):
            FewStepGenerator.over(generator, count, step_list=steps)


def test_images_go_on_and_have_scores(tiny: Any, tmp_path: Path) -> None:
    from oneshot_fast.rewards import load_rewards

    def run() -> SampleRun:
        rewards = load_rewards(["thickness"])
        return SampleRun(tiny, PROMPTS, tmp_path, images_per_prompt=2, rewards=rewards, seed=3)

    summary = run().run()
    rows = read_jsonl(tmp_path / "samples.jsonl")
    assert len(rows) == 6 and summary["means"]["thickness"] > 0
    path = tmp_path / rows[3]["image"]
    before = path.read_bytes()
    path.unlink()
    (tmp_path / "summary.json").unlink()
    assert run().run()["samples"] == 6
    assert path.read_bytes() == before
    assert Image.open(tmp_path / "grid.png").size == (128, 192)
