"""Tests of RotationAdam: both ways of a gradient, groups, schedulers, files, convergence."""

import copy
import math
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import conv2d

from oneshot_fast import RotationAdam, ops

MOMENTS = ["elementwise", "scalar"]


def rotations(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return ops.skew_exp(torch.randn(shape, dtype=dtype))


def matching_problem(B: int = 4):
    """Loss per image of a small generator, and the noise to rotate; no rotation brings it to 0."""
    first, second = torch.randn(8, 4, 3, 3) / 6, torch.randn(3, 8, 3, 3) / 8

    def generate(z: Tensor) -> Tensor:
        return conv2d(torch.tanh(conv2d(z, first, padding=1)), second, padding=1)

    target = generate(torch.randn(B, 4, 16, 16))
    return torch.randn(B, 4, 16, 16), lambda z: (generate(z) - target).square().mean((1, 2, 3))


def run_rotation_adam(eps: Tensor, loss_of, lr: float, steps: int, **options) -> float:
    """Mean over the images of the lowest loss on the way."""
    q = torch.eye(16).repeat(len(eps), 1, 1)
    optimizer = RotationAdam([q], lr=lr, **options)
    best = torch.full((len(eps),), math.inf)
    for _ in range(steps):
        z = ops.patch_rotate(eps, q, 2).requires_grad_()
        loss = loss_of(z)
        (dz,) = torch.autograd.grad(loss.sum(), z)
        optimizer.step(outer={q: ops.patch_outer(dz, z.detach(), 2, like=q)})
        best = torch.minimum(best, loss.detach())
    return best.mean().item()


def run_raw_adam(eps: Tensor, loss_of, lr: float, steps: int) -> float:
    """The same with Adam on a, q = exp(a - a^T)."""
    a = torch.zeros(len(eps), 16, 16, requires_grad=True)
    optimizer = torch.optim.Adam([a], lr=lr)
    best = torch.full((len(eps),), math.inf)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(ops.patch_rotate(eps, ops.skew_exp(a), 2))
        loss.sum().backward()
        optimizer.step()
        best = torch.minimum(best, loss.detach())
    return best.mean().item()


@pytest.mark.parametrize("second_moment", MOMENTS)
def test_as_low_as_adam_on_the_generator(second_moment: str) -> None:
    """At the best learning rate of each."""
    eps, loss_of = matching_problem()
    raw = min(run_raw_adam(eps, loss_of, lr, 50) for lr in (0.05, 0.1, 0.2))
    ours = min(
        run_rotation_adam(eps, loss_of, lr, 50, second_moment=second_moment)
        for lr in (0.1, 0.2, 0.4)
    )
    assert ours <= raw


def test_both_ways_of_a_gradient_agree() -> None:
    eps, loss_of = matching_problem()
    q = rotations(4, 16, 16)
    leaf = q.clone().requires_grad_()
    cheap, common = RotationAdam([q]), RotationAdam([leaf])
    for _ in range(3):
        z = ops.patch_rotate(eps, q, 2).requires_grad_()
        (dz,) = torch.autograd.grad(loss_of(z).sum(), z)
        cheap.step(outer={q: ops.patch_outer(dz, z.detach(), 2, like=q)})

        common.zero_grad()
        loss_of(ops.patch_rotate(eps, leaf, 2)).sum().backward()
        common.step()
    torch.testing.assert_close(q, leaf.detach(), rtol=0, atol=1e-4)


def test_outer_comes_before_grad_and_the_others_stay() -> None:
    q, with_both, without = rotations(3, 4, 4), rotations(4, 4), rotations(2, 5, 5)
    old, expected = without.clone(), with_both.clone()
    with_both.grad = torch.randn(4, 4)
    g = torch.randn(4, 4)
    RotationAdam([q, with_both, without], lr=0.2).step(outer={with_both: g, q: torch.zeros_like(q)})
    RotationAdam([expected], lr=0.2).step(outer={expected: g})
    assert torch.equal(with_both, expected)
    assert torch.equal(without, old)


def test_groups_shapes_and_options() -> None:
    """Each parameter moves as rotation_step alone would move it, with the options of its group."""
    one, two = rotations(3, 16, 16), rotations(5, 5, dtype=torch.float64)
    options = {"lr": 0.3, "betas": (0.5, 0.7), "eps": 1e-3, "max_angle": 0.1}
    optimizer = RotationAdam(
        [{"params": [one]}, {"params": [two], **options, "second_moment": "scalar"}], lr=0.02
    )
    alone, other = one.clone(), two.clone()
    state = [torch.zeros(3, 16, 16), torch.zeros(3, 16, 16), torch.zeros(3)]
    other_state = [torch.zeros(n, dtype=torch.float64) for n in ((5, 5), (), ())]
    for _ in range(3):
        g, h = torch.randn(3, 16, 16), torch.randn(5, 5, dtype=torch.float64)
        optimizer.step(outer={one: g, two: h})
        ops.rotation_step(alone, g, *state, lr=0.02)
        ops.rotation_step(
            other, h, *other_state, lr=0.3, beta1=0.5, beta2=0.7, eps=1e-3, max_angle=0.1
        )
    assert torch.equal(one, alone)
    assert torch.equal(two, other)
    assert optimizer.state[two]["exp_avg_sq"].shape == ()


def test_half_precision_gradients() -> None:
    q = rotations(2, 8, 8)
    expected, g = q.clone(), torch.randn(2, 8, 8).bfloat16()
    RotationAdam([q]).step(outer={q: g})
    RotationAdam([expected]).step(outer={expected: g.float()})
    assert torch.equal(q, expected)


def test_closure_and_scheduler() -> None:
    q = rotations(2, 8, 8).requires_grad_()
    optimizer = RotationAdam([q], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = q.diagonal(dim1=-2, dim2=-1).sum().neg()
        loss.backward()
        return loss

    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            losses.append(optimizer.step(closure).item())
            scheduler.step()
    assert losses == sorted(losses, reverse=True)
    assert optimizer.param_groups[0]["lr"] == 0.1 / 16


def gradients() -> list[Tensor]:
    return [torch.randn(3, 4, 4) for _ in range(8)]


@pytest.mark.parametrize("second_moment", MOMENTS)
@pytest.mark.parametrize("how", ["file", "state_dict"])
def test_a_saved_run_continues_bit_for_bit(how: str, second_moment: str, tmp_path: Path) -> None:
    path = tmp_path / "optimizer.safetensors"
    q, gs = rotations(3, 4, 4), gradients()
    optimizer = RotationAdam([q], lr=0.07, second_moment=second_moment)
    for g in gs[:4]:
        optimizer.step(outer={q: g})
    optimizer.save(path)
    resumed = q.clone()
    other = RotationAdam([resumed], lr=0.5)
    if how == "file":
        other.load(path)
    else:
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for g in gs[4:]:
        optimizer.step(outer={q: g})
        other.step(outer={resumed: g})
    assert torch.equal(q, resumed)
    assert other.param_groups[0]["lr"] == 0.07
    assert sorted(load_file(path)) == ["0.exp_avg", "0.exp_avg_sq", "0.steps"]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_save_before_the_first_step(tmp_path: Path) -> None:
    optimizer = RotationAdam([rotations(4, 4)], lr=0.3)
    optimizer.save(tmp_path / "new.safetensors")
    other = RotationAdam([rotations(4, 4)])
    other.load(tmp_path / "new.safetensors")
    assert other.param_groups[0]["lr"] == 0.3
    assert not other.state


def test_a_file_of_other_parameters_is_refused(tmp_path: Path) -> None:
    RotationAdam([rotations(4, 4)]).save(tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="parameter group"):
        RotationAdam([rotations(4, 4), rotations(4, 4)]).load(tmp_path / "one.safetensors")


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        ([torch.zeros(4, 5)], {}, r"expected \[..., D, D\] in float32 or float64, got \[4, 5\]"),
        ([torch.zeros(4, 4).half()], {}, r"got \[4, 4\] in float16"),
        ([torch.zeros(4, 4)], {"lr": -0.1}, "lr = -0.1 is out of range"),
        ([torch.zeros(4, 4)], {"betas": (0.9, 1.0)}, r"betas = \(0.9, 1.0\) is out of range"),
        ([torch.zeros(4, 4)], {"eps": 0.0}, "eps = 0.0"),
        ([torch.zeros(4, 4)], {"max_angle": 0.0}, "max_angle = 0.0"),
        ([torch.zeros(4, 4)], {"second_moment": "both"}, "second_moment = 'both'"),
    ],
)
def test_wrong_options_are_named(params, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RotationAdam(params, **options)


def test_wrong_group_and_wrong_outer() -> None:
    q = rotations(4, 4)
    optimizer = RotationAdam([q])
    with pytest.raises(ValueError, match="lr = -1"):
        optimizer.add_param_group({"params": [rotations(3, 3)], "lr": -1.0})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=r"no parameters of this optimiser: \[3, 3\]"):
        optimizer.step(outer={rotations(3, 3): torch.zeros(3, 3)})
    with pytest.raises(RuntimeError, match=r"q must be \[2, 4, 4\], got \[4, 4\]"):
        optimizer.step(outer={q: torch.zeros(2, 4, 4)})
