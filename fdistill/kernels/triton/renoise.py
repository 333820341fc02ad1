"""x_t and the network's input in one pass, from given noise or from noise made in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdistill.kernels.checks import wide
from fdistill.kernels.layout import empty_samples_like, is_channels_last, laid_out_like, network_input_like
from fdistill.kernels.triton.rows import on_device, vectors

#: Counters of one block; each makes four elements.
COUNTERS, WARPS = 512, 4


@triton.jit
def _normals(u, v):
    """Two standard normals from two 32-bit words (Box & Muller 1958), without the branch that sine and cosine of
    unbounded angles need: half the angle is within a quarter turn, where short series are exact to float32.
    """
    radius = tl.sqrt(-2.0 * tl.log(u.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10))
    half = (v.to(tl.float32) * 2.3283064365386963e-10 - 0.5) * 3.141592653589793
    s = half * half
    sine = -1.9841270e-4 + s * (2.7557319e-6 + s * -2.5052108e-8)
    sine = half * (1.0 + s * (-0.16666667 + s * (8.3333333e-3 + s * sine)))
    cosine = -1.3888889e-3 + s * (2.4801587e-5 + s * (-2.7557319e-7 + s * 2.0876757e-9))
    cosine = 1.0 + s * (-0.5 + s * (4.1666667e-2 + s * cosine))
    return radius * (1.0 - 2.0 * sine * sine), radius * (2.0 * sine * cosine)


@triton.jit
def _address(element, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where element c * PIXELS + pixel of a sample lies in memory."""
    if CHANNELS_LAST:
        return (element % PIXELS) * CHANNELS + element // PIXELS
    return element


