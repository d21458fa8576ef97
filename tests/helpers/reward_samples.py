"""Small checkpoints in the published layouts, and their scores in fp64 by the published formulas.

Nothing here knows transformers: the references work on the published names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Layout = dict[str, tuple[int, ...]]
Tensors = dict[str, Tensor]
# of open_clip and BLIP: pixels of the ImageNet-like data that CLIP saw
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64).view(3, 1, 1)


@dataclass(frozen=True)
class Sizes:
    """Of one tower: its width, hidden width, depth and the width of an attention head."""

    width: int
    hidden: int
    depth: int
    head: int


@dataclass(frozen=True)
class Model:
    """Of a model with a tower for images and one for text."""

    image: Sizes
    text: Sizes
    patch: int
    image_size: int
    vocabulary: int
    positions: int
    joint: int


# ViT-H/14 as published, and a small one
VIT_H = Model(Sizes(1280, 5120, 32, 80), Sizes(1024, 4096, 24, 64), 14, 224, 49408, 77, joint=1024)
SMALL_CLIP = Model(Sizes(160, 96, 2, 80), Sizes(128, 64, 3, 64), 14, 28, 514, 16, joint=24)
# BLIP with ViT-L/16 as in ImageReward, and a small one
BLIP_L = Model(Sizes(1024, 4096, 24, 64), Sizes(768, 3072, 12, 64), 16, 224, 30524, 512, 256)
SMALL_BLIP = Model(Sizes(192, 96, 2, 64), Sizes(128, 64, 3, 64), 16, 32, 40, 64, joint=24)


def affine(name: str, out: int, into: int | None = None) -> Layout:
    """Weight and bias of a linear layer, or of a layer norm."""
    return {
        f"{name}.weight": (out,) if into is None else (out, into),
        f"{name}.bias": (out,),
    }


def open_clip_layout(model: Model) -> Layout:
    """Names and shapes of open_clip's CLIP, as HPSv2's files have them."""
    image, text = model.image, model.text
    cells = (model.image_size // model.patch) ** 2
    layout: Layout = {
        "positional_embedding": (model.positions, text.width),
        "text_projection": (text.width, model.joint),
        "logit_scale": (),
        "visual.class_embedding": (image.width,),
        "visual.positional_embedding": (cells + 1, image.width),
        "visual.proj": (image.width, model.joint),
        "visual.conv1.weight": (image.width, 3, model.patch, model.patch),
        "token_embedding.weight": (model.vocabulary, text.width),
    }
    for name, width in (
        ("visual.ln_pre", image.width),
        ("visual.ln_post", image.width),
        ("ln_final", text.width),
    ):
        layout |= affine(name, width)
    for prefix, tower in (("visual.", image), ("", text)):
        for k in range(tower.depth):
            block = f"{prefix}transformer.resblocks.{k}"
            layout |= affine(f"{block}.ln_1", tower.width) | affine(f"{block}.ln_2", tower.width)
            layout |= {
                f"{block}.attn.in_proj_weight": (3 * tower.width, tower.width),
                f"{block}.attn.in_proj_bias": (3 * tower.width,),
            }
            layout |= affine(f"{block}.attn.out_proj", tower.width, tower.width)
            layout |= affine(f"{block}.mlp.c_fc", tower.hidden, tower.width)
            layout |= affine(f"{block}.mlp.c_proj", tower.width, tower.hidden)
    return layout


def imagereward_layout(model: Model) -> Layout:
    """Names and shapes of ImageReward.pt: BLIP with an MLP head of five linear layers."""
    image, text = model.image, model.text
    cells = (model.image_size // model.patch) ** 2
    see, read = "blip.visual_encoder", "blip.text_encoder"
    layout: Layout = {
        f"{see}.cls_token": (1, 1, image.width),
        f"{see}.pos_embed": (1, cells + 1, image.width),
        f"{see}.patch_embed.proj.weight": (image.width, 3, model.patch, model.patch),
        f"{see}.patch_embed.proj.bias": (image.width,),
        **affine(f"{see}.norm", image.width),
        f"{read}.embeddings.word_embeddings.weight": (model.vocabulary, text.width),
        f"{read}.embeddings.position_embeddings.weight": (model.positions, text.width),
        f"{read}.embeddings.position_ids": (1, model.positions),
        **affine(f"{read}.embeddings.LayerNorm", text.width),
        **affine("blip.vision_proj", model.joint, image.width),
        **affine("blip.text_proj", model.joint, text.width),
    }
    for k in range(image.depth):
        block = f"{see}.blocks.{k}"
        layout |= affine(f"{block}.norm1", image.width) | affine(f"{block}.norm2", image.width)
        layout |= affine(f"{block}.attn.qkv", 3 * image.width, image.width)
        layout |= affine(f"{block}.attn.proj", image.width, image.width)
        layout |= affine(f"{block}.mlp.fc1", image.hidden, image.width)
        layout |= affine(f"{block}.mlp.fc2", image.width, image.hidden)
    for k in range(text.depth):
        block = f"{read}.encoder.layer.{k}"
        for kind, width in (("attention", text.width), ("crossattention", image.width)):
            layout |= affine(f"{block}.{kind}.self.query", text.width, text.width)
            layout |= affine(f"{block}.{kind}.self.key", text.width, width)
            layout |= affine(f"{block}.{kind}.self.value", text.width, width)
            layout |= affine(f"{block}.{kind}.output.dense", text.width, text.width)
            layout |= affine(f"{block}.{kind}.output.LayerNorm", text.width)
        layout |= affine(f"{block}.intermediate.dense", text.hidden, text.width)
        layout |= affine(f"{block}.output.dense", text.width, text.hidden)
        layout |= affine(f"{block}.output.LayerNorm", text.width)
    return layout | {f"mlp.{key}": shape for key, shape in head_layout(text.width).items()}


def head_layout(width: int) -> Layout:
    """Names and shapes of the head of LAION's aesthetic predictor and of ImageReward."""
    widths = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}
    layout: Layout = {}
    for number, out in widths.items():
        layout |= affine(f"layers.{number}", out, width)
        width = out
    return layout


