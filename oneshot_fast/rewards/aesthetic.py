"""``aesthetic``: how much people like the look of an image, whatever its prompt."""

from torch import Tensor, nn

from oneshot_fast.rewards.base import EmbeddingReward, Setup
from oneshot_fast.rewards.clip_encoder import VIT_L, ClipEncoder, load_clip
from oneshot_fast.rewards.weights import linear_head
from oneshot_fast.runtime.tensor_files import read_pickle

HEAD_FILE = "sac+logos+ava1-l14-linearMSE.pth"


class AestheticReward(EmbeddingReward):
    """LAION's linear head on the unit embedding of CLIP ViT-L/14: a rating from 1 to 10.

    Schuhmann 2022, https://github.com/christophschuhmann/improved-aesthetic-predictor, the head
    trained on SAC, Logos and AVA1.
    """

    encoder: ClipEncoder

    def __init__(self, name: str, encoder: ClipEncoder, head: nn.Sequential) -> None:
        """Score by ``head``, float32, on embeddings of ``encoder``; ``name`` is the reward's."""
        super().__init__()
        self.name = name
        self.encoder, self.head = encoder, head

    @classmethod
    def load(cls, name: str, setup: Setup) -> "AestheticReward":
        path = setup.find("Aesthetic", HEAD_FILE)
        head = linear_head(read_pickle(path), path).to(setup.device)
        return cls(name, load_clip(setup, VIT_L), head)

    def rate(self, embeddings: Tensor, features: Tensor) -> Tensor:
        return self.head(embeddings)[:, 0]
