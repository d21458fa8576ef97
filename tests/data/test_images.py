"""Images: files of every kind, by Pillow or byte by byte, read back; images side by side."""

import errno
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from oneshot_fast.data.image_refs import file_sha256
from oneshot_fast.data.images import crop_loss, load_image, shrink, tile
from oneshot_fast.errors import DataError

HALF = 128 / 255


def pixel(path: Path) -> list[float]:
    """[R, G, B] of an image of one colour."""
    image = load_image(path, 8, 8)
    assert image.shape == (3, 8, 8) and image.dtype == torch.float32 and image.is_contiguous()
    assert float(image.flatten(1).std(dim=1).max()) < 1e-6
    return image[:, 0, 0].tolist()


def png(
    depth: int, colour_type: int, size: tuple[int, int], rows: bytes, extra: bytes = b""
) -> bytes:
    """A PNG file from raw rows (each with a filter byte), for kinds that Pillow does not write."""
    header = struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, 0)
    body = (
        chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + body


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def tiff(bits: int, photometric: int, width: int, row: bytes) -> bytes:
    """A little-endian grey TIFF file of one row, for kinds that Pillow does not write."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8)]
    tags += [(277, 1), (278, 1), (279, len(row)), (339, 1)]
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", t, 3, 1, v) for t, v in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(row)) + row + ifd + bytes(4)


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("RGB", (255, 128, 0), "png", [1, HALF, 0]),
        ("RGB", (255, 128, 0), "bmp", [1, HALF, 0]),
        ("RGB", (255, 128, 0), "tiff", [1, HALF, 0]),
        ("RGB", (255, 128, 0), "ppm", [1, HALF, 0]),
        ("L", 128, "png", [HALF] * 3),
        ("1", 1, "png", [1, 1, 1]),
        ("LA", (0, 127), "png", [HALF] * 3),  # half-transparent black over white
        ("RGBA", (255, 0, 0, 0), "png", [1, 1, 1]),
        ("RGBA", (255, 0, 0, 127), "png", [1, HALF, HALF]),
        ("RGBA", (255, 0, 0, 255), "webp", [1, 0, 0]),
        ("CMYK", (0, 255, 255, 0), "tiff", [1, 0, 0]),
        ("I;16", 65535, "png", [1, 1, 1]),
        ("I;16", 257, "png", [1 / 255] * 3),
        ("I;16", 1, "tiff", [1 / 65535] * 3),  # the low byte counts
        ("I;16B", 257, "tiff", [1 / 255] * 3),
        ("I", 65535, "tiff", [1, 1, 1]),
        ("I;16", 32768, "pgm", [32768 / 65535] * 3),
        ("F", 0.25, "tiff", [0.25] * 3),
    ],
)
def test_modes(
    tmp_path: Path, mode: str, colour: object, suffix: str, expected: list[float]
) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.new(mode, (12, 10), colour).save(path, lossless=True)
    assert pixel(path) == pytest.approx(expected, abs=1e-6)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    assert pixel(tmp_path / "a.jpg") == pytest.approx([1, 0, 0], abs=0.01)


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])])
def test_palette_transparency_is_white(tmp_path: Path, transparency: int | bytes) -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (4, 0, 8, 8))
    image.save(tmp_path / "a.png", transparency=transparency)
    result = load_image(tmp_path / "a.png", 8, 8)
    assert result[:, 0, 0].tolist() == [1, 1, 1] and result[:, 0, 7].tolist() == [0, 0, 1]


def test_deep_png(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(16, 2, (2, 1), b"\0" + struct.pack(">6H", 65535, 0, 32768, 0, 0, 65535)))
    torch.testing.assert_close(
        load_image(path, 1, 2)[:, 0], torch.tensor([[1, 0], [0, 0], [HALF, 1]])
    )
    path.write_bytes(png(16, 4, (2, 1), b"\0" + struct.pack(">4H", 0, 65535, 0, 0)))
    assert load_image(path, 1, 2)[0, 0].tolist() == [0, 1]
    key = chunk(b"tRNS", struct.pack(">H", 1000))  # grey value 1000 is see-through
    path.write_bytes(png(16, 0, (2, 1), b"\0" + struct.pack(">2H", 1001, 1000), key))
    assert load_image(path, 1, 2)[0, 0].tolist() == pytest.approx([1001 / 65535, 1])


@pytest.mark.parametrize(
    ("bits", "photometric", "row", "expected"),
    [
        (12, 1, bytes([0xFF, 0xF0, 0x00]), [1, 0]),
        (16, 1, struct.pack("<2H", 65535, 0), [1, 0]),
        (16, 0, struct.pack("<2H", 65535, 0), [0, 1]),  # white is zero
        (8, 0, bytes([255, 0]), [0, 1]),
    ],
)
def test_tiff_depth_and_polarity(
    tmp_path: Path, bits: int, photometric: int, row: bytes, expected: list[float]
) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(bits, photometric, 2, row))
    assert load_image(tmp_path / "a.tif", 1, 2)[0, 0].tolist() == expected


def quadrants() -> Image.Image:
    """Red | green above blue | white, 16 x 8."""
    image = Image.new("RGB", (16, 8), "white")
    for colour, box in (("red", (0, 0)), ("lime", (8, 0)), ("blue", (0, 4))):
        image.paste(colour, (*box, box[0] + 8, box[1] + 4))
    return image


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize(
    ("orientation", "corners"),  # top left, top right as the viewer must see them
    [(1, "rg"), (2, "gr"), (3, "wb"), (4, "bw"), (5, "rb"), (6, "br"), (7, "wg"), (8, "gw")],
)
def test_exif_rotation(tmp_path: Path, suffix: str, orientation: int, corners: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    options = {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    quadrants().save(path, exif=exif, lossless=True, **options)
    height, width = (8, 16) if orientation < 5 else (16, 8)
    result = load_image(path, height, width)
    colours = {"r": [1, 0, 0], "g": [0, 1, 0], "b": [0, 0, 1], "w": [1, 1, 1]}
    for corner, at in zip(corners, ((1, 1), (1, width - 2)), strict=True):
        assert result[:, at[0], at[1]].tolist() == pytest.approx(colours[corner], abs=0.05)


def test_broken_exif_does_not_spoil_the_picture(tmp_path: Path) -> None:
    quadrants().save(tmp_path / "a.png", exif=b"Exif\0\0garbage")
    assert load_image(tmp_path / "a.png", 8, 16)[:, 0, 0].tolist() == [1, 0, 0]


def reference_lanczos(image: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Antialiased Lanczos-3 in fp64, weights normalised over the pixels inside the image."""
    scale = image.shape[axis] / length
    centres = (np.arange(length)[:, None] + 0.5) * scale
    t = (np.arange(image.shape[axis])[None] + 0.5 - centres) / max(scale, 1)
    weights = np.where(np.abs(t) < 3, np.sinc(t) * np.sinc(t / 3), 0)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.moveaxis(np.tensordot(weights, image, (1, axis)), 0, axis)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(("mode", "height", "width"), [("squash", 16, 32), ("crop", 20, 12)])
def test_antialiased_lanczos(
    tmp_path: Path, deep: bool, mode: str, height: int, width: int
) -> None:
    # Mid greys: overshoot between Pillow's two 8-bit passes must not clip.
    values = np.random.default_rng(0).integers(64, 192, (40, 24))
    stored = (values * 257).astype(np.uint16) if deep else values.astype(np.uint8)
    Image.fromarray(stored).save(tmp_path / "a.png")
    result = load_image(tmp_path / "a.png", height, width, mode)
    expected = reference_lanczos(reference_lanczos(values / 255, width, 1), height, 0)
    assert expected.min() > 0 and expected.max() < 1
    assert np.abs(result[0].numpy() - expected).max() < (1e-5 if deep else 2 / 255)


def test_lanczos_overshoot_stays_in_range(tmp_path: Path) -> None:
    stored = np.zeros((16, 16), np.uint16)
    stored[:, 8:] = 65535
    Image.fromarray(stored).save(tmp_path / "a.png")
    result = load_image(tmp_path / "a.png", 33, 33)
    assert float(result.min()) == 0 and float(result.max()) == 1


def stripes(vertical: bool) -> Tensor:
    """24 x 8 (or 8 x 24) thirds of 0, 1 and 0, as uint8 [H, W]."""
    stored = torch.zeros(8, 24, dtype=torch.uint8)
    stored[:, 8:16] = 255
    return stored.T if vertical else stored


@pytest.mark.parametrize("vertical", [False, True])
def test_crop_takes_the_centre_and_squash_takes_all(tmp_path: Path, vertical: bool) -> None:
    Image.fromarray(stripes(vertical).contiguous().numpy()).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 8, 8, "crop").tolist() == torch.ones(3, 8, 8).tolist()
    squashed = load_image(tmp_path / "a.png", 8, 8, "squash")
    assert float(squashed.mean()) == pytest.approx(1 / 3, abs=0.02)
    with pytest.raises(DataError, match="use crop, squash or pad"):
        load_image(tmp_path / "a.png", 8, 8, "fit")


