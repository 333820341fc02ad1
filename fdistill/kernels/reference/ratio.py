"""From logits to normalised density ratios and the weights of an f-divergence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdistill.kernels.checks import widened

LOGIT_BOUND = 10.0


def bin_index(level: Tensor, num_bins: int, low: float, high: float, log_bins: bool) -> Tensor:
    """[B] levels -> [B] int64 bins of equal width between low and high, or between their logarithms."""
    value = widened(level)
    if log_bins:
        low, high, value = math.log(low), math.log(high), value.log()
    # Clamped before the cast: the integer of an infinity is undefined.
    return ((value - low) / (high - low) * num_bins).clamp(0, num_bins - 1).long()


def ratio_samples(
    logits: Tensor, level: Tensor, lower: float, upper: float, num_bins: int, low: float, high: float, log_bins: bool
) -> Tensor:
    """[B, H] logits and [B] levels -> [B, 3] float32: ratio exp(clamp(mean logit)) clamped to [lower, upper], bin, and
    1 where the ratio was clamped. Differentiable in the logits.
    """
    raw = widened(logits.float().mean(1)).clamp(-LOGIT_BOUND, LOGIT_BOUND).exp()
    ratio = raw.clamp(lower, upper)
    index = bin_index(level, num_bins, low, high, log_bins)
    return torch.stack([ratio.float(), index.float(), (raw != ratio).float()], 1)


def ratio_bins(samples: Tensor, bins: Tensor, momentum: float) -> Tensor:
    """The updated means [K] of the bins; samples [N, 3] as from `ratio_samples`, of the whole global batch."""
    ratio, index = samples[:, 0].detach(), samples[:, 1].long()
    sums = widened(torch.zeros(2, len(bins), device=samples.device))
    sums[0].index_add_(0, index, ratio.to(sums.dtype))
    sums[1].index_add_(0, index, torch.ones_like(ratio, dtype=sums.dtype))
    total, count = sums
    updated = momentum * bins + (1 - momentum) * total / count.clamp(min=1)
    return torch.where(count > 0, updated, bins).float()


def normalised(samples: Tensor, bins: Tensor) -> Tensor:
    """Ratios [N] over the means of their bins, in float64 where the device has it, since 20^30 overflows float32."""
    return widened(samples[:, 0]) / widened(bins)[samples[:, 1].long()]


def normalised_weights(h: Tensor) -> tuple[Tensor, Tensor]:
    """(h / mean(h), h) from h [N] of the whole global batch: the first in its own precision, the second in float32."""
    return h / h.mean(), h.clamp(max=torch.finfo(torch.float32).max).float()


def ratio_weights(
    samples: Tensor, bins: Tensor, momentum: float, factor: float, power: float, power1p: float
) -> tuple[Tensor, Tensor]:
    """[N, 3] samples of the global batch -> weight [N], float64 where the device has it, and h [N], float32; updates
    the bins [K] in place.

    h = factor r^power (1 + r)^power1p of the ratio over its bin's mean, weight = h / mean(h).
    """
    bins.copy_(ratio_bins(samples, bins, momentum))
    r = normalised(samples, bins)
    return normalised_weights(factor * torch.exp(power * r.log() + power1p * r.log1p()))


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
    """`ratio_samples` and `ratio_weights` of one process: weight, h and clamped [B]."""
    samples = ratio_samples(logits, level, lower, upper, len(bins), low, high, log_bins)
    weight, h = ratio_weights(samples, bins, momentum, factor, power, power1p)
    return weight, h, samples[:, 2].clone()
