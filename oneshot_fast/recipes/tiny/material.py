"""What a generator of the recipe is trained on."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from tqdm import trange

from oneshot_fast.embedded import digits as drawn
from oneshot_fast.embedded.digits import BASE_STYLE, load_digits, prompt_of, random_affine, render


class Material(Protocol):
    """Images of 64 x 64 pixels, [0, 1] RGB, and the texts of their classes."""

    prompts: tuple[str, ...]

    def of_any_style(self, count: int, draw: torch.Generator) -> Tensor:
        """Images [count, 3, 64, 64] that the VAE learns from."""

    def base(self, copies: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images [B, 3, 64, 64] and labels [B] that the teacher learns, in ``copies`` parts."""


class Digits:
    """The training writers' digits; the teacher learns them in black on white."""

    prompts = tuple(map(prompt_of, range(10)))

    def of_any_style(self, count: int, draw: torch.Generator) -> Tensor:
        """Digits in any style, moved."""
        digits, _ = load_digits("train")
        index = torch.randint(len(digits), (count,), generator=draw)
        style = drawn.random_style(count, draw)
        return render(digits[index], style, random_affine(count, 1.5, draw))

    def base(self, copies: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All digits, moved a little, ``copies`` times."""
        draw = torch.Generator().manual_seed(seed)
        digits, labels = load_digits("train")
        for _ in trange(copies, desc="encode"):
            yield render(digits, BASE_STYLE, random_affine(len(digits), 0.6, draw)), labels
