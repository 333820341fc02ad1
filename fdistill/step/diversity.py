"""The diversity term of DP-DMD (arXiv 2602.03139): the first step of a few-step student is supervised by the teacher.

Distribution matching forgets modes in the first step, which decides what an image shows. With this term the first step
learns where the teacher's own trajectory from the same noise leads, and matching trains the steps after it alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fdistill.base import rng
from fdistill.base.errors import ArgumentError
from fdistill.condition import Condition
from fdistill.denoiser import Denoiser
from fdistill.generator import FewStepGenerator
from fdistill.kernels.layout import expand
from fdistill.noise import add_noise, implied_noise
from fdistill.rollout import Rollout
from fdistill.step.roles import Networks


class Diversity(NamedTuple):
    """The settings of the term.

    Attributes:
        weight: its weight beside the matching loss.
        levels: that the teacher's trajectory passes, falling from the student's first; K + 1 of them for K steps.
    """

    weight: float
    levels: tuple[float, ...]


class Supervised(NamedTuple):
    """Samples x0 [B, C, H, W] after all steps, with gradients in all steps but the first, and the term's loss [B],
    with a gradient in the first step alone.
    """

    x0: Tensor
    loss: Tensor


def draw_supervised(
    networks: Networks, generator: torch.Generator, batch: int, condition: Condition | None, diversity: Diversity
) -> Supervised:
    """Draws the samples of a student update, and the loss of their first step: mean |x0 - `trajectory_x0`|^2.

    For a flow whose first level is 1 it is the squared error of the first step's velocity eps - x0 against that of the
    line from the noise to the end of the trajectory, (eps - z) / (1 - sigma_K), which is the paper's.

    Raises:
        ArgumentError: the student takes one step.
    """
    student = networks.generator
    if not isinstance(student, FewStepGenerator):
        raise ArgumentError(f"diversity: expected a student of several steps, got {type(student).__name__}")
    noise = rng.normal(generator, batch, student.noise_shape())
    stochastic = student.sampler == "stochastic"
    eps = noise[:, 0] if stochastic else noise
    first = student(noise[:, :1] if stochastic else noise, condition, Rollout(student.levels[:1]))
    target = trajectory_x0(networks.teacher, eps, condition, diversity.levels)
    loss = (first - target).square().flatten(1).mean(1)
    rest = noise[:, 1:] if stochastic else student.implied_noise(first.detach(), eps)
    x0 = student(rest, condition, Rollout(student.levels[1:], first.detach(), trained="all"))
    return Supervised(x0, loss)


@torch.no_grad()
def trajectory_x0(teacher: Denoiser, noise: Tensor, condition: Condition | None, levels: tuple[float, ...]) -> Tensor:
    """The x0 [B, C, H, W] that a straight line from the start through the end of the teacher's trajectory leads to.

    The trajectory takes deterministic Euler steps from x = schedule.start(levels[0]) noise to z at levels[-1]. The line
    is the path x_t = alpha x0 + sigma eps of one x0 and one eps that passes both.
    """
    schedule = teacher.schedule

    first, *others = (torch.full((len(noise),), level, device=noise.device) for level in levels)
    t, x = first, expand(schedule.start(first), noise) * noise
    start = x
    for following in others:
        x0 = teacher(x, t, condition)
        x, t = add_noise(schedule, x0, implied_noise(schedule, x0, x, t), following), following
    alphas, sigmas = ([expand(of(each), x) for each in (first, t)] for of in (schedule.alpha, schedule.sigma))
    return (sigmas[0] * x - sigmas[1] * start) / (alphas[1] * sigmas[0] - alphas[0] * sigmas[1])
