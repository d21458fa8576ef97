"""``pickscore``: which of several images for a prompt people pick."""

from oneshot_fast.rewards.clip import ClipReward


class PickScoreReward(ClipReward):
    """Scale times cosine, both of a CLIP ViT-H/14 trained on people's choices.

    Kirstain et al. 2023, arXiv 2305.01569, equation 2.
    """

    model = "PickScore_v1"
