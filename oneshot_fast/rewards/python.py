"""``python:module.name``: a reward of the user's own, a function or a subclass of ``Reward``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from oneshot_fast.errors import UserError
from oneshot_fast.rewards.base import Reward, Setup
from oneshot_fast.runtime.user_functions import import_function


class PythonReward(Reward):
    """Calls ``function(images, prompts)``, which returns one score per image.

    Images are [B, 3, H, W] float32 in [0, 1] RGB, prompts a list of B strings, scores [B]. A
    function whose scores carry no gradient says so by ``function.differentiable = False``.
    """

    def __init__(self, name: str, function: Callable[[Tensor, list[str]], Tensor]) -> None:
        """Score by ``function``; ``name`` is the reward's."""
        super().__init__()
        self.name = name
        self.differentiable = bool(getattr(function, "differentiable", True))
        self._function = function
        self._prompts: list[str] = []

    @classmethod
    def load(cls, name: str, setup: Setup) -> Reward:
        """Import the function, or load the class; modules of the working directory count, too."""
        found: Any = import_function(name, "reward")
        if isinstance(found, type) and issubclass(found, Reward):
            return found.load(name, setup)
        return cls(name, found)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Numbers of the prompts, which are kept, [B] int64, on the CPU: reading must not wait."""
        first = len(self._prompts)
        self._prompts += prompts
        return torch.arange(first, len(self._prompts), device="cpu")

    def forward(self, images: Tensor, features: Tensor) -> Tensor:
        if isinstance(images, FakeTensor):  # a dry run: without values the function cannot run
            return images.float().flatten(1).mean(1)
        prompts = [self._prompts[k] for k in features.tolist()]
        scores = torch.as_tensor(self._function(images.float(), prompts), device=images.device)
        if scores.shape != images.shape[:1]:
            raise UserError(
                f"reward {self.name} returned shape {list(scores.shape)}, expected one score for "
                f"each of {len(images)} images"
            )
        needs_gradient = images.requires_grad and torch.is_grad_enabled() and self.differentiable
        if needs_gradient and not scores.requires_grad:
            raise UserError(
                f"reward {self.name} returned no gradient; set differentiable = False on the "
                "function and use a search"
            )
        return scores.float()
