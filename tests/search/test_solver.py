"""Searches side by side: equal to torch's Adam, stopped early, refilled, halved without memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from samples import FULL, NOISE, PATIENT, ROUNDING, STEPS, Limited, assign_batch, batch_of
from torch.utils._python_dispatch import TorchDispatchMode

from oneshot_fast import ops
from oneshot_fast.errors import UserError
from oneshot_fast.generators.base import Generator
from oneshot_fast.jobs.assign.objective import matching_loss
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.search import TargetSearch
from oneshot_fast.jobs.assign.targets import Target
from oneshot_fast.noise.rotation import PatchRotation
from oneshot_fast.search.solver import Solved


def solve(
    generator: Any, options: AssignOptions, batch_size: int, *batches: list[Target]
) -> dict[int, Solved[Target]]:
    """Results by index, each target once."""
    search = TargetSearch(generator, options, batch_size=batch_size)
    found = [s for some in search.solve(batches) for s in some]
    assert len({s.item.index for s in found}) == len(found)
    return {s.item.index: s for s in found}


def same(found: dict[int, Solved[Target]], expected: dict[int, Solved[Target]]) -> None:
    assert found.keys() == expected.keys()
    for index, s in found.items():
        assert s.losses == pytest.approx(expected[index].losses, rel=ROUNDING)
        assert s.best_step == expected[index].best_step
        torch.testing.assert_close(s.z, expected[index].z, rtol=0, atol=NOISE)


def test_raw_adam_is_torch_adam(tiny: Generator, small_data: Path) -> None:
    eps, prompts, latents, _ = batch_of(tiny, small_data)
    rotation = PatchRotation(eps.shape, FULL.patch_size)
    # torch's eps is smaller; a radian is sqrt(D - 1) elements of a - a^T, each twice a change of a
    adam = torch.optim.Adam([rotation.skew], lr=FULL.lr / (2 * 15**0.5))
    curves = []
    for _ in range(STEPS):
        loss = matching_loss(tiny, rotation(eps), prompts, {"latents": latents}, FULL)
        curves.append(loss.detach())
        adam.zero_grad()
        loss.sum().backward()
        adam.step()
    result = assign_batch(tiny, eps, prompts, latents, None, FULL)
    torch.testing.assert_close(result.losses[:-1], torch.stack(curves), rtol=2e-3, atol=0)


def expected_end(curve: list[float], options: AssignOptions) -> int:
    """Number of losses that the rules of AssignOptions leave of a whole curve."""
    level, level_step = float("inf"), 0
    for step, loss in enumerate(curve):
        if loss < level * (1 - options.stop_improvement):
            level, level_step = loss, step
        stuck = options.stop_patience and step - level_step >= options.stop_patience
        if stuck or (options.stop_loss is not None and loss <= options.stop_loss):
            return step + 1
    return len(curve)


@pytest.mark.parametrize("batch_size", [2, 4, 8])
@pytest.mark.parametrize("rule", ["patience", "loss"])
def test_a_stopped_search_is_the_start_of_the_whole_one(
    tiny: Generator, targets: list[Target], rule: str, batch_size: int
) -> None:
    whole = solve(tiny, FULL, 6, targets)
    middle = sorted(s.losses[STEPS // 2] for s in whole.values())[3] * 1.001
    options = PATIENT if rule == "patience" else dataclasses.replace(FULL, stop_loss=middle)
    found = solve(tiny, options, batch_size, targets[:4], targets[4:])
    ends = {index: expected_end(s.losses, options) for index, s in whole.items()}
    assert min(ends.values()) < STEPS and len(set(ends.values())) > 1
    assert {index: len(s.losses) for index, s in found.items()} == ends
    for index, s in found.items():
        assert s.losses == pytest.approx(whole[index].losses[: ends[index]], rel=ROUNDING)
        assert s.best_step == s.losses.index(min(s.losses))
        problem = targets[index]
        with torch.no_grad():
            target = {"latents": problem.latent[None]}
            again = matching_loss(tiny, s.z[None], problem.prompt, target, options)
        assert again.item() == pytest.approx(min(s.losses), rel=ROUNDING)


@pytest.mark.parametrize("options", [FULL, PATIENT], ids=["full", "patient"])
def test_out_of_memory_halves_the_batch_and_goes_on(
    tiny: Generator, targets: list[Target], options: AssignOptions, capfd: Any
) -> None:
    expected = solve(tiny, options, 6, targets)
    limited = Limited(tiny, 3)
    same(solve(limited, options, 6, targets[:5], targets[5:]), expected)
    said = capfd.readouterr().err
    assert said.count("out of memory") == 1 and "going on with 3" in said
    assert limited.sizes.count(max(limited.sizes)) == 1
    with pytest.raises(UserError, match="out of memory with a single target"):
        solve(Limited(tiny, 0), options, 4, targets)


class Watch(TorchDispatchMode):
    """Refuses operations that make the host wait for a device."""

    WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.WAITS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [FULL, PATIENT], ids=["full", "patient"])
def test_a_search_computes_only_what_it_needs(
    tiny: Generator, small_data: Path, options: AssignOptions
) -> None:
    eps, prompts, latents, _ = batch_of(tiny, small_data)
    pipe = tiny.pipe
    idle = [pipe.text_encoder, pipe.text_encoder_2, pipe.vae.encoder, pipe.vae.decoder]
    calls: list[object] = []
    hooks = [m.register_forward_pre_hook(lambda m, x: calls.append(m)) for m in idle]
    with Watch():
        assign_batch(tiny, eps, prompts, latents, None, options)
    for hook in hooks:
        hook.remove()
    assert not calls
    for module in (*idle, pipe.unet):
        assert all(not p.requires_grad and p.grad is None for p in module.parameters())
    for module in (pipe.unet, pipe.vae):
        kinds = {type(processor) for processor in module.attn_processors.values()}
        assert kinds == {AttnProcessor2_0}  # torch's scaled_dot_product_attention


def test_a_rotation_is_what_is_found(tiny: Generator, targets: list[Target]) -> None:
    for s in solve(tiny, PATIENT, 2, targets).values():
        z = ops.patch_rotate(s.item.eps[None], s.q[None], PATIENT.patch_size)[0]
        torch.testing.assert_close(z, s.z, rtol=0, atol=1e-6)
