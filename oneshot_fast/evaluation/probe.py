"""What features that know nothing of prompts tell of them: a linear probe of real images."""

import torch
import torch.nn.functional as F
from torch import Tensor

_RIDGE = 0.1  # of the features' mean square


class PromptProbe:
    """Tells the embedding of an image's prompt from its features.

    A ridge regression (Hoerl and Kennard 1970) on real images and their prompts, as linear probes
    are (Alain and Bengio 2016, arXiv:1610.01644). What it tells stands beside the features and
    counts as much as they do, so that distances see what an image shows, not only how it looks.
    """

    def __init__(self, features: Tensor, told: Tensor) -> None:
        """Learn.

        Args:
            features: Of M >= 2 real images, [M, F].
            told: Embeddings of their prompts, [M, E]; not all alike.
        """
        x, y = features.double(), told.double()
        self._mean, self._centre = x.mean(0), y.mean(0)
        deviation = x.std(0)
        self._deviation = deviation.clamp_min(1e-6 * deviation.max().item() + 1e-12)
        x, y = (x - self._mean) / self._deviation, y - self._centre
        kernel = x @ x.T
        weight = _RIDGE * kernel.diagonal().mean() + 1e-12
        inverse = torch.linalg.inv(kernel + weight * torch.eye(len(x), dtype=torch.float64))
        self._map = x.T @ (inverse @ y)
        own = (kernel @ inverse).diagonal()[:, None]
        self._scales = _spread(features.double()), _spread(x @ self._map)
        # each told by the others alone: the leave-one-out residuals of Allen 1974
        self.real = self._beside(features.double(), (x @ self._map - own * y) / (1 - own))

    def __call__(self, features: Tensor) -> Tensor:
        """Features [B, F] and what they tell of the prompts: [B, F + E] fp64."""
        return self._beside(features.double(), self._tell(features))

    def fit(self, features: Tensor, told: Tensor) -> Tensor:
        """Cosines [B] of what features [B, F] tell with the embeddings of B prompts, [B, E].

        Both are taken from the mean of the prompts that it has learnt.
        """
        return F.cosine_similarity(self._tell(features), told.double() - self._centre)

    def _tell(self, features: Tensor) -> Tensor:
        return (features.double() - self._mean) / self._deviation @ self._map

    def _beside(self, features: Tensor, told: Tensor) -> Tensor:
        own, other = self._scales
        return torch.cat((features / own, told / other), 1)


def _spread(features: Tensor) -> float:
    """RMS distance from the mean; 1 where all are alike."""
    return features.var(0).sum().sqrt().item() or 1.0
