"""What the teacher's deterministic sampler made of noise, and what the student makes of the same."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fdistill.condition import Condition
from fdistill.generator import FewStepGenerator
from fdistill.noise import NoiseSchedule
from fdistill.rollout import Rollout
from fdistill.step.roles import Networks


class Pairs(NamedTuple):
    """Samples of the teacher's sampler, each with the noise that it started from.

    Attributes:
        noise: [B, C, H, W], standard normal.
        x0: [B, C, H, W] that the sampler made of it.
        condition: the sampler's.
        level: of a student of several steps, the level of the step that learns; None for a student of one.
        x_t: [B, C, H, W] the sampler's noisy sample at that level; None at the first, which starts from noise.
    """

    noise: Tensor
    x0: Tensor
    condition: Condition | None
    level: float | None = None
    x_t: Tensor | None = None

    def entered(self, schedule: NoiseSchedule) -> float:
        """The level for the logs."""
        return schedule.t_max if self.level is None else self.level


def student_of_pairs(networks: Networks, pairs: Pairs) -> Tensor:
    """What the student's step makes of the noise, or of the noisy sample on the teacher's way: x0 [B, C, H, W]."""
    student: Any = networks.generator
    arguments: list[Any] = [pairs.noise, pairs.condition]
    if pairs.level is not None and isinstance(student, FewStepGenerator):
        noise = pairs.noise[:, None] if student.sampler == "stochastic" else pairs.noise
        arguments = [noise, pairs.condition, Rollout((pairs.level,), x_t=pairs.x_t)]
    x0: Tensor = student(*arguments)
    return x0
