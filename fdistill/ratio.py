"""From discriminator logits to the weight h(r) of the score difference, normalised in two stages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fdistill.distributed import global_mean, sum_over_processes
from fdistill.divergence import Divergence, Function, get_divergence, widened
from fdistill.errors import ArgumentError, did_you_mean
from fdistill.noise import NoiseSchedule, noise_to_signal

_LOGIT_BOUND = 10.0


@dataclass(frozen=True)
class RatioWeight:
    """What one batch of logits became; all [B] float32."""

    weight: Tensor  #: h / mean(h) over the global batch
    h: Tensor  #: h(r) before that
    clamped: Tensor  #: 1 where the ratio left [lower, upper], else 0


class DensityRatio:
    """log(p_teacher / p_student) logits -> weights.

    In order: mean over heads, clamp to +-10, exp, clamp to [lower, upper]; r / (running mean of r in its noise bin),
    since E_student[r] = 1 at every level; h(r); h / mean(h) over all processes. Bins start at 1, an empty bin keeps its
    value, and bin = momentum * bin + (1 - momentum) * mean.

    Args:
        lower, upper: bounds of the ratio, 0 < lower <= 1 <= upper.
        num_bins: noise bins.
        bin_edges: "log-sigma": equal width in the log of the noise-to-signal ratio over [sigma_min, sigma_max], so
            that every bin is used; "linear": equal width in the level itself, as published (for EDM two thirds of the
            draws then share a bin).
        momentum: in [0, 1); 0 uses the batch alone.
        sigma_min, sigma_max: range that the bins cover, in the unit that `weight` is given; what lies outside joins
            the end bins.

    Attributes:
        bins: [num_bins] float32 running means; state that a checkpoint must keep.
    """

    def __init__(
        self,
        lower: float = 0.1,
        upper: float = 20.0,
        num_bins: int = 10,
        bin_edges: Literal["log-sigma", "linear"] = "log-sigma",
        momentum: float = 0.0,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ):
        if not 0 < lower <= 1 <= upper < math.inf:
            raise ArgumentError(f"lower, upper: expected 0 < lower <= 1 <= upper, got {lower} and {upper}")
        if num_bins < 1:
            raise ArgumentError(f"num_bins: expected at least 1, got {num_bins}")
        if not 0 <= momentum < 1:
            raise ArgumentError(f"momentum: expected a number in [0, 1), got {momentum}")
        if bin_edges not in ("log-sigma", "linear"):
            raise ArgumentError(f"bin_edges: got {bin_edges!r}; {did_you_mean(bin_edges, ('log-sigma', 'linear'))}")
        if not sigma_min < sigma_max < math.inf or (bin_edges == "log-sigma" and sigma_min <= 0):
            raise ArgumentError(
                f"sigma_min, sigma_max: expected an increasing finite range, got {sigma_min} and {sigma_max}"
            )
        self.lower, self.upper = float(lower), float(upper)
        self.num_bins = num_bins
        self.bin_edges = bin_edges
        self.momentum = float(momentum)
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        self.bins = torch.ones(num_bins)

    def bin_index(self, sigma: Tensor) -> Tensor:
        """[B] levels -> [B] int64 bins in [0, num_bins)."""
        low, high, value = self.sigma_min, self.sigma_max, sigma.float()
        if self.bin_edges == "log-sigma":
            low, high, value = math.log(low), math.log(high), value.log()
        # Clamped before the cast: the integer of an infinity is undefined.
        return ((value - low) / (high - low) * self.num_bins).clamp(0, self.num_bins - 1).long()

    def bin_level(self, schedule: NoiseSchedule, t: Tensor) -> Tensor:
        """Levels t [B] in the unit of the bins: the noise-to-signal ratio, or with "linear" bins t itself."""
        return noise_to_signal(schedule, t) if self.bin_edges == "log-sigma" else t

    def ratio(self, logits: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised ratios, differentiable in the logits where they are not clamped, and whether they are (1.0 or
        0.0); both [B] float32. Updates the bins. Arguments as in `weight`.
        """
        if logits.ndim not in (1, 2) or sigma.shape != logits.shape[:1]:
            raise ArgumentError(
                f"logits, sigma: expected [B] or [B, H] and [B], got {tuple(logits.shape)} and {tuple(sigma.shape)}"
            )
        self.bins = self.bins.to(logits.device)
        raw = logits.float().reshape(len(logits), -1).mean(1).clamp(-_LOGIT_BOUND, _LOGIT_BOUND).exp()
        ratio = raw.clamp(self.lower, self.upper)
        index = self.bin_index(sigma)
        sums = torch.zeros(2, self.num_bins, device=ratio.device)
        sums[0].index_add_(0, index, ratio.detach())
        sums[1].index_add_(0, index, torch.ones_like(ratio))
        total, count = sum_over_processes(sums)
        updated = self.momentum * self.bins + (1 - self.momentum) * total / count.clamp(min=1)
        self.bins = torch.where(count > 0, updated, self.bins)
        return ratio / self.bins[index], (raw != ratio).float()

    def evaluate(self, logits: Tensor, sigma: Tensor, divergence: str | Divergence | Function) -> RatioWeight:
        """`weight`, with what is worth logging beside it. Updates the bins."""
        divergence = get_divergence(divergence)
        ratio, clamped = self.ratio(logits.detach(), sigma)
        h = divergence.weight(widened(ratio))  # divided by its mean before it is narrowed: 20^30 has no float32
        narrow = h.clamp(max=torch.finfo(torch.float32).max).float()
        return RatioWeight(weight=(h / global_mean(h)).float(), h=narrow, clamped=clamped)

    def weight(self, logits: Tensor, sigma: Tensor, divergence: str | Divergence | Function) -> Tensor:
        """Weights of the score difference: [B] float32, without gradient, mean 1 over the global batch. Updates the
        bins.

        Args:
            logits: [B] or [B, H], log(p_teacher / p_student) at the student's noised samples.
            sigma: [B] noise-to-signal ratios sigma(t) / alpha(t); with "linear" bins the level itself.
            divergence: anything `get_divergence` takes.
        """
        return self.evaluate(logits, sigma, divergence).weight
