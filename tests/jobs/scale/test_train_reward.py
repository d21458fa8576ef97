"""Rewards for estimates: what is learnt, kept, resumed and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from oneshot_fast.jobs.scale import train_reward
from oneshot_fast.jobs.scale.labels import read_labels, split
from oneshot_fast.jobs.scale.options import RewardTraining
from oneshot_fast.jobs.scale.pools import read_pool
from oneshot_fast.jobs.scale.train_reward import HalvingOptions, RewardRun
from oneshot_fast.rewards import identity, load_rewards
from oneshot_fast.rewards.digit import DigitReward
from oneshot_fast.rewards.noise_aware import network_of
from oneshot_fast.runtime.files import read_json, read_metadata, read_safetensors
from oneshot_fast.scale import main
from oneshot_fast.training.losses.score import ScoreLoss, predict

Call = Callable[..., Any]
FILES = ("level-02", "level-01", "level-00", "clean")
GIVEN = {"0": "level-01", "1": "level-00"}
OPTIONS = RewardTraining(network="classifier", batch_size=1, holdout=0.5, epochs_per_level=2)


FLAGS = "train_reward --reward thickness --network classifier --batch_size 1 --holdout 0.5"
FLAGS += " --epochs_per_level 2"  # as OPTIONS


@pytest.fixture(scope="module")
def trained(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward that learnt thickness from two images, by ``OPTIONS``."""
    folder = tmp_path_factory.mktemp("trained") / "reward"
    assert main([*FLAGS.split(), "--data", str(made), "--output_dir", str(folder)]) == 0
    return folder


def test_a_dry_run_counts_its_steps(made: Path, trained: Path, call: Call) -> None:
    planned = call("scale", *FLAGS.split(), "--data", made, "--dry_run").out.splitlines()
    assert planned[0] == "images to learn from: 2, of prompts: 1, kept aside: 1"
    assert planned[1] == f"trainings: {', '.join(FILES)}"
    assert planned[3].startswith(f"steps: {read_json(trained / 'summary.json')['steps']}, batch")


