"""From logits to the weights of an f-divergence: operators behind `ratio.DensityRatio`; see `kernels`.

In one process, `ratio` does all of it. Several processes exchange their samples between `ratio_samples` and
`ratio_weights`, since the means of the noise bins and the mean of h, which depends on them, are over the global batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdistill.kernels import implementation
from fdistill.kernels.checks import widened


@torch.library.custom_op("fdistill::ratio", mutates_args=("bins",))
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """weight (float64 where the device has it), h and clamped (float32), all [B], as `reference.ratio`; no gradient.
    Updates the bins [K] in place, as a captured graph requires.
    """
    results: tuple[Tensor, Tensor, Tensor] = implementation("ratio", backend, logits).ratio(
        logits, level, bins, lower, upper, low, high, log_bins, momentum, factor, power, power1p
    )
    return results


@ratio.register_fake
def _(logits: Tensor, level: Tensor, bins: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    h, clamped = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
    return widened(torch.empty_like(h)), h, clamped


@torch.library.custom_op("fdistill::ratio_samples", mutates_args=())
def ratio_samples(
    logits: Tensor,
    level: Tensor,
    lower: float,
    upper: float,
    num_bins: int,
    low: float,
    high: float,
    log_bins: bool,
    backend: str,
) -> Tensor:
    """[B, 3] ratio, bin and 1 where the ratio was clamped, as `reference.ratio_samples`; no gradient."""
    samples: Tensor = implementation("ratio", backend, logits).ratio_samples(
        logits, level, lower, upper, num_bins, low, high, log_bins
    )
    return samples


@ratio_samples.register_fake
def _(logits: Tensor, *rest: object) -> Tensor:
    return logits.new_empty((len(logits), 3), dtype=torch.float32)


@torch.library.custom_op("fdistill::ratio_weights", mutates_args=("bins",))
def ratio_weights(
    samples: Tensor,
    bins: Tensor,
    momentum: float,
    factor: float,
    power: float,
    power1p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """weight (float64 where the device has it) and h (float32) [N] of the global batch, as `reference.ratio_weights`;
    updates the bins [K] in place.
    """
    results: tuple[Tensor, Tensor] = implementation("ratio", backend, samples).ratio_weights(
        samples, bins, momentum, factor, power, power1p
    )
    return results


@ratio_weights.register_fake
def _(samples: Tensor, bins: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    h = samples.new_empty(len(samples), dtype=torch.float32)
    return widened(torch.empty_like(h)), h
