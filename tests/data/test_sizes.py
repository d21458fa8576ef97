"""Aspect-ratio buckets: which sizes there are, which an image takes, what a crop costs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from PIL import Image

from oneshot_fast.data.images import crop_loss, cut_warning, size_in
from oneshot_fast.data.options import DataOptions, SizeOptions
from oneshot_fast.data.sizes import Buckets, Frame, part_cut
from oneshot_fast.errors import DataError, UserError

# of SDXL's own list of sizes (arXiv 2307.01952, appendix I), the widest of each height
WIDE = [(512, 2048), (576, 1792), (640, 1600), (704, 1472), (768, 1344), (832, 1216), (896, 1152)]


def test_buckets_are_those_of_sdxl() -> None:
    sizes = Buckets.of(1024, 64).sizes
    assert {*WIDE, *((w, h) for h, w in WIDE), (1024, 1024)} <= {*sizes}
    assert all(h % 64 == w % 64 == 0 and h * w <= 1024**2 for h, w in sizes)
    assert min(h * w for h, w in sizes) > 0.85 * 1024**2
    assert {*sizes} == {(w, h) for h, w in sizes}


@pytest.mark.parametrize(("side", "step"), [(1024, 64), (512, 64), (64, 16)])
def test_an_image_takes_the_size_that_costs_least(side: int, step: int) -> None:
    draw, buckets = random.Random(0), Buckets.of(side, step)
    for _ in range(50):
        original = draw.randint(100, 4000), draw.randint(100, 4000)
        frame = buckets.frame(original)
        (height, width), (top, left) = frame.size, frame.corner
        scale = max(height / original[0], width / original[1])
        assert abs(scale * original[0] - height - 2 * top) <= 1
        assert abs(scale * original[1] - width - 2 * left) <= 1
        losses = {size: part_cut(original, size) for size in buckets.sizes}
        assert losses[frame.size] == min(losses.values())
        kept = height * width / (scale**2 * original[0] * original[1])
        assert 1 - kept == pytest.approx(losses[frame.size])


def test_a_square_stays_one() -> None:
    assert Buckets.of(64, 16).frame((640, 640)) == Frame((64, 64), (640, 640), (0, 0))


@pytest.mark.parametrize(
    ("side", "step", "said"), [(64, 64, "no other size than 64 x 64"), (96, 64, "does not divide")]
)
def test_buckets_that_make_no_sense(side: int, step: int, said: str) -> None:
    with pytest.raises(UserError, match=f"bucket_step 64 .*{said}"):
        Buckets.of(side, step)


def test_a_frame_is_read_as_it_was_written() -> None:
    frame = Buckets.of(64, 16).frame((333, 1000))
    assert Frame.read(frame.fields) == frame
    for broken in ({}, frame.fields | {"original_size": [0, 5]}, frame.fields | {"target_size": 5}):
        with pytest.raises(DataError, match="resize_mode bucket needs '"):
            Frame.read(broken)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"width": 64}, "--width and --height go together"),
        ({"width": 64, "height": 64, "resolution": 64}, "--resolution is for squares"),
        ({"bucket_step": 8}, "--bucket_step has no effect without --resize_mode bucket"),
        ({"width": 64, "height": 96, "resize_mode": "bucket"}, "give --resolution, not --width"),
    ],
)
def test_flags_that_exclude_each_other(flags: dict[str, int], said: str) -> None:
    with pytest.raises(DataError, match=said):
        DataOptions(**flags).check()  # type: ignore[arg-type]


def test_a_size_is_height_and_width() -> None:
    assert SizeOptions(width=64, height=96).size == (96, 64)
    assert SizeOptions(resolution=64).size == 64 and SizeOptions().size is None


def test_a_lying_picture_is_as_high_as_it_is_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    for suffix in ("jpg", "png"):
        path = tmp_path / f"a.{suffix}"
        Image.new("RGB", (30, 10)).save(path, exif=exif)
        assert size_in(path) == (30, 10)
        assert crop_loss(path, (96, 32)) == 0 and crop_loss(path) == pytest.approx(2 / 3)


def test_the_worst_crop_is_named_once() -> None:
    cut = [("a", 0.2), ("b", 0.4), ("c", 0.51), ("d", 0.34)]
    said = "3 images lose more than a third, most c (51%); pad them"
    assert cut_warning(cut, "pad them") == said
    assert cut_warning(cut[:1], "pad them") is None
