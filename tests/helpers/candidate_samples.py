"""Ways to move noises, and targets to choose for."""

from __future__ import annotations

import dataclasses

import torch

from oneshot_fast.generators.base import Conditioning
from oneshot_fast.jobs.assign.targets import Target
from oneshot_fast.search.options import SearchOptions

GRADIENT = {
    "rotation": SearchOptions("rotation", steps=8),
    "raw": SearchOptions("rotation", steps=8, rotation_optimizer="raw_adam"),
    "tiles": SearchOptions("rotation", steps=8, rotation_groups=2),
    "sphere": SearchOptions("sphere", steps=8),
    "white": SearchOptions("white", steps=8),
    "sphere, Adam": SearchOptions("sphere", steps=8, sphere_optimizer="adam"),
    "white, Adam": SearchOptions("white", steps=8, sphere_optimizer="adam"),
}


def no_prompts(count: int) -> Conditioning:
    return Conditioning(torch.zeros(count, 1), torch.zeros(count, 1))


def of_one_prompt(targets: list[Target]) -> list[Target]:
    record = targets[0].record
    return [
        dataclasses.replace(
            t, prompt=targets[0].prompt, record=dataclasses.replace(t.record, prompt=record.prompt)
        )
        for t in targets
    ]


def pool_seed(targets: list[Target], k: int) -> int:
    from oneshot_fast.runtime.seeds import derived_seed

    return derived_seed(0, "pool", targets[0].record.id, k)
