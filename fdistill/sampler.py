"""Deterministic sampling of a teacher: Heun's method on the probability-flow ODE (Karras et al. 2022, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from fdistill.condition import Condition
from fdistill.denoiser import Denoiser
from fdistill.kernels.layout import expand
from fdistill.noise import noise_to_signal, noise_to_signal_range


def evaluations(num_steps: int) -> int:
    """Network evaluations per sample (NFE) that `heun_sample` needs."""
    return 2 * num_steps - 1


def sampling_levels(denoiser: Denoiser, num_steps: int, rho: float = 7.0, start_level: float | None = None) -> Tensor:
    """[num_steps] float32 levels from start_level (t_max by default) down to t_min, on the Karras grid of
    noise-to-signal ratios (eq. 5).
    """
    schedule = denoiser.schedule
    smallest, largest = noise_to_signal_range(schedule)
    start = schedule.t_max if start_level is None else start_level
    if start < schedule.t_max:
        largest = noise_to_signal(schedule, torch.tensor(start, dtype=torch.float64)).item()
    levels = schedule.level(torch.linspace(largest ** (1 / rho), smallest ** (1 / rho), num_steps) ** rho)
    levels[0] = start  # where its noise-to-signal ratio is infinite, the grid begins at a finite one
    return levels


@torch.no_grad()
def heun_sample(
    denoiser: Denoiser,
    noise: Tensor,
    condition: Condition | None = None,
    num_steps: int = 18,
    start_level: float | None = None,
) -> Tensor:
    """Samples x0 [B, C, H, W] from standard normal noise [B, C, H, W].

    Args:
        condition: class labels [B], or None.
        num_steps: number of grid points; costs 2 num_steps - 1 evaluations per sample.
        start_level: the level at which schedule.start(start_level) * noise is the noisy sample; t_max by default.
    """
    schedule = denoiser.schedule
    levels = sampling_levels(denoiser, num_steps, start_level=start_level).to(noise.device)
    batch = len(noise)
    x = expand(schedule.start(levels[:1]), noise) * noise
    for i in range(num_steps):
        t = levels[i].expand(batch)
        alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
        x0, _ = denoiser.denoise_with_features(x, t, condition, ())
        if i == num_steps - 1:
            return x0
        eps = (x - alpha * x0) / sigma
        t_next = levels[i + 1].expand(batch)
        alpha_next, sigma_next = expand(schedule.alpha(t_next), x), expand(schedule.sigma(t_next), x)
        x_next = alpha_next * x0 + sigma_next * eps
        x0_next, _ = denoiser.denoise_with_features(x_next, t_next, condition, ())
        eps_next = (x_next - alpha_next * x0_next) / sigma_next
        # Trapezoid rule in x / alpha over the noise-to-signal ratio; from an infinite ratio only the Euler step
        # is finite.
        step = sigma_next / alpha_next - sigma / alpha
        correction = alpha_next * step * (eps_next - eps) / 2
        x = x_next + torch.where(torch.isfinite(step), correction, torch.zeros_like(correction))
    raise AssertionError("num_steps must be at least 1")
