"""Memory of an assignment's step as estimated, beside the count of a real one."""

from __future__ import annotations

import pytest
import torch

from oneshot_fast.generators.base import Generator
from oneshot_fast.jobs.assign.objective import MatchingObjective
from oneshot_fast.jobs.assign.options import AssignOptions
from oneshot_fast.jobs.assign.plan import assignment_memory
from oneshot_fast.planning.memory import LiveMemory
from oneshot_fast.search.problem import Problem


@pytest.mark.parametrize("pixel", [0.0, 1.0])
def test_the_estimate_of_an_assignment(pixel: float, tiny: Generator) -> None:
    options = AssignOptions(pixel_l1_weight=pixel)
    estimate = assignment_memory(tiny, options, 64, 3)
    z, latents = torch.zeros(2, 3, 4, 8, 8).unbind()
    target = {"latents": latents, "images": torch.zeros(3, 3, 64, 64)}
    problem = Problem(z, tiny.blank_prompts(3), target=target)
    networks = tiny.networks.values()
    known = [t for n in networks for t in (*n.parameters(), *n.buffers())]
    z = z.clone().requires_grad_()
    with LiveMemory(known) as memory:
        MatchingObjective(tiny, options)(z, problem).loss.sum().backward()
    weights = sum(p.nbytes for n in networks for p in n.parameters())
    assert estimate.peak == pytest.approx(weights + memory.peak, rel=0.15)
