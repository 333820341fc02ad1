"""What turns a saved direction into a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fdistill.kernels.checks import wide
from fdistill.kernels.layout import laid_out_like
from fdistill.noise import expand


def scale_rows(direction: Tensor, scale: Tensor, upstream: Tensor) -> Tensor:
    """direction scale upstream, like direction [B, ...]; scale and upstream are [B]."""
    dtype = wide(direction.dtype)
    factor = expand(scale.to(dtype) * upstream.to(dtype), direction)
    return laid_out_like((factor * direction.to(dtype)).to(direction.dtype), torch.empty_like(direction))
