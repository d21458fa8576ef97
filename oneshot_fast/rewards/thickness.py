"""``thickness``: how thick the strokes of a drawing are."""

import torch
from torch import Tensor

from oneshot_fast.rewards.base import Reward

_SMALLEST = 1e-8


class ThicknessReward(Reward):
    """Mean stroke width in pixels, whatever the ink and the paper.

    A stroke of width w and length L has area w L and, its ends apart, an outline of 2 L. With d a
    pixel's distance to the paper's colour, sum d is contrast times area, and by the coarea formula
    (Federer 1959) sum |grad d| is contrast times outline: w = 2 sum d / sum |grad d|. Blurred edges
    change neither. The paper's colour is the mean of the image's border.
    """

    name = "thickness"

    def forward(self, images: Tensor, features: Tensor) -> Tensor:
        return stroke_width(paper_distance(images))


def paper_distance(images: Tensor) -> Tensor:
    """[B, H, W] float32: distance of images [B, 3, H, W], [0, 1] RGB, to their borders' mean."""
    pixels = images.float()
    rows, columns = pixels[:, :, [0, -1]], pixels[:, :, 1:-1, [0, -1]]
    border = torch.cat((rows.flatten(2), columns.flatten(2)), 2)
    difference = pixels - border.mean(2)[:, :, None, None]
    return (difference.square().sum(1) + _SMALLEST).sqrt()


def stroke_width(distance: Tensor) -> Tensor:
    """2 sum d / sum |grad d| in pixels, [...], of distances d [..., H, W]."""
    down = distance[..., 1:, :-1] - distance[..., :-1, :-1]
    right = distance[..., :-1, 1:] - distance[..., :-1, :-1]
    slope = (down.square() + right.square() + _SMALLEST).sqrt()
    return 2 * distance.sum((-2, -1)) / slope.sum((-2, -1))
