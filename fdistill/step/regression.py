"""The update of the student by regression on the teacher's own pairs alone: a warm-up before another method."""

from __future__ import annotations

import torch

from fdistill.condition import Condition
from fdistill.losses import regression_loss
from fdistill.rollout import Rollout
from fdistill.step.pairs import Pairs, student_of_pairs
from fdistill.step.roles import Networks, PerSample, StepResult


def regression_step(
    networks: Networks,
    condition: Condition | None,
    generator: torch.Generator,
    *,
    batch_size: int,
    pairs: Pairs,
    rollout: Rollout | None = None,
    regression_weight: float = 1.0,
) -> StepResult:
    """One update of the student towards what the teacher's ODE makes of the same noise.

    loss = regression_weight mean |student(z) - teacher's ODE(z)|^2

    A step of a student of several gets the ODE's noisy sample at its level instead of z (CausVid, arXiv 2412.07772).

    The loss trains only the student, and evaluates nothing else.

    Args:
        networks: the roles.
        condition, generator, batch_size, rollout: not read; the pairs have their own conditions and level, and nothing
            is drawn.
        pairs: noise, the teacher's samples and their conditions.
        regression_weight: weight of the loss.
    """
    losses = regression_loss(student_of_pairs(networks, pairs), pairs.x0)
    t = torch.full_like(losses, pairs.entered(networks.teacher.schedule))
    return StepResult(regression_weight * losses.mean(), {"generator/regression": PerSample(losses.detach(), t)})
