"""Aspect-ratio buckets: images of about one area in the shape nearest to their own, instead of all as squares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fdistill.base.errors import ArgumentError
from fdistill.data.recipes import open_header, upright_size
from fdistill.data.source import Encoded, Source

_WIDEST = 2.0  # longest side over shortest: models have been trained on little beyond


@dataclass(frozen=True)
class Bucket:
    """A shape of images in pixels, and the rows of a data set that get it."""

    height: int
    width: int
    rows: list[int]


def bucket_sizes(resolution: int, multiple: int) -> list[tuple[int, int]]:
    """(height, width) of every bucket, from the widest to the tallest: sides that are multiples of `multiple`, areas of
    at most resolution^2 and as near to it as such sides come, aspect ratios of at most 2.

    Of 1024 and 64 they are among SDXL's (arXiv 2307.01952, appendix I): 768 x 1344, 832 x 1216, 896 x 1152, ...

    Raises:
        ArgumentError: resolution is no multiple of `multiple`.
    """
    if multiple < 1 or resolution % multiple:
        raise ArgumentError(
            f"buckets: got {multiple}; expected a number of pixels that divides the resolution, {resolution}, such as "
            "64 for 1024"
        )
    wide = []
    for height in range(multiple, resolution, multiple):
        width = resolution**2 // height // multiple * multiple
        if width <= _WIDEST * height:
            wide.append((height, width))
    return [*wide, (resolution, resolution), *((width, height) for height, width in reversed(wide))]


def nearest(sizes: Sequence[tuple[int, int]], height: int, width: int) -> int:
    """The place of the size whose aspect ratio is nearest to that of an image, by the ratio of both."""
    ratio = math.log(height / width)
    return min(range(len(sizes)), key=lambda place: abs(math.log(sizes[place][0] / sizes[place][1]) - ratio))


def sort_into_buckets(source: Source, resolution: int, multiple: int, least: int = 1) -> list[Bucket]:
    """The buckets of a data set's images that have any, from the widest to the tallest. Reads every image's header.

    The images of a bucket with fewer than `least` go to the nearest bucket that has as many; if none has, all images
    become squares. An image whose header cannot be read gets the most frequent shape; whoever decodes it leaves it out.

    Raises:
        ArgumentError: as `bucket_sizes`, or least is below 1.
    """
    if least < 1:
        raise ArgumentError(f"bucket_images: got {least}; expected at least 1")
    sizes = bucket_sizes(resolution, multiple)
    found = [_size(source.encoded(row)) for row in range(len(source))]
    places = [None if size is None else nearest(sizes, *size) for size in found]
    counts = [places.count(place) for place in range(len(sizes))]
    kept = [size for size, count in zip(sizes, counts, strict=True) if count >= least] or [(resolution, resolution)]
    rows: list[list[int]] = [[] for _ in kept]
    for row, size in enumerate(found):
        if size is not None:
            rows[nearest(kept, *size)].append(row)
    most = max(range(len(kept)), key=lambda place: len(rows[place]))
    rows[most] = sorted([*rows[most], *(row for row, size in enumerate(found) if size is None)])
    return [Bucket(*size, own) for size, own in zip(kept, rows, strict=True) if own]


def _size(encoded: Encoded) -> tuple[int, int] | None:
    """(height, width) of an image, as it is seen; None if its header cannot be read."""
    if not isinstance(encoded, bytes):
        return encoded.shape[0], encoded.shape[1]
    try:
        return upright_size(open_header(encoded))
    except Exception:
        return None


class Rows:
    """Some rows of another data set, as a data set: a `Source`."""

    def __init__(self, source: Source, rows: Sequence[int]):
        self.name, self.num_classes = source.name, source.num_classes
        self._source, self._rows = source, list(rows)

    @cached_property
    def labels(self) -> Tensor:
        """int64 [N]."""
        return self._source.labels[torch.tensor(self._rows)]

    @property
    def captions(self) -> Sequence[str] | None:
        """One text per item, or None."""
        captions = self._source.captions
        return None if captions is None else [captions[row] for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def item_name(self, index: int) -> str:
        """The item's name in the other data set."""
        return self._source.item_name(self._rows[index])

    def encoded(self, index: int) -> Encoded:
        """The item as the other data set has it."""
        return self._source.encoded(self._rows[index])
