"""Schedules of the main job: effort per cycle, partial E-steps, warm starts, an early end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from samples import rows_of

from oneshot_fast.data.manifests import read_manifest
from oneshot_fast.data.noise_files import read_noise
from oneshot_fast.errors import UserError
from oneshot_fast.evaluation.distances import Verdict, best_of
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.em.options import EmOptions
from oneshot_fast.jobs.optimize.options import OptimizeOptions
from oneshot_fast.jobs.sft.options import SftOptions

Call = Callable[..., Any]
SMALL = (
    "--eval_samples 10 --train_lr 2e-5 --preserve_latent_weight 0 --preserve_pixel_weight 0 "
    "--num_images 0"
)


@pytest.fixture
def em(small_model: Path, small_data: Path, tmp_path: Path, call: Call) -> Callable[[str], Any]:
    """Runs the job in ``tmp_path``, with the pairs as the held-out ones, too."""
    given = ["--initial_model_id", small_model, "--data_root", small_data]
    given += ["--heldout_root", small_data, "--work_dir", tmp_path, *SMALL.split()]
    return lambda flags: call("em", *given, *flags.split())


def by_id(path: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in rows_of(path)}


def test_partial_warm_cycles_of_a_schedule(tmp_path: Path, em: Callable[[str], Any]) -> None:
    flags = (
        "--em_schedule 3:2,2:1,2:1 --assign_fraction 0.5 --warm_start --pool_refresh 0 "
        "--assign_method sphere"
    )
    assert em(flags).code == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [len(row["assign"]["losses"]) for row in summary["cycles"]] == [4, 3, 3]
    first, second, third = (
        by_id(tmp_path / f"cycle-0{k}" / "assign/manifest.jsonl") for k in (1, 2, 3)
    )
    assert len(first) == 6 and len(second) == len(third) == 3
    assert second.keys() | third.keys() == first.keys()
    for rows in (second, third):  # the same base noises, and the search begins where it ended
        for name, row in rows.items():
            assert row["seed"] == first[name]["seed"]
            assert row["initial_loss"] < first[name]["initial_loss"]
    pairs = {pair.id: pair for pair in read_manifest(tmp_path / "cycle-03/manifest.jsonl")[0]}
    assert pairs.keys() == first.keys()
    for name, pair in pairs.items():
        newest = third if name in third else second
        folder = tmp_path / ("cycle-03" if name in third else "cycle-02") / "assign"
        assert pair.noise_path.resolve() == (folder / newest[name]["noise_path"]).resolve()
        assert read_noise(pair.noise_path, pair.noise_index).shape == (4, 8, 8)
    steps = [json.loads((tmp_path / f"cycle-0{k}/sft/summary.json").read_text())["steps"]
             for k in (1, 2, 3)]  # fmt: skip
    assert steps == [2, 1, 1]
    again = em(flags)
    assert again.code == 0 and json.loads((tmp_path / "summary.json").read_text()) == summary


def test_a_warm_search_keeps_or_betters_the_noise(tmp_path: Path, em: Callable[[str], Any]) -> None:
    flags = "--em_schedule 4:1,4:1 --assign_method search --warm_start --train_lr 1e-12"
    assert em(flags).code == 0
    first, second = (by_id(tmp_path / f"cycle-0{k}" / "assign/manifest.jsonl") for k in (1, 2))
    for name, row in second.items():
        assert row["best_loss"] <= first[name]["best_loss"] * (1 + 1e-3)
    assert any(row["seed"] != first[name]["seed"] for name, row in second.items())


def test_it_stops_when_the_measure_does(
    tmp_path: Path, small_model: Path, em: Callable[[str], Any]
) -> None:
    # a training that changes nothing does not come nearer to the held-out images either
    flags = "--num_cycles 4 --assign_steps 1 --train_epochs 1 --train_lr 1e-30 --patience 2"
    ended = em(flags)
    assert ended.code == 0 and "not better on held-out images in 2 cycles" in ended.err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["cycle"] for row in summary["cycles"]] == [1, 2]
    weights = "checkpoint-final/unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / weights).samefile(tmp_path / "cycle-02" / "sft" / weights)
    # and nothing beat the base, which is said first and kept as the best
    assert summary["best_cycle"] == 0 and ended.out.startswith("\nNothing beat the base")
    assert (
        "The final generator cannot be told apart from the base: energy score for 6 held-out"
        in ended.out
    )
    best = load_generator(tmp_path / "checkpoint-best").fingerprint()
    assert best == load_generator(small_model).fingerprint()
    kept = (tmp_path / "checkpoint-best" / "model_index.json").stat().st_mtime_ns
    assert em(flags).code == 0
    assert kept == (tmp_path / "checkpoint-best" / "model_index.json").stat().st_mtime_ns


def test_the_best_cycle_beats_the_base_by_more_than_one_error() -> None:
    def verdict(after: float) -> Verdict:
        return Verdict("energy_score", 10.0, after, 2.0)

    assert best_of([verdict(10), verdict(10.5), verdict(8.1)]) == 0
    assert best_of([verdict(7), verdict(6), verdict(6.5)]) == 2
    assert best_of([None, verdict(11)]) == best_of([]) == 0


def test_efforts_of_a_schedule() -> None:
    options = EmOptions(em_schedule="40:10,20:5").resolve(64)
    assert [options.assign(k).gradient_steps for k in (1, 2)] == [40, 20]
    assert [options.sft(cycles=[k]).epochs for k in (1, 2)] == [10, 5]
    assert options.sft("random", [1, 2]).epochs == 15
    pool = EmOptions(em_schedule="8:1,4:1", assign_method="pool").resolve(64)
    assert [pool.assign(k).candidates for k in (1, 2)] == [8, 4]
    plain = EmOptions(num_cycles=3, assign_steps=7, train_epochs=2).resolve(64)
    assert plain.schedule() == [(7, 2)] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"em_schedule": "40-10"}, 'em_schedule is "40-10"'),
        ({"em_schedule": "40:0"}, 'em_schedule is "40:0"'),
        ({"num_cycles": 0}, "num_cycles must be at least 1"),
        ({"assign_fraction": 0.0}, "assign_fraction must be above 0"),
        ({"warm_start": True, "assign_method": "rotation"}, "warm_start does not work"),
    ],
)
def test_senseless_schedules_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EmOptions(**changes).resolve(64).check()


def test_em_has_the_options_of_both_steps_but_for_these() -> None:
    def left_out(kind: type[Any], prefix: str) -> set[str]:
        own = {field.name for field in dataclasses.fields(EmOptions)}
        names = {field.name for field in dataclasses.fields(kind)}
        return names - own - {name.removeprefix(prefix) for name in own}

    # each kind of E-step has an optimiser of its own where noises move freely
    assert left_out(AssignOptions, "assign_") == {"free_optimizer"}
    assert left_out(OptimizeOptions, "assign_") == {"free_optimizer"}
    # EM decides, adds a new adapter in every cycle, and shows each cycle's images
    shown = {"validation_steps", "validation_prompt"}
    of_one = {"noise", "lora_from", "max_steps", "lr_num_cycles", "lr_power"}
    assert left_out(SftOptions, "train_") == of_one | shown
