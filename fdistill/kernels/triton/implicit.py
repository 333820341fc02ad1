"""Inner products of implicit score objectives, and their derivatives, each in one pass.

The forward pass writes three numbers per sample. If it saved the four gradients instead, they would be written and read
back to multiply them by the upstream gradient, which costs more than reading the inputs twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdistill.kernels.layout import empty_samples_like, layout_of
from fdistill.kernels.triton.rows import BLOCK, WARPS, on_device, plan, rows, vectors


@triton.jit
def _coefficients(teacher_skip_ptr, teacher_out_ptr, fake_skip_ptr, fake_out_ptr, sample):
    return (
        tl.load(teacher_skip_ptr + sample).to(tl.float32),
        tl.load(teacher_out_ptr + sample).to(tl.float32),
        tl.load(fake_skip_ptr + sample).to(tl.float32),
        tl.load(fake_out_ptr + sample).to(tl.float32),
    )


@triton.jit
def _implicit(
    x0_ptr,
    x_t_ptr,
    teacher_ptr,
    fake_ptr,
    teacher_skip_ptr,
    teacher_out_ptr,
    fake_skip_ptr,
    fake_out_ptr,
    sums_ptr,
    batch,
    size,
    splits,
    x0_step,
    x_t_step,
    teacher_step,
    fake_step,
    RAW: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample = program // splits
    part = program - sample * splits
    row = sample.to(tl.int64)
    if RAW:
        teacher_skip, teacher_out, fake_skip, fake_out = _coefficients(
            teacher_skip_ptr, teacher_out_ptr, fake_skip_ptr, fake_out_ptr, sample
        )
    inner = tl.zeros((BLOCK,), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    distance = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, CHUNK, BLOCK):
        i = part * CHUNK + start + tl.arange(0, BLOCK)
        inside = i < size
        x0 = tl.load(x0_ptr + row * x0_step + i, mask=inside, other=0.0).to(tl.float32)
        teacher = tl.load(teacher_ptr + row * teacher_step + i, mask=inside, other=0.0).to(tl.float32)
        fake = tl.load(fake_ptr + row * fake_step + i, mask=inside, other=0.0).to(tl.float32)
        if RAW:
            x_t = tl.load(x_t_ptr + row * x_t_step + i, mask=inside, other=0.0).to(tl.float32)
            fake = fake_out * fake
            difference = (teacher_skip - fake_skip) * x_t + (teacher_out * teacher - fake)
            fake = fake_skip * x_t + fake
        else:
            difference = teacher - fake
        error = fake - x0
        inner += difference * error
        square += difference * difference
        distance += tl.abs(error + difference)
    # [3, batch, splits]; divided here, so that a sample in one piece needs no second pass.
    at = sums_ptr + program
    tl.store(at, tl.sum(inner) / size)
    tl.store(at + batch * splits, tl.sum(square) / size)
    tl.store(at + 2 * batch * splits, tl.sum(distance) / size)


@triton.jit
def _implicit_backward(
    upstream_ptr,
    x0_ptr,
    x_t_ptr,
    teacher_ptr,
    fake_ptr,
    teacher_skip_ptr,
    teacher_out_ptr,
    fake_skip_ptr,
    fake_out_ptr,
    x0_gradient_ptr,
    x_t_gradient_ptr,
    teacher_gradient_ptr,
    fake_gradient_ptr,
    batch,
    size,
    blocks,
    x0_step,
    x_t_step,
    teacher_step,
    fake_step,
    gradient_step,
    RAW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample = program // blocks
    i = (program - sample * blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    row = sample.to(tl.int64)
    inner = tl.load(upstream_ptr + sample).to(tl.float32) / size
    square = tl.load(upstream_ptr + batch + sample).to(tl.float32) / size
    x0 = tl.load(x0_ptr + row * x0_step + i, mask=inside, other=0.0).to(tl.float32)
    teacher = tl.load(teacher_ptr + row * teacher_step + i, mask=inside, other=0.0).to(tl.float32)
    fake = tl.load(fake_ptr + row * fake_step + i, mask=inside, other=0.0).to(tl.float32)
    if RAW:
        teacher_skip, teacher_out, fake_skip, fake_out = _coefficients(
            teacher_skip_ptr, teacher_out_ptr, fake_skip_ptr, fake_out_ptr, sample
        )
        x_t = tl.load(x_t_ptr + row * x_t_step + i, mask=inside, other=0.0).to(tl.float32)
        fake = fake_out * fake
        difference = (teacher_skip - fake_skip) * x_t + (teacher_out * teacher - fake)
        fake = fake_skip * x_t + fake
    else:
        difference = teacher - fake
    x0_gradient = -inner * difference
    teacher_gradient = inner * (fake - x0) + 2.0 * square * difference
    fake_gradient = inner * difference - teacher_gradient
    at = row * gradient_step + i
    tl.store(x0_gradient_ptr + at, x0_gradient.to(x0_gradient_ptr.dtype.element_ty), mask=inside)
    if RAW:
        x_t_gradient = teacher_skip * teacher_gradient + fake_skip * fake_gradient
        tl.store(x_t_gradient_ptr + at, x_t_gradient.to(x_t_gradient_ptr.dtype.element_ty), mask=inside)
        teacher_gradient = teacher_out * teacher_gradient
        fake_gradient = fake_out * fake_gradient
    tl.store(teacher_gradient_ptr + at, teacher_gradient.to(teacher_gradient_ptr.dtype.element_ty), mask=inside)
    tl.store(fake_gradient_ptr + at, fake_gradient.to(fake_gradient_ptr.dtype.element_ty), mask=inside)


def implicit(
    x0: Tensor,
    x_t: Tensor | None,
    teacher: Tensor,
    fake: Tensor,
    teacher_skip: Tensor | None,
    teacher_out: Tensor | None,
    fake_skip: Tensor | None,
    fake_out: Tensor | None,
) -> Tensor:
    """See `reference.implicit`."""
    batch = len(x0)
    size, chunk, splits = plan(x0)
    sums = torch.empty(3, batch, splits, dtype=torch.float32, device=x0.device)
    if batch:
        tensors = rows(layout_of(x0), x0, x_t, teacher, fake)
        coefficients = vectors(sums, teacher_skip, teacher_out, fake_skip, fake_out)
        with on_device(x0):
            _implicit[(batch * splits,)](
                *tensors,
                *coefficients,
                sums,
                batch,
                size,
                splits,
                *(value.stride(0) for value in tensors),
                RAW=x_t is not None,
                CHUNK=chunk,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return sums.sum(2) if splits > 1 else sums.reshape(3, batch)


def implicit_backward(
    upstream: Tensor,
    x0: Tensor,
    x_t: Tensor | None,
    teacher: Tensor,
    fake: Tensor,
    teacher_skip: Tensor | None,
    teacher_out: Tensor | None,
    fake_skip: Tensor | None,
    fake_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.implicit_backward`."""
    batch = len(x0)
    gradients = [
        x0.new_empty(0) if value is None else empty_samples_like(x0, value.dtype) for value in (x0, x_t, teacher, fake)
    ]
    if batch:
        size = plan(x0).size
        blocks = triton.cdiv(size, BLOCK)
        like = gradients[0]
        tensors = rows(like, x0, x_t, teacher, fake)
        coefficients = vectors(like, teacher_skip, teacher_out, fake_skip, fake_out)
        written = [value if value.numel() else like for value in gradients]
        with on_device(x0):
            _implicit_backward[(batch * blocks,)](
                upstream.contiguous(),
                *tensors,
                *coefficients,
                *written,
                batch,
                size,
                blocks,
                *(value.stride(0) for value in tensors),
                like.stride(0),
                RAW=x_t is not None,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return gradients[0], gradients[1], gradients[2], gradients[3]
