"""Score difference with its per-sample normaliser, in one pass over the networks' outputs.

The direction F - T does not depend on the normaliser, and the normaliser is one number per sample. So the pass
writes the direction unscaled, beside its sums, and the backward pass, which has to multiply by the upstream gradient
anyway, multiplies by the scale as well. Samples of any size are read only once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdistill.kernels.layout import empty_samples_like
from fdistill.kernels.triton.rows import BLOCK, WARPS, on_device, plan, rows, vectors


@triton.jit
def _finish(distance, square, weight, floor, size, loss_ptr, scale_ptr, sample, NORMALISED: tl.constexpr):
    s = weight
    if NORMALISED:
        s = weight / tl.maximum(distance / size, floor)
    tl.store(loss_ptr + sample, s * s * (square / size) * 0.5)
    tl.store(scale_ptr + sample, s / size)


@triton.jit
def _matching(
    x0_ptr,
    x_t_ptr,
    teacher_ptr,
    unconditional_ptr,
    fake_ptr,
    teacher_skip_ptr,
    teacher_out_ptr,
    fake_skip_ptr,
    fake_out_ptr,
    weight_ptr,
    direction_ptr,
    loss_ptr,
    scale_ptr,
    sums_ptr,
    size,
    splits,
    x0_step,
    x_t_step,
    teacher_step,
    unconditional_step,
    fake_step,
    direction_step,
    floor,
    guidance_scale,
    RAW: tl.constexpr,
    GUIDED: tl.constexpr,
    NORMALISED: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample = program // splits
    part = program - sample * splits
    row = sample.to(tl.int64)
    if RAW:
        teacher_skip = tl.load(teacher_skip_ptr + sample).to(tl.float32)
        teacher_out = tl.load(teacher_out_ptr + sample).to(tl.float32)
        skip = tl.load(fake_skip_ptr + sample).to(tl.float32) - teacher_skip
        fake_out = tl.load(fake_out_ptr + sample).to(tl.float32)
    distances = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, CHUNK, BLOCK):
        i = part * CHUNK + start + tl.arange(0, BLOCK)
        inside = i < size
        x0 = tl.load(x0_ptr + row * x0_step + i, mask=inside, other=0.0).to(tl.float32)
        teacher = tl.load(teacher_ptr + row * teacher_step + i, mask=inside, other=0.0).to(tl.float32)
        fake = tl.load(fake_ptr + row * fake_step + i, mask=inside, other=0.0).to(tl.float32)
        if GUIDED:
            at = unconditional_ptr + row * unconditional_step + i
            unconditional = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            teacher = unconditional + guidance_scale * (teacher - unconditional)
        if RAW:
            x_t = tl.load(x_t_ptr + row * x_t_step + i, mask=inside, other=0.0).to(tl.float32)
            teacher = teacher_out * teacher
            d = skip * x_t + (fake_out * fake - teacher)
            target = teacher_skip * x_t + teacher
        else:
            d = fake - teacher
            target = teacher
        distances += tl.abs(x0 - target)
        squares += d * d
        tl.store(direction_ptr + row * direction_step + i, d.to(direction_ptr.dtype.element_ty), mask=inside)
    distance = tl.sum(distances)
    square = tl.sum(squares)
    if SPLIT:
        tl.store(sums_ptr + 2 * program, distance)
        tl.store(sums_ptr + 2 * program + 1, square)
    else:
        weight = tl.load(weight_ptr + sample).to(tl.float32)
        _finish(distance, square, weight, floor, size, loss_ptr, scale_ptr, sample, NORMALISED)


@triton.jit
def _matching_sums(
    sums_ptr,
    weight_ptr,
    loss_ptr,
    scale_ptr,
    size,
    splits,
    floor,
    NORMALISED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0)
    part = tl.arange(0, BLOCK)
    at = sums_ptr + 2 * (sample * splits + part)
    distance = tl.sum(tl.load(at, mask=part < splits, other=0.0))
    square = tl.sum(tl.load(at + 1, mask=part < splits, other=0.0))
    weight = tl.load(weight_ptr + sample).to(tl.float32)
    _finish(distance, square, weight, floor, size, loss_ptr, scale_ptr, sample, NORMALISED)


def matching(
    x0: Tensor,
    x_t: Tensor | None,
    teacher: Tensor,
    unconditional: Tensor | None,
    fake: Tensor,
    teacher_skip: Tensor | None,
    teacher_out: Tensor | None,
    fake_skip: Tensor | None,
    fake_out: Tensor | None,
    weight: Tensor,
    floor: float | None,
    guidance_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.matching`."""
    batch = len(x0)
    direction = empty_samples_like(x0)
    loss, scale = (torch.empty(batch, dtype=torch.float32, device=x0.device) for _ in range(2))
    if not batch:
        return loss, direction, scale
    size, chunk, splits = plan(x0)
    tensors = rows(direction, x0, x_t, teacher, unconditional, fake)
    weight, *coefficients = vectors(scale, weight, teacher_skip, teacher_out, fake_skip, fake_out)
    sums = torch.empty(batch * splits, 2, dtype=torch.float32, device=x0.device) if splits > 1 else loss
    with on_device(x0):
        _matching[(batch * splits,)](
            *tensors,
            *coefficients,
            weight,
            direction,
            loss,
            scale,
            sums,
            size,
            splits,
            *(value.stride(0) for value in tensors),
            direction.stride(0),
            floor or 0.0,
            guidance_scale,
            RAW=x_t is not None,
            GUIDED=unconditional is not None,
            NORMALISED=floor is not None,
            SPLIT=splits > 1,
            CHUNK=chunk,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        if splits > 1:
            block = triton.next_power_of_2(splits)
            _matching_sums[(batch,)](
                sums,
                weight,
                loss,
                scale,
                size,
                splits,
                floor or 0.0,
                NORMALISED=floor is not None,
                BLOCK=block,
                num_warps=4,
            )
    return loss, direction, scale
