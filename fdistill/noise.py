"""Noise schedules, x_t = alpha(t) x0 + sigma(t) eps, and samplers of training levels.

The whole library works with x0-predictions at levels t of the teacher's own schedule. Levels are float tensors and may
be fractional.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from functools import cache, lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from fdistill.base.constants import constant
from fdistill.base.errors import ArgumentError, CheckpointError, did_you_mean
from fdistill.kernels.layout import expand

__all__ = [
    "LEVEL_SAMPLERS",
    "EDMSchedule",
    "FlowSchedule",
    "NoiseSchedule",
    "VPSchedule",
    "add_noise",
    "karras_levels",
    "lognormal_levels",
    "shifted_levels",
    "uniform_levels",
]


class NoiseSchedule(Hashable, Protocol):
    """How a teacher's level t maps to signal and noise. All methods are elementwise on float tensors of any shape."""

    @property
    def t_min(self) -> float:
        """The least noisy level the teacher was trained at."""

    @property
    def t_max(self) -> float:
        """The noisiest level."""

    def alpha(self, t: Tensor) -> Tensor:
        """Signal coefficient, in [0, 1]."""

    def sigma(self, t: Tensor) -> Tensor:
        """Noise coefficient, >= 0."""

    def level(self, noise_to_signal: Tensor) -> Tensor:
        """The t with sigma(t) / alpha(t) equal to the argument, clamped to [t_min, t_max]."""

    def start(self, t: Tensor) -> Tensor:
        """The scale of the noise from which a sampler or a generator starts at level t."""


def noise_to_signal(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """sigma(t) / alpha(t); infinite where alpha is 0."""
    return schedule.sigma(t) / schedule.alpha(t)


@cache
def noise_to_signal_range(schedule: NoiseSchedule) -> tuple[float, float]:
    """The ratio at t_min and t_max, clamped to [0.001, 1000] so that a grid can span it; computed once, on the CPU."""
    ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64, device="cpu")
    low, high = noise_to_signal(schedule, ends).clamp(1e-3, 1e3).tolist()
    return low, high


class EDMSchedule:
    """Variance exploding: t = sigma, alpha = 1 (Karras et al. 2022, arXiv 2206.00364)."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0):
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ArgumentError(f"EDMSchedule: expected 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        self.t_min = float(sigma_min)
        self.t_max = float(sigma_max)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def level(self, noise_to_signal: Tensor) -> Tensor:
        return noise_to_signal.clamp(self.t_min, self.t_max)

    def start(self, t: Tensor) -> Tensor:
        return t


class FlowSchedule:
    """Rectified flow: alpha = 1 - t, sigma = t, t in [t_min, 1] (Liu et al. 2022, arXiv 2209.03003)."""

    def __init__(self, t_min: float = 1e-3):
        if not 0 < t_min < 1:
            raise ArgumentError(f"FlowSchedule: expected 0 < t_min < 1, got {t_min}")
        self.t_min = float(t_min)
        self.t_max = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def level(self, noise_to_signal: Tensor) -> Tensor:
        # r / (1 + r), written so that an infinite ratio gives 1.
        return (1 - 1 / (1 + noise_to_signal)).clamp(self.t_min, 1.0)

    def start(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class VPSchedule:
    """Discrete variance preserving: t = timestep in [0, T - 1], alpha^2 + sigma^2 = 1 (Ho et al. 2020).

    Between two timesteps (alpha, sigma) runs along the chord between the table's points, scaled back to the unit
    circle: exact at the timesteps, and finite where alpha = 0 (zero terminal SNR, Lin et al. 2023, arXiv 2305.08891).

    Args:
        alphas_cumprod: [T] cumulative products of 1 - beta, in [0, 1], strictly decreasing.
    """

    def __init__(self, alphas_cumprod: Tensor):
        table = alphas_cumprod.detach().to("cpu", torch.float64)
        if table.ndim != 1 or len(table) < 2 or not bool(((table >= 0) & (table <= 1)).all()):
            raise ArgumentError("VPSchedule: alphas_cumprod must be a 1-D table of at least 2 values in [0, 1]")
        if not bool((table.diff() < 0).all()):
            raise ArgumentError("VPSchedule: alphas_cumprod must decrease from one timestep to the next")
        self.t_min = 0.0
        self.t_max = float(len(table) - 1)
        self.alphas_cumprod = table
        self._alphas = table.sqrt()
        self._sigmas = (1 - table).sqrt()
        self._on_device: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def _tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        key = (like.device, like.dtype)
        if key not in self._on_device:
            self._on_device[key] = (
                self._alphas.to(like.dtype).to(like.device),
                self._sigmas.to(like.dtype).to(like.device),
            )
        return self._on_device[key]

    def _chord(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alphas, sigmas = self._tables(t)
        left = t.floor().clamp(0, len(alphas) - 2).long()
        fraction = t - left
        alpha = torch.lerp(alphas[left], alphas[left + 1], fraction)
        sigma = torch.lerp(sigmas[left], sigmas[left + 1], fraction)
        length = torch.hypot(alpha, sigma)
        return alpha / length, sigma / length

    def alpha(self, t: Tensor) -> Tensor:
        return self._chord(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self._chord(t)[1]

    def level(self, noise_to_signal: Tensor) -> Tensor:
        alphas, sigmas = self._tables(noise_to_signal)
        ratio = noise_to_signal.clamp(sigmas[0] / alphas[0], sigmas[-1] / alphas[-1])
        right = torch.searchsorted(sigmas / alphas, ratio.contiguous()).clamp(1, len(alphas) - 1)
        left = right - 1
        # On the chord sigma = ratio * alpha is linear in the fraction; divided by the ratio it stays finite at
        # infinity.
        start = sigmas[left] / ratio - alphas[left]
        end = sigmas[right] / ratio - alphas[right]
        return left + (start / (start - end)).clamp(0, 1)

    def start(self, t: Tensor) -> Tensor:
        # Not sigma(t): diffusers' samplers start from pure noise whatever the first timestep, and so do one-step
        # students that start at a lower timestep (DMD2's SDXL student starts at 399).
        return torch.ones_like(t)


def vp_schedule_from_config(config: Mapping[str, Any]) -> VPSchedule:
    """The schedule of any diffusers DDPM-style scheduler config (a scheduler_config.json read as a dict).

    diffusers' DDPMScheduler computes the table, so every beta schedule that it supports works here, including zero
    terminal SNR and `trained_betas`.

    Raises:
        CheckpointError: diffusers does not support the beta schedule.
    """
    from diffusers import DDPMScheduler

    known = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
    )
    wanted = {key: config[key] for key in known if config.get(key) is not None}
    try:
        table = DDPMScheduler(**wanted).alphas_cumprod
    except NotImplementedError as error:
        choices = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
        raise CheckpointError(
            f"scheduler config: unknown beta_schedule {config.get('beta_schedule')!r}; "
            f"{did_you_mean(str(config.get('beta_schedule')), choices)}"
        ) from error
    return VPSchedule(table)


def add_noise(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha(t) x0 + sigma(t) noise. x0, noise [B, ...], t [B] -> [B, ...]."""
    return expand(schedule.alpha(t), x0) * x0 + expand(schedule.sigma(t), x0) * noise


