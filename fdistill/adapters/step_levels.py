"""The levels at which a student takes a given number of steps, along its teacher's own schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from fdistill.base.constants import constant
from fdistill.base.errors import ConfigError
from fdistill.denoiser import Denoiser
from fdistill.noise import FlowSchedule, VPSchedule, karras_levels, noise_to_signal_range

_PATCH = 2  # of the transformers whose schedulers shift by the number of tokens


@constant
def step_levels(
    denoiser: Denoiser,
    steps: int,
    *,
    scheduler: Mapping[str, Any] | None = None,
    start: float | None = None,
    shift: float | None = None,
) -> tuple[float, ...]:
    """The levels of `steps` steps, evenly spread in the family's own measure and ending one step above zero.

    - Flows: sigma = 1, (n-1)/n, ..., 1/n, shifted: a sigma / (1 + (a - 1) sigma). These are the sigmas with which the
      pipelines of Flux, Qwen-Image and others call their scheduler, and ComfyUI's "simple". The stretch to a terminal
      sigma, which would leave the last step next to nothing to do, is left out.
    - Timesteps: T (n-k) / n - 1, that is 999, 749, 499, 249 for four of a thousand (DMD2, arXiv 2405.14867).
    - EDM: even points of the Karras grid (arXiv 2206.00364, eq. 5) of the noise-to-signal ratio.

    Args:
        denoiser: the teacher's network, resized to the images that the student makes.
        scheduler: the config of the teacher's scheduler, which says how much a flow is shifted.
        start: the first level; None is the schedule's last.
        shift: a, for flows; None is the scheduler's: a number, or one that depends on the number of tokens, and for
            FLUX.2 on the number of steps.

    Raises:
        ConfigError: a shift is given for a teacher that is no flow.
    """
    schedule = denoiser.schedule
    start = schedule.t_max if start is None else start
    shares = [(steps - index) / steps for index in range(steps)]
    if isinstance(schedule, FlowSchedule):
        a = _shift(scheduler or {}, denoiser, steps) if shift is None else shift
        return tuple(start * a * share / (1 + (a - 1) * share) for share in shares)
    if shift is not None:
        raise ConfigError(f"student.shift: got {shift:g}, but the teacher is no flow; expected null")
    if isinstance(schedule, VPSchedule):
        return tuple(float(round((start + 1) * share) - 1) for share in shares)
    least, most = noise_to_signal_range(schedule)
    level = torch.tensor(start, dtype=torch.float64)
    ratio = float(schedule.sigma(level) / schedule.alpha(level))
    top = (ratio ** (1 / 7) - least ** (1 / 7)) / (most ** (1 / 7) - least ** (1 / 7))
    below = karras_levels(schedule, torch.tensor(shares[1:], dtype=torch.float64), high=top)
    return (float(start), *below.tolist())


def _shift(scheduler: Mapping[str, Any], denoiser: Denoiser, steps: int) -> float:
    """How much a scheduler of diffusers shifts the sigmas of this many steps."""
    if not scheduler.get("use_dynamic_shifting"):
        return float(scheduler.get("shift") or scheduler.get("flow_shift") or 1.0)
    mu = denoiser.schedule_shift(steps)
    if mu is None:
        mu = _mu_of_tokens(scheduler, denoiser)
    return mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu)


def _mu_of_tokens(scheduler: Mapping[str, Any], denoiser: Denoiser) -> float:
    """mu, linear in the number of tokens between the two that the scheduler's config names."""
    few, many = (
        float(scheduler.get(f"{name}_image_seq_len") or count) for name, count in (("base", 256), ("max", 4096))
    )
    low, high = (float(scheduler.get(f"{name}_shift") or shift) for name, shift in (("base", 0.5), ("max", 1.15)))
    tokens = math.prod(denoiser.sample_shape[1:]) / _PATCH**2
    return low + (tokens - few) / (many - few) * (high - low)
