"""CLIP's two encoders in one embedding space, which several rewards score in."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from oneshot_fast.rewards.base import EmbeddingReward, ImageEncoder, Setup
from oneshot_fast.rewards.preprocess import preprocess
from oneshot_fast.rewards.weights import read_model, read_tokenizer, tokenize

VIT_L = "CLIP-ViT-L-14"
TOKENIZER = ("CLIPTokenizer", "merges.txt", "vocab.json")


class ClipEncoder(ImageEncoder):
    """A frozen transformers ``CLIPModel`` with its tokenizer."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prepare: Callable[[Tensor, int, torch.dtype], Tensor] = preprocess,
    ) -> None:
        """Wrap a model, the tokenizer of its texts and the preprocessing of its images."""
        super().__init__()
        self.model, self._prepare = model, prepare
        self.tokenizer = tokenizer
        self.prompt_tokens: int = model.config.text_config.max_position_embeddings
        self._size = model.config.vision_config.image_size
        # float32 even where the model is not: scores of near images differ in the last digits
        self.scale = float(model.logit_scale.detach().double().exp())

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit embeddings, [B, D] float32; what exceeds the context length is cut off."""
        found = tokenize(self.tokenizer, prompts, self.prompt_tokens)
        ids = found.input_ids.to(self.model.device)
        pooled = self.model.text_model(ids).pooler_output
        return F.normalize(self.model.text_projection(pooled).float(), dim=-1)

    def encode_images(self, images: Tensor) -> Tensor:
        pixels = self._prepare(images, self._size, self.model.dtype)
        pooled = self.model.vision_model(pixels).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)


class CosineReward(EmbeddingReward):
    """Scale times the cosine of an image's and its prompt's CLIP embedding."""

    encoder: ClipEncoder

    def __init__(self, name: str, encoder: ClipEncoder, scale: float) -> None:
        """Score in ``encoder``'s space; ``name`` is the reward's."""
        super().__init__()
        self.name = name
        self.encoder, self.scale = encoder, scale
        self.tokenizer, self.prompt_tokens = encoder.tokenizer, encoder.prompt_tokens

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return self.encoder.encode_prompts(prompts)

    def rate(self, embeddings: Tensor, features: Tensor) -> Tensor:
        return self.scale * (embeddings * features).sum(1)


def load_clip(setup: Setup, model: str) -> ClipEncoder:
    """The CLIPModel in the folder ``model``, if it is whole; rewards of one ``setup`` share it."""
    if model not in setup.shared:
        network = read_model(setup, model, "CLIPModel")
        setup.shared[model] = ClipEncoder(network, read_tokenizer(setup, model, *TOKENIZER))
    return setup.shared[model]