def implied_noise(schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The noise that makes x_t of x0, as `add_noise` does. x0, x_t [B, ...], t [B] -> [B, ...]."""
    return (x_t - expand(schedule.alpha(t), x0) * x0) / expand(schedule.sigma(t), x0)


# Level samplers: a uniform draw u in (0, 1) -> level. Being functions of u, they need no random state of their own.


def uniform_levels(schedule: NoiseSchedule, u: Tensor, *, low: float = 0.0, high: float = 1.0) -> Tensor:
    """t uniform over the fraction [low, high] of [t_min, t_max]; the usual choice for VP and flow teachers."""
    return schedule.t_min + (schedule.t_max - schedule.t_min) * (low + (high - low) * u)


def shifted_levels(
    schedule: NoiseSchedule, u: Tensor, *, shift: float = 3.0, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """Uniform levels moved towards noise: a fraction f of the range becomes shift f / (1 + (shift - 1) f). This is
    how rectified flows of large images are trained and sampled (Esser et al. 2024, arXiv 2403.03206, section 5.3.2).
    """
    fraction = low + (high - low) * u
    return schedule.t_min + (schedule.t_max - schedule.t_min) * shift * fraction / (1 + (shift - 1) * fraction)


def karras_levels(
    schedule: NoiseSchedule, u: Tensor, *, rho: float = 7.0, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """Uniform over the Karras grid of noise-to-signal ratios (arXiv 2206.00364, eq. 5); the usual choice for EDM
    teachers.

    low and high limit the part of the grid that is used, counted from the least noisy end (DMD2 leaves out 2 % at
    either end).
    """
    smallest, largest = (bound ** (1 / rho) for bound in noise_to_signal_range(schedule))
    return schedule.level((smallest + (low + (high - low) * u) * (largest - smallest)) ** rho)


def lognormal_levels(schedule: NoiseSchedule, u: Tensor, *, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """Levels whose log noise-to-signal ratio is normal with `mean` and `std` (arXiv 2206.00364, table 1)."""
    tiny = torch.finfo(u.dtype).eps
    standard_normal = math.sqrt(2) * torch.erfinv(2 * u.clamp(tiny, 1 - tiny) - 1)
    return schedule.level(torch.exp(mean + std * standard_normal))


LEVEL_SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform_levels,
    "shifted": shifted_levels,
    "karras": karras_levels,
    "lognormal": lognormal_levels,
}


@lru_cache(maxsize=64)
@constant
def share_below(levels: Callable[[NoiseSchedule, Tensor], Tensor], schedule: NoiseSchedule, top: float) -> float:
    """The largest u for which levels(schedule, u) is at most `top`, to 1e-15; levels rise with u in [0, 1]."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        below = float(levels(schedule, torch.tensor([middle], dtype=torch.float64))) <= top
        low, high = (middle, high) if below else (low, middle)
    return high
