"""Reinforcement: what learns, killed and resumed, near a teacher, and what is refused."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_samples import tiny_pipeline
from torch import Tensor

from oneshot_fast.errors import UserError
from oneshot_fast.generators.adapters import add_adapter
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.generators.lora_files import Adapters, LoraFile
from oneshot_fast.generators.sdxl import SdxlGenerator
from oneshot_fast.jobs.reinforce.options import ReinforceOptions
from oneshot_fast.jobs.reinforce.run import ReinforceRun
from oneshot_fast.rewards import load_rewards
from oneshot_fast.runtime.files import read_jsonl
from oneshot_fast.runtime.seeds import gaussian
from oneshot_fast.training.batch import Rows
from oneshot_fast.training.checkpoints import STUDENT, load_state
from oneshot_fast.training.losses.grpo import clip_bounds, is_clipped, original_seed, policy_loss

LORA = "pytorch_lora_weights.safetensors"
PROMPTS = ["a red bird", "a house by the sea", "a boat"]
SMALL: dict[str, Any] = {
    "batch_size": 4, "images_per_prompt": 2, "steps_per_epoch": 2, "epochs": 1, "lr": 1e-3
}  # fmt: skip


def bright(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean((1, 2, 3))


def equal(images: Tensor, prompts: list[str]) -> Tensor:
    return images.new_ones(len(images))


def infinite(images: Tensor, prompts: list[str]) -> Tensor:
    return bright(images, prompts) / 0


def few(steps: int = 3) -> FewStepGenerator:
    generator = SdxlGenerator(tiny_pipeline("StableDiffusionXLPipeline"))
    return FewStepGenerator.over(generator, steps, eta=0.9 if steps > 1 else None)


def run_of(folder: Path, generator: Any, of: str = "bright", **options: Any) -> ReinforceRun:
    teacher, offload = options.pop("teacher", None), options.pop("offload", False)
    prompts = options.pop("prompts", PROMPTS)
    return ReinforceRun(
        generator, prompts, folder, ReinforceOptions(**{**SMALL, **options}),
        rewards=load_rewards([f"python:{__name__}.{of}"]), teacher=teacher, eval_samples=10,
        save_minutes=0, offload=offload,
    )  # fmt: skip


@pytest.mark.parametrize("original_seeds", [False, True])
def test_a_rollout_and_what_its_steps_share(tmp_path: Path, original_seeds: bool) -> None:
    run = run_of(tmp_path, few(4), policy_steps=1, original_seeds=original_seeds)
    runs = list[list[Tensor]]()
    rollout = run.generator.rollout

    def seen(*given: Any) -> list[Tensor]:
        runs.append(rollout(*given))
        return runs[-1]

    run.generator.rollout = seen  # type: ignore[method-assign]
    rows = run.batch([], 0)["rollout"]
    assert sorted(Counter(rows.extra["texts"]).values()) == [2, 2]
    assert len(rows) == 4 and rows.extra["texts"][0] == rows.extra["texts"][1]
    (learns,) = rows.extra["steps"][0]
    before, after = (rows.extra[name][:, 0] for name in ("before", "after"))
    with torch.no_grad():
        made = run.generator.transition(learns, before, rows.conditioning)
        drawn = (after - made.mean) / made.std
        assert abs(drawn.std() - 1) < 0.1 and not torch.allclose(drawn[0], drawn[1])
        for k in {0, 1, 2} - {learns}:  # what the images of a prompt drew in the others
            x, after_it = runs[0][k], runs[0][k + 1]
            made = run.generator.transition(k, x, rows.conditioning)
            z = (after_it - made.mean) / made.std
            assert abs(z.std() - 1) < 0.1 and not torch.allclose(x[0], x[1])
            torch.testing.assert_close(z[0], z[1], rtol=0, atol=1e-4)
            torch.testing.assert_close(z[2], z[3], rtol=0, atol=1e-4)
            assert (z[0] - z[2]).abs().max() > 0.1
            theirs = gaussian([original_seed(rows.extra["texts"][0], k, 0)], z.shape[1:])
            assert torch.allclose(z[:1], theirs, rtol=0, atol=1e-4) == original_seeds
    # the policy's gradient raises what was better than the others
    run.trainers = {STUDENT: run.trainer(STUDENT, 4)}
    batch = run.batch([], 0)
    advantage = batch["rollout"].extra["advantage"]
    assert advantage.any() and abs(advantage.sum()) < 1e-5

    def likely() -> Tensor:
        with torch.no_grad():
            found = run.generator.transition(learns, before, rows.conditioning)
        return found.log_probability(after)

    old = likely()
    run.trainers[STUDENT](batch)
    assert (advantage * (likely() - old)).mean() > 0


def test_killed_and_resumed_beside_a_teacher(tmp_path: Path) -> None:
    base = few(2)

    def run(name: str, offload: bool = False) -> ReinforceRun:
        found = run_of(
            tmp_path / name, copy.deepcopy(base), teacher=copy.deepcopy(base), match_weight=0.1,
            final_reward_weight=0.1, final_reward_margin=2.0, preserve_latent_weight=0.1,
            preserve_pool_size=4, teacher_guidance=2.0, lora_rank=2, offload=offload,
        )  # fmt: skip
        roles: Any = found._roles  # nothing can compute where idle networks wait
        roles._home, roles._away = torch.float32, torch.float64
        return found

    summary = run("whole").run()
    assert summary["steps"] == 2 and summary["skipped_steps"] == 0
    (row,) = read_jsonl(tmp_path / "whole/history.jsonl")
    assert {"policy", "final", "match", "preserve", "fake loss", "reward", "drift"} <= row.keys()
    assert row["drift"] > 0
    die(run("broken", offload=True), 1)
    run("broken", offload=True).run()
    rows = [read_jsonl(tmp_path / name / "history.jsonl") for name in ("whole", "broken")]
    assert rows[0] == rows[1]
    files = [(tmp_path / of / "lora-final" / LORA).read_bytes() for of in ("whole", "broken")]
    assert files[0] == files[1]


def random_lora(generator: FewStepGenerator, folder: Path) -> LoraFile:
    """What makes a many-step model the generator, by half its weight."""
    adapted = copy.deepcopy(generator)
    add_adapter(adapted.denoiser, 2, 4.0)
    own = {k: p for k, p in adapted.denoiser.named_parameters() if p.requires_grad}
    adapted.save_adapter({k: 0.2 * torch.randn_like(p) for k, p in own.items()}, folder)
    return LoraFile(folder / LORA, 0.5)


def merged(base: FewStepGenerator, *loras: LoraFile) -> FewStepGenerator:
    generator = copy.deepcopy(base)
    pipe, parts = generator.pipe, SdxlGenerator.parts
    files = Adapters(pipe, parts, loras, "--lora")
    files.merge(parts[0], generator.denoiser, [lora.weight for lora in loras], None)
    return generator


def made(generator: FewStepGenerator) -> Tensor:
    with torch.no_grad():
        noise = gaussian([3], generator.noise_shape(64, 64))
        return generator.latents(noise, generator.told(PROMPTS[:1], [3]))


def check_close(found: Tensor, expected: Tensor) -> None:
    """To float32's rounding of the largest."""
    assert (found - expected).abs().max() < 1e-6 * expected.abs().max()


