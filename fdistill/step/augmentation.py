"""Guidance as a term of its own: the CFG augmentation of Decoupled DMD (arXiv 2511.22677).

The difference that DMD follows, guided teacher minus fake score, is the sum of distribution matching, T_c - F, and of
(s - 1) (T_c - T_0): T_c and T_0 are the teacher's x0-predictions with and without the condition, s is the guidance
scale, F the fake score's. The second term makes an image out of few steps, the first keeps it from going too far.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fdistill.base import rng
from fdistill.base.errors import ArgumentError
from fdistill.condition import Condition
from fdistill.guidance import GuidedDenoiser
from fdistill.losses import NORMALISER_FLOOR, matching_loss, score_difference_loss, score_difference_weight
from fdistill.noise import share_below
from fdistill.prediction import Prediction
from fdistill.step.roles import LevelDraw, Networks, PerSample, frozen, renoise


class Augmentation(NamedTuple):
    """The settings of the term.

    Attributes:
        weight: its weight beside the matching loss.
        levels: (schedule, uniform draws [B]) -> t [B]; of these levels the cleaner ones are drawn, see
            `augmentation_loss`.
        weighting: as of `generator_step`: "normalised" divides by mean|x0 - T_c| of this term's own level.
        normaliser_floor: the least that "normalised" divides by.
    """

    weight: float
    levels: LevelDraw
    weighting: str = "normalised"
    normaliser_floor: float = NORMALISER_FLOOR


def augmentation_loss(
    networks: Networks,
    x0: Tensor,
    condition: Condition | None,
    generator: torch.Generator,
    augmentation: Augmentation,
    entered: float,
    *,
    backend: str = "auto",
) -> PerSample:
    """The loss [B] whose gradient moves x0 along (s - 1) (T_c - T_0), and the levels t [B] at which it is taken.

    Levels are those of `augmentation.levels` below the level at which the student's last step got its input. The paper
    finds that drawing both terms' levels separately changes nothing, and that drawing these below it does.

    Args:
        networks: the roles; the teacher must be guided.
        x0: [B, C, H, W] student samples, the only argument that receives a gradient.
        entered: the level of the student's last step.

    Raises:
        ArgumentError: the teacher is not guided.
    """
    teacher, schedule = networks.teacher, networks.teacher.schedule
    if not isinstance(teacher, GuidedDenoiser):
        raise ArgumentError("augmentation: expected a guided teacher, got one without guidance")
    share = share_below(augmentation.levels, schedule, entered)
    t = augmentation.levels(schedule, share * rng.uniform(generator, len(x0))).clamp(max=entered)
    with frozen(teacher):
        x_t, (network_input,), (form,) = renoise([teacher], x0.detach(), t, generator, backend=backend)
        both, _ = teacher.predict(network_input, t, condition, form=form, output_grad=False)
    assert both.unconditional is not None
    conditional = Prediction(both.output, both.skip, both.out)
    none = Prediction(both.unconditional, both.skip, both.out)
    scale = torch.full_like(t, teacher.guidance_scale - 1)
    if augmentation.weighting == "normalised":
        floor = augmentation.normaliser_floor
        loss = matching_loss(x0, conditional, none, weight=scale, floor=floor, x_t=x_t, backend=backend)
        return PerSample(loss, t)
    weight = scale * score_difference_weight(augmentation.weighting, schedule.alpha(t), schedule.sigma(t))
    return PerSample(score_difference_loss(x0, conditional, none, weight, x_t=x_t, backend=backend), t)
