"""The learning rate of every step."""

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from oneshot_fast.training.options import TrainOptions


def rates(**options) -> list[float]:
    return [TrainOptions(lr=0.1, **options).lr_at(step, 10) for step in range(10)]


def test_it_rises_over_the_warmup_then_stays():
    assert rates(lr_warmup_steps=4)[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert set(rates()) == {0.1}


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_it_falls_as_that_of_torch(name: str):
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    theirs = (
        LinearLR(optimizer, 1.0, 0.0, total_iters=8)
        if name == "linear"
        else CosineAnnealingLR(optimizer, T_max=8)
    )
    ours = rates(lr_scheduler=name, lr_warmup_steps=2)
    assert ours[:2] == pytest.approx([0.05, 0.1])
    for rate in ours[2:]:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    ("name", "more", "theirs"),
    [("cosine_with_restarts", {"lr_num_cycles": 2}, {"num_cycles": 2}),
     ("polynomial", {"lr_power": 2.0}, {"power": 2.0})],
)  # fmt: skip
def test_it_is_that_of_diffusers(name: str, more: dict[str, float], theirs: dict[str, float]):
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule, expected = get_scheduler(name, optimizer, None, 3, 10, **theirs), []
    for _ in range(10):
        expected += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    found = rates(lr_scheduler=name, lr_warmup_steps=3, **more)
    assert found == pytest.approx([*expected[1:4], *expected[3:]])  # the warm-up is a step earlier


def test_max_steps_come_before_epochs():
    cut = TrainOptions(epochs=4, max_steps=7)
    assert (cut.steps(3), cut.passes(3), TrainOptions(epochs=4).steps(3)) == (7, 3, 12)
