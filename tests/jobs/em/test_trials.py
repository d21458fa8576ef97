"""em --recipe auto: which trials there are, what they cost, who wins, and kills in between."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oneshot_fast.errors import UserError
from oneshot_fast.evaluation.distances import Verdict
from oneshot_fast.generators.toy import ToyGenerator
from oneshot_fast.generators.toy_networks import ToyClassifier, ToyConfig, ToyNetwork
from oneshot_fast.jobs.em import trials
from oneshot_fast.jobs.em.options import EmOptions
from oneshot_fast.jobs.em.targets import EmRun
from oneshot_fast.jobs.em.trials import Trial, follow, run_trials, short, trained_on, winner
from oneshot_fast.recipes.toy.data import shapes

Call = Callable[..., Any]
AUTO = EmOptions(recipe="auto", num_cycles=2).resolve(64)


def verdict(after: float, error: float = 1.0) -> Verdict:
    return Verdict("energy_score", 10.0, after, error)


def test_the_better_method_is_tried_with_other_learning_rates() -> None:
    scores = {"sphere": 9.0, "best_of_n": 8.0}
    tried = run_trials(AUTO, lambda method, lr: verdict(scores[method] + abs(lr - 3e-4) * 1e3))
    assert [(trial.method, pytest.approx(trial.lr)) for trial in tried] == [
        ("sphere", 1e-4), ("best_of_n", 1e-4), ("best_of_n", 3e-5), ("best_of_n", 3e-4),
    ]  # fmt: skip
    assert max(tried, key=lambda trial: trial.gain).lr == pytest.approx(3e-4)
    own = dataclasses.replace(AUTO, assign_method="pool")
    assert [trial.method for trial in run_trials(own, lambda *_: "broke off")][:2] == [
        "pool",
        "sphere",
    ]


def test_another_trial_wins_only_beyond_the_error_of_their_difference() -> None:
    def chosen(*after: float | str, error: float = 1.0) -> str:
        tried = [
            Trial(str(k), 1.0, x if isinstance(x, str) else verdict(x)) for k, x in enumerate(after)
        ]

        def between(one: Trial, other: Trial) -> Verdict:
            return Verdict("energy_score", 10 - one.gain, 10 - other.gain, error)

        return winner(tried, between).method

    assert chosen(11, 10.5, "broke off") == chosen("broke off", "broke off") == "0"
    assert chosen(12, 8.9, 9.5) == "1" and chosen("broke off", 8.9) == "1"
    assert chosen(12, 9.1) == chosen("broke off", 9.1) == "0"  # nor beyond that of the base
    assert chosen(9, 8.5) == "0" and chosen(9, 8.5, error=0.4) == "1"
    # a better method does not carry another learning rate with it, which has to gain by itself
    assert chosen(9, 7, 6.5) == "1" and chosen(9, 7, 6.5, 5) == "3"


def test_trials_take_a_third_of_the_whole_effort_and_both_methods_the_same() -> None:
    for changes in ({}, {"num_cycles": 4}, {"assign_steps": 10, "train_epochs": 30}):
        options = dataclasses.replace(AUTO, **changes)
        share = trained_on(options, 10_000) / 10_000

        def cost(options: EmOptions) -> float:
            cycle = trials.evaluations(options.assign()) + 3 * options.train_epochs
            return len(options.schedule()) * cycle

        whole = [cost(follow(options, method, 1e-4)) for method in ("sphere", "best_of_n")]
        assert whole[0] == pytest.approx(whole[1], rel=0.2)
        parts = [cost(short(options, method, 1e-4)) for method in ("sphere", "best_of_n")]
        spent = share * (sum(parts) + 2 * 3 * options.train_epochs)
        part = spent / (spent + whole[0])
        assert part <= 1 / 3 + 1e-9 and (share == pytest.approx(2 / 3, abs=1e-4) or part > 0.33)


def test_options_of_one_method_alone_are_refused_at_once() -> None:
    rotation = {"assign_method": "rotation", "rotation_optimizer": "raw_adam"}
    with pytest.raises(UserError, match="lr_unit matrix is for the method rotation"):
        dataclasses.replace(
            AUTO, **rotation, assign_lr=5e-4, assign_lr_unit="matrix", max_angle=None
        ).check()


@pytest.mark.parametrize(
    "flag", ["em_schedule", "warm_start", "assign_candidates", "assign_fraction"]
)
def test_options_that_do_not_fit_both_methods_are_refused(flag: str) -> None:
    value = {
        "em_schedule": "4:1", "warm_start": True, "assign_candidates": 8, "assign_fraction": 0.5,
    }[flag]  # fmt: skip
    with pytest.raises(UserError, match=f"--{flag} does not fit"):
        dataclasses.replace(AUTO, **{flag: value}).check()


SHORT = (
    "--recipe auto --num_cycles 2 --assign_steps 4 --train_epochs 4 --eval_samples 32 "
    "--num_images 0 --train_lr 1e-4"
)


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Of a small generator of shapes, and 80 pairs."""
    folder = tmp_path_factory.mktemp("shapes")
    data = shapes("train", 80, 16)
    data.write_pairs(folder / "pairs", 80)
    config = ToyConfig(data.prompts, 16, (4, 8, 8), 8)
    generator = ToyGenerator(config, ToyNetwork(config))
    generator.classifier = ToyClassifier(data.prompts, 16)
    generator.save(folder / "model")
    return ["--data_root", folder / "pairs", "--initial_model_id", folder / "model", *SHORT.split()]