def die(run: ReinforceRun, at: int) -> None:
    """In the step ``at``."""
    take = run.take_step

    def dies(rows: list[int], step: int) -> None:
        if step == at:
            raise MemoryError
        take(rows, step)

    run.take_step = dies  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        run.run()


def test_one_network_is_teacher_fake_and_student(tmp_path: Path) -> None:
    base = few(2)
    lora = random_lora(base, tmp_path)

    def run(name: str) -> ReinforceRun:
        generator = copy.deepcopy(base)
        generator.stack([lora])
        return run_of(
            tmp_path / name, generator, match_weight=0.1, teacher_guidance=2.0, lora_rank=2
        )

    whole, seen = run("whole"), dict[str, Tensor]()
    check_close(made(whole.generator), made(merged(base, lora)))
    take = whole.take_step

    def looks(rows: list[int], step: int) -> None:
        take(rows, step)
        for role in ("student", "fake", "teacher"):
            with whole._roles(role) as model:  # type: ignore[misc]
                seen[role] = made(model)

    whole.take_step = looks  # type: ignore[method-assign]
    whole.run()
    assert torch.equal(seen["teacher"], made(base))
    for role in ("student", "fake"):
        assert (seen[role] - made(base)).abs().max() > 1e-3
    check_close(made(whole.generator), seen["student"])
    trained = LoraFile(tmp_path / "whole" / "lora-final" / LORA)
    both = made(merged(base, lora, trained))
    check_close(both, seen["student"])
    die(run("broken"), 1)
    run("broken").run()
    files = [tmp_path / of / "lora-final" / LORA for of in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()
    again = run("whole")
    assert again.run()["steps"] == 2  # finished: its checkpoint is loaded
    check_close(made(again.generator), seen["student"])


def test_several_updates_of_a_rollout(tmp_path: Path) -> None:
    run = run_of(tmp_path, few(2), inner_updates=2)
    run.trainers = {STUDENT: run.trainer(STUDENT, 4)}

    def ratio(rows: Rows) -> Tensor:
        ((k,), *_), before = rows.extra["steps"], rows.extra["before"][:, 0]
        with torch.no_grad():
            made = run.generator.transition(k, before, rows.conditioning)
        return (made.log_probability(rows.extra["after"][:, 0]) - rows.extra["old"][:, 0]).exp()

    rows = run.batch([], 0)["rollout"]
    assert rows.extra["old"].isnan().all()
    found = run.losses[STUDENT](run.generator, run.batch([], 1))
    assert (ratio(rows) - 1).abs().max() < 1e-6 and found["clipped"] == 0
    run.take_step([], 0)
    assert run.trainers[STUDENT].last["clipped"] == 0
    rows = run.batch([], 1)["rollout"]
    old = rows.extra["old"].clone()
    assert old.isfinite().all() and (ratio(rows) - 1).abs().max() > 0.2
    run.take_step([], 1)
    assert torch.equal(old, rows.extra["old"]) and run.trainers[STUDENT].last["clipped"] > 0
    assert run.batch([], 2)["rollout"].extra["old"].isnan().all()  # of new images
    gone = torch.tensor([1.5, 0.5, 1.5, 0.5, 9.0]).log()
    for advantage, at in ((1.0, [0, 4]), (-1.0, [1, 3]), (0.0, [])):
        found = is_clipped(gone, torch.zeros(5), torch.full((5,), advantage), clip_bounds(0.2))
        assert set(found.nonzero().flatten().tolist()) >= {*at}
        now = gone.clone().requires_grad_()
        policy_loss(now, torch.zeros(5), torch.full((5,), advantage), clip_bounds(0.2)).backward()
        assert torch.equal(now.grad == 0, found | (torch.full((5,), advantage) == 0))


def test_between_rollouts_it_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    base = few(2)

    def run(name: str) -> ReinforceRun:
        return run_of(tmp_path / name, copy.deepcopy(base), inner_updates=2, lora_rank=2)

    assert run("whole").run()["steps"] == 4
    die(run("broken"), 3)  # in the middle of the second rollout
    run("broken").run()
    files = [(tmp_path / of / "lora-final" / LORA).read_bytes() for of in ("whole", "broken")]
    assert files[0] == files[1]
    rows = [read_jsonl(tmp_path / of / "history.jsonl") for of in ("whole", "broken")]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("of", ["equal", "infinite"])
def test_rewards_that_say_nothing_end_it(tmp_path: Path, of: str) -> None:
    run = run_of(tmp_path, few(2), of, steps_per_epoch=30)
    before = [p.clone() for p in run.generator.denoiser.parameters()]
    with pytest.raises(UserError, match="in 20 steps in a row"):
        run.run()
    assert all(map(torch.equal, before, run.generator.denoiser.parameters()))
    again = run_of(tmp_path, few(2), of, steps_per_epoch=30)
    again.trainers = {STUDENT: again.trainer(STUDENT, 30)}
    load_state(tmp_path / "state.safetensors", again.trainers)
    student = again.trainers[STUDENT]
    assert (student.step, student.skipped, student.empty_in_a_row) == (20, 20, 0)


def test_of_the_teacher_the_denoiser_is_taken(tmp_path: Path) -> None:
    generator, teacher = few(), few()
    run = run_of(tmp_path, generator, teacher=teacher, match_weight=0.1)
    assert run.teacher is not None and run.teacher.denoiser is teacher.denoiser
    own, shared = generator.networks, run.teacher.networks
    assert all(own[name] is shared[name] for name in [*own][1:])
    other = tiny_pipeline("StableDiffusionXLPipeline")
    kind, how = type(other.scheduler), other.scheduler.config
    other.scheduler = kind.from_config(how, prediction_type="v_prediction")
    other = FewStepGenerator.over(SdxlGenerator(other), 3, eta=0.9)
    with pytest.raises(
        UserError, match=r"the teacher is v_prediction of .*, the generator epsilon"
    ):
        run_of(tmp_path, generator, teacher=other, match_weight=0.1)


def test_the_fake_of_an_adapter_has_weights_that_can_be_updated() -> None:
    options = ReinforceOptions(lora_rank=2, weights_dtype="bfloat16", match_weight=0.1)
    options.check()
    own = options.of_fake(adapts=False)
    assert own.weights_dtype == "float32" and not own.lora_rank
    assert options.of_fake(adapts=True).lora_rank == 2


def test_the_dry_run(tmp_path: Path, call: Callable[..., Any]) -> None:
    (tmp_path / "p.txt").write_text("a handwritten digit one\na handwritten digit seven\n")
    flags = [
        "--model_id", "tiny-teacher", "--prompt_file", tmp_path / "p.txt", "--batch_size", 4,
        "--images_per_prompt", 2, "--num_inference_steps", 2, "--cps_eta", 0.9,
        "--reward", "thickness", "--lora_rank", 2,
    ]  # fmt: skip
    more = ["--teacher", "tiny-teacher", "--match_weight", 1, "--final_reward_weight", 0.1]
    ended = call("reinforce", *flags, *more, "--dry_run")
    assert ended.code == 0 and "memory, weights of the teacher" in ended.out, ended
    for said in ("moments of the fake", "of it for the fake", "of it for images and rewards"):
        assert said in ended.out, ended
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]


