"""What a kind of data set provides: how it is recognised, and its images with labels, each found by its index."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from fdistill.base.errors import DataError

__all__ = ["ArraySource", "Kind", "Source", "class_labels"]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})

Encoded = bytes | np.ndarray[Any, np.dtype[np.uint8]]
T = TypeVar("T")


class Source(Protocol):
    """Images by index. Sources can be pickled and used after a fork."""

    @property
    def name(self) -> str:
        """Where it came from, for messages."""

    @property
    def labels(self) -> Tensor:
        """int64 [N], in [0, num_classes); zeros if there are none."""

    @property
    def num_classes(self) -> int | None:
        """None for a source without labels."""

    @property
    def captions(self) -> Sequence[str] | None:
        """One text per item, read at first use; None for a source without captions. DataError if they are damaged."""

    def __len__(self) -> int:
        """The number of items, at least 1."""

    def item_name(self, index: int) -> str:
        """What a message calls one item: a file or member name."""

    def encoded(self, index: int) -> Encoded:
        """A compressed image file, or pixels uint8 [H, W, C] or [H, W]."""


@dataclass(frozen=True)
class Kind:
    """One kind of data set: a row of the registry in `fdistill.data`, made in the file that reads it.

    Both functions take what the user wrote after `data=`: a name, or the path of a file or folder.

    Attributes:
        name: what messages call it, as in "holds CIFAR-10 and tar files"; of an embedded data set, its own name.
        recognises: whether this is a data set of the kind. It looks at names, and opens nothing.
        open: the data set; raises DataError where it is damaged.
        file: what messages call one that is no folder, such as ".zip", "CIFAR-10's .tar.gz" or "hf:owner/name"; its
            last word is how file names of this kind end. Empty where there are only folders.
    """

    name: str
    recognises: Callable[[str], bool]
    open: Callable[[str], Source]
    file: str = ""


class PerProcess(Generic[T]):
    """A handle opened at its first use in each process: after a fork, two processes would share one file position.

    Args:
        opened: makes the handle; must be picklable if the source is to be.
    """

    def __init__(self, opened: Callable[[], T]):
        self._opened = opened
        self._handle: tuple[int, T] | None = None

    def get(self) -> T:
        if self._handle is None or self._handle[0] != os.getpid():
            self._handle = os.getpid(), self._opened()
        return self._handle[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"_opened": self._opened, "_handle": None}


def is_image(name: str) -> bool:
    """True for the name of an image file; hidden files (macOS writes `._x.png`) are none."""
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def class_labels(values: Any, count: int, where: str) -> tuple[Tensor, int | None]:
    """(labels int64 [count], number of classes: the largest id + 1) of a sequence; (zeros, None) of None.

    Raises:
        DataError: a label is not an integer, is negative, or there are not `count` of them.
    """
    if values is None:
        return torch.zeros(count, dtype=torch.long), None
    try:
        array = np.asarray(values)
    except ValueError as error:  # lists of different lengths
        raise DataError(f"{where}: labels of different shapes; expected one integer class id per image") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"{where}: labels are {array.dtype} of shape {list(array.shape)}; expected one integer class id per image"
        )
    if len(array) != count:
        raise DataError(f"{where}: {len(array)} labels for {count} images; expected one for each")
    if array.min() < 0:
        raise DataError(
            f"{where}: label {array.min()} is negative; expected class ids from 0 (a test split without labels has -1)"
        )
    return torch.from_numpy(array.astype(np.int64)), int(array.max()) + 1


class ArraySource:
    """Images held in memory.

    Args:
        images: uint8 [N, C, H, W] with N >= 1.
        labels: int64 [N].
        captions: N texts, or None.
    """

    def __init__(
        self,
        name: str,
        images: Tensor,
        labels: Tensor,
        num_classes: int | None,
        captions: Sequence[str] | None = None,
    ):
        self.name, self.images, self.labels, self.num_classes = name, images, labels, num_classes
        self.captions = captions

    def __len__(self) -> int:
        return len(self.images)

    def item_name(self, index: int) -> str:
        return f"image {index}"

    def encoded(self, index: int) -> Encoded:
        pixels = self.images[index].permute(1, 2, 0).numpy()
        return pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
