"""The operator that multiplies saved directions by what a backward pass brings; see `kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from fdistill.kernels import implementation


@torch.library.custom_op("fdistill::scale_rows", mutates_args=())
def scale_rows(direction: Tensor, scale: Tensor, upstream: Tensor, backend: str) -> Tensor:
    """direction scale upstream, like direction [B, ...]; scale and upstream are [B]."""
    gradient: Tensor = implementation("scale_rows", backend, direction).scale_rows(direction, scale, upstream)
    return gradient


@scale_rows.register_fake
def _(direction: Tensor, scale: Tensor, upstream: Tensor, backend: str) -> Tensor:
    return torch.empty_like(direction)
