"""``imagereward``: how much people would like an image for its prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oneshot_fast.errors import ModelError
from oneshot_fast.rewards.base import Reward, Setup
from oneshot_fast.rewards.preprocess import preprocess
from oneshot_fast.rewards.weights import (
    build,
    depth,
    linear_head,
    read_tokenizer,
    renamed,
    tokenize,
)
from oneshot_fast.runtime.tensor_files import read_pickle

MODEL, FILE = "ImageReward", "ImageReward.pt"
# shift and scale of the raw score, as published with the checkpoint's code
MEAN, STD = 0.16717362830052426, 1.0333394966054072
NUM_TOKENS = 35
HEAD = 64  # width of one attention head, in both of BLIP's encoders

_VISION, _TEXT, _MLP = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
# BLIP's contrastive heads, which the score does not use, and a buffer that counts 0, 1, 2, ...
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", _TEXT + "embeddings.position_ids")
_VISION_NAMES = (  # in transformers
    (r"^cls_token", "embeddings.class_embedding"),
    (r"^pos_embed", "embeddings.position_embedding"),
    (r"^patch_embed\.proj", "embeddings.patch_embedding"),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks", "encoder.layers"),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.norm([12])\.", r".layer_norm\1."),
)


class ImageRewardReward(Reward):
    """(v - 0.167) / 1.033 with v a linear head on BLIP's text encoder that sees the image.

    Xu et al. 2023, arXiv 2304.05977; https://github.com/THUDM/ImageReward.
    """

    name = "imagereward"

    def __init__(self, vision: Any, text: Any, head: nn.Sequential, tokenizer: Any) -> None:
        """Join BLIP's encoders (transformers) and the head."""
        super().__init__()
        self.vision, self.text, self.head = vision, text, head
        self.tokenizer, self.prompt_tokens = tokenizer, NUM_TOKENS

    @classmethod
    def load(cls, name: str, setup: Setup) -> "ImageRewardReward":
        path = setup.find(MODEL, FILE)
        vision, text, head = load_blip(path, setup.dtype)
        tokenizer = read_tokenizer(setup, MODEL, "BertTokenizer", "vocab.txt")
        return cls(vision, text, head, tokenizer).to(setup.device)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Token ids and mask, [B, 2, 35] int64; what exceeds 35 tokens is cut off."""
        tokens = tokenize(self.tokenizer, prompts, NUM_TOKENS)
        return torch.stack((tokens.input_ids, tokens.attention_mask), 1).to(self.text.device)

    def forward(self, images: Tensor, features: Tensor) -> Tensor:
        pixels = preprocess(images, self.vision.config.image_size, self.vision.dtype)
        seen = self.vision(pixels).last_hidden_state
        ids, mask = features.unbind(1)
        read = self.text(ids, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return (self.head(read[:, 0].float())[:, 0] - MEAN) / STD


def load_blip(path: Path, dtype: torch.dtype) -> tuple[Any, Any, nn.Sequential]:
    """BLIP's encoders and the head of an ImageReward checkpoint; the head is float32.

    Depths and widths are those of the tensors, so that a smaller model of this layout loads too.

    Raises:
        ModelError: If a tensor is missing, left over or of another shape.
    """
    from transformers import BlipTextModel, BlipVisionModel

    tensors = read_pickle(path)
    vision, text, head = parts(tensors, path)
    try:
        vision_config, text_config = configs_of(tensors)
    except KeyError as error:
        raise ModelError(f"{path} has another layout: no {error.args[0]}") from None
    # without a pooler, whose weights the layout does not have
    text_encoder = build(BlipTextModel, text_config, text, path, dtype, add_pooling_layer=False)
    vision_encoder = build(BlipVisionModel, vision_config, vision, path, dtype)
    return vision_encoder, text_encoder, linear_head(head, path)


def parts(
    tensors: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The checkpoint's tensors for vision, text and head, under transformers' names.

    Raises:
        ModelError: If one of the file ``path`` belongs to none of them.
    """
    found: dict[str, dict[str, Tensor]] = {_VISION: {}, _TEXT: {}, _MLP: {}}
    for key, value in tensors.items():
        if key.startswith(_UNUSED):
            continue
        part = next((part for part in found if key.startswith(part)), None)
        if part is None:
            raise ModelError(f"{path} has another layout: unknown {key}")
        found[part][key.removeprefix(part)] = value
    return renamed(found[_VISION], _VISION_NAMES), found[_TEXT], found[_MLP]


def configs_of(tensors: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """Transformers' configurations of BLIP's encoders; KeyError if a needed tensor is missing."""
    from transformers import BlipTextConfig, BlipVisionConfig

    width, _, patch, _ = tensors[_VISION + "patch_embed.proj.weight"].shape
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=tensors[_VISION + "blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=depth(tensors, _VISION + "blocks."),
        num_attention_heads=width // HEAD,
        patch_size=patch,
        image_size=patch * round((tensors[_VISION + "pos_embed"].shape[1] - 1) ** 0.5),
        layer_norm_eps=1e-6,
    )
    vocabulary, text_width = tensors[_TEXT + "embeddings.word_embeddings.weight"].shape
    text = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=text_width,
        encoder_hidden_size=width,
        intermediate_size=tensors[_TEXT + "encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=depth(tensors, _TEXT + "encoder.layer."),
        num_attention_heads=text_width // HEAD,
        max_position_embeddings=tensors[_TEXT + "embeddings.position_embeddings.weight"].shape[0],
        # transformers makes cross-attention only then; masks stay bidirectional
        is_decoder=True,
    )
    return vision, text
