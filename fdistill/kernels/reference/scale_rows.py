"""Multiplies each sample by a number."""

from __future__ import annotations

import torch
from torch import Tensor

from fdistill.kernels.checks import wide
from fdistill.kernels.layout import as_results, expand


def scale_rows(rows: Tensor, scale: Tensor, upstream: Tensor | None, dtype: torch.dtype) -> Tensor:
    """rows scale upstream in `dtype`, laid out like rows [B, ...]; scale and upstream are [B]; None means ones."""
    precise = wide(rows.dtype)
    factor = scale.to(precise) if upstream is None else scale.to(precise) * upstream.to(precise)
    return as_results(expand(factor, rows) * rows.to(precise), rows, dtype)
