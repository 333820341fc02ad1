"""The updates of a distillation as plain functions: each takes a batch and returns a loss to call backward on.

Devices, optimisers, logging and files belong to the caller. Each loss has gradients only for the parameters of its own
role: the other networks are frozen while the step's graph is built, so a plain `loss.backward()` is enough.
"""

from fdistill.step.augmentation import Augmentation
from fdistill.step.critic import critic_step
from fdistill.step.diffratio import diffratio_step, ratio_critic_step
from fdistill.step.diversity import Diversity
from fdistill.step.implicit import sid_step, sim_step, uni_instruct_step
from fdistill.step.matching import generator_step
from fdistill.step.pairs import Pairs
from fdistill.step.regression import regression_step
from fdistill.step.roles import ROLES, LevelDraw, Networks, PerSample, StepResult, frozen
from fdistill.step.segment import Segment

__all__ = [
    "ROLES",
    "Augmentation",
    "Diversity",
    "LevelDraw",
    "Networks",
    "Pairs",
    "PerSample",
    "Segment",
    "StepResult",
    "critic_step",
    "diffratio_step",
    "frozen",
    "generator_step",
    "ratio_critic_step",
    "regression_step",
    "sid_step",
    "sim_step",
    "uni_instruct_step",
]