@pytest.mark.parametrize("size", [(1, 1), (1, 1000), (1000, 1)])
def test_extreme_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, "red").save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == [1, 0, 0]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_animation_gives_the_first_frame(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert pixel(path) == [1, 0, 0]


def damaged(tmp_path: Path) -> dict[str, Path]:
    noisy = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    bodies = {"zero bytes": b"", "text": b"a cat\n", "header only": b"\x89PNG\r\n\x1a\n"}
    for suffix in ("png", "jpg", "webp", "gif"):
        noisy.save(tmp_path / f"whole.{suffix}")
        whole = (tmp_path / f"whole.{suffix}").read_bytes()
        bodies[f"truncated {suffix}"] = whole[: len(whole) // 2]
    whole = bytearray((tmp_path / "whole.png").read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    bodies["flipped bits"] = bytes(whole)
    bodies["bomb"] = png(8, 2, (60000, 60000), b"")
    bodies["no pixels"] = b"P6 0 0 255\n"
    bodies["postscript"] = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    )
    bodies["float beyond 1"] = b"Pf 2 1 -1.0\n" + struct.pack("<2f", 0.5, 200.0)
    bodies["float nan"] = b"Pf 2 1 -1.0\n" + struct.pack("<2f", 0.5, float("nan"))
    for name, body in bodies.items():
        (tmp_path / f"{name}.png").write_bytes(body)
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
    names = [*bodies, "folder", "pipe", "missing", "x" * 300, "nul\0"]
    return {name: tmp_path / f"{name}.png" for name in names}


@pytest.mark.filterwarnings("error")  # an unclosed file is a ResourceWarning
def test_damaged_files_are_named_and_closed(tmp_path: Path) -> None:
    paths = damaged(tmp_path)
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    for name, path in paths.items():
        with pytest.raises(DataError) as caught:
            load_image(path, 8, 8)
        message = str(caught.value)
        assert message.startswith(f"{path}: ") and "\n" not in message.removeprefix(str(path)), name
        assert len(message) < len(str(path)) + 260
    after = os.listdir("/proc/self/fd") if before else []
    assert len(after) == len(before)
    with pytest.raises(DataError, match="bomb"):
        load_image(paths["bomb"], 8, 8)
    with pytest.raises(DataError, match="not an image"):
        load_image(paths["postscript"], 8, 8)
    with pytest.raises(DataError, match=r"outside 0\.\.1"):
        load_image(paths["float nan"], 8, 8)


def test_good_files_are_closed(tmp_path: Path) -> None:
    test_animation_gives_the_first_frame(tmp_path, "gif")
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("counts open files through /proc")
    before = len(os.listdir("/proc/self/fd"))
    load_image(tmp_path / "a.gif", 8, 8)
    assert len(os.listdir("/proc/self/fd")) == before


def test_tile_places_images_row_by_row() -> None:
    images = torch.arange(3.0)[:, None, None, None].expand(3, 3, 2, 2)
    grid = tile(images, columns=2)
    assert grid.shape == (3, 4, 4)
    assert grid[0, ::2, ::2].tolist() == [[0, 1], [2, 1]]  # the gap is white


def test_shrink_keeps_small_images_and_averages_large_ones() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert shrink(images, 8) is images
    torch.testing.assert_close(shrink(images, 4)[:, :, 0, 0], images[:, :, :2, :2].mean((2, 3)))


@pytest.mark.parametrize(("size", "rows"), [((20, 10), (4, 12)), ((2000, 1), (7, 8))])
def test_pad_keeps_all_and_adds_black(
    tmp_path: Path, size: tuple[int, int], rows: tuple[int, int]
) -> None:
    Image.new("RGB", size, "white").save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", 16, 16, "pad")
    inside = image[:, slice(*rows)]
    assert inside.min() == 1 and image.sum() == inside.sum()
    Image.fromarray(np.full((9, 3), 65535, np.uint16)).save(tmp_path / "deep.png")
    assert load_image(tmp_path / "deep.png", 9, 9, "pad").sum() == 3 * 9 * 3


def test_what_a_crop_loses(tmp_path: Path) -> None:
    Image.new("L", (910, 512)).save(tmp_path / "a.png")
    assert crop_loss(tmp_path / "a.png") == pytest.approx(1 - 512 / 910)
    assert crop_loss(Image.new("L", (16, 2000))) == pytest.approx(0.992)
    with pytest.raises(DataError, match="cannot be decoded"):
        crop_loss(tmp_path / "none.png")


def test_a_disk_error_is_the_images_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.png")

    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", broken)
    monkeypatch.setattr(Image, "open", broken)
    for read in (file_sha256, crop_loss, lambda path: load_image(path, 4, 4)):
        with pytest.raises(DataError, match="Input/output error"):
            read(tmp_path / "a.png")
