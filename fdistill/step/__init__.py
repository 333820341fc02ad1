"""The updates of a distillation as plain functions: a batch in, a loss to call backward on out.

Devices, optimisers, logging and files belong to the caller. Each loss reaches the parameters of its own role only: the
other networks are frozen while the step's graph is built, so a plain `loss.backward()` is right.
"""

from fdistill.step.critic import critic_step
from fdistill.step.diffratio import diffratio_step, ratio_critic_step
from fdistill.step.implicit import sid_step, sim_step, uni_instruct_step
from fdistill.step.matching import Pairs, generator_step
from fdistill.step.roles import ROLES, LevelDraw, Networks, PerSample, StepResult, frozen

__all__ = [
    "ROLES",
    "LevelDraw",
    "Networks",
    "Pairs",
    "PerSample",
    "StepResult",
    "critic_step",
    "diffratio_step",
    "frozen",
    "generator_step",
    "ratio_critic_step",
    "sid_step",
    "sim_step",
    "uni_instruct_step",
]
