"""A network's output as an x0-prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from fdistill.kernels.checks import wide
from fdistill.kernels.layout import as_results, expand


def to_x0(output: Tensor, x_t: Tensor, skip: Tensor, out: Tensor) -> Tensor:
    """skip x_t + out output, at least float32 and laid out like the output; skip and out are [B]."""
    dtype = wide(torch.promote_types(output.dtype, x_t.dtype))
    x0 = expand(skip.to(dtype), x_t) * x_t.to(dtype) + expand(out.to(dtype), x_t) * output.to(dtype)
    return as_results(x0, output, dtype)
