"""Numbers and pictures as pages show them."""

import base64
import io
from pathlib import Path

import pytest
import torch
from PIL import Image

from oneshot_fast.report.page import number, percent, picture


@pytest.mark.parametrize("values", [1, 256])  # a flat image has few bytes, noise has many
def test_large_images_are_embedded_small(tmp_path: Path, values: int) -> None:
    noise = torch.randint(0, values, (512, 512, 3), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "large.png")
    shown = picture(tmp_path / "large.png", 192)
    data = base64.b64decode(shown.uri.split(",", 1)[1])
    assert Image.open(io.BytesIO(data)).size == (192, 192)
    assert len(data) < 50_000 and not shown.pixelated


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (1234567.0, "1,234,567"), (232.7075, "232.7"), (7.0369, "7.037"),
        (-0.04356, "-0.04356"), (5.36e-7, "5.4e-07"), (float("nan"), "nan"),
    ],
)  # fmt: skip
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_percent() -> None:
    assert percent(0.5, 2.0) == "-75.0 %" and percent(3.0, 2.0) == "+50.0 %"
    assert percent(1.0, 0.0) == ""