def test_a_recipe_is_chosen_by_default_unless_flags_or_too_few_targets_say_otherwise(
    flags: list[object], tmp_path: Path, call: Call
) -> None:
    for given in (
        "", "--train_epochs 10", "--recipe none", "--max_angle 0.3", "--num_cycles 3",
        "--train_lr 1e-4", "--heldout 0", "--max_samples 30 --heldout 0.3",
    ):  # fmt: skip
        shown = call("em", "--work_dir", tmp_path, *flags[:4], *given.split(), "--dry_run")
        assert shown.code == 0, shown.err
        assert ("trials of --recipe auto" in shown.out) == (given in ("", "--train_epochs 10"))


def test_a_recipe_is_chosen_kept_and_reported(
    flags: list[object], tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = call("em", "--work_dir", tmp_path / "whole", *flags)
    assert whole.code == 0, whole.err
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    found = summary["recipe"]
    assert len(found["trials"]) == 4 and not (tmp_path / "whole" / "trials").exists()
    assert (found["trained_on"], found["judged_by"]) == (17, 16 + 47)
    rates = {row["lr"] for row in found["trials"]}
    assert len(rates) == 3 and found["lr"] in rates and found["seconds"] > 0
    trained = json.loads((tmp_path / "whole/cycle-01/sft/run.json").read_text())
    assert trained["lr"] == found["lr"] and summary["settings"]["recipe"] == "auto"
    assigned = json.loads((tmp_path / "whole/cycle-01/assign/run.json").read_text())
    assert assigned["method"] == found["method"]
    assert f"recipe: assign_method {found['method']}" in whole.out
    assert "Which recipe" in (tmp_path / "whole" / "report.html").read_text()

    done = []  # of the second call

    def stop(*given: Any) -> Verdict | None:  # killed in the third trial
        done.append(given)
        if len(done) == 3:
            raise KeyboardInterrupt
        return attempt(*given)

    attempt = EmRun._try
    with monkeypatch.context() as patch:
        patch.setattr(EmRun, "_try", lambda *given: stop(*given))
        assert call("em", "--work_dir", tmp_path / "killed", *flags).code == 130
    assert call("em", "--work_dir", tmp_path / "killed", *flags).code == 0
    again = json.loads((tmp_path / "killed" / "summary.json").read_text())
    assert again["recipe"]["trials"] == found["trials"]
    assert again["random_noise"] == summary["random_noise"]


def test_a_recipe_needs_held_out_pairs_and_enough_targets(
    flags: list[object], tmp_path: Path, call: Call
) -> None:
    for more, said in (
        (["--heldout", 0], "judges by held-out pairs, and there are none"),
        (["--num_cycles", 1], "would train on 8 of 64 targets, fewer than 16"),
    ):
        ended = call("em", "--work_dir", tmp_path, *flags, *more)
        assert ended.code == 2 and said in ended.err, ended.err
