"""From logits to weights: one launch in one process; with several, one launch before and one after their collective.

The means of the noise bins and of h are over only B numbers, so one block computes them and need not wait for others.
It computes in float64, in which no weight overflows and whose cost is negligible for B numbers; bounds and powers are
passed to it as float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fdistill.kernels.reference.ratio import LOGIT_BOUND
from fdistill.kernels.triton.rows import on_device

#: Numbers that a block holds at a time: logits to add up, and (sample, bin) pairs.
LOGITS, MEMBERS = 2048, 4096


@triton.jit
def _samples(
    logits_ptr,
    level_ptr,
    sample,
    batch,
    heads,
    logits_step,
    head_step,
    level_step,
    lower,
    upper,
    low,
    high,
    LOGIT_BOUND: tl.constexpr,
    LOG_BINS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
):
    """(ratio, bin, clamped) of a block of samples."""
    inside = sample < batch
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(HEAD_BLOCKS):
        head = k * HEADS + tl.arange(0, HEADS)
        at = sample.to(tl.int64)[:, None] * logits_step + head[None, :] * head_step
        mask = inside[:, None] & (head < heads)[None, :]
        total += tl.sum(tl.load(logits_ptr + at, mask=mask, other=0.0).to(tl.float32), 1)
    logit = (total / heads).to(tl.float64)
    # The hardware's min and max would turn a NaN into a bound.
    logit = tl.where(logit > LOGIT_BOUND, LOGIT_BOUND, tl.where(logit < -LOGIT_BOUND, -LOGIT_BOUND, logit))
    raw = tl.exp(logit)
    ratio = tl.where(raw > upper, upper, tl.where(raw < lower, lower, raw))
    value = tl.load(level_ptr + sample * level_step, mask=inside, other=1.0).to(tl.float64)
    if LOG_BINS:
        value = tl.log(value)
    position = (value - low) / (high - low) * BINS
    index = tl.where(position >= BINS - 1, BINS - 1.0, tl.where(position > 0.0, position, 0.0))
    return ratio.to(tl.float32), index.to(tl.int32), tl.where(raw != ratio, 1.0, 0.0)


@triton.jit
def _ratio_samples(
    logits_ptr,
    level_ptr,
    samples_ptr,
    batch,
    heads,
    logits_step,
    head_step,
    level_step,
    lower,
    upper,
    low,
    high,
    LOGIT_BOUND: tl.constexpr,
    LOG_BINS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
):
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ratio, index, clamped = _samples(
        logits_ptr,
        level_ptr,
        sample,
        batch,
        heads,
        logits_step,
        head_step,
        level_step,
        lower,
        upper,
        low,
        high,
        LOGIT_BOUND,
        LOG_BINS,
        BINS,
        BLOCK,
        HEADS,
        HEAD_BLOCKS,
    )
    at = samples_ptr + 3 * sample
    tl.store(at, ratio, mask=sample < batch)
    tl.store(at + 1, index.to(tl.float32), mask=sample < batch)
    tl.store(at + 2, clamped, mask=sample < batch)


@triton.jit
def _ratio_weights(
    logits_ptr,
    level_ptr,
    samples_ptr,
    clamped_ptr,
    bins_ptr,
    weight_ptr,
    h_ptr,
    batch,
    heads,
    logits_step,
    head_step,
    level_step,
    lower,
    upper,
    low,
    high,
    momentum,
    factor,
    power,
    power1p,
    FROM_LOGITS: tl.constexpr,
    CLAMPED: tl.constexpr,
    LOGIT_BOUND: tl.constexpr,
    LOG_BINS: tl.constexpr,
    BINS: tl.constexpr,
    BINS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    BATCH_BLOCKS: tl.constexpr,
):
    column = tl.arange(0, BINS_BLOCK)
    total = tl.zeros((BINS_BLOCK,), tl.float64)
    count = tl.zeros((BINS_BLOCK,), tl.float64)
    for k in range(BATCH_BLOCKS):
        sample = k * BLOCK + tl.arange(0, BLOCK)
        inside = sample < batch
        at = samples_ptr + 3 * sample
        if FROM_LOGITS:
            ratio, index, clamped = _samples(
                logits_ptr,
                level_ptr,
                sample,
                batch,
                heads,
                logits_step,
                head_step,
                level_step,
                lower,
                upper,
                low,
                high,
                LOGIT_BOUND,
                LOG_BINS,
                BINS,
                BLOCK,
                HEADS,
                HEAD_BLOCKS,
            )
            tl.store(at, ratio, mask=inside)
            tl.store(at + 1, index.to(tl.float32), mask=inside)
        else:
            ratio = tl.load(at, mask=inside, other=0.0)
            index = tl.load(at + 1, mask=inside, other=0.0).to(tl.int32)
            clamped = tl.load(at + 2, mask=inside, other=0.0)
        if CLAMPED:
            tl.store(clamped_ptr + sample, clamped, mask=inside)
        member = (index[:, None] == column[None, :]) & inside[:, None]
        total += tl.sum(tl.where(member, ratio[:, None], 0.0).to(tl.float64), 0)
        count += tl.sum(tl.where(member, 1.0, 0.0).to(tl.float64), 0)
    old = tl.load(bins_ptr + column, mask=column < BINS, other=1.0).to(tl.float64)
    updated = momentum * old + (1.0 - momentum) * total / tl.where(count > 0.0, count, 1.0)
    bins = tl.where(count > 0.0, updated, old).to(tl.float32)
    tl.store(bins_ptr + column, bins, mask=column < BINS)
    # Other threads of this block have written what is read from here on.
    tl.debug_barrier()
    h_total = tl.zeros((BLOCK,), tl.float64)
    for k in range(BATCH_BLOCKS):
        sample = k * BLOCK + tl.arange(0, BLOCK)
        h = _h(samples_ptr, sample, sample < batch, bins, column, factor, power, power1p)
        h_total += tl.where(sample < batch, h, 0.0)
    mean = tl.sum(h_total) / batch
    for k in range(BATCH_BLOCKS):
        sample = k * BLOCK + tl.arange(0, BLOCK)
        inside = sample < batch
        h = _h(samples_ptr, sample, inside, bins, column, factor, power, power1p)
        tl.store(weight_ptr + sample, h / mean, mask=inside)
        tl.store(
            h_ptr + sample, tl.where(h > 3.4028234663852886e38, 3.4028234663852886e38, h).to(tl.float32), mask=inside
        )


@triton.jit
def _h(samples_ptr, sample, inside, bins, column, factor, power, power1p):
    """factor r^power (1 + r)^power1p of a block of samples; r is a sample's ratio over its bin's mean."""
    ratio = tl.load(samples_ptr + 3 * sample, mask=inside, other=1.0).to(tl.float64)
    index = tl.load(samples_ptr + 3 * sample + 1, mask=inside, other=0.0).to(tl.int32)
    mean = tl.sum(tl.where(index[:, None] == column[None, :], bins[None, :], 0.0), 1)
    r = ratio / mean.to(tl.float64)
    return factor * tl.exp(power * tl.log(r) + power1p * tl.log(1.0 + r))


def _head_block(heads: int) -> int:
    return min(1 << (heads - 1).bit_length(), 64)


def ratio_samples(
    logits: Tensor, level: Tensor, lower: float, upper: float, num_bins: int, low: float, high: float, log_bins: bool
) -> Tensor:
    """See `reference.ratio_samples`."""
    batch, heads = logits.shape
    samples = torch.empty(batch, 3, dtype=torch.float32, device=logits.device)
    if not batch:
        return samples
    low, high = (math.log(low), math.log(high)) if log_bins else (low, high)
    block_heads = _head_block(heads)
    block = LOGITS // block_heads
    with on_device(logits):
        _ratio_samples[(triton.cdiv(batch, block),)](
            logits,
            level,
            samples,
            batch,
            heads,
            *logits.stride(),
            level.stride(0),
            lower,
            upper,
            low,
            high,
            LOGIT_BOUND=LOGIT_BOUND,
            LOG_BINS=log_bins,
            BINS=num_bins,
            BLOCK=block,
            HEADS=block_heads,
            HEAD_BLOCKS=triton.cdiv(heads, block_heads),
            num_warps=4,
        )
    return samples


def _weights(
    logits: Tensor | None,
    level: Tensor | None,
    samples: Tensor,
    clamped: Tensor | None,
    bins: Tensor,
    bounds: tuple[float, float, float, float, bool],
    momentum: float,
    powers: tuple[float, float, float],
) -> tuple[Tensor, Tensor]:
    """Weight and h. If logits are given, the same launch also computes the samples from them."""
    batch = len(samples)
    weight = torch.empty(batch, dtype=torch.float64, device=samples.device)
    h = torch.empty(batch, dtype=torch.float32, device=samples.device)
    lower, upper, low, high, log_bins = bounds
    heads = 1 if logits is None else logits.shape[1]
    block_heads = min(_head_block(heads), 16)
    block_bins = triton.next_power_of_2(len(bins))
    block = max(16, min(256, MEMBERS // block_bins))
    with on_device(samples):
        _ratio_weights[(1,)](
            samples if logits is None else logits,
            samples if level is None else level,
            samples,
            samples if clamped is None else clamped,
            bins,
            weight,
            h,
            batch,
            heads,
            *((0, 0) if logits is None else logits.stride()),
            0 if level is None else level.stride(0),
            lower,
            upper,
            *((math.log(low), math.log(high)) if log_bins else (low, high)),
            momentum,
            *powers,
            FROM_LOGITS=logits is not None,
            CLAMPED=clamped is not None,
            LOGIT_BOUND=LOGIT_BOUND,
            LOG_BINS=log_bins,
            BINS=len(bins),
            BINS_BLOCK=block_bins,
            BLOCK=block,
            HEADS=block_heads,
            HEAD_BLOCKS=triton.cdiv(heads, block_heads),
            BATCH_BLOCKS=triton.cdiv(batch, block),
            num_warps=8,
        )
    return weight, h


def ratio_weights(
    samples: Tensor, bins: Tensor, momentum: float, factor: float, power: float, power1p: float
) -> tuple[Tensor, Tensor]:
    """See `reference.ratio_weights`."""
    bounds = (0.0, 1.0, 0.0, 1.0, False)
    return _weights(None, None, samples.contiguous(), None, bins, bounds, momentum, (factor, power, power1p))


def ratio(
    logits: Tensor,
    level: Tensor,
    bins: Tensor,
    lower: float,
    upper: float,
    low: float,
    high: float,
    log_bins: bool,
    momentum: float,
    factor: float,
    power: float,
    power1p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.ratio`."""
    batch, device = len(logits), logits.device
    clamped = torch.empty(batch, dtype=torch.float32, device=device)
    bounds, powers = (lower, upper, low, high, log_bins), (factor, power, power1p)
    if logits.numel() > 1 << 15:  # one block would take longer for them than a second launch
        samples = ratio_samples(logits, level, lower, upper, len(bins), low, high, log_bins)
        weight, h = _weights(None, None, samples, clamped, bins, bounds, momentum, powers)
    else:
        samples = torch.empty(batch, 3, dtype=torch.float32, device=device)
        weight, h = _weights(logits, level, samples, clamped, bins, bounds, momentum, powers)
    return weight, h, clamped
