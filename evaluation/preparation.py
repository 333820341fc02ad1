"""From encoded images, or those in memory, to pixels that can be measured: what will do, and how it is resampled."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.Image import Image as PILImage
from torch import Tensor

from evaluation.recipes import RECIPES
from fdistill.base.errors import ArgumentError, DataError, did_you_mean
from fdistill.data.recipes import pixels

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
#: PIL's names of what becomes grey, or RGB. ImageNet has two dozen CMYK files, which every tool converts.
_MODES = {1: ("1", "L"), 3: ("1", "L", "P", "RGB", "CMYK")}
_PNG_BIT_DEPTH = 24  # its place in the file; PIL makes 8 bits of 16 without a word
_THREADS = 8
_WORTH_THREADS = 64 * 64  # pixels; smaller images are decoded in less time than threads need to take turns

_T = TypeVar("_T")


class UnusableImageError(Exception):
    """What is wrong with an image; reads on after its name."""


def check_settings(channels: int, recipe: str, size: int | None) -> None:
    """Raises ArgumentError for what `prepared` cannot do."""
    if channels not in (1, 3):
        raise ArgumentError(f"channels: expected 1 or 3, got {channels}")
    if recipe not in RECIPES:
        raise ArgumentError(f"recipe: got {recipe!r}; {did_you_mean(recipe, RECIPES)}")
    if size is None and recipe != "exact":
        raise ArgumentError(f"size: recipe {recipe!r} makes squares of a given size; expected the side in pixels")
    if size is not None and size < 1:
        raise ArgumentError(f"size: expected at least 1, got {size}")


def opened(encoded: bytes, channels: int, size: tuple[int, int] | None) -> PILImage:
    """The image with its header read and nothing decoded.

    Args:
        channels: 1, or 3, for which greyscale will do as well.
        size: width and height; None for any.

    Raises:
        UnusableImageError: no image, transparent, of more than 8 bits a channel, another colour space or size.
    """
    try:
        image = Image.open(io.BytesIO(encoded), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise UnusableImageError(f"is no {', '.join(_FORMATS)}; make or copy it again") from error
    except Exception as error:  # damaged headers end in nearly any of them
        raise _damaged(error) from error
    expected = "8-bit greyscale" if channels == 1 else "8-bit RGB or greyscale"
    if image.has_transparency_data:
        raise UnusableImageError(f"is transparent ({image.mode}); expected {expected}, so put it on a background")
    if image.format == "PNG" and encoded[_PNG_BIT_DEPTH] > 8:
        raise UnusableImageError(f"has {encoded[_PNG_BIT_DEPTH]} bits a channel; expected {expected}")
    if image.mode not in _MODES[channels]:
        raise UnusableImageError(f"is of mode {image.mode}; expected {expected}")
    if size is not None and image.size != size:
        raise UnusableImageError(f"is {image.width}x{image.height}; {expected_size(size)}")
    return image


def decoded(image: PILImage, channels: int, recipe: str, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 [channels, H, W] of an opened image; its own size if the recipe is "exact".

    Raises:
        UnusableImageError: damaged.
    """
    try:
        image.load()
        mode = "L" if channels == 1 else "RGB"
        image = image if image.mode == mode else image.convert(mode)
        return pixels(image if recipe == "exact" else RECIPES[recipe](image, size))
    except Exception as error:  # PIL's decoders end in nearly any of them on damaged bytes
        raise _damaged(error) from error


def prepared(images: Tensor, name: str, *, channels: int, recipe: str, size: int | None) -> Tensor:
    """What `open_images` makes of images that are in memory.

    Args:
        images: uint8 [B, C, H, W].
        name: of where they come from, for messages.
        channels, recipe, size: as of `open_images`; with "exact" and no size they keep theirs.

    Returns:
        uint8 [B, channels, size, size], contiguous.

    Raises:
        DataError: images of other channels or another size.
    """
    check_settings(channels, recipe, size)
    found, height, width = images.shape[1:]
    if found != channels and (found, channels) != (1, 3):
        raise DataError(f"images {name}: of {found} channels; expected {channels}")
    if recipe == "exact":
        if size is not None and (height, width) != (size, size):
            raise DataError(f"images {name}: are {width}x{height}; {expected_size((size, size))}")
    else:
        assert size is not None
        made = np.empty((len(images), found, size, size), np.uint8)

        def resample(place: int) -> None:
            array = images[place].permute(1, 2, 0).numpy()
            made[place] = pixels(RECIPES[recipe](Image.fromarray(array[:, :, 0] if found == 1 else array), size))

        in_threads(resample, range(len(images)), threads_for(width, height))
        images = torch.from_numpy(made)
    return images.expand(-1, channels, -1, -1).clone(memory_format=torch.contiguous_format)


def is_grey(image: PILImage) -> bool:
    """Of one channel."""
    return image.mode in _MODES[1]


def is_lossy(encoded: bytes, image: PILImage) -> bool:
    """JPEG, and WEBP other than its simple lossless kind, by content: a .png may hold one."""
    return encoded.startswith(b"\xff\xd8") or (image.format == "WEBP" and encoded[12:16] != b"VP8L")


def expected_size(size: tuple[int, int]) -> str:
    """The part of a message that says what would do."""
    return f"expected {size[0]}x{size[1]}; bring them to that size first, or choose another protocol"


def threads_for(width: int, height: int) -> int:
    """How many decode images of this size."""
    return min(_THREADS, os.cpu_count() or 1) if width * height >= _WORTH_THREADS else 1


def in_threads(work: Callable[[int], _T], items: Sequence[int], threads: int) -> list[_T]:
    """Results in order. Threads end with the call, so a process may fork between calls."""
    if threads == 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


def _damaged(error: Exception) -> UnusableImageError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UnusableImageError(f"cannot be read ({reason}); make or copy it again")