def random_tensors(layout: Layout, seed: int = 0) -> Tensors:
    """Random values for every name, such that no layer saturates or vanishes."""
    generator = torch.Generator().manual_seed(seed)

    def values() -> Iterator[tuple[str, Tensor]]:
        for name, shape in layout.items():
            if name.endswith("position_ids"):
                yield name, torch.arange(shape[1])[None]
                continue
            value = torch.randn(shape, generator=generator)
            last = shape[-1] if len(shape) > 1 else 4
            yield name, value / last**0.5 + (len(shape) == 1 and name.endswith("weight"))

    return dict(values())


def hps_score(t: Mapping[str, Tensor], model: Model, images: Tensor, tokens: Tensor) -> Tensor:
    """Cosine of both towers of open_clip, [B] fp64 (Wu et al. 2023, arXiv 2306.09341).

    Args:
        t: Tensors by open_clip's names.
        model: Their sizes.
        images: [B, 3, S, S], [0, 1] RGB, of the model's size.
        tokens: [B, positions] int64; a text ends at its greatest token.
    """
    t = {name: value.double() for name, value in t.items()}
    x = F.conv2d((images.double() - MEAN) / STD, t["visual.conv1.weight"], stride=model.patch)
    x = x.flatten(2).mT
    first = t["visual.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat((first, x), 1) + t["visual.positional_embedding"]
    x = norm(t, "visual.ln_pre", x)
    for k in range(model.image.depth):
        x = _clip_block(t, f"visual.transformer.resblocks.{k}", x, model.image, None)
    seen = norm(t, "visual.ln_post", x[:, 0]) @ t["visual.proj"]
    y = t["token_embedding.weight"][tokens] + t["positional_embedding"]
    later = torch.ones(model.positions, model.positions, dtype=torch.bool).triu(1)
    for k in range(model.text.depth):
        y = _clip_block(t, f"transformer.resblocks.{k}", y, model.text, later)
    end = y[torch.arange(len(y)), tokens.argmax(1)]
    read = norm(t, "ln_final", end) @ t["text_projection"]
    return F.cosine_similarity(seen, read)


def _clip_block(
    t: Mapping[str, Tensor], name: str, x: Tensor, sizes: Sizes, hidden_from: Tensor | None
) -> Tensor:
    inner = norm(t, f"{name}.ln_1", x)
    qkv = inner @ t[f"{name}.attn.in_proj_weight"].T + t[f"{name}.attn.in_proj_bias"]
    x = x + linear(t, f"{name}.attn.out_proj", attend(*qkv.chunk(3, -1), sizes.head, hidden_from))
    inner = F.gelu(linear(t, f"{name}.mlp.c_fc", norm(t, f"{name}.ln_2", x)))
    return x + linear(t, f"{name}.mlp.c_proj", inner)


def imagereward_score(
    t: Mapping[str, Tensor], model: Model, images: Tensor, tokens: Tensor, mask: Tensor
) -> Tensor:
    """ImageReward's score, [B] fp64 (Xu et al. 2023, arXiv 2304.05977; BLIP: arXiv 2201.12086).

    Args:
        t: Tensors by the names in ImageReward.pt.
        model: Their sizes.
        images: [B, 3, S, S], [0, 1] RGB, of the model's size.
        tokens: [B, L] int64.
        mask: [B, L], 1 where a token is, 0 where padding is.
    """
    t = {name: value.double() for name, value in t.items()}
    see, read = "blip.visual_encoder", "blip.text_encoder"
    weight, bias = (t[f"{see}.patch_embed.proj.{part}"] for part in ("weight", "bias"))
    x = F.conv2d((images.double() - MEAN) / STD, weight, bias, stride=model.patch).flatten(2).mT
    x = torch.cat((t[f"{see}.cls_token"].expand(len(x), 1, -1), x), 1) + t[f"{see}.pos_embed"]
    for k in range(model.image.depth):
        block = f"{see}.blocks.{k}"
        qkv = linear(t, f"{block}.attn.qkv", norm(t, f"{block}.norm1", x, 1e-6))
        seen = attend(*qkv.chunk(3, -1), model.image.head, None)
        x = x + linear(t, f"{block}.attn.proj", seen)
        inner = F.gelu(linear(t, f"{block}.mlp.fc1", norm(t, f"{block}.norm2", x, 1e-6)))
        x = x + linear(t, f"{block}.mlp.fc2", inner)
    x = norm(t, f"{see}.norm", x, 1e-6)
    y = t[f"{read}.embeddings.word_embeddings.weight"][tokens]
    y = y + t[f"{read}.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    y = norm(t, f"{read}.embeddings.LayerNorm", y, 1e-12)
    for k in range(model.text.depth):
        block = f"{read}.encoder.layer.{k}"
        y = _bert_attention(t, f"{block}.attention", y, y, model.text.head, ~mask[:, None].bool())
        y = _bert_attention(t, f"{block}.crossattention", y, x, model.text.head, None)
        inner = F.gelu(linear(t, f"{block}.intermediate.dense", y))
        inner = linear(t, f"{block}.output.dense", inner)
        y = norm(t, f"{block}.output.LayerNorm", inner + y, 1e-12)
    return (head_score(t, "mlp.", y[:, 0]) - 0.16717362830052426) / 1.0333394966054072


def _bert_attention(
    t: Mapping[str, Tensor], name: str, y: Tensor, x: Tensor, head: int, hidden: Tensor | None
) -> Tensor:
    q = linear(t, f"{name}.self.query", y)
    k, v = (linear(t, f"{name}.self.{part}", x) for part in ("key", "value"))
    out = linear(t, f"{name}.output.dense", attend(q, k, v, head, hidden))
    return norm(t, f"{name}.output.LayerNorm", out + y, 1e-12)


def head_score(t: Mapping[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    """The five linear layers, [B], one after the other: they have no nonlinearity."""
    for number in (0, 2, 4, 6, 7):
        x = linear(t, f"{prefix}layers.{number}", x)
    return x[:, 0]


def linear(t: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Affine map by name."""
    return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]


def norm(t: Mapping[str, Tensor], name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer norm by name."""
    return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)


def attend(q: Tensor, k: Tensor, v: Tensor, head: int, hidden: Tensor | None) -> Tensor:
    """Softmax attention of heads of width ``head``; ``hidden`` [.., L, L] marks what is not seen.

    Args:
        q: [B, L, heads * head].
        k: [B, M, heads * head].
        v: [B, M, heads * head].
        head: Width of one head.
        hidden: [L, M] or [B, 1, M] bool, or None.
    """
    q, k, v = (x.unflatten(-1, (-1, head)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.mT / head**0.5
    if hidden is not None:
        logits = logits.masked_fill(hidden if hidden.dim() == 2 else hidden[:, None], -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
