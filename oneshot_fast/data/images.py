"""Images as tensors in [0, 1] RGB: decoded from files of any common kind, laid out, written."""

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from oneshot_fast.data.image_refs import ImageRef, Member
from oneshot_fast.data.sizes import Size, part_cut
from oneshot_fast.errors import DataError, refused
from oneshot_fast.runtime.files import replacing

# A fixed list, since Pillow would hand some other formats (EPS) to external programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
MUCH = 1 / 3  # of a picture: if a crop takes more away, the user is told
_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
_LYING = range(5, 9)  # EXIF orientations of pictures whose sides are exchanged


def load_image(path: ImageRef, height: int, width: int, resize_mode: str = "crop") -> Tensor:
    """Decode an image file and resize it with Pillow's antialiased Lanczos filter.

    EXIF rotation is applied, transparency is composited over white, of an animation the first frame
    is taken, and grey deeper than 8 bits keeps its depth (65535 becomes 1.0). Floating-point images
    must hold values in [0, 1]. Colour profiles are ignored; CMYK is converted by Pillow's formula.

    Args:
        path: PNG, JPEG, WebP, TIFF, BMP, GIF, PPM, JPEG 2000 or AVIF file, whatever its suffix; or
            such a file inside a shard.
        height: H of the result, pixels.
        width: W of the result, pixels.
        resize_mode: "crop" scales to cover H x W and cuts the centre; "squash" changes the aspect;
            "pad" scales to fit and fills both sides with black.

    Returns:
        [3, H, W] float32, [0, 1] RGB, contiguous.

    Raises:
        DataError: the file is missing, damaged, too large, not an image, or `resize_mode` is wrong.
    """
    if isinstance(path, Path) and not os.path.isfile(path):
        raise DataError(f"{path}: no such image file")
    with refused(DataError, f"{path}: cannot be decoded: "):
        try:
            image = _decode(path)
        except UnidentifiedImageError:
            known = ", ".join(_FORMATS)
            raise DataError(f"{path}: not an image in a known format ({known})") from None
    return resized(image, height, width, resize_mode)


