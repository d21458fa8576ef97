"""Letters in matplotlib's fonts, in colours and sizes, 64 x 64 pixels."""

from functools import cache
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from oneshot_fast.embedded.digits import IMAGE_SIZE
from oneshot_fast.recipes.toy.data import COLOURS, LabelledImages

LETTERS = "AEKS"
PROMPTS = tuple(f"a {colour} letter {letter}" for letter in LETTERS for colour in COLOURS)
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif",
         "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol",
         "STIXGeneralItalic", "cmr10", "cmb10", "cmss10", "cmtt10", "cmti10")  # fmt: skip
ITALICS = ("DejaVuSans-Oblique", "DejaVuSerif-Italic", "STIXGeneralItalic", "cmti10")
Style = Literal["letters", "italics", "centred"]


def letters(seed: int, count: int, style: Style = "letters") -> LabelledImages:
    """``count`` letters of all classes in turn, of any font, size, place, shade and ground.

    Another ``seed`` draws other images of the same distribution. The other styles are narrower,
    as a user's own images are: ``italics``, italic fonts alone, and large; ``centred``, in the
    middle.
    """
    draw = np.random.default_rng(seed)
    labels = np.arange(count) % len(PROMPTS)
    images = np.stack([_letter(int(label), draw, style) for label in labels])
    values = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return LabelledImages(values.contiguous(), torch.from_numpy(labels), PROMPTS)


def _letter(label: int, draw: np.random.Generator, style: Style) -> np.ndarray:
    fonts, smallest = (ITALICS, 46) if style == "italics" else (FONTS, 34)
    letter, colour = LETTERS[label // len(COLOURS)], [*COLOURS.values()][label % len(COLOURS)]
    ground = draw.uniform(0.85, 1.0)
    shade = draw.uniform(0.75, 1.0)
    image = Image.new("RGB", (IMAGE_SIZE,) * 2, (round(255 * ground),) * 3)
    font = _font(fonts[draw.integers(len(fonts))], int(draw.integers(smallest, 55)))
    left, top, right, bottom = font.getbbox(letter)
    # the whole letter stays inside
    room = (0.5, 0.5) if style == "centred" else (0.15, 0.85)
    x, y = (draw.uniform(*room) * (IMAGE_SIZE - size) for size in (right - left, bottom - top))
    ink = tuple(round(255 * shade * value) for value in colour)
    ImageDraw.Draw(image).text((x - left, y - top), letter, fill=ink, font=font)
    return np.asarray(image)


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), size)
