"""From discriminator logits to the weight h(r) of the score difference, normalised in two stages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fdistill.base.distributed import gather_rows
from fdistill.base.errors import ArgumentError, did_you_mean
from fdistill.base.rng import world
from fdistill.divergence import Divergence, Function, get_divergence
from fdistill.kernels import ratio as kernels
from fdistill.kernels.checks import check_rows
from fdistill.kernels.reference import ratio as reference
from fdistill.noise import NoiseSchedule, noise_to_signal


@dataclass(frozen=True)
class RatioWeight:
    """The weights of one batch, and what they were computed from; all [B] float32."""

    weight: Tensor  #: h / mean(h) over the global batch
    h: Tensor  #: h(r) before the normalisation
    clamped: Tensor  #: 1 where the ratio left [lower, upper], else 0


class DensityRatio:
    """Turns the logits log(p_teacher / p_student) into weights of the score difference.

    The steps: r = exp(mean over heads, clamped to +-10), clamped to [lower, upper]; r / (running mean of r in its noise
    bin), since E_student[r] = 1 at every level; h(r); h / mean(h) over all processes. Bins start at 1, an empty bin
    keeps its value, and otherwise bin = momentum * bin + (1 - momentum) * mean.

    Args:
        lower, upper: bounds of the ratio, e^-10 <= lower <= 1 <= upper <= e^10.
        num_bins: number of noise bins.
        bin_edges: "log-sigma": equal width in the log of the noise-to-signal ratio over [sigma_min, sigma_max], so
            that every bin is used; "linear": equal width in the level itself, as published (for EDM two thirds of the
            draws then share a bin).
        momentum: in [0, 1); 0 uses the batch alone.
        sigma_min, sigma_max: range of the bins, in the unit of `sigma` in `weight`; values outside it fall into the
            first or the last bin.

    Attributes:
        bins: [num_bins] float32 running means; a checkpoint must store them.
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
        least, most = math.exp(-reference.LOGIT_BOUND), math.exp(reference.LOGIT_BOUND)
        if lower < least or upper > most:
            raise ArgumentError(
                f"lower, upper: got {lower:g} and {upper:g}, but logits are clamped to +-{reference.LOGIT_BOUND:g}, so "
                f"every ratio is in [{least:.1e}, {int(most)}]; expected bounds within that range"
            )
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
        return reference.bin_index(sigma, self.num_bins, self.sigma_min, self.sigma_max, self._log_bins)

    @property
    def _log_bins(self) -> bool:
        return self.bin_edges == "log-sigma"

    def bin_level(self, schedule: NoiseSchedule, t: Tensor) -> Tensor:
        """Levels t [B] in the unit of the bins: the noise-to-signal ratio, or with "linear" bins t itself."""
        return noise_to_signal(schedule, t) if self._log_bins else t

    def _checked(self, logits: Tensor, sigma: Tensor) -> Tensor:
        """The logits as [B, H]; moves the bins to their device."""
        if logits.ndim not in (1, 2) or not logits.is_floating_point():
            raise ArgumentError(
                f"logits: expected a float tensor [B] or [B, H], got {logits.dtype} {tuple(logits.shape)}"
            )
        check_rows("sigma", sigma, logits)
        self.bins = self.bins.to(logits.device)
        return logits[:, None] if logits.ndim == 1 else logits

    def ratio(self, logits: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised ratios, differentiable in the logits where they are not clamped, and 1.0 where they are clamped,
        else 0.0; both [B] float32. Updates the bins. Arguments as in `weight`.
        """
        samples = reference.ratio_samples(
            self._checked(logits, sigma),
            sigma,
            self.lower,
            self.upper,
            self.num_bins,
            self.sigma_min,
            self.sigma_max,
            self._log_bins,
        )
        self.bins = reference.ratio_bins(gather_rows(samples.detach()), self.bins, self.momentum)
        return reference.normalised(samples, self.bins).float(), samples[:, 2].detach()

    def evaluate(
        self,
        logits: Tensor,
        sigma: Tensor,
        divergence: str | Divergence | Function,
        *,
        ramp: float = 1.0,
        backend: str = "auto",
    ) -> RatioWeight:
        """Like `weight`, but also returns values for the log. Updates the bins.

        Args:
            ramp: the weight is 1 + ramp (h / mean(h) - 1).
            backend: "auto", "triton" or "reference"; a custom divergence is computed by torch, so "triton" raises
                ArgumentError for it.

        Other arguments are as in `weight`.
        """
        divergence = get_divergence(divergence)
        logits = self._checked(logits, sigma).detach()
        bounds = (self.sigma_min, self.sigma_max, self._log_bins)
        if divergence.powers and world()[1] == 1:
            weight, h, clamped = kernels.ratio(
                logits,
                sigma,
                self.bins,
                self.lower,
                self.upper,
                *bounds,
                self.momentum,
                *divergence.powers,
                backend,
            )
            return RatioWeight(_ramped(weight, ramp), h, clamped)
        samples = kernels.ratio_samples(logits, sigma, self.lower, self.upper, self.num_bins, *bounds, backend)
        # The means of the bins and the mean of h, which depends on them, are over the global batch. One exchange of
        # the samples replaces two reductions in a row, and every process adds up in the same order.
        everyone = gather_rows(samples)
        if divergence.powers:
            weight, h = kernels.ratio_weights(everyone, self.bins, self.momentum, *divergence.powers, backend)
        elif backend == "triton":
            raise ArgumentError(
                f"backend: 'triton' computes only weights h(r) = c r^a (1 + r)^b, and divergence {divergence.name!r} "
                "is not known in that form; expected 'auto' or 'reference'"
            )
        else:
            self.bins.copy_(reference.ratio_bins(everyone, self.bins, self.momentum))
            weight, h = reference.normalised_weights(divergence.weight(reference.normalised(everyone, self.bins)))
        own = slice(world()[0] * len(logits), (world()[0] + 1) * len(logits))
        return RatioWeight(_ramped(weight[own], ramp), h[own], samples[:, 2])

    def weight(self, logits: Tensor, sigma: Tensor, divergence: str | Divergence | Function) -> Tensor:
        """Weights of the score difference: [B] float32, without gradient, mean 1 over the global batch. Updates the
        bins.

        Args:
            logits: [B] or [B, H], log(p_teacher / p_student) at the student's noised samples; with several processes B
                is the same on each.
            sigma: [B] noise-to-signal ratios sigma(t) / alpha(t); with "linear" bins the level itself.
            divergence: anything `get_divergence` takes.
        """
        return self.evaluate(logits, sigma, divergence).weight


def _ramped(weight: Tensor, ramp: float) -> Tensor:
    """1 + ramp (weight - 1), float32."""
    return (1 + ramp * (weight - 1)).float()
