"""Distances in features of a user's own: searched, pooled, followed by gradients, refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_samples import rows
from samples import of_one_prompt, pool_seed
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from oneshot_fast.data.pairs import read_pairs
from oneshot_fast.errors import UserError
from oneshot_fast.generators.base import Generator
from oneshot_fast.generators.target_images import TargetImages
from oneshot_fast.jobs.assign.objective import MatchingObjective
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.plan import assign_plan, assignment_memory
from oneshot_fast.jobs.assign.search import Chooser, TargetSearch
from oneshot_fast.jobs.assign.targets import Preparer, Target, problem_of
from oneshot_fast.jobs.em.options import EmOptions
from oneshot_fast.runtime.seeds import gaussian

ROWS = AssignOptions(
    steps=4, latent_loss_weight=0.0, feature_weight=3.0, features="python:feature_samples.rows"
)


def prepare(tiny: Generator, data: Path, options: AssignOptions) -> Any:
    preparer = Preparer(tiny, TargetImages(tiny), options, seed=0, resize_mode="crop")
    return preparer.prepare([*enumerate(read_pairs(data)[0])])


@pytest.fixture(scope="module")
def targets(tiny: Generator, small_data: Path) -> list[Target]:
    found: list[Target] = prepare(tiny, small_data, ROWS)[0]
    return found


def distance(tiny: Generator, target: Target, eps: Tensor) -> float:
    """Mean squared difference of the rows' means, written out."""
    image = TargetImages(tiny).image(target.record.image_path, "crop")
    made = tiny.decode(tiny.latents(eps[None], target.prompt))[0]
    return (rows(made[None]) - rows(image[None])).square().mean().item()


def test_the_loss_is_a_weighted_sum_of_all_distances(tiny: Generator, small_data: Path) -> None:
    parts = {"latent_loss_weight": 1.0, "pixel_l1_weight": 2.0, "feature_weight": 3.0}
    both = dataclasses.replace(ROWS, **parts)
    problem = problem_of(prepare(tiny, small_data, both)[0])
    single = []
    for name in parts:
        weights = {other: parts[other] if other == name else 0.0 for other in parts}
        alone = MatchingObjective(tiny, dataclasses.replace(ROWS, **weights))
        single.append(alone(problem.eps, problem).loss)
    torch.testing.assert_close(
        MatchingObjective(tiny, both)(problem.eps, problem).loss, torch.stack(single).sum(0)
    )
    assert all((loss > 1e-4).all() for loss in single)


def test_search_finds_the_candidate_nearest_in_features(
    tiny: Generator, targets: list[Target]
) -> None:
    options = dataclasses.replace(ROWS, method="best_of_n", candidates=6)
    chooser = Chooser(tiny, options, 0)
    for before, after in zip(targets, chooser.choose(targets), strict=True):
        seeds = [chooser._seed_of(before, k) for k in range(6)]
        known = [distance(tiny, before, gaussian([s], before.eps.shape)[0]) for s in seeds]
        assert after.seed == seeds[known.index(min(known))]
        assert after.first_loss == pytest.approx(3 * known[0], rel=1e-3)


def test_a_pool_is_matched_by_features(tiny: Generator, targets: list[Target]) -> None:
    same = of_one_prompt(targets)
    options = dataclasses.replace(ROWS, method="pool", candidates=2)
    found = Chooser(tiny, options, 0).choose(same)
    seeds = [pool_seed(same, k) for k in range(2 * len(same))]
    noises = gaussian(seeds, same[0].eps.shape)
    table = torch.tensor([[distance(tiny, t, eps) for eps in noises] for t in same])
    expected = [seeds[k] for k in linear_sum_assignment(table.numpy())[1]]
    assert [target.seed for target in found] == expected


