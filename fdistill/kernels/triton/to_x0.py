"""A network's output as an x0-prediction, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdistill.kernels.checks import wide
from fdistill.kernels.layout import empty_samples_like
from fdistill.kernels.triton.rows import BLOCK, WARPS, on_device, rows, vectors


@triton.jit
def _to_x0(
    output_ptr,
    x_t_ptr,
    skip_ptr,
    out_ptr,
    x0_ptr,
    size,
    blocks,
    output_step,
    x_t_step,
    x0_step,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample = program // blocks
    i = (program - sample * blocks) * BLOCK + tl.arange(0, BLOCK)
    row = sample.to(tl.int64)
    output = tl.load(output_ptr + row * output_step + i, mask=i < size, other=0.0).to(tl.float32)
    x_t = tl.load(x_t_ptr + row * x_t_step + i, mask=i < size, other=0.0).to(tl.float32)
    skip = tl.load(skip_ptr + sample).to(tl.float32)
    out = tl.load(out_ptr + sample).to(tl.float32)
    tl.store(x0_ptr + row * x0_step + i, skip * x_t + out * output, mask=i < size)


def to_x0(output: Tensor, x_t: Tensor, skip: Tensor, out: Tensor) -> Tensor:
    """See `reference.to_x0`."""
    x0 = empty_samples_like(output, wide(torch.promote_types(output.dtype, x_t.dtype)))
    if not x0.numel():
        return x0
    size = x0.shape[1:].numel()
    blocks = triton.cdiv(size, BLOCK)
    output_rows, x_t_rows = rows(x0, output, x_t)
    skip, out = vectors(skip, skip, out)
    with on_device(x0):
        _to_x0[(len(x0) * blocks,)](
            output_rows,
            x_t_rows,
            skip,
            out,
            x0,
            size,
            blocks,
            output_rows.stride(0),
            x_t_rows.stride(0),
            x0.stride(0),
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return x0
