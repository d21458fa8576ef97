"""``pickscore``: which of several images for a prompt people pick."""

from __future__ import annotations

from oneshot_fast.rewards.base import Setup
from oneshot_fast.rewards.clip_encoder import CosineReward, load_clip


class PickScoreReward(CosineReward):
    """Scale times cosine, both of a CLIP ViT-H/14 trained on people's choices.

    Kirstain et al. 2023, arXiv 2305.01569, equation 2.
    """

    @classmethod
    def load(cls, name: str, setup: Setup) -> PickScoreReward:
        """The reward with the CLIPModel in PickScore_v1."""
        encoder = load_clip(setup, "PickScore_v1")
        return cls(name, encoder, encoder.scale)
