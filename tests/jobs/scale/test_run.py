"""Pruned and steered runs: who wins, what is evaluated, what is kept."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from oneshot_fast import cli, sft
from oneshot_fast.data.images import load_image
from oneshot_fast.data.manifests import find_manifests, read_manifest
from oneshot_fast.errors import UserError
from oneshot_fast.generators.few_step import FewStepGenerator
from oneshot_fast.generators.options import ModelOptions
from oneshot_fast.jobs.scale import run as scale_run
from oneshot_fast.jobs.scale.options import ScaleOptions
from oneshot_fast.jobs.scale.rules import METHODS
from oneshot_fast.jobs.scale.run import ScaleRun
from oneshot_fast.jobs.scale.walk import Walked, Walker
from oneshot_fast.planning.costs import Work, count_flops
from oneshot_fast.rewards import load_rewards
from oneshot_fast.runtime.seeds import gaussian
from oneshot_fast.search.pruning import Cost, Schedule, winners
from oneshot_fast.search.samples import samples_of

Call = Callable[..., Any]
PROMPTS = ("a photo of the digit three", "a photo of the digit seven")
STEPS, N = 3, 5
SAMPLES = samples_of(PROMPTS, 1, seed=0)
PRUNED = ScaleOptions(after=(0, 1), keep=(0.6, 0.7), candidates=N)
FLAGS = ["run", "--model_id", "tiny", "--num_inference_steps", 3, "--reward", "thickness"]
FLAGS += ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]


@pytest.fixture(scope="module")
def few_steps(tiny: Any) -> Any:
    return FewStepGenerator.over(tiny, STEPS)


@pytest.fixture(scope="module")
def ancestral(tiny: Any) -> Any:
    return FewStepGenerator.over(tiny, STEPS, eta="ancestral")


def walk(generator: Any, options: ScaleOptions, batch_size: int = 16) -> Walked:
    walker = Walker(generator, load_rewards(["thickness"]), (64, 64), batch_size)
    seeds = [sample.seed for sample in SAMPLES]
    steps = generator.num_inference_steps
    rule = METHODS[options.method](options, options.candidates or 1, steps, seeds)
    found = walker.walk(SAMPLES, rule)
    expected = rule.counts()
    assert (found.evaluations, found.early, found.last) == tuple(
        len(SAMPLES) * count for count in (expected.evaluations, expected.early, expected.last)
    )
    return found


def test_nothing_that_was_dropped_is_evaluated(few_steps: Any, monkeypatch: Any) -> None:
    rows = []
    guided = FewStepGenerator._guided

    def counted(self: Any, k: int, x: Any, told: Any) -> Any:
        rows.append((k, len(x)))
        return guided(self, k, x, told)

    monkeypatch.setattr(FewStepGenerator, "_guided", counted)
    found = walk(few_steps, PRUNED)
    alive = Schedule(PRUNED.after, PRUNED.keep).counts(N)
    by_step = [sum(n for k, n in rows if k == step) for step in range(STEPS)]
    assert by_step == [len(SAMPLES) * m for m in alive]
    assert sum(by_step) == found.evaluations


def test_winners_are_those_of_the_simulator(few_steps: Any) -> None:
    everything = walk(few_steps, ScaleOptions(after=(0, 1), keep=(1.0, 1.0), candidates=N))
    *prune, final = (scored.totals[..., None] for scored in everything.trace)
    chosen = np.broadcast_to(np.arange(N), (1, len(SAMPLES), N))
    alive = Schedule(PRUNED.after, PRUNED.keep).counts(N)
    expected = winners(chosen, np.stack(prune), final, alive)[0]
    for batch_size in (1, 7, 64):
        assert walk(few_steps, PRUNED, batch_size).winners.tolist() == expected.tolist()
    best = walk(few_steps, ScaleOptions("best_of_n", candidates=N))
    assert best.winners.tolist() == final[..., 0].argmax(-1).tolist()


def test_the_winner_is_what_its_noise_makes(few_steps: Any) -> None:
    found = walk(few_steps, PRUNED)
    sample, winner = SAMPLES[1], int(found.winners[1])
    seed = sample.seed_of(winner)  # of the noise, and of those that the sampler draws later
    z = gaussian([seed], (4, 8, 8))
    with torch.no_grad():
        image = few_steps.images(few_steps.latents(z, few_steps.told([sample.prompt], [seed])))
    assert (image[0] * 255 - found.images[1].float()).abs().max() < 1.01
    score = load_rewards(["thickness"])(image, [sample.prompt]).item()
    assert found.scores["total"][1] == pytest.approx(score, rel=1e-4)


def test_copies_of_a_particle_part_and_batches_do_not_matter(ancestral: Any) -> None:
    options = ScaleOptions(
        "fk", after=(0, 1), candidates=4, inverse_temperature=4.0, resample_below=1.0
    )
    found, other = walk(ancestral, options), walk(ancestral, options, 3)
    assert found.winners.tolist() == other.winners.tolist()
    end = found.trace[-1]
    for candidates, totals in zip(end.candidates, end.totals, strict=True):
        assert len({*totals}) == 4  # though some have one ancestor
        assert (np.diff(candidates) >= 0).all()
    assert any(len({*row}) < 4 for row in end.candidates)
    said = found.rule.said(0)
    assert said["resampled"] == [True, True] and sum(said["weights"]) == pytest.approx(1)


def test_one_step_of_any_method_is_best_of_n(tiny: Any) -> None:
    best = walk(tiny, ScaleOptions("best_of_n", candidates=6))
    for options in (
        ScaleOptions("prune", candidates=6), ScaleOptions("fk", candidates=6),
        ScaleOptions("svdd", candidates=2, branches=3),
    ):  # fmt: skip
        assert walk(tiny, options).winners.tolist() == best.winners.tolist()
        options.checked(1, False)


def test_each_line_of_svdd_goes_on_with_its_best_sample(ancestral: Any) -> None:
    options = ScaleOptions("svdd", after=(0,), candidates=2, branches=3)
    found = walk(ancestral, options)
    assert [scored.step for scored in found.trace] == [0, 1, 2]
    for scored in found.trace[:-1]:
        by_line = scored.totals.reshape(len(SAMPLES), 2, 3)
        assert (scored.kept - 3 * np.arange(2) == by_line.argmax(-1)).all()
        assert (np.ptp(by_line, -1) > 0).all()


@pytest.fixture(scope="module")
def work(few_steps: Any) -> Work:
    return count_flops(few_steps, load_rewards(["thickness"]), (64, 64), "x")


def test_the_cost_of_the_embedded_generator(tiny: Any, work: Work) -> None:
    assert work.evaluation / 1e6 == pytest.approx(120.34, abs=0.005)  # attention included
    assert work.verification / 1e6 == pytest.approx(226.13, abs=0.005)
    guided = FewStepGenerator.over(tiny, STEPS, guidance_scale=2.0)
    twice = count_flops(guided, load_rewards(["thickness"]), (64, 64), "x")
    assert twice.evaluation == 2 * work.evaluation


def test_a_budget_pays_for_candidates_and_best_of_n_gets_no_less(
    few_steps: Any, work: Work, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(scale_run, "count_flops", lambda *of: work)

    def run(**options: Any) -> ScaleRun:
        given = ScaleOptions(after=(0, 1), keep=(0.6, 0.7), compare="best_of_n", **options)
        rewards = load_rewards(["thickness"])
        return ScaleRun(few_steps, PROMPTS, tmp_path, given, rewards=rewards)

    cost = Cost(1.0, 0.0, STEPS)
    found = run(budget=20.0, cost_unit="evaluations")
    assert found.n == Schedule((0, 1), (0.6, 0.7)).affordable(20.0, cost)
    assert found.beside == -(-found.counts.evaluations // STEPS)
    of = run(budget=20 * found.flops[0] / 1e12)
    assert of.counts.cost(*of.flops) <= 20 * of.flops[0]
    assert of.beside * (STEPS * of.flops[0] + of.flops[2]) >= of.counts.cost(*of.flops)
    with pytest.raises(UserError, match="give at least"):
        run(budget=1.0, cost_unit="evaluations")
    of.beside = of.n
    pruned, plain = (line for line in str(of.plan()).splitlines() if "candidates: " in line)
    assert f"{of.counts.evaluations} evaluations" in pruned
    assert f"best_of_n, {of.n} candidates: {of.n * STEPS} evaluations" in plain


def test_seconds_are_those_that_the_same_run_began_with(
    few_steps: Any, work: Work, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(scale_run, "count_flops", lambda *of: work)

    def run(**more: Any) -> ScaleRun:
        options = ScaleOptions(
            "best_of_n", budget=7.0, cost_unit="seconds", compare=more.pop("compare", "none")
        )
        rewards = load_rewards(["thickness"])
        return ScaleRun(few_steps, PROMPTS, tmp_path, options, rewards=rewards, **more)

    measured = iter([(1.0, 0.0, 0.0), (0.5, 0.0, 0.0), (0.25, 0.0, 0.0)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Walker, "seconds", lambda self, sample: next(measured))
        first = run()
        assert first.n == 2
        (tmp_path / "run.json").write_text(json.dumps(first.settings()))
        again = run()
        assert again.n == 2 and again.settings() == first.settings()
        assert run(seed=1).n == 4  # another run
        assert run(begins_anew=True).n == 9


def test_a_schedule_is_read_once(few_steps: Any, tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"

    def run() -> ScaleRun:
        options = ScaleOptions(candidates=4, schedule=path)
        return ScaleRun(few_steps, PROMPTS, tmp_path, options, rewards=load_rewards(["thickness"]))

    path.write_text(json.dumps({"schedule": {"after": [0], "keep": [0.5]}}))
    read = run()
    path.write_text(json.dumps({"schedule": {"after": [0.9], "keep": [0.5]}}))
    assert read.settings()["after"] == (0,) and read.counts.evaluations == 4 + 2 * 2
    with pytest.raises(UserError, match="is no schedule"):
        run()


def test_memory_that_ends_after_the_scores_repeats_no_row(few_steps: Any) -> None:
    rewards = load_rewards(["thickness"])
    walker = Walker(few_steps, rewards, (64, 64), 4)

    class Short(torch.Tensor):
        """Cannot be made 8 bits of more than 2 rows."""

        def round(self) -> Any:
            if len(self) > 2:
                raise torch.OutOfMemoryError
            return self.as_subclass(torch.Tensor).round()

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        images = few_steps.images
        patch.setattr(few_steps, "images", lambda x: images(x).as_subclass(Short))
        scores, pixels = walker._score(torch.randn(4, 4, 8, 8), [PROMPTS[0]] * 4, 2, True)
    assert scores["total"].shape == (4,) and len(pixels) == 4


def test_the_printed_training_takes_the_flags_of_the_model(tmp_path: Path, call: Call) -> None:
    flags = ["run", "--model_id", "tiny-teacher", "--num_inference_steps", 2, "--step_list", 900]
    flags += [400, "--guidance_scale", 2, "--reward", "thickness", "--prompt", PROMPTS[0]]
    flags += ["--candidates", 2, "--method", "best_of_n", "--output_dir", tmp_path / "run"]
    ended = call("scale", *flags)
    assert ended.code == 0, ended.err
    line = next(row for row in ended.out.splitlines() if row.startswith("to train"))
    words = shlex.split(line.partition("oneshot_fast.sft ")[2])
    given = cli._parse("sft", sft.SftCommand, words)
    assert given.model_id == "tiny-teacher" and given.manifest_path
    assert given.model == ModelOptions(
        num_inference_steps=2, step_list=(900.0, 400.0), guidance_scale=2.0
    )
    (path,) = find_manifests(given.manifest_path)
    sft.check_sampler(path, given.model, "--noise random")
    options = ModelOptions(variant="fp16", lora=("a", "b:2"), timestep=399.0, compile=True)
    assert options.flags == shlex.split(
        "--variant fp16 --timestep 399.0 --lora a --lora b:2 --compile"
    )


def test_a_run_keeps_what_was_dropped_and_what_won(tmp_path: Path, call: Call) -> None:
    folder = tmp_path / "run"
    flags = [*FLAGS, "--output_dir", folder, "--candidates", 5]
    flags += ["--after", 0, "--keep", 0.4, "--compare", "best_of_n"]
    ended = call("scale", *flags)
    assert ended.code == 0, ended.err
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").open()]
    assert [row["id"] for row in rows] == [s.id for s in SAMPLES]
    for row in rows:
        first, last = row["steps"]
        best = sorted(sorted(range(5), key=lambda k: -first["scores"][k])[:2])
        assert first["kept"] == last["candidates"] == best
        assert last["kept"] == [row["candidate"]]
        assert row["best"]["total"] == max(last["scores"])
        assert (row["evaluations"], row["verifications"]) == (5 + 2 * 2, 5 + 2)
        beside = row["compare"]
        assert len(beside["steps"][-1]["scores"]) == beside["evaluations"] / 3
        assert beside["flops"] >= row["flops"]
        z = load_file(folder / row["noise_path"])["z"][row["noise_index"]]
        seed = torch.Generator().manual_seed(row["seed"])
        assert torch.equal(z, torch.randn(4, 8, 8, generator=seed))
        assert load_image(folder / row["target_image_path"], 64, 64).shape == (3, 64, 64)
    summary = json.loads((folder / "metrics_summary.json").read_text())
    assert summary["evaluations"] == 2 * 9 and summary["compare"]["gain"]["mean"] == pytest.approx(
        summary["best_reward"] - summary["compare"]["best_reward"]
    )
    for row in rows:  # the same image, in another batch
        row["compare"]["best"]["total"] = row["best"]["total"] * (1 + 1e-7)
        row["seconds"] = row["compare_seconds"] = 1.0
    assert scale_run.summarise(rows)["compare"]["equal"] == 2
    pairs = read_manifest(folder / "training" / "manifest.jsonl")
    assert len(pairs[0]) == 2
    page = (folder / "report.html").read_text()
    assert "What was dropped and what won" in page and (folder / "curves.png").is_file()
    again = call("scale", *flags)
    assert again.code == 0 and again.out == ended.out


def test_one_step_equals_optimize(tmp_path: Path, call: Call) -> None:
    flags = ["--model_id", "tiny", "--reward", "thickness", "--candidates", 6, "--batch_size", 5]
    flags += ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--num_images_per_prompt", 2]
    found = {}
    for name in ("optimize", "scale"):
        more = ["run"] if name == "scale" else []
        method = ["--method", "best_of_n", "--output_dir", tmp_path / name]
        assert call(name, *more, *flags, *method).code == 0
        lines = (tmp_path / name / "manifest.jsonl").open()
        found[name] = [json.loads(line) for line in lines]
    for one, other in zip(found["optimize"], found["scale"], strict=True):
        assert one["seed"] == other["seed"] and one["first_seed"] == other["first_seed"]
        assert one["best"]["total"] == pytest.approx(other["best"]["total"], abs=1e-4)
        images = (load_image(tmp_path / k / one["target_image_path"], 64, 64) for k in found)
        first, second = images
        assert (first - second).abs().max() < 1.01 / 255


def test_a_killed_run_goes_on(forks: Any, tmp_path: Path) -> None:
    def command(folder: Path) -> list[Any]:
        flags = [*FLAGS, "--output_dir", folder, "--num_images_per_prompt", 2, "--candidates", 2]
        return [*flags, "--after", 0, "--keep", 0.4, "--batch_size", 2, "--cps_eta", "ancestral"]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert forks.run("scale", command(whole), whole).code == 0
    pictures = sorted(path.relative_to(whole) for path in whole.glob("images/*"))
    assert len(pictures) == 4
    for at in (3, "00000002.safetensors", "metrics_summary.json"):
        assert forks.run("scale", command(killed), killed, at=at).code == -signal.SIGKILL
    ended = forks.run("scale", command(killed), killed)
    assert ended.code == 0, ended.err
    for name in ("manifest.jsonl", *pictures):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    assert not list(killed.rglob(".tmp-*"))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "give --candidates N or --budget"),
        ("--candidates 4", "give --after STEPS and --keep SHARES"),
        ("--candidates 4 --after 0 1 --keep 0.5", "give one ratio per step"),
        ("--candidates 4 --after 2 --keep 0.5", "the last one selects"),
        ("--candidates 4 --after 1 0 --keep 0.5 0.5", "give steps that increase"),
        ("--candidates 4 --after 0 --keep 1.5", "above 0 and at most 1"),
        ("--candidates 4 --after 0 --keep 0.5 --potential max", "--potential is for the method fk"),
        ("--candidates 4 --method fk --after 0 --cps_eta 0", "needs a sampler that draws noise"),
        ("--candidates 4 --method fk --after 0 --keep 0.5", "--keep is for the method prune"),
        ("--candidates 4 --method best_of_n --after 0", "--after is for the method"),
        ("--candidates 4 --cost_unit evaluations --after 0 --keep 0.5", "--cost_unit is that of"),
        ("--candidates 4 --method best_of_n --prune_reward digit", "--prune_reward has no effect"),
        ("--candidates 4 --after 0 --keep 0.5 --compile", "compiles anew for every size"),
        ("--candidates 4 --method fk --after 0 --inverse_temperature inf", "finite"),
        ("--candidates 4 --method svdd --after 0 --temperature inf", "temperature is inf"),
        ("--candidates 4 --after 0 --keep 0.5 --seeds 5 --num_images_per_prompt 4", "--seeds"),
        ("--budget inf --after 0 --keep 0.5", "a budget of inf pays more than can be counted"),
        ("--budget 1e-9 --after 0 --keep 0.5", "is below one candidate; give at least"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, call: Call, flags: str, said: str) -> None:
    ended = call("scale", *FLAGS, "--output_dir", tmp_path / "run", *flags.split())
    assert ended.code == 2 and said in ended.error, ended.err
    assert not (tmp_path / "run").exists()


def test_rewards_that_are_not_finite_lose(few_steps: Any, tmp_path: Path) -> None:
    rewards = load_rewards(["thickness"])
    score = rewards.scores

    def broken(images: Any, prompts: Any) -> Any:
        found = score(images, prompts)
        for k, prompt in enumerate(prompts):
            if prompt == PROMPTS[1] or k % 2:
                found["thickness"][k] = torch.nan
        return found

    rewards.scores = broken  # type: ignore[method-assign]
    options = ScaleOptions(after=(0,), keep=(0.5,), candidates=4)
    run = ScaleRun(few_steps, PROMPTS, tmp_path / "run", options, rewards=rewards, batch_size=4)
    summary = run.run()
    assert (summary["samples"], summary["failed"]) == (1, 1)
    row = json.loads((tmp_path / "run" / "manifest.jsonl").read_text())
    assert row["candidate"] % 2 == 0 and None in row["steps"][0]["scores"]
    failed = json.loads((tmp_path / "run" / "failures.jsonl").read_text())
    assert failed["prompt"] == PROMPTS[1] and "finite" in failed["reason"]


def test_estimates_may_be_scored_by_other_rewards_and_a_tiny_decoder(
    tmp_path: Path, call: Call
) -> None:
    from diffusers import AutoencoderTiny

    AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    ).save_pretrained(tmp_path / "decoder")  # fmt: skip
    flags = [*FLAGS, "--candidates", 6, "--after", 0, "--keep", 0.5, "--prune_reward", "digit"]
    flags += ["--score_decoder_id", tmp_path / "decoder", "--output_dir", tmp_path / "run"]
    ended = call("scale", *flags)
    assert ended.code == 0 and "warning: the scores of the tiny decoder" in ended.err
    summary = json.loads((tmp_path / "run" / "metrics_summary.json").read_text())
    assert summary["decoder_spearman"] < 0.9
    evaluation, early, last = summary["settings"]["flops"]
    assert early != last and summary["settings"]["prune_rewards"] == ["digit"]
    for line in (tmp_path / "run" / "manifest.jsonl").open():
        row = json.loads(line)
        first, end = row["steps"]
        assert max(first["scores"]) < 0 < min(end["scores"])  # log-probabilities, then pixels
        assert row["flops"] == 12 * evaluation + 6 * early + 3 * last
