"""Labelled images for the small generators: real digits and drawn coloured shapes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from oneshot_fast.data.pairs import write_pairs
from oneshot_fast.embedded.digits import load_digits, prompt_of, random_affine

DIGIT_PROMPTS = tuple(map(prompt_of, range(10)))
SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (0.85, 0.15, 0.15), "green": (0.15, 0.65, 0.25),
    "blue": (0.15, 0.3, 0.85), "yellow": (0.95, 0.8, 0.1),
}  # fmt: skip


@dataclass(frozen=True)
class LabelledImages:
    """Images of known classes.

    Attributes:
        images: [N, 3, s, s] float32, [0, 1] RGB.
        labels: [N] int64.
        prompts: The text of every class.
    """

    images: Tensor
    labels: Tensor
    prompts: tuple[str, ...]

    def sample(self, count: int, start: int = 0) -> "LabelledImages":
        """At most ``count`` of the images, from ``start`` on in a random order."""
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0))
        chosen = order[start : start + count]
        return LabelledImages(self.images[chosen], self.labels[chosen], self.prompts)

    def write_pairs(self, folder: Path, count: int, start: int = 0) -> None:
        """Write what ``sample`` chooses in the input format of the commands."""
        chosen = self.sample(count, start)
        prompts = [self.prompts[label] for label in chosen.labels.tolist()]
        names = [f"{k:05d}.png" for k in range(len(prompts))]
        write_pairs(folder, prompts, names, chosen.images)


def digits(split: str) -> LabelledImages:
    """Real digits, 16 x 16 pixels, black ink on white; see embedded/digits.py for their source.

    "train" and "heldout" are of different writers; training digits are slightly moved copies.
    """
    grey, labels = load_digits(split)
    grey = grey[:, None]
    if split == "train":
        grey, labels = grey.repeat(8, 1, 1, 1), labels.repeat(8)
        maps = random_affine(len(grey), 0.7, torch.Generator().manual_seed(0))
    else:
        maps = torch.eye(2, 3).expand(len(grey), 2, 3)
    grid = F.affine_grid(maps, [len(grey), 1, 16, 16], align_corners=False)
    ink = F.grid_sample(grey, grid, mode="bicubic", align_corners=False).clamp(0, 1)
    return LabelledImages((1 - ink).expand(-1, 3, 16, 16).contiguous(), labels, DIGIT_PROMPTS)


def shapes(split: str, count: int = 8000, size: int = 32, upright: bool = False) -> LabelledImages:
    """Coloured shapes of any size, place and angle on light grey, drawn with soft edges.

    "train" and "heldout" are drawn with different seeds, on ``size`` x ``size`` pixels. Those that
    are ``upright`` are large and stand upright.
    """
    draw = torch.Generator().manual_seed(0 if split == "train" else 1)
    labels = torch.arange(count) % (len(SHAPES) * len(COLOURS))
    radius, x, y, turn, tone, shade = torch.rand(6, count, 1, 1, generator=draw)
    if upright:
        turn, radius = 0.25 + 0 * turn, 0.75 + 0.25 * radius
    radius = 0.22 + 0.16 * radius
    x, y = (0.5 + (c - 0.5) * (1 - 2 * radius) for c in (x, y))
    axis = (torch.arange(size) + 0.5) / size
    u, v = axis[None, None, :] - x, axis[None, :, None] - y
    angle = 2 * math.pi * turn
    u, v = angle.cos() * u + angle.sin() * v, angle.cos() * v - angle.sin() * u
    distances = torch.stack([outline(u, v, radius) for outline in _OUTLINES])
    distance = distances[labels // len(COLOURS), torch.arange(count)]
    inside = (0.5 - distance * size / 1.5).clamp(0, 1)[:, None]
    colours = torch.tensor(list(COLOURS.values()))[labels % len(COLOURS)][:, :, None, None]
    colours = colours * (0.75 + 0.25 * shade[:, None])
    ground = 0.8 + 0.15 * tone[:, None]
    prompts = tuple(f"a {colour} {shape}" for shape in SHAPES for colour in COLOURS)
    return LabelledImages(inside * colours + (1 - inside) * ground, labels, prompts)


def _circle(u: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    return (u.square() + v.square()).sqrt() - 0.85 * radius


def _polygon(u: Tensor, v: Tensor, radius: Tensor, sides: int) -> Tensor:
    """Distance from the nearest edge's line of a regular polygon with corners at ``radius``."""
    turns = [2 * math.pi * k / sides for k in range(sides)]
    edges = [math.cos(t) * u + math.sin(t) * v for t in turns]
    return torch.stack(edges).amax(0) - radius * math.cos(math.pi / sides)


def _star(u: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    """Five points: the outline's radius runs between 0.45 and 1.1 of ``radius``."""
    angle = torch.atan2(v, u) * 5
    far = (u.square() + v.square()).sqrt()
    return far - radius * (0.72 + 0.38 * (2 / math.pi) * torch.asin(0.97 * angle.cos()))


_OUTLINES: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (
    _circle,
    lambda u, v, r: _polygon(u, v, r, 4),
    lambda u, v, r: _polygon(u, v, r, 3),
    _star,
)