@pytest.mark.parametrize("method", ["sphere", "rotation"])
def test_gradients_go_through_the_features(
    tiny: Generator, targets: list[Target], method: Any
) -> None:
    """With more targets than places on the device, which others take over."""
    options = dataclasses.replace(ROWS, method=method, stop_loss=1e-9)
    found = [s for part in TargetSearch(tiny, options, batch_size=4).solve([targets]) for s in part]
    assert sorted(s.item.index for s in found) == [0, 1, 2, 3, 4, 5]
    for s in found:
        assert s.losses[0] == pytest.approx(3 * distance(tiny, s.item, s.item.eps), rel=1e-3)
        assert min(s.losses) == pytest.approx(3 * distance(tiny, s.item, s.z), rel=1e-2)
        assert min(s.losses) < 0.9 * s.losses[0]


def test_bad_features_of_one_target_fail_alone(tiny: Generator, small_data: Path) -> None:
    options = dataclasses.replace(ROWS, features="python:feature_samples.not_finite")
    ready, failures = prepare(tiny, small_data, options)
    assert len(ready) == 5 and [f.prompt for f in failures] == ["a handwritten digit one"]
    assert "NaN or infinite" in failures[0].reason


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one", r"shape \[1, 3, 64, 64\], expected \[6, ...\]"),
        ("counts", "a floating tensor, not one of torch.int64"),
        ("growing", "a made image have 6 values, of its target 1"),
        ("rounded", "carry no gradient"),
    ],
)
def test_a_function_that_does_not_fit(
    tiny: Generator, small_data: Path, targets: list[Target], name: str, message: str
) -> None:
    options = dataclasses.replace(ROWS, features=f"python:feature_samples.{name}")
    with pytest.raises(UserError, match=message):
        batch = targets if name in ("one", "counts") else prepare(tiny, small_data, options)[0]
        [*TargetSearch(tiny, options, batch_size=6).solve([batch])]


def test_one_number_without_a_gradient_can_be_searched_for(
    tiny: Generator, small_data: Path
) -> None:
    for name in ("rounded", "brightness"):
        options = dataclasses.replace(
            ROWS,
            method="best_of_n",
            candidates=2,
            features=f"python:feature_samples.{name}",
        )
        ready = prepare(tiny, small_data, options)[0]
        assert len(Chooser(tiny, options, 0).choose(ready)) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": None}, "together"),
        ({"feature_weight": 0.0}, "nothing to match"),
        ({"feature_weight": 0.0, "latent_loss_weight": 1.0}, "together"),
        ({"feature_weight": float("nan")}, "finite and not negative"),
        ({"features": "feature_samples.rows"}, "does not begin with python:"),
        ({"features": "python:feature_samples.absent"}, "cannot import features"),
        ({"features": "python:absent_module.rows"}, "cannot import features"),
        ({"features": "python:rows"}, "write python:module.function"),
        ({"features": "python:feature_samples.number"}, "is no function but int"),
    ],
)
def test_senseless_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(ROWS, **changes).check()


def test_the_commands_take_features(small_data: Path, tmp_path: Path, call: Any) -> None:
    flags = ["--data_root", small_data, "--output_root", tmp_path / "run", "--model_id", "tiny"]
    flags += ["--assign_method", "search", "--candidates", 2, "--num_images", 0]
    flags += ["--feature_weight", 1, "--features", "python:feature_samples.brightness"]
    assert call("assign", *flags).code == 0
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert settings["features"] == "python:feature_samples.brightness"
    other = call("assign", *flags[:-1], "python:feature_samples.rows")
    assert other.code == 2 and "features: python:feature_samples.brightness then" in other.err
    wrong = call("assign", *flags[:-1], "python:feature_samples.absent")
    assert wrong.code == 2 and wrong.err.count("\n") == 1
    em = EmOptions(feature_weight=2.0, features="python:feature_samples.rows").resolve(64).assign()
    assert em.feature_weight == 2.0 and em.features == ROWS.features


def test_dry_runs_count_the_decoder(tiny: Generator) -> None:
    plain = AssignOptions()
    assert (
        assignment_memory(tiny, ROWS, 64, 2).held["activations"]
        > 1.5 * assignment_memory(tiny, plain, 64, 2).held["activations"]
    )
    plan = assign_plan(tiny, ROWS, resolution=64, batch_size=2, samples=6, num_images=0)
    assert plan.seconds is not None and plan.seconds > 0
