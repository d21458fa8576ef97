"""Options that are filled from other options."""

from dataclasses import dataclass

from oneshot_fast.runtime.options import pick


@dataclass(frozen=True)
class Step:
    steps: int = 1
    lr: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Job:
    train_steps: int = 5
    steps: int = 7
    lr: float = 0.5


def test_pick_takes_prefixed_fields_then_equal_ones_then_defaults() -> None:
    assert pick(Step, Job(), "train_") == Step(steps=5, lr=0.5, seed=0)
    assert pick(Step, Job()) == Step(steps=7, lr=0.5, seed=0)
    assert pick(Step, Job(), "train_", steps=9, seed=3) == Step(steps=9, lr=0.5, seed=3)
