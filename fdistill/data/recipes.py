"""From an encoded image to pixels of the teacher's size. Recipes have names, as results depend on the resampling.

An image that a camera has marked as turned (EXIF) is turned upright; the tools that the recipes come from do not do so.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.Image import Image as PILImage
from PIL.Image import Resampling

from fdistill.base.errors import DataError
from fdistill.data.source import Encoded

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
#: The most pixels of an image: at this number Pillow warns of files that are small and take gigabytes to decode.
_MOST_PIXELS = 89_478_485
_ORIENTATION, _ON_ITS_SIDE = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and those of its values that swap height and width


def exact(image: PILImage, height: int, width: int) -> PILImage:
    """No resampling; raises DataError for an image of another size."""
    if image.size != (width, height):
        others = ", ".join(name for name in RECIPES if name != "exact")
        raise DataError(
            f"is {image.width}x{image.height}, but the teacher's images are {width}x{height}; choose a recipe that "
            f"resamples: {others}"
        )
    return image


def center_box(image: PILImage, height: int, width: int) -> PILImage:
    """The largest central part of the wanted shape, averaged over areas (PIL's BOX): for squares StyleGAN's data set
    tool with its box filter (Karras et al. 2020)."""
    return _central(image, height, width).resize((width, height), Resampling.BOX)


def center_lanczos(image: PILImage, height: int, width: int) -> PILImage:
    """The largest central part of the wanted shape, resized with LANCZOS: for squares EDM's data set tool,
    "center-crop" (Karras et al. 2022)."""
    return _central(image, height, width).resize((width, height), Resampling.LANCZOS)


def adm(image: PILImage, height: int, width: int) -> PILImage:
    """BOX-halved while it is at least twice as large as wanted, then BICUBIC to the wanted size on one side and at
    least that on the other, then the central part: for squares the ImageNet of guided-diffusion (Dhariwal and Nichol
    2021, image_datasets.py), of EDM and EDM2 ("center-crop-dhariwal"), DiT and SiT."""
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    size = round(image.width * scale), round(image.height * scale)
    _check_pixels(*size)
    return _cropped(image.resize(size, Resampling.BICUBIC), height, width)


def squash(image: PILImage, height: int, width: int) -> PILImage:
    """The whole image, stretched to the wanted shape with LANCZOS."""
    return image.resize((width, height), Resampling.LANCZOS)


#: Functions (image, height, width) -> image of that size.
RECIPES: dict[str, Callable[[PILImage, int, int], PILImage]] = {
    "exact": exact,
    "center-box": center_box,
    "center-lanczos": center_lanczos,
    "adm": adm,
    "squash": squash,
}


def _central(image: PILImage, height: int, width: int) -> PILImage:
    """The largest central part with the aspect ratio of height and width."""
    if image.width * height >= image.height * width:
        return _cropped(image, image.height, max(1, image.height * width // height))
    return _cropped(image, max(1, image.width * height // width), image.width)


def _cropped(image: PILImage, height: int, width: int) -> PILImage:
    """Where a margin is odd, the larger part is at the right or the bottom."""
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_channels(image: PILImage, channels: int) -> PILImage:
    """8-bit grey (channels 1, ITU-R 601 luma) or RGB (3); whatever is transparent lies on white.

    Raises:
        ValueError: 16-bit, 32-bit or float pixels, whose range is unknown.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError(f"its pixels are of mode {image.mode}, 16 bits or more; expected 8 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    mode = {1: "L", 3: "RGB"}[channels]
    return image if image.mode == mode else image.convert(mode)


def open_image(encoded: Encoded) -> PILImage:
    """The decoded image, turned upright; raises nearly any Exception for bytes that are none."""
    if not isinstance(encoded, bytes):
        return Image.fromarray(encoded)
    try:
        image = open_header(encoded)
    except UnidentifiedImageError as error:
        raise ValueError(f"its {len(encoded)} bytes are no {', '.join(FORMATS)}") from error
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image


def open_header(encoded: bytes) -> PILImage:
    """An image of which only the header is read yet.

    Raises:
        UnidentifiedImageError: it is of none of `FORMATS`.
        ValueError: it has more pixels than are decoded.
        Exception: nearly any, for a damaged header.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    except Image.DecompressionBombError as error:  # of twice as many
        raise ValueError(f"has more than {_MOST_PIXELS:,} pixels; make it smaller, or remove it") from error
    _check_pixels(*image.size)
    return image


def upright_size(image: PILImage) -> tuple[int, int]:
    """(height, width) that an image has once it is turned upright; reads no more than its header."""
    turned = image.getexif().get(_ORIENTATION, 1) in _ON_ITS_SIDE
    return (image.width, image.height) if turned else (image.height, image.width)


def _check_pixels(width: int, height: int) -> None:
    if width * height > _MOST_PIXELS:
        raise ValueError(f"{width}x{height} are more than {_MOST_PIXELS:,} pixels; make it smaller, or remove it")


def pixels(image: PILImage) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    """uint8 [C, H, W]."""
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