@pytest.fixture(scope="module")
def given(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with networks that serve steps where two images chose the base reward."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("given") / "reward")
    config = read_json(folder / "reward.json")
    config["files"] = {step: f"{name}.safetensors" for step, name in GIVEN.items()}
    (folder / "reward.json").write_text(json.dumps(config))
    return folder


def test_the_folder_is_a_reward_with_a_network_per_step(
    trained: Path, given: Path, made: Path, tmp_path: Path, call: Call
) -> None:
    labels, summary = read_labels(made, "thickness"), read_json(trained / "metrics.json")
    for step, kept in summary["kept"].items():
        assert kept["kendall"] >= summary["base"][step]["kendall"]
        level = summary["best"].get(step)
        assert kept == (summary["levels"][level] if level else summary["base"])[step]
    assert "2" not in summary["best"]  # nothing is better than the reward itself
    rewards, apart = load_rewards([str(given)]), split(labels.prompts, 0.5, 0)[1]
    rows, texts = [(apart[0], 0), (apart[0], 1)], [labels.prompts[apart[0]]] * 2
    for step, name in GIVEN.items():
        scores = rewards.at_step(int(step))(labels.images(rows, int(step)), texts)
        error = (scores.double() - torch.from_numpy(labels.final[apart[0]])).square().mean()
        assert float(error) == pytest.approx(summary["levels"][name][step]["mse"], rel=1e-5)
    images = labels.images(rows, 2)
    assert torch.equal(rewards(images, texts), rewards.at_step(1)(images, texts))
    assert torch.equal(
        rewards.at_step(2)(images, texts), load_rewards(["thickness"])(images, texts)
    )
    flags = ["run", "--model_id", "tiny", "--candidates", "3", "--reward", "thickness"]
    flags += ["--after", "0", "--keep", "0.7"]
    flags += ["--prompt", "digit one", "--prune_reward", str(given), "--num_inference_steps"]
    ended = call("scale", *flags, 3, "--output_dir", tmp_path / "run")
    assert ended.code == 0
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert settings["prune_rewards"] == [identity(str(given))] != [str(given)]
    ended = call("scale", *flags, 2, "--output_dir", tmp_path / "no")
    assert ended.code == 2 and "was trained for estimates of 3 steps" in ended.error
    flags = ["--model_id", "tiny", "--prompt", "digit one", "--reward", f"{given}:2"]
    assert call("optimize", *flags, "--steps", 1, "--output_dir", tmp_path / "found").code == 0


def test_a_pool_has_what_it_says_beside_the_base_reward(
    given: Path, tmp_path: Path, call: Call
) -> None:
    flags = ["--model_id", "tiny", "--num_inference_steps", 3, "--candidates", 4, "--prompt"]
    flags += ["digit one", "--prompt", "digit two", "--reward", "thickness", "--output_dir"]
    ended = call("scale", "data", *flags, tmp_path, "--prune_reward", given)
    assert ended.code == 0
    pool, labels = read_pool(tmp_path / "pool.safetensors"), read_labels(tmp_path, "thickness")
    assert pool.noise_aware is not None and pool.noise_aware_steps == (0, 1)
    rows, rewards = [(1, n) for n in range(4)], load_rewards([str(given)])
    for step in (0, 1):
        scores = rewards.at_step(step)(labels.images(rows, step), ["digit two"] * 4)
        np.testing.assert_allclose(pool.noise_aware[1, :, step, 0], scores, atol=0.02)  # 8 bits
    assert (pool.base[..., 0] == labels.scores.astype(np.float32)).all()
    flags = ["simulate", "--pool", tmp_path / "pool.safetensors", "--after", 0, "--keep", 0.5]
    flags += ["--budget", 60, "--output_dir", tmp_path / "simulated"]
    ended = call("scale", *flags, "--evaluation_cost", 4, "--verification_cost", 1)
    assert ended.code == 0 and "pruned, noise-aware" in ended.out
    ended = call("scale", "data", "--model_id", "tiny", "--num_inference_steps", 3,
                 "--prompt", "digit one", "--reward", "thickness", "--prune_reward",
                 f"{given}:2", "--output_dir", tmp_path / "no")  # fmt: skip
    assert ended.code == 2 and "a --prune_reward for each --reward" in ended.error


def test_the_baseline_learns_as_long_from_finished_images_alone(trained: Path) -> None:
    found = {name: read_metadata(trained / f"{name}.safetensors", "about") for name in FILES}
    assert [len(about["history"]) for about in found.values()] == [2, 2, 2, 6]
    # as long, with one rate that falls; what differs is the images, and their order
    ends = [read_safetensors(trained / f"{name}.safetensors") for name in ("level-02", "clean")]
    assert ends[0]["mean"] == ends[1]["mean"] != 0
    assert not torch.equal(ends[0]["head.weight"], ends[1]["head.weight"])
    assert "Kendall, trained on finished images" in (trained / "report.html").read_text()


@pytest.mark.parametrize(
    ("steps", "damaged"), [(1, ""), (5, "level-02"), (9, "level-02"), (14, "")]
)
def test_a_killed_training_goes_on_to_the_same_bits(
    trained: Path, made: Path, tmp_path: Path, monkeypatch: Any, steps: int, damaged: str
) -> None:
    class Killed(BaseException):
        pass

    taken = iter(range(steps))

    class Mortal(train_reward.Trainer):
        def __call__(self, batch: Any) -> None:
            if next(taken, None) is None:
                raise Killed
            super().__call__(batch)

    def run() -> RewardRun:
        return RewardRun(tmp_path / "run", made, "thickness", OPTIONS, save_minutes=0)

    with monkeypatch.context() as patch:
        patch.setattr(train_reward, "Trainer", Mortal)
        with pytest.raises(Killed):
            run().run()
    (state,) = (tmp_path / "run").glob("state-*.safetensors")
    if damaged:  # an earlier level, which is trained again while the state of this one waits
        path = tmp_path / "run" / f"{damaged}.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
        assert damaged not in state.name
    taken = iter(range(99))
    with monkeypatch.context() as patch:
        patch.setattr(train_reward, "Trainer", Mortal)
        run().run()
    assert 99 - len([*taken]) == 24 - steps + (4 if damaged else 0)
    for name in (*(f"{name}.safetensors" for name in FILES), "metrics.json", "reward.json"):
        assert (tmp_path / "run" / name).read_bytes() == (trained / name).read_bytes()
    assert not [*(tmp_path / "run").glob("state-*")]


def test_a_reward_with_weights_is_trained_itself(made: Path, tmp_path: Path) -> None:
    options = RewardTraining(batch_size=2, holdout=0.5, pair_weight=1.0, one_network=True)
    run = RewardRun(tmp_path / "run", made, "digit", options)
    summary = run.run()
    assert [phase.name for phase in run.phases] == ["level-01", "level-00"]  # it knows the last
    assert {path.name for path in (tmp_path / "run").glob("*.safetensors")} == {
        "level-00.safetensors"
    }
    assert summary["best"] == {"0": "level-00", "1": "level-00"} and "clean" not in summary
    labels, rewards = read_labels(made, "digit"), load_rewards([str(tmp_path / "run")])
    images, texts = labels.images([(0, 0)], 2), [labels.prompts[0]]
    scores = rewards.at_step(2)(images, texts).item(), DigitReward()(images, torch.tensor([3]))
    assert scores[0] == pytest.approx(scores[1].item(), rel=1e-6)  # the base reward's own
    assert run.run() == json.loads((tmp_path / "run" / "summary.json").read_text())


def test_thresholds_begin_as_thickness_and_learn(made: Path, tmp_path: Path) -> None:
    options = RewardTraining(network="thresholds", batch_size=2, holdout=0.5, baseline=False)
    run = RewardRun(tmp_path / "run", made, "thickness", options)
    assert [phase.name for phase in run.phases] == ["level-02", "level-01", "level-00"]
    labels, begun = read_labels(made, "thickness"), network_of("thresholds", run.setup)
    images = labels.images([(p, n) for p in range(2) for n in range(2)], 0)
    scores = begun(images, images.new_empty(4, 0))
    assert torch.equal(scores, load_rewards(["thickness"])(images, [""] * 4))
    run.run()
    begun.load_state_dict(read_safetensors(tmp_path / "run" / "level-00.safetensors"))
    learnt = begun(images, images.new_empty(4, 0))
    assert not torch.equal(learnt, scores)
    assert torch.equal(begun(images[:1], images.new_empty(1, 0)), learnt[:1])
    blank = begun(torch.ones(1, 3, 64, 64), images.new_empty(1, 0))
    assert bool(blank.isfinite())


def test_no_text_is_on_both_sides() -> None:
    train, apart = split(["a", "b", "a", "c", "b", "d"], 0.3, 1)
    assert sorted(train + apart) == [*range(6)]
    assert not {"abacbd"[k] for k in train} & {"abacbd"[k] for k in apart}


def test_the_loss_is_least_at_the_scores_and_does_not_see_their_scale() -> None:
    class Line(torch.nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(factor))

        def encode(self, prompts: list[str]) -> torch.Tensor:
            return torch.empty(len(prompts), 0)

        def forward(self, images: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
            return self.factor * images.flatten(1).sum(1)

    texts = ["a", "a", "b", "b"]
    x = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(4, 1, 1, 1)

    def losses(factor: float, scale: float) -> dict[str, torch.Tensor]:
        rows = train_reward.Rows(
            x, train_reward.Conditioning(x), {"texts": texts, "scores": scale * x.flatten()}
        )
        model: Any = type("Model", (), {"module": Line(factor)})
        return ScoreLoss(scale, 0.5)(model, train_reward.Batch(images=rows))

    found = losses(3.0, 2.0)
    gap = (0.5 * x.flatten()).double()  # of prediction and score, in deviations
    assert found["mse"].item() == pytest.approx(gap.square().mean().item(), rel=1e-6)
    wanted, said = torch.tensor([-1.0, -4.0]) / 0.5, torch.tensor([-1.5, -6.0]) / 0.5
    t, p = wanted.double().sigmoid(), said.double().sigmoid()
    entropy = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
    assert found["pairs"].item() == pytest.approx(0.5 * entropy.item(), rel=1e-6)
    for part in ("mse", "pairs"):
        at = [losses(factor, 2.0)[part].item() for factor in (1.9, 2.0, 2.1)]
        assert min(at) == at[1]
        assert found[part].item() == pytest.approx(losses(30.0, 20.0)[part].item(), rel=1e-5)
    assert predict(Line(2.0), x, texts).tolist() == [2.0, 4.0, 8.0, 16.0]  # type: ignore[arg-type]


def test_the_rate_falls_to_half() -> None:
    options = HalvingOptions(lr=2.0)
    assert [options.lr_at(step, 4) for step in range(4)] == [2.0, 1.75, 1.5, 1.25]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--reward", "thickness"], "has no weights to train; give --network classifier"),
        (["--reward", "digit", "--network", "thresholds"], "is of reward thickness"),
        (["--reward", "clip"], "line 1: no scores of clip, only of thickness, digit"),
        (["--reward", "digit:2"], "a weight has no effect"),
        (["--reward", "nothing"], "no reward 'nothing'"),
        (["--reward", "digit", "--levels", "0,3"], "levels has step 3; the data have [0, 1, 2]"),
        (["--reward", "digit", "--holdout", "1"], "holdout must be between 0 and 1"),
        (["--reward", "digit", "--lr", "0"], "lr is 0"),
        (["--reward", "digit", "--epochs_per_level", "0"], "epochs_per_level is 0"),
    ],
)
def test_bad_flags_are_refused(
    made: Path, tmp_path: Path, call: Call, flags: list[str], said: str
) -> None:
    ended = call("scale", "train_reward", "--data", made, "--output_dir", tmp_path / "r", *flags)
    assert ended.code == 2 and said in ended.error
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[1].update(id="p0000/id000"), "line 2: p0000/id000 comes a second time"),
        (lambda rows: rows.pop(), "p0001 has 1 images, others 2"),
        (lambda rows: rows[2].update(steps=[0, 1]), "line 3, p0001/id000: its steps are [0, 1]"),
        (lambda rows: rows[3]["scores_per_step"]["digit"].__setitem__(0, None), "line 4, p0001"),
        (lambda rows: rows[0].pop("prompt"), "line 1: no line of `scale data`"),
        (lambda rows: rows.clear(), "has no images"),
        (lambda rows: [row.update(prompt="one") for row in rows], "2 different prompts"),
    ],
)
def test_bad_data_are_named(
    made: Path, tmp_path: Path, change: Callable[[Any], Any], said: str
) -> None:
    data = shutil.copytree(made, tmp_path / "data")
    rows = [json.loads(line) for line in (data / "labels.jsonl").open()]
    change(rows)
    (data / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=said.replace("[", r"\[").replace("]", r"\]")):
        RewardRun(tmp_path / "run", data, "digit", RewardTraining())


