"""What turns a saved direction into a gradient, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdistill.kernels.triton.rows import BLOCK, WARPS, on_device


@triton.jit
def _scale_rows(
    direction_ptr,
    scale_ptr,
    upstream_ptr,
    gradient_ptr,
    size,
    blocks,
    direction_step,
    scale_step,
    upstream_step,
    gradient_step,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample = program // blocks
    i = (program - sample * blocks) * BLOCK + tl.arange(0, BLOCK)
    row = sample.to(tl.int64)
    factor = tl.load(scale_ptr + sample * scale_step).to(tl.float32)
    factor *= tl.load(upstream_ptr + sample * upstream_step).to(tl.float32)
    direction = tl.load(direction_ptr + row * direction_step + i, mask=i < size, other=0.0).to(tl.float32)
    gradient = factor * direction
    tl.store(gradient_ptr + row * gradient_step + i, gradient.to(gradient_ptr.dtype.element_ty), mask=i < size)


def scale_rows(direction: Tensor, scale: Tensor, upstream: Tensor) -> Tensor:
    """See `reference.scale_rows`. The upstream gradient of a mean is an expanded number, and is read as that."""
    gradient = torch.empty_like(direction)
    if not direction.numel():
        return gradient
    size = direction.shape[1:].numel()
    blocks = triton.cdiv(size, 2 * BLOCK)
    with on_device(direction):
        _scale_rows[(len(direction) * blocks,)](
            direction,
            scale,
            upstream,
            gradient,
            size,
            blocks,
            direction.stride(0),
            scale.stride(0),
            upstream.stride(0),
            gradient.stride(0),
            BLOCK=2 * BLOCK,
            num_warps=WARPS,
        )
    return gradient
