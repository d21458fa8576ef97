"""``clip``: how well an image fits its prompt."""

from typing import ClassVar

from oneshot_fast.rewards.base import Setup
from oneshot_fast.rewards.clip_encoder import VIT_L, CosineReward, load_clip


class ClipReward(CosineReward):
    """CLIP's logit: its scale, 100 as published, times the cosine of image and prompt.

    Radford et al. 2021, arXiv 2103.00020. By default ViT-L/14.
    """

    model: ClassVar = VIT_L

    @classmethod
    def load(cls, name: str, setup: Setup) -> "ClipReward":
        encoder = load_clip(setup, cls.model)
        return cls(name, encoder, encoder.scale)
