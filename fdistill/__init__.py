"""fdistill distils diffusion checkpoints into one-step generators, by f-divergence distillation (arXiv 2502.15681)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fdistill.adapters.checkpoint import load_teacher as load_teacher
    from fdistill.commands.ema import reconstruct_student as reconstruct_student
    from fdistill.condition import TextCondition as TextCondition
    from fdistill.config.reading import load_config as load_config
    from fdistill.config.schema import DistillConfig as DistillConfig
    from fdistill.denoiser import Denoiser as Denoiser
    from fdistill.discriminator import ChannelMean as ChannelMean
    from fdistill.discriminator import Discriminator as Discriminator
    from fdistill.divergence import Divergence as Divergence
    from fdistill.divergence import divergence_from as divergence_from
    from fdistill.divergence import get_divergence as get_divergence
    from fdistill.generation.generate import generate as generate
    from fdistill.generator import FewStepGenerator as FewStepGenerator
    from fdistill.generator import OneStepGenerator as OneStepGenerator
    from fdistill.guidance import GuidedDenoiser as GuidedDenoiser
    from fdistill.losses import matching_loss as matching_loss
    from fdistill.losses import score_difference_loss as score_difference_loss
    from fdistill.losses import score_difference_weight as score_difference_weight
    from fdistill.ratio import DensityRatio as DensityRatio
    from fdistill.step import Networks as Networks
    from fdistill.step import Pairs as Pairs
    from fdistill.step import critic_step as critic_step
    from fdistill.step import diffratio_step as diffratio_step
    from fdistill.step import generator_step as generator_step
    from fdistill.step import ratio_critic_step as ratio_critic_step
    from fdistill.step import sid_step as sid_step
    from fdistill.step import sim_step as sim_step
    from fdistill.step import uni_instruct_step as uni_instruct_step
    from fdistill.students.folder import load_student as load_student
    from fdistill.students.lora import lora_copy as lora_copy
    from fdistill.students.one_step_pipeline import OneStepPipeline as OneStepPipeline
    from fdistill.students.tiue import TiUEGenerator as TiUEGenerator
    from fdistill.students.tiue_pipeline import TiUEPipeline as TiUEPipeline
    from fdistill.teachers.text_encoders import PromptEncoder as PromptEncoder
    from fdistill.training.loop import distill as distill

# Names are imported on first use, so that `import fdistill` and `fdistill --help` do not wait for torch and diffusers.
_WHERE = {
    "ChannelMean": "discriminator",
    "critic_step": "step",
    "Denoiser": "denoiser",
    "DensityRatio": "ratio",
    "diffratio_step": "step",
    "Discriminator": "discriminator",
    "distill": "training.loop",
    "DistillConfig": "config.schema",
    "Divergence": "divergence",
    "divergence_from": "divergence",
    "FewStepGenerator": "generator",
    "generate": "generation.generate",
    "generator_step": "step",
    "get_divergence": "divergence",
    "GuidedDenoiser": "guidance",
    "load_config": "config.reading",
    "load_student": "students.folder",
    "load_teacher": "adapters.checkpoint",
    "lora_copy": "students.lora",
    "matching_loss": "losses",
    "Networks": "step",
    "OneStepGenerator": "generator",
    "OneStepPipeline": "students.one_step_pipeline",
    "Pairs": "step",
    "PromptEncoder": "teachers.text_encoders",
    "ratio_critic_step": "step",
    "reconstruct_student": "commands.ema",
    "score_difference_loss": "losses",
    "score_difference_weight": "losses",
    "sid_step": "step",
    "sim_step": "step",
    "TextCondition": "condition",
    "TiUEGenerator": "students.tiue",
    "TiUEPipeline": "students.tiue_pipeline",
    "uni_instruct_step": "step",
}

__all__ = [*_WHERE, "__version__"]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that this finds

    def __getattr__(name: str) -> Any:
        if name not in _WHERE:
            raise AttributeError(f"module 'fdistill' has no attribute {name!r}")
        return getattr(importlib.import_module(f"fdistill.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
