"""From an encoded image to pixels of the teacher's size. Recipes have names, as results depend on the resampling.

Camera rotation (EXIF) is not applied, as in the data sets that the recipes come from.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.Image import Image as PILImage
from PIL.Image import Resampling

from fdistill.base.errors import DataError
from fdistill.data.source import Encoded

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")


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
    """The decoded image; raises nearly any Exception for bytes that are none."""
    if not isinstance(encoded, bytes):
        return Image.fromarray(encoded)
    try:
        image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"its {len(encoded)} bytes are no {', '.join(_FORMATS)}") from error
    image.load()
    return image


def pixels(image: PILImage) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    """uint8 [C, H, W]."""
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
