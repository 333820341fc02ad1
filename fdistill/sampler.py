"""Deterministic sampling of a teacher: Heun's method on the probability-flow ODE (Karras et al. 2022, algorithm 1)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

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
    levels = sampling_levels(denoiser, num_steps, start_level=start_level)
    return _integrated(denoiser, noise, condition, levels, ())[0]


@torch.no_grad()
def heun_states(
    denoiser: Denoiser, noise: Tensor, condition: Condition | None, num_steps: int, stops: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """(x0 [B, C, H, W], the noisy samples [B, K - 1, C, H, W] on the way to it at the stops after the first).

    Arguments are those of `heun_sample`, whose grid the stops are added to; stops[0] is its start_level.

    Args:
        stops: K falling levels, above t_min.
    """
    grid = sampling_levels(denoiser, num_steps, start_level=stops[0])
    passed = torch.tensor(stops[1:], dtype=grid.dtype)
    levels = torch.cat([grid, passed]).unique().flip(0)
    places = len(levels) - 1 - torch.searchsorted(levels.flip(0), passed)
    x0, states = _integrated(denoiser, noise, condition, levels, places.tolist())
    return x0, torch.stack(states, dim=1)


def _integrated(
    denoiser: Denoiser, noise: Tensor, condition: Condition | None, levels: Tensor, kept: Collection[int]
) -> tuple[Tensor, list[Tensor]]:
    """x0 after these falling levels, and the noisy samples at those places among them that are kept."""
    schedule, batch = denoiser.schedule, len(noise)
    states: list[Tensor] = []
    levels = levels.to(noise.device)
    x = expand(schedule.start(levels[:1]), noise) * noise
    for i in range(len(levels)):
        if i in kept:
            states.append(x)
        t = levels[i].expand(batch)
        alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
        x0, _ = denoiser.denoise_with_features(x, t, condition, ())
        if i == len(levels) - 1:
            return x0, states
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
