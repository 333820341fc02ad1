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


def exact(image: PILImage, size: int) -> PILImage:
    """No resampling; raises DataError for an image of another size."""
    if image.size != (size, size):
        others = ", ".join(name for name in RECIPES if name != "exact")
        raise DataError(
            f"is {image.width}x{image.height}, but the teacher's images are {size}x{size}; choose a recipe that "
            f"resamples: {others}"
        )
    return image


def center_box(image: PILImage, size: int) -> PILImage:
    """The largest central square, averaged over areas (PIL's BOX): StyleGAN's data set tool with its box filter
    (Karras et al. 2020)."""
    return _central_square(image).resize((size, size), Resampling.BOX)


def center_lanczos(image: PILImage, size: int) -> PILImage:
    """The largest central square, resized with LANCZOS: EDM's data set tool, "center-crop" (Karras et al. 2022)."""
    return _central_square(image).resize((size, size), Resampling.LANCZOS)


def adm(image: PILImage, size: int) -> PILImage:
    """BOX-halved while the short side is at least 2 size, then BICUBIC to a short side of `size`, then the central
    square: the ImageNet of guided-diffusion (Dhariwal and Nichol 2021, image_datasets.py), of EDM and EDM2
    ("center-crop-dhariwal"), DiT and SiT."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    _check_pixels(round(image.width * scale), round(image.height * scale))
    image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    return _central_square(image)


def squash(image: PILImage, size: int) -> PILImage:
    """The whole image, stretched to a square with LANCZOS."""
    return image.resize((size, size), Resampling.LANCZOS)


RECIPES: dict[str, Callable[[PILImage, int], PILImage]] = {
    "exact": exact,
    "center-box": center_box,
    "center-lanczos": center_lanczos,
    "adm": adm,
    "squash": squash,
}


def _central_square(image: PILImage) -> PILImage:
    """Where a margin is odd, the larger part is at the right or the bottom."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


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


def _check_pixels(width: int, height: int) -> None:
    if width * height > _MOST_PIXELS:
        raise ValueError(f"{width}x{height} are more than {_MOST_PIXELS:,} pixels; make it smaller, or remove it")


def pixels(image: PILImage) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    """uint8 [C, H, W]."""
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
