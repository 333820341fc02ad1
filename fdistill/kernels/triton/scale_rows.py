"""Multiplies each sample by a number, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdistill.kernels.layout import empty_samples_like, laid_out_like
from fdistill.kernels.triton.rows import BLOCK, WARPS, on_device


@triton.jit
def _scale_rows(
    rows_ptr,
    scale_ptr,
    upstream_ptr,
    scaled_ptr,
    size,
    blocks,
    rows_step,
    scale_step,
    upstream_step,
    scaled_step,
    UPSTREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample = program // blocks
    i = (program - sample * blocks) * BLOCK + tl.arange(0, BLOCK)
    row = sample.to(tl.int64)
    factor = tl.load(scale_ptr + sample * scale_step).to(tl.float32)
    if UPSTREAM:
        factor *= tl.load(upstream_ptr + sample * upstream_step).to(tl.float32)
    value = tl.load(rows_ptr + row * rows_step + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(scaled_ptr + row * scaled_step + i, (factor * value).to(scaled_ptr.dtype.element_ty), mask=i < size)


def scale_rows(rows: Tensor, scale: Tensor, upstream: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `reference.scale_rows`. The upstream gradient of a sum is one expanded number, and is read without a copy."""
    scaled = empty_samples_like(rows, dtype)
    if not scaled.numel():
        return scaled
    rows = laid_out_like(rows, scaled)
    size = rows.shape[1:].numel()
    blocks = triton.cdiv(size, 2 * BLOCK)
    with on_device(rows):
        _scale_rows[(len(rows) * blocks,)](
            rows,
            scale,
            scale if upstream is None else upstream,
            scaled,
            size,
            blocks,
            rows.stride(0),
            scale.stride(0),
            0 if upstream is None else upstream.stride(0),
            scaled.stride(0),
            UPSTREAM=upstream is not None,
            BLOCK=2 * BLOCK,
            num_warps=WARPS,
        )
    return scaled