@triton.jit
def _renoise(
    x0_ptr,
    noise_ptr,
    alpha_ptr,
    sigma_ptr,
    input_scale_ptr,
    x_t_ptr,
    input_ptr,
    first,
    size,
    quarter,
    blocks,
    x0_step,
    noise_step,
    x_t_step,
    input_step,
    SEEDED: tl.constexpr,
    HAS_INPUT: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    INPUT_CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample = program // blocks
    counter = (program - sample * blocks) * BLOCK + tl.arange(0, BLOCK)
    row = sample.to(tl.int64)
    alpha = tl.load(alpha_ptr + sample).to(tl.float32)
    sigma = tl.load(sigma_ptr + sample).to(tl.float32)
    if HAS_INPUT:
        input_scale = tl.load(input_scale_ptr + sample).to(tl.float32)
    if SEEDED:
        zero = tl.zeros_like(counter)
        word0, word1, word2, word3 = tl.philox(tl.load(noise_ptr), counter, zero + (first + sample), zero, zero)
        noise0, noise1 = _normals(word0, word1)
        noise2, noise3 = _normals(word2, word3)
    for word in tl.static_range(4):
        element = word * quarter + counter
        inside = (counter < quarter) & (element < size)
        at = _address(element, CHANNELS, PIXELS, CHANNELS_LAST)
        x0 = tl.load(x0_ptr + row * x0_step + at, mask=inside, other=0.0).to(tl.float32)
        if SEEDED:
            noise = noise0 if word == 0 else (noise1 if word == 1 else (noise2 if word == 2 else noise3))
        else:
            noise = tl.load(noise_ptr + row * noise_step + at, mask=inside, other=0.0).to(tl.float32)
        x_t = alpha * x0 + sigma * noise
        tl.store(x_t_ptr + row * x_t_step + at, x_t, mask=inside)
        if HAS_INPUT:
            to = input_ptr + row * input_step + _address(element, CHANNELS, PIXELS, INPUT_CHANNELS_LAST)
            tl.store(to, (input_scale * x_t).to(input_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _renoise_backward(
    x_t_gradient_ptr,
    input_gradient_ptr,
    alpha_ptr,
    input_scale_ptr,
    gradient_ptr,
    size,
    blocks,
    x_t_step,
    input_step,
    gradient_step,
    HAS_X_T: tl.constexpr,
    HAS_INPUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample = program // blocks
    i = (program - sample * blocks) * BLOCK + tl.arange(0, BLOCK)
    row = sample.to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    if HAS_X_T:
        total += tl.load(x_t_gradient_ptr + row * x_t_step + i, mask=i < size, other=0.0).to(tl.float32)
    if HAS_INPUT:
        through = tl.load(input_gradient_ptr + row * input_step + i, mask=i < size, other=0.0).to(tl.float32)
        total += tl.load(input_scale_ptr + sample).to(tl.float32) * through
    gradient = tl.load(alpha_ptr + sample).to(tl.float32) * total
    tl.store(gradient_ptr + row * gradient_step + i, gradient.to(gradient_ptr.dtype.element_ty), mask=i < size)


def _launch(
    x0: Tensor,
    noise: Tensor,
    first: int | None,
    alpha: Tensor,
    sigma: Tensor,
    input_scale: Tensor | None,
    input_dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """`noise` is the noise itself if `first` is None; otherwise it is the seed, and `first` the index of sample 0."""
    seeded = first is not None
    batch, size = len(x0), x0.shape[1:].numel()
    x_t = empty_samples_like(x0, wide(x0.dtype))
    if input_scale is None:
        network_input = x0.new_empty(0, dtype=input_dtype)
    else:
        network_input = network_input_like(x0, input_dtype, channels_last)
    if not batch:
        return x_t, network_input
    last = is_channels_last(x_t)
    # Elements are counted in the order of a contiguous sample: any layout other than that and channels last is copied.
    plain = x_t if last or x_t.is_contiguous() else torch.empty_like(x_t, memory_format=torch.contiguous_format)
    x0 = laid_out_like(x0, plain)
    noise = noise if seeded else laid_out_like(noise, plain)
    written = network_input if input_scale is not None else plain
    if written is not plain and not is_channels_last(written) and not written.is_contiguous():
        written = torch.empty_like(written, memory_format=torch.contiguous_format)
    quarter = triton.cdiv(size, 4)
    blocks = triton.cdiv(quarter, COUNTERS)
    alpha, sigma, scale = vectors(alpha, alpha, sigma, input_scale)
    mixed = last or is_channels_last(written)  # otherwise one compiled kernel serves every shape
    with on_device(x0):
        _renoise[(batch * blocks,)](
            x0,
            noise,
            alpha,
            sigma,
            scale,
            plain,
            written,
            first or 0,
            size,
            quarter,
            blocks,
            x0.stride(0),
            0 if seeded else noise.stride(0),
            plain.stride(0),
            written.stride(0),
            SEEDED=seeded,
            HAS_INPUT=input_scale is not None,
            CHANNELS=x0.shape[1] if mixed else 1,
            PIXELS=size // x0.shape[1] if mixed else 1,
            CHANNELS_LAST=last,
            INPUT_CHANNELS_LAST=is_channels_last(written),
            BLOCK=COUNTERS,
            num_warps=WARPS,
        )
    if plain is not x_t:
        x_t.copy_(plain)
    if input_scale is not None and written is not network_input:
        network_input.copy_(written)
    return x_t, network_input


def renoise(
    x0: Tensor,
    noise: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    input_scale: Tensor | None,
    input_dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """See `reference.renoise`."""
    return _launch(x0, noise, None, alpha, sigma, input_scale, input_dtype, channels_last)


def renoise_seeded(
    x0: Tensor,
    seed: Tensor,
    first: int,
    alpha: Tensor,
    sigma: Tensor,
    input_scale: Tensor | None,
    input_dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """See `reference.renoise_seeded`."""
    return _launch(x0, seed, first, alpha, sigma, input_scale, input_dtype, channels_last)


def renoise_backward(
    x_t_gradient: Tensor | None,
    input_gradient: Tensor | None,
    alpha: Tensor,
    input_scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See `reference.renoise_backward`."""
    like = x_t_gradient if x_t_gradient is not None else input_gradient
    assert like is not None
    gradient = empty_samples_like(like, dtype)
    if not gradient.numel():
        return gradient
    size = like.shape[1:].numel()
    block = 2048
    blocks = triton.cdiv(size, block)
    x_t_rows, input_rows = (
        gradient if value is None else laid_out_like(value, gradient) for value in (x_t_gradient, input_gradient)
    )
    alpha, scale = vectors(alpha, alpha, input_scale)
    with on_device(like):
        _renoise_backward[(len(like) * blocks,)](
            x_t_rows,
            input_rows,
            alpha,
            scale,
            gradient,
            size,
            blocks,
            x_t_rows.stride(0),
            input_rows.stride(0),
            gradient.stride(0),
            HAS_X_T=x_t_gradient is not None,
            HAS_INPUT=input_gradient is not None,
            BLOCK=block,
            num_warps=8,
        )
    return gradient
