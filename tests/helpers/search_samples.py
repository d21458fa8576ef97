"""Shared by tests: parts of test_matching_slots."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from oneshot_fast.generators.base import Conditioning, Generator, Prediction
from oneshot_fast.jobs.assign.options import AssignOptions

STEPS = 12
FULL = AssignOptions("rotation", rotation_optimizer="raw_adam", lr=0.155, steps=STEPS)


PATIENT = dataclasses.replace(FULL, stop_patience=2, stop_improvement=0.045)


class Limited:
    """A generator that evaluates at most so many targets at once, as if on a small GPU."""

    def __init__(self, generator: Generator, limit: int) -> None:
        self.generator, self.limit, self.sizes = generator, limit, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)

    def predict(self, eps: Tensor, prompts: Conditioning) -> Prediction:
        self.sizes.append(len(eps))
        if len(eps) > self.limit:
            raise torch.OutOfMemoryError("out of memory")
        return self.generator.predict(eps, prompts)