def test_missing_files_are_named(made: Path, trained: Path, tmp_path: Path) -> None:
    data = shutil.copytree(made, tmp_path / "data")
    (data / "images" / "p0001" / "id001" / "s01.png").unlink()
    with pytest.raises(ValueError, match=r"s01\.png is missing; repeat the `scale data`"):
        RewardRun(tmp_path / "run", data, "digit", RewardTraining())
    with pytest.raises(ValueError, match=r"has no labels\.jsonl; make it with `scale data`"):
        RewardRun(tmp_path / "run", tmp_path, "digit", RewardTraining())
    broken = shutil.copytree(trained, tmp_path / "reward")
    config = read_json(broken / "reward.json") | {"files": {"0": "level-09.safetensors"}}
    (broken / "reward.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is missing; repeat the `scale train_reward`"):
        load_rewards([str(broken)])
    (broken / "reward.json").write_text("{}")
    with pytest.raises(ValueError, match=r"reward\.json has another layout"):
        load_rewards([str(broken)])
    with pytest.raises(ValueError, match=r"holds no reward of `scale train_reward`"):
        load_rewards([str(tmp_path)])
    with pytest.raises(ValueError, match="was trained already"):
        options = RewardTraining(network=str(trained))
        RewardRun(tmp_path / "run", made, "thickness", options)
