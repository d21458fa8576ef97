"""Preprocessing on tensors against Pillow's on 8-bit images, which the rewards were made with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from oneshot_fast.data.images import to_pil
from oneshot_fast.embedded.digits import BASE_STYLE, load_digits, render
from oneshot_fast.rewards.preprocess import preprocess, preprocess_padded, resize


def smooth_images(H: int, W: int) -> Tensor:
    """One drawn digit and one pattern, [2, 3, H, W], rounded to 8 bits."""
    drawn = torch.nn.functional.interpolate(
        render(load_digits("heldout")[0][:1], BASE_STYLE), (H, W), mode="bilinear"
    )
    y, x = torch.meshgrid(torch.arange(H) / H, torch.arange(W) / W, indexing="ij")
    waves = torch.stack((torch.sin(9 * x + 4 * y), torch.cos(12 * y), torch.sin(20 * x * y)))
    return (torch.cat((drawn, 0.5 + 0.5 * waves[None])) * 255).round() / 255


@pytest.mark.parametrize("size", [(64, 64), (28, 28), (96, 61), (50, 133), (20, 24)])
def test_preprocessing_is_clips_processors(size: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28)
    images = smooth_images(*size)
    pictures = [to_pil(image) for image in images]
    expected = processor(pictures, return_tensors="pt").pixel_values
    ours = preprocess(images, 28, torch.float32)
    # the processor rounds to 8 bits after each of its two passes
    torch.testing.assert_close(ours, expected, rtol=0, atol=1.01 / 255 / 0.26)


@pytest.mark.parametrize("size", [(64, 64), (96, 61), (50, 133)])
def test_padding_keeps_all_of_the_image_between_black_bars(size: tuple[int, int]) -> None:
    images = smooth_images(*size)
    expected = []
    for image in map(to_pil, images):
        scale = 28 / max(image.size)
        small = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
        square = Image.new("RGB", (28, 28))
        square.paste(small, [(28 - side) // 2 for side in small.size])
        expected.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    )
    ours = preprocess_padded(images, 28, torch.float32) * std + mean
    torch.testing.assert_close(ours, torch.stack(expected) / 255, rtol=0, atol=1.01 / 255)


def test_resizing_is_differentiable() -> None:
    images = 0.3 + 0.4 * torch.rand(1, 1, 9, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: resize(x, 4), images)
    assert torch.autograd.gradcheck(lambda x: resize(x, 11), images)