def resized(image: Image.Image, height: int, width: int, resize_mode: str = "crop") -> Tensor:
    """As ``load_image``, of a picture of mode "RGB", or "F" in [0, 1]."""
    if resize_mode not in ("crop", "squash", "pad"):
        raise DataError(f"resize_mode is '{resize_mode}': use crop, squash or pad")
    if resize_mode == "crop":
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    elif resize_mode == "pad":
        scale = min(width / image.width, height / image.height)
        w, h = (max(1, round(scale * side)) for side in image.size)
        inner = image.resize((w, h), Image.Resampling.LANCZOS)
        image = Image.new(image.mode, (width, height))  # black
        image.paste(inner, ((width - w) // 2, (height - h) // 2))
    else:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    if image.mode == "F":  # Lanczos overshoots at edges; Pillow clips this for 8 bits only
        return pixels.clamp(0, 1).expand(3, -1, -1).contiguous()
    return pixels.permute(2, 0, 1).div(255).contiguous()


def crop_loss(image: ImageRef | Image.Image | str, size: Size = (1, 1)) -> float:
    """Part of a picture that is cut away where a crop brings it to ``size``.

    Raises:
        DataError: the file cannot be read.
    """
    return part_cut(size_in(image, upright=size[0] != size[1]), size)


def size_in(image: ImageRef | Image.Image | str, upright: bool = True) -> Size:
    """Height and width of a picture; of files the header is read.

    Where it shall be ``upright``, PNG files are read as a whole: their EXIF block may be the end.

    Raises:
        DataError: the file cannot be read.
    """
    if isinstance(image, Image.Image):
        return image.height, image.width
    with refused(DataError, f"{image}: cannot be decoded: "):
        source = io.BytesIO(image.read()) if isinstance(image, Member) else image
        with Image.open(source, formats=_FORMATS) as opened:
            width, height = opened.size
            with contextlib.suppress(Exception):  # as where it is decoded
                if upright and opened.getexif().get(ExifTags.Base.Orientation) in _LYING:
                    return width, height
            return height, width


def cut_warning(cut: Sequence[tuple[object, float]], remedy: str) -> str | None:
    """What the user is told of images and the parts of them that a crop took; None: nothing."""
    much = [one for one in cut if one[1] > MUCH]
    if not much:
        return None
    worst, part = max(much, key=lambda one: one[1])
    return f"{len(much)} images lose more than a third, most {worst} ({part:.0%}); {remedy}"


def _decode(path: ImageRef) -> Image.Image:
    """First frame, upright and opaque: mode "RGB", or "F" in [0, 1] for grey deeper than 8 bits."""
    source = path if isinstance(path, Path) else io.BytesIO(path.read())
    with Image.open(source, formats=_FORMATS) as image:
        image.load()  # damaged pixels raise here; below, only the EXIF block can be at fault
        with contextlib.suppress(Exception):  # a broken EXIF block does not spoil the picture
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I") or image.mode == "F":
            return Image.fromarray(_deep_grey(path, image))
        if not image.has_transparency_data:
            return image.convert("RGB")
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")


def _deep_grey(path: ImageRef, image: Image.Image) -> npt.NDArray[np.float32]:
    """[H, W] float32 in [0, 1] of a grey image with 12, 16 or 32 bits per pixel."""
    # Pillow unpacks the bits of a TIFF but neither scales nor inverts deep grey.
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_TIFF_BITS, (16,))[0]
    white = 1.0 if image.mode == "F" else float((1 << min(bits, 16)) - 1)
    grey = np.asarray(image).astype(np.float32) / np.float32(white)
    # Rounding of a float image may pass the ends by a little; anything more is another value range.
    if not (grey.min() >= -1e-3 and grey.max() <= 1 + 1e-3):  # also false for NaN
        raise DataError(
            f"{path}: pixel values outside 0..{white:g}: save it with 8 or 16 bits per channel"
        )
    if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 1 - grey
    if "transparency" in image.info:  # PNG: the one grey value that is see-through
        grey[grey == np.float32(image.info["transparency"]) / np.float32(white)] = 1
    return grey.clip(0, 1)


def to_pil(image: Tensor) -> Image.Image:
    """An 8-bit Pillow image of RGB [3, H, W], uint8 or floats in [0, 1]."""
    if image.is_floating_point():
        image = (image.detach().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def save_png(path: Path, image: Tensor) -> None:
    """Write an RGB image [3, H, W], uint8 or floats in [0, 1], as an 8-bit PNG."""
    with replacing(path, durable=False) as temporary:
        to_pil(image).save(temporary, "PNG")


def shrink(images: Tensor, side: int) -> Tensor:
    """Images [B, 3, H, W] averaged down to at most ``side`` pixels a side, in their own shape."""
    longest = max(images.shape[-2:])
    if longest <= side:
        return images
    H, W = (max(1, round(side * old / longest)) for old in images.shape[-2:])
    return F.interpolate(images, (H, W), mode="area")


def squared(images: Tensor, side: int) -> Tensor:
    """Images [B, 3, H, W] as squares of at most ``side`` pixels a side, for a judge of squares."""
    H, W = images.shape[-2:]
    return shrink(images, side) if H == W else F.interpolate(images, (side, side), mode="area")


def tile(images: Tensor, columns: int) -> Tensor:
    """One image [3, rows * H, columns * W] of images [N, 3, H, W], row by row; gaps are white."""
    N, _, H, W = images.shape
    rows = -(-N // columns)
    blank = images.new_ones(rows * columns - N, 3, H, W)
    grid = torch.cat((images, blank)).view(rows, columns, 3, H, W)
    return grid.permute(2, 0, 3, 1, 4).reshape(3, rows * H, columns * W)
