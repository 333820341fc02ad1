"""Images as bytes and as network values: the one place where [0, 255] meets [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor


def to_unit(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(x0: Tensor) -> Tensor:
    """float [-1, 1] -> uint8 [0, 255], clipped first, rounded to nearest."""
    return (x0.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
