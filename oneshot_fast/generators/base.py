"""What a generator is told about its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptEncoding:
    """What the UNet is told about a batch of prompts.

    Attributes:
        embeds: Hidden states of both text encoders, [B, 77, E].
        pooled: Pooled embedding of the second text encoder, [B, P].
    """

    embeds: Tensor
    pooled: Tensor

    def row(self, k: int) -> PromptEncoding:
        """The encoding of prompt ``k``, as a batch of one."""
        return PromptEncoding(self.embeds[k : k + 1], self.pooled[k : k + 1])

    @staticmethod
    def cat(parts: Sequence[PromptEncoding]) -> PromptEncoding:
        """One batch of the prompts of all ``parts``."""
        return PromptEncoding(
            torch.cat([part.embeds for part in parts]), torch.cat([part.pooled for part in parts])
        )
