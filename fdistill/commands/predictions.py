"""Errors of x0-predictions on noised data, beside those of the best linear denoiser of the same data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fdistill.base import rng
from fdistill.condition import Condition, TextCondition, none_like
from fdistill.denoiser import Denoiser
from fdistill.noise import add_noise, noise_to_signal
from fdistill.sampler import sampling_levels

LEVELS, SEED = 8, 0
#: Largest error relative to the best linear denoiser's. A trained network is better than that denoiser at every level;
#: a network whose prediction is misinterpreted is worse at some level.
_TOLERANCE = 1.05
#: The same at levels whose noise is below a hundredth of the data: there even a good network's own error counts.
_TOLERANCE_AT_THE_END, _END = 1.25, 0.01
#: Where x0 = skip x_t + out output with a larger `out`, small errors of a good network are large ones of x0.
_AMPLIFIED = 20.0
_NUMBERS = 2**18  # in the samples that a network sees at once: its activations are far larger


@dataclass(frozen=True)
class LevelCheck:
    """Root mean square errors of x0 at one level: the network's, and that of the best linear denoiser.

    Attributes:
        spread: standard deviation of the data.
        amplification: the factor from an error of the network's output to one of x0.
    """

    t: float
    noise_to_signal: float
    error: float
    linear_error: float
    spread: float
    amplification: float = 1.0

    @property
    def judged(self) -> bool:
        """False where an error says little, because x0 amplifies the network's output."""
        return self.amplification <= _AMPLIFIED

    @property
    def makes_sense(self) -> bool:
        """False if the error is NaN, or above the tolerance where it is judged."""
        tolerance = _TOLERANCE if self.linear_error > _END * self.spread else _TOLERANCE_AT_THE_END
        return self.error <= tolerance * self.linear_error or (not self.judged and math.isfinite(self.error))


class LinearDenoiser:
    """The best linear denoiser of stationary data: a Wiener filter from their mean and their spectrum.

    Channels are turned to their principal axes first, so that what they have in common counts.

    Args:
        x0: samples [B, C, H, W].
    """

    def __init__(self, x0: Tensor):
        centred = (x0 - x0.mean(dim=0, keepdim=True)).double().cpu()
        flat = centred.transpose(0, 1).flatten(1)
        _, axes = torch.linalg.eigh(flat @ flat.T)
        turned = torch.einsum("bchw,cd->bdhw", centred, axes)
        power = torch.fft.fft2(turned, norm="ortho").abs().square()
        self.spectrum = power.sum(dim=0) / max(1, len(x0) - 1)  # [C, H, W]; the mean costs one degree of freedom
        self.spread = float(x0.std())

    def error(self, alpha: float, sigma: float) -> float:
        """Its root mean square error of x0 from alpha x0 + sigma noise."""
        noise = self.spectrum * sigma**2 / (alpha**2 * self.spectrum + sigma**2)
        return float(noise.nan_to_num(0.0).mean().sqrt())


def at_once(shape: Sequence[int]) -> int:
    """How many samples of a shape (C, H, W) a network sees at once."""
    return max(1, _NUMBERS // math.prod(shape))


def rows(condition: Condition | None, first: int, last: int) -> Condition | None:
    """The conditions of samples [first, last)."""
    if isinstance(condition, TextCondition):
        return condition.rows(slice(first, last))
    return None if condition is None else condition[first:last]


@torch.no_grad()
def predicted(denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
    """x0-predictions [B, C, H, W], a few samples at a time."""
    parts, count = [], at_once(x_t.shape[1:])
    for first in range(0, len(x_t), count):
        last = first + count
        part, _ = denoiser.denoise_with_features(x_t[first:last], t[first:last], rows(condition, first, last), ())
        parts.append(part)
    return torch.cat(parts)


@torch.no_grad()
def check_predictions(
    denoiser: Denoiser, x0: Tensor, condition: Condition | None, ratios: Tensor | None = None
) -> list[LevelCheck]:
    """Errors of x0-predictions on noised samples x0 [B, C, H, W].

    Args:
        ratios: the noise-to-signal ratios [L] to check at; by default those of eight levels, from the noisiest to the
            cleanest.
    """
    schedule, linear = denoiser.schedule, LinearDenoiser(x0)
    noise = rng.indexed_normal(SEED, range(len(x0)), x0.shape[1:]).to(x0.device)
    levels = sampling_levels(denoiser, LEVELS) if ratios is None else schedule.level(ratios)
    checks = []
    for level in levels.to(x0.device):
        t = level.expand(len(x0))
        error = (predicted(denoiser, add_noise(schedule, x0, noise, t), t, condition) - x0).square().mean().sqrt()
        out = denoiser.preconditioning(level[None]).out
        checks.append(
            LevelCheck(
                level.item(),
                noise_to_signal(schedule, level).item(),
                error.item(),
                linear.error(schedule.alpha(level).item(), schedule.sigma(level).item()),
                linear.spread,
                1.0 if out is None else float(out.abs()),
            )
        )
    return checks


def relative_error(checks: Sequence[LevelCheck]) -> float:
    """The geometric mean over the judged levels of error / linear error; infinite if an error is not finite."""
    ratios = [check.error / check.linear_error for check in checks if check.judged and check.linear_error > 0]
    if not ratios or not all(map(math.isfinite, ratios)):
        return math.inf
    return math.exp(sum(math.log(max(ratio, 1e-12)) for ratio in ratios) / len(ratios))


@torch.no_grad()
def describe_effect(denoiser: Denoiser, x0: Tensor, condition: Condition, null: TextCondition | int) -> str:
    """What the condition does to x0-predictions at a middle level: guidance adds a multiple of it.

    Args:
        x0: samples [B, C, H, W].
        condition: of the samples.
        null: the condition that guidance leads away from.
    """
    level = sampling_levels(denoiser, LEVELS)[LEVELS // 2].to(x0.device)
    t = level.expand(len(x0))
    noise = rng.indexed_normal(SEED, range(len(x0)), x0.shape[1:]).to(x0.device)
    x_t = add_noise(denoiser.schedule, x0, noise, t)
    with_condition = predicted(denoiser, x_t, t, condition)
    without = predicted(denoiser, x_t, t, none_like(condition, null))
    moved = float((with_condition - without).square().mean().sqrt())
    errors = [float((found - x0).square().mean().sqrt()) for found in (with_condition, without)]
    text = f"at level {level:.4g} the condition moves x0 by {moved:.4f}; its error is {errors[0]:.4f} with it, "
    return text + f"{errors[1]:.4f} without" + ("" if moved > 0 else ": no effect")
