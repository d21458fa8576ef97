"""Held-out pairs: how many, seeded, whatever else is in the list; and how they are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from oneshot_fast.data.records import Failure, Record
from oneshot_fast.errors import UserError
from oneshot_fast.evaluation.features import load_features
from oneshot_fast.evaluation.heldout import hold_out, measure_against
from oneshot_fast.generators.loading import load_generator
from oneshot_fast.generators.target_images import TargetImages


def pairs(count: int) -> list[Record | Failure]:
    return [Record(f"id{k}", k, "a", "x.png", Path("x.png")) for k in range(count)]


@pytest.mark.parametrize(
    ("count", "share", "held"),
    [(63, None, 0), (64, None, 16), (300, None, 30), (9000, None, 500), (10, 0.3, 3), (80, 0, 0)],
)
def test_a_tenth_is_held_out_where_it_can_be_spared(count, share, held) -> None:
    kept, out = hold_out(pairs(count), share, 0)
    assert len(out) == held and len(kept) == count - held
    assert sorted([*kept, *out], key=lambda item: item.line) == pairs(count)


def test_the_choice_is_of_the_seed_and_the_places_alone() -> None:
    items = pairs(80)
    _, held = hold_out(items, None, 0)
    assert hold_out(items, None, 0)[1] == held != hold_out(items, None, 1)[1]
    broken = [Failure("no JSON", item.line) for item in items]
    assert [item.line for item in hold_out(broken, None, 0)[1]] == [item.line for item in held]


@pytest.mark.parametrize("share", [-0.1, 1.0, 0.99])
def test_shares_that_make_no_sense(share) -> None:
    with pytest.raises(UserError, match="heldout"):
        hold_out(pairs(10), share, 0)


def test_images_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    generator = load_generator("tiny", device="cpu")
    targets = TargetImages(generator)
    Image.new("RGB", (64, 64), (255, 0, 0)).save(tmp_path / "red.png")
    absent, red, again = (
        Record(name, 1, "a", name, tmp_path / f"{name}.png") for name in ("absent", "red", "red")
    )
    folder = tmp_path / "eval"
    more = {"samples": 10, "seed": 0, "features": load_features("vae", generator)}
    found = measure_against([absent, red, again], targets, generator, folder, **more)
    measure, real, reasons = found
    assert [*reasons] == [0] and "absent.png" in reasons[0]
    assert measure.real is not None and len(measure.real) == 2
    assert torch.equal(measure.real[0], measure.real[1]) and real["prompt_diversity"] == 0
    with pytest.raises(UserError, match=r"no held-out image can be read: .*absent\.png"):
        measure_against([absent], targets, generator, folder, **more)
