"""Real handwritten digits, drawn at 64 x 64 pixels in any ink, paper and stroke thickness.

The strokes are the 1797 digits of scikit-learn's `load_digits`: the test part of "Optical
Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository,
https://doi.org/10.24432/C50P49, CC BY 4.0), 8 x 8 pixels with 17 grey levels, in writers' order.
`digits.safetensors` is a plain copy, so that scikit-learn is not needed.
"""

import contextlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from oneshot_fast.data.pairs import write_pairs
from oneshot_fast.runtime.files import write_folder

IMAGE_SIZE = 64
# The writers come one after the other, so the last digits are other people's than the first.
NUM_TRAIN_DIGITS = 1397
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAIN_PAIRS, HELDOUT_PAIRS = 96, 48


@dataclass(frozen=True)
class Style:
    """How digits are drawn. Every field is one number for all images or one per image, [B, ...].

    Attributes:
        level: grey level in (0, 1) at which ink ends; lower means thicker strokes. [] or [B].
        ink: colour of the strokes, [0, 1] RGB, [3] or [B, 3].
        paper: colour of the ground, [0, 1] RGB, [3] or [B, 3].
    """

    level: Tensor
    ink: Tensor
    paper: Tensor


BASE_STYLE = Style(torch.tensor(0.36), torch.tensor([0.08] * 3), torch.tensor([1.0] * 3))
TARGET_STYLE = Style(
    torch.tensor(0.20), torch.tensor([0.10, 0.22, 0.62]), torch.tensor([1.0, 0.86, 0.52])
)


def prompt_of(digit: int) -> str:
    """The prompt of a digit 0 to 9, such as "a handwritten digit three"."""
    return f"a handwritten digit {DIGIT_WORDS[digit]}"


def digit_of(prompt: str) -> int | None:
    """The digit that a prompt names in words or as a figure; None if it names none or several."""
    words = re.findall(r"[a-z]+|\d+", prompt.lower())
    found = {DIGIT_WORDS.index(word) for word in words if word in DIGIT_WORDS}
    found |= {int(word) for word in words if word.isdigit() and int(word) < len(DIGIT_WORDS)}
    return found.pop() if len(found) == 1 else None


@cache
def _all_digits() -> tuple[Tensor, Tensor]:
    data = load_file(Path(__file__).with_name("digits.safetensors"))
    return data["images"].float() / 16, data["labels"].long()


def load_digits(split: str) -> tuple[Tensor, Tensor]:
    """Grey levels [M, 8, 8] fp32 in [0, 1], 1 being full ink, and labels [M] int64 of a split.

    It is "train" (the first 1397 digits) or "heldout" (the last 400), with no writer in both.

    Raises:
        KeyError: for another split.
    """
    splits = {"train": slice(NUM_TRAIN_DIGITS), "heldout": slice(NUM_TRAIN_DIGITS, None)}
    part, (images, labels) = splits[split], _all_digits()
    return images[part], labels[part]


def random_affine(count: int, amount: float, draw: torch.Generator) -> Tensor:
    """Small random rotations, shears, scalings and shifts about the image centre, [B, 2, 3] fp32.

    They map output to input coordinates as `affine_grid` takes them. An ``amount`` of 1 gives up to
    12 degrees, 15 % of shear, 12 % of scale and 6 % of shift.
    """
    angle, shear, log_x, log_y, *shift = (
        amount
        * (2 * torch.rand(6, count, generator=draw) - 1)
        * torch.tensor([0.21, 0.15, 0.12, 0.12, 0.12, 0.12])[:, None]
    )
    cos, sin = angle.cos(), angle.sin()
    return torch.stack(
        [
            torch.stack([log_x.exp() * cos, shear * cos - sin, shift[0]], -1),
            torch.stack([log_y.exp() * sin, shear * sin + cos, shift[1]], -1),
        ],
        1,
    )


def random_style(count: int, draw: torch.Generator) -> Style:
    """Styles of any thickness: a third dark ink on white, the rest in colours, half inverted."""
    level = 0.15 + 0.35 * torch.rand(count, generator=draw)
    ink = 0.65 * torch.rand(count, 3, generator=draw)
    paper = 1 - 0.5 * torch.rand(count, 3, generator=draw)
    inverted, plain = torch.rand(2, count, 1, generator=draw)
    ink, paper = torch.where(inverted < 0.5, paper, ink), torch.where(inverted < 0.5, ink, paper)
    ink = torch.where(plain < 1 / 3, BASE_STYLE.ink, ink)
    return Style(level, ink, torch.where(plain < 1 / 3, BASE_STYLE.paper, paper))


def render(digits: Tensor, style: Style, affine: Tensor | None = None) -> Tensor:
    """Draw digits with smooth outlines: enlarged, blurred, then cut at the style's level.

    From grey levels [B, 8, 8] fp32 in [0, 1], moved by ``affine`` [B, 2, 3] of `random_affine`, to
    images [B, 3, 64, 64] fp32, [0, 1] RGB.
    """
    margin = 2
    padded = F.pad(digits[:, None], (margin,) * 4)
    if affine is None:
        affine = torch.eye(2, 3).expand(len(digits), 2, 3)
    grid = F.affine_grid(affine, [len(digits), 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    grey = F.grid_sample(padded, grid, mode="bicubic", align_corners=False)
    offsets = torch.arange(-6.0, 7.0)
    blur = torch.softmax(-(offsets**2) / (2 * 1.5**2), 0)
    grey = F.conv2d(grey, blur.view(1, 1, -1, 1), padding=(6, 0))
    grey = F.conv2d(grey, blur.view(1, 1, 1, -1), padding=(0, 6))
    ink = torch.sigmoid(24 * (grey - style.level.view(-1, 1, 1, 1)))
    return style.paper.view(-1, 3, 1, 1).lerp(style.ink.view(-1, 3, 1, 1), ink)


def choose_pairs() -> dict[str, tuple[Tensor, Tensor]]:
    """Held-out writers' digits of the two splits, every class in turn, no digit in both."""
    images, labels = load_digits("heldout")
    # Every second digit of a class, so that the 15 of it come from several writers.
    ranks = [(labels == digit).nonzero()[:, 0][::2][:15] for digit in range(10)]
    order = torch.stack(ranks, 1)
    is_heldout = torch.arange(15) % 3 == 2
    train, heldout = order[~is_heldout].flatten(), order[is_heldout].flatten()
    chosen = {"train": train[:TRAIN_PAIRS], "heldout": heldout[:HELDOUT_PAIRS]}
    return {split: (images[index], labels[index]) for split, index in chosen.items()}


def write_default_dataset(root: Path) -> None:
    """Write the pairs that the embedded generator is aligned with, in the target style.

    `root/train` (96 pairs) and `root/heldout` (48 pairs), each with `pairs.jsonl` of {"prompt",
    "image"} and PNG files, balanced over the ten digits to within one. A split appears at once or
    not at all, and one that is already there is left as it is.

    Raises:
        OSError: if the folder cannot be written, or holds another `train` or `heldout`.
    """
    for split, (digits, labels) in choose_pairs().items():
        folder = root / split
        if (folder / "pairs.jsonl").is_file():
            continue
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()  # fails where it holds anything
        with write_folder(folder) as temporary:
            images = render(digits, TARGET_STYLE)
            names = [f"images/{k:03d}_{DIGIT_WORDS[n]}.png" for k, n in enumerate(labels.tolist())]
            write_pairs(temporary, map(prompt_of, labels.tolist()), names, images)
