"""Squared error of an x0-prediction: loss and gradient in one pass over the network's output."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdistill.kernels.layout import empty_samples_like
from fdistill.kernels.triton.rows import BLOCK, WARPS, on_device, plan, rows, vectors


@triton.jit
def _denoising(
    prediction_ptr,
    x_t_ptr,
    x0_ptr,
    skip_ptr,
    out_ptr,
    weight_ptr,
    residual_ptr,
    loss_ptr,
    scale_ptr,
    sums_ptr,
    size,
    splits,
    prediction_step,
    x_t_step,
    x0_step,
    residual_step,
    RAW: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample = program // splits
    part = program - sample * splits
    row = sample.to(tl.int64)
    weight = tl.load(weight_ptr + sample).to(tl.float32)
    slope = weight
    if RAW:
        skip = tl.load(skip_ptr + sample).to(tl.float32)
        out = tl.load(out_ptr + sample).to(tl.float32)
        slope = weight * out
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, CHUNK, BLOCK):
        i = part * CHUNK + start + tl.arange(0, BLOCK)
        inside = i < size
        residual = tl.load(prediction_ptr + row * prediction_step + i, mask=inside, other=0.0).to(tl.float32)
        x0 = tl.load(x0_ptr + row * x0_step + i, mask=inside, other=0.0).to(tl.float32)
        if RAW:
            x_t = tl.load(x_t_ptr + row * x_t_step + i, mask=inside, other=0.0).to(tl.float32)
            residual = skip * x_t + out * residual
        residual -= x0
        squares += residual * residual
        tl.store(residual_ptr + row * residual_step + i, residual.to(residual_ptr.dtype.element_ty), mask=inside)
    square = tl.sum(squares)
    if SPLIT:
        tl.store(sums_ptr + program, square)
    else:
        tl.store(loss_ptr + sample, weight * (square / size))
    if part == 0:
        tl.store(scale_ptr + sample, 2.0 / size * slope)


@triton.jit
def _denoising_sums(sums_ptr, weight_ptr, loss_ptr, size, splits, BLOCK: tl.constexpr):
    sample = tl.program_id(0)
    part = tl.arange(0, BLOCK)
    square = tl.sum(tl.load(sums_ptr + sample * splits + part, mask=part < splits, other=0.0))
    tl.store(loss_ptr + sample, tl.load(weight_ptr + sample).to(tl.float32) * (square / size))


def denoising(
    prediction: Tensor,
    x_t: Tensor | None,
    x0: Tensor,
    skip: Tensor | None,
    out: Tensor | None,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.denoising`."""
    batch = len(x0)
    residual = empty_samples_like(prediction)
    loss, scale = (torch.empty(batch, dtype=torch.float32, device=x0.device) for _ in range(2))
    if not batch:
        return loss, residual, scale
    size, chunk, splits = plan(x0)
    tensors = rows(residual, prediction, x_t, x0)
    weight, *coefficients = vectors(scale, weight, skip, out)
    sums = torch.empty(batch * splits, dtype=torch.float32, device=x0.device) if splits > 1 else loss
    with on_device(x0):
        _denoising[(batch * splits,)](
            *tensors,
            *coefficients,
            weight,
            residual,
            loss,
            scale,
            sums,
            size,
            splits,
            *(value.stride(0) for value in tensors),
            residual.stride(0),
            RAW=x_t is not None,
            SPLIT=splits > 1,
            CHUNK=chunk,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        if splits > 1:
            block = triton.next_power_of_2(splits)
            _denoising_sums[(batch,)](sums, weight, loss, size, splits, BLOCK=block, num_warps=4)
    return loss, residual, scale
