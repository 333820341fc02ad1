"""How images are resized and cropped: the recipes of training data, and two that only evaluations use."""

from __future__ import annotations

from collections.abc import Callable

from PIL.Image import Image as PILImage
from PIL.Image import Resampling

from fdistill.data import RECIPES as TRAINING_RECIPES


def torchvision_lanczos(image: PILImage, size: int) -> PILImage:
    """The largest central square, then LANCZOS to `size` pixels, as GigaGAN and DMD2 prepare COCO (Kang et al. 2023,
    Yin et al. 2024).

    It differs from "center-lanczos" if a margin is an odd number of pixels: half of it is rounded to the even number,
    as torchvision does.
    """
    return _rounded_crop(image, min(image.size)).resize((size, size), Resampling.LANCZOS)


def center_patch(image: PILImage, size: int) -> PILImage:
    """The central size x size pixels as they are, for patch FID (SDXL-Lightning, arXiv 2402.13929).

    An image that is smaller on either side is stretched to that size with BICUBIC.
    """
    if min(image.size) < size:
        return image.resize((size, size), Resampling.BICUBIC)
    return _rounded_crop(image, size)


def _square(recipe: Callable[[PILImage, int, int], PILImage]) -> Callable[[PILImage, int], PILImage]:
    return lambda image, size: recipe(image, size, size)


RECIPES: dict[str, Callable[[PILImage, int], PILImage]] = {
    **{name: _square(recipe) for name, recipe in TRAINING_RECIPES.items()},
    "torchvision-lanczos": torchvision_lanczos,
    "center-patch": center_patch,
}


def _rounded_crop(image: PILImage, side: int) -> PILImage:
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))
