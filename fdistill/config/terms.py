"""Sections of the terms that are added to the student's loss. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fdistill.config.sections import (
    CountOrZero,
    Fraction,
    LevelsConfig,
    NonNegative,
    Positive,
    ScoreWeighting,
    Section,
    Steps,
)


class RegressionConfig(Section):
    """DMD's regression on pairs: noise at the student's level, and the sample that the teacher's ODE makes of it."""

    weight: NonNegative = 0.0
    pairs: CountOrZero = 2000


class ImageTermConfig(Section):
    """A loss on the student's images, decoded in every step, and their prompts."""

    weight: NonNegative = Field(default=0.0, description="weight of the term; 0 turns it off")
    gradient_ratio: NonNegative = Field(
        default=0.0,
        description="if above 0, weight is set in every update: the norm of the term's gradient on the student's "
        "samples is then this many times matching's",
    )

    @property
    def used(self) -> bool:
        """Whether the student's loss has this term."""
        return self.weight > 0 or self.gradient_ratio > 0


class CLIPLossConfig(ImageTermConfig):
    """A hinge on the CLIP similarity of the student's images and their prompts; a latent student's samples are decoded
    in every step."""

    margin: Fraction = Field(default=0.35, description="cosine similarity above which the loss is 0")
    model: str = Field(default="ViT-B-32", description="name of a model in open_clip")
    weights: str | None = Field(default=None, description="safetensors file of the model's weights")


class RewardConfig(ImageTermConfig):
    """Minus a preference model's score of the student's images for their prompts; a latent student's samples are
    decoded in every step. That score is then no independent measure of the student."""

    model: Literal["hps21", "pickscore"] = "hps21"
    weights: str | None = Field(default=None, description="file of the model's weights, as published or as safetensors")


class AugmentationConfig(LevelsConfig):
    """Guidance as a term of its own (Decoupled DMD, arXiv 2511.22677), at those of these levels that are cleaner than
    the student's input; matching is then without guidance."""

    weight: NonNegative = Field(default=0.0, description="weight of the term; 0 turns it off")
    weighting: ScoreWeighting = Field(
        default="normalised",
        description="weight over noise levels; normalised divides by the term's own mean|x0 - x0'|",
    )
    normaliser_floor: Positive = Field(default=1e-6, description="the least that weighting=normalised divides by")


class SegmentConfig(Section):
    """A few-step student's step agrees with a detour through the teacher (SenseFlow, arXiv 2506.00523)."""

    weight: NonNegative = Field(default=0.0, description="weight of the term (SenseFlow: 0.5 to 1); 0 turns it off")
    margin: float = Field(
        default=0.05,
        ge=0,
        lt=0.5,
        description="share of a segment, at each end, in which the teacher does not hand over",
    )


class DiversityConfig(Section):
    """The first step of a few-step student learns from the teacher's own trajectory (DP-DMD, arXiv 2602.03139)."""

    weight: NonNegative = Field(default=0.0, description="weight of the term (DP-DMD: 0.05); 0 turns it off")
    steps: Steps = Field(default=5, description="Euler steps of the teacher's trajectory")
    of: Steps = Field(default=30, description="steps that the teacher would take for an image")

    @model_validator(mode="after")
    def _ends_before_the_image(self) -> DiversityConfig:
        if self.steps >= self.of:
            raise ValueError(f"expected steps < of, got {self.steps} and {self.of}")
        return self
