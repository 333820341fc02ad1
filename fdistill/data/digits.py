"""The UCI handwritten digits that come with the package: 1,797 images of 8x8 pixels in 10 classes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fdistill.assets import DIGITS_DATA
from fdistill.data.source import ArraySource, Kind


def load_digits() -> tuple[Tensor, Tensor]:
    """(images [1797, 1, 8, 8] uint8 in [0, 255], labels [1797] int64 in [0, 9]).

    The original has 17 grey levels v in [0, 16]; the images here hold round(255 v / 16).
    """
    with np.load(DIGITS_DATA, allow_pickle=False) as archive:
        levels = torch.from_numpy(archive["images"].astype(np.float32))
        labels = torch.from_numpy(archive["labels"].astype(np.int64))
    return (levels * (255 / 16)).round().to(torch.uint8)[:, None], labels


def open_digits(name: str) -> ArraySource:
    """The digits with their classes."""
    return ArraySource(name, *load_digits(), 10)


KIND = Kind("digits", lambda where: where == "digits", open_digits)
