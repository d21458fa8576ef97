"""``hybrid``: look and prompt at once, from one embedding of the image."""

from collections.abc import Sequence

from torch import Tensor, nn

from oneshot_fast.rewards.aesthetic import AestheticReward
from oneshot_fast.rewards.clip_encoder import ClipEncoder

COSINE_WEIGHT = 0.25


class HybridReward(AestheticReward):
    """The aesthetic rating + 0.25 times the cosine of image and prompt, both of CLIP ViT-L/14."""

    def __init__(self, name: str, encoder: ClipEncoder, head: nn.Sequential) -> None:
        """As for the aesthetic rating; prompts are read, too."""
        super().__init__(name, encoder, head)
        self.tokenizer, self.prompt_tokens = encoder.tokenizer, encoder.prompt_tokens

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return self.encoder.encode_prompts(prompts)

    def rate(self, embeddings: Tensor, features: Tensor) -> Tensor:
        return self.head(embeddings)[:, 0] + COSINE_WEIGHT * (embeddings * features).sum(1)