def test_what_is_refused(tmp_path: Path, call: Callable[..., Any]) -> None:
    generator = few()
    for options, message in (
        ({"images_per_prompt": 1}, "images_per_prompt is 1; give at least 2"),
        ({"batch_size": 5}, "give a multiple of images_per_prompt"),
        ({"batch_size": 8}, "is 4 prompts; there are 3"),
        ({"prompts": PROMPTS[:1]}, "one prompt only"),
        ({"policy_weight": 0.0}, "nothing to learn"),
        ({"inner_updates": 0}, "inner_updates is 0"),
        ({"inner_updates": 2, "policy_weight": 0.0, "final_reward_weight": 1.0}, "no effect"),
        ({"inner_updates": 2, "clip": 0.1, "clip_original": 1e-5}, "are two clips of one ratio"),
        ({"inner_updates": 2, "clip_original": 0.0}, "clip_original is 0"),
        ({"clip": 0.1}, "--clip has no effect without --inner_updates 2"),
        ({"original_seeds": True}, "share no noise, as all 2 steps"),
        ({"match_weight": 0.1}, "needs a --teacher; or --lora_rank"),
        ({"match_weight": 0.1, "lora_rank": 2}, "needs a --teacher; or --lora_rank"),
        ({"teacher": generator}, "no effect without --match_weight"),
        ({"final_reward_margin": 2.0}, "no effect without --final_reward_weight"),
        ({"final_reward_weight": 1.0, "final_reward_margin": math.nan}, "margin is nan"),
        ({"match_weight": 0.1, "fake_lr": -1.0}, "fake_lr is -1"),
        ({"offload": True}, "--offload has no effect without --match_weight"),
        ({"fake_lr": 1e-4}, "no effect without --match_weight"),
    ):
        with pytest.raises(UserError, match=message):
            run_of(tmp_path, generator, **options)
    with pytest.raises(UserError, match="none of its steps draws noise"):
        run_of(tmp_path, few(1))
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    (tmp_path / "one.txt").write_text(PROMPTS[0])
    # before a model is loaded
    flags = ["--model_id", tmp_path / "none", "--output_dir", tmp_path / "run"]
    flags += ["--prompt_file", tmp_path / "p.txt"]
    for more, message in (
        ([], "give --reward NAME"),
        (["--reward", "thickness", "--judge", "thickness"], "cannot judge what is trained on it"),
        (["--reward", "thickness", "--guidance_scale", 2], "RL knows no guidance"),
        (["--reward", "thickness", "--width", 64], "--width and --height go together"),
        (["--reward", "thickness", "--prompt_file", tmp_path / "one.txt"], "one prompt only"),
        (["--reward", "thickness", "--batch_size", 64], "is 8 prompts; there are 3"),
    ):
        ended = call("reinforce", *flags, *more)
        assert ended.code == 2 and message in ended.error, ended
