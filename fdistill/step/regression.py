"""The update of the student by regression on the teacher's own pairs alone: a warm-up before another method."""

from __future__ import annotations

import torch

from fdistill.condition import Condition
from fdistill.losses import regression_loss
from fdistill.step.matching import Pairs
from fdistill.step.roles import Networks, PerSample, StepResult


def regression_step(
    networks: Networks,
    condition: Condition | None,
    generator: torch.Generator,
    *,
    batch_size: int,
    pairs: Pairs,
    regression_weight: float = 1.0,
) -> StepResult:
    """One update of the student towards what the teacher's ODE makes of the same noise.

    loss = regression_weight mean |student(z) - teacher's ODE(z)|^2

    The loss trains only the student, and evaluates nothing else.

    Args:
        networks: the roles.
        condition, generator, batch_size: not read; the pairs have their own conditions, and nothing is drawn.
        pairs: noise, the teacher's samples and their conditions.
        regression_weight: weight of the loss.
    """
    losses = regression_loss(networks.generator(pairs.noise, pairs.condition), pairs.x0)
    t = torch.full_like(losses, networks.teacher.schedule.t_max)
    return StepResult(regression_weight * losses.mean(), {"generator/regression": PerSample(losses.detach(), t)})
