"""How images become pixels that can be measured: which images are accepted, and how they are resized."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.Image import Image as PILImage
from torch import Tensor

from evaluation.recipes import RECIPES
from fdistill.base.errors import ArgumentError, DataError, did_you_mean
from fdistill.data.recipes import FORMATS, open_header, pixels

#: PIL's modes that are converted to 1 channel, or to 3. ImageNet has two dozen CMYK files, which every tool converts.
_MODES = {1: ("1", "L"), 3: ("1", "L", "P", "RGB", "CMYK")}
_ORIENTATION = 0x0112  # of EXIF
_PNG_BIT_DEPTH = 24  # offset of that byte in the file; PIL would turn 16 bits into 8 silently
_THREADS = 8
_WORTH_THREADS = 64 * 64  # pixels; decoding a smaller image takes less time than handing it to a thread

_T = TypeVar("_T")


class UnusableImageError(Exception):
    """What is wrong with an image, as the end of a sentence that begins with its name."""


@dataclass(frozen=True)
class Preparation:
    """The form that images are brought to before they are measured.

    Attributes:
        channels: 3, where greyscale images become three equal channels, or 1.
        recipe: how they are resized, a key of `evaluation.recipes.RECIPES`; "exact" resizes nothing.
        size: side in pixels of the square that the recipe makes. With "exact", the size that images must have; None for
            any size.

    Raises:
        ArgumentError: a value that is not one of these.
    """

    channels: int
    recipe: str = "exact"
    size: int | None = None

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ArgumentError(f"channels: expected 1 or 3, got {self.channels}")
        if self.recipe not in RECIPES:
            raise ArgumentError(f"recipe: got {self.recipe!r}; {did_you_mean(self.recipe, RECIPES)}")
        if self.size is None and self.recipe != "exact":
            raise ArgumentError(
                f"size: recipe {self.recipe!r} makes squares of a given size; expected the side in pixels"
            )
        if self.size is not None and self.size < 1:
            raise ArgumentError(f"size: expected at least 1, got {self.size}")


def opened(encoded: bytes, channels: int, size: tuple[int, int] | None) -> PILImage:
    """An image of which only the header is read yet.

    Args:
        encoded: the bytes of a file.
        channels: 1, or 3, for which greyscale images are accepted too.
        size: (width, height) that it must have; None for any.

    Raises:
        UnusableImageError: it is no image, is transparent, or has more than 8 bits a channel, another colour space or
            another size.
    """
    try:
        image = open_header(encoded)
    except UnidentifiedImageError as error:
        raise UnusableImageError(f"is no {', '.join(FORMATS)}; make or copy it again") from error
    except Exception as error:  # damaged headers make PIL raise nearly any exception
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


def decoded(image: PILImage, preparation: Preparation) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 [channels, H, W] of an opened image.

    Raises:
        UnusableImageError: the file is damaged.
    """
    try:
        image.load()
        mode = "L" if preparation.channels == 1 else "RGB"
        image = image if image.mode == mode else image.convert(mode)
        if preparation.recipe == "exact":
            return pixels(image)
        assert preparation.size is not None
        return pixels(RECIPES[preparation.recipe](image, preparation.size))
    except Exception as error:  # damaged bytes make PIL's decoders raise nearly any exception
        raise _damaged(error) from error


def prepared(images: Tensor, name: str, preparation: Preparation) -> Tensor:
    """Prepares images that are in memory.

    Args:
        images: uint8 [B, C, H, W].
        name: where they come from, for messages.

    Returns:
        uint8 [B, channels, size, size], contiguous; with recipe "exact" of their own height and width.

    Raises:
        DataError: images of another number of channels or another size.
    """
    channels, recipe, size = preparation.channels, preparation.recipe, preparation.size
    found, height, width = images.shape[1:]
    if found != channels and (found, channels) != (1, 3):
        raise DataError(f"images {name}: have {found} channels; expected {channels}")
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
    """Whether an image has one channel."""
    return image.mode in _MODES[1]


def is_lossy(encoded: bytes, image: PILImage) -> bool:
    """Whether a file is JPEG, or WebP other than its simple lossless kind; by its bytes, as its name may be wrong."""
    return encoded.startswith(b"\xff\xd8") or (image.format == "WEBP" and encoded[12:16] != b"VP8L")


def is_turned(image: PILImage) -> bool:
    """Whether a camera has marked an opened image as turned. It is measured as it is stored."""
    if image.format == "PNG" and "exif" not in image.info:
        return False  # getexif would decode the image to look for it behind the pixels
    try:
        return image.getexif().get(_ORIENTATION, 1) not in (0, 1)
    except Exception:  # a damaged entry of a whole image
        return False


def expected_size(size: tuple[int, int]) -> str:
    """The end of a message about an image of another size."""
    return f"expected {size[0]}x{size[1]}; bring them to that size first, or choose another protocol"


def threads_for(width: int, height: int) -> int:
    """How many threads to decode images of this size with."""
    return min(_THREADS, os.cpu_count() or 1) if width * height >= _WORTH_THREADS else 1


def in_threads(work: Callable[[int], _T], items: Sequence[int], threads: int) -> list[_T]:
    """[work(item) for item in items], in threads. They end with the call, so that a process may fork between calls."""
    if threads == 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


def _damaged(error: Exception) -> UnusableImageError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UnusableImageError(f"cannot be read ({reason}); make or copy it again")
