"""SenseFlow's intra-segment guidance (arXiv 2506.00523): a student's step agrees with a detour through the teacher.

A few-step student's step from one of its levels to the next must land where the teacher's short step to a level in
between, and the student's own step on from there, would land. SenseFlow reports that distribution matching of FLUX
converges with it, and not without.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fdistill.base.errors import ArgumentError
from fdistill.condition import Condition
from fdistill.generator import FewStepGenerator
from fdistill.noise import add_noise, implied_noise
from fdistill.rollout import Rollout
from fdistill.step.roles import Networks


class Segment(NamedTuple):
    """The segment of an update, and the term's weight.

    Attributes:
        weight: of the term beside the matching loss (SenseFlow: 0.5 for SD3.5 medium, 1 for large and FLUX).
        begin: the level of the student's step.
        middle: the level between, at which the teacher hands over to the student.
        end: the level of the student's next step; None after the last, whose end is the image.
    """

    weight: float
    begin: float
    middle: float
    end: float | None


def segment_loss(networks: Networks, x0: Tensor, x_t: Tensor, condition: Condition | None, segment: Segment) -> Tensor:
    """The mean squared difference [B] at the segment's end between the student's step and the detour.

    All three steps are deterministic: they noise an x0 with the noise that it and the step's input imply. Only the
    student's step has a gradient. At the end of the last segment the two x0 themselves are compared.

    Args:
        x0: [B, C, H, W] the student's output at segment.begin.
        x_t: [B, C, H, W] its input there, without gradient.

    Raises:
        ArgumentError: the student takes one step.
    """
    student, schedule = networks.generator, networks.teacher.schedule
    if not isinstance(student, FewStepGenerator):
        raise ArgumentError(f"segment: expected a student of several steps, got {type(student).__name__}")
    begin, middle = (torch.full((len(x_t),), level, device=x_t.device) for level in (segment.begin, segment.middle))

    def landed(x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        if segment.end is None:
            return x0
        return add_noise(schedule, x0, implied_noise(schedule, x0, x_t, t), torch.full_like(t, segment.end))

    with torch.no_grad():
        teacher_x0 = networks.teacher(x_t, begin, condition)
        noise = implied_noise(schedule, teacher_x0, x_t, begin)
        handed_over = add_noise(schedule, teacher_x0, noise, middle)
        # As a rollout, because sharded students run by their own forward alone.
        draws = noise[:, None] if student.sampler == "stochastic" else noise
        own_x0 = student(draws, condition, Rollout((segment.middle,), teacher_x0))
        target = landed(own_x0, handed_over, middle)
    return (landed(x0, x_t, begin) - target).square().flatten(1).mean(1)
