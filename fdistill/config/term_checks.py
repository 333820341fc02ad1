"""Whether the terms that are added to the student's loss fit the method and the student. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from fdistill.config.sections import StudentConfig
from fdistill.config.terms import AugmentationConfig, CLIPLossConfig, RewardConfig
from fdistill.methods import METHODS
from fdistill.student_kinds import STUDENT_KINDS


def check_augmentation(name: str, augmentation: AugmentationConfig, scale: float, rescale: float) -> None:
    """Checks that there is guidance to make a term of, and a method that adds it."""
    if not augmentation.weight:
        return
    if not METHODS[name].extra_terms:
        raise ValueError(
            f"augmentation.weight: got {augmentation.weight}, but method={name} does not add this term; expected 0, or "
            "method=decoupled-dmd or f-distill"
        )
    if scale == 1:
        raise ValueError(
            "guidance_scale: got 1, which is no guidance, but augmentation.weight makes guidance a term of its own; "
            "expected a guidance_scale above 1, or augmentation.weight=0"
        )
    if rescale:
        raise ValueError(
            f"guidance_rescale: got {rescale}, which augmentation.weight does not read; expected 0, or "
            "augmentation.weight=0"
        )


def check_image_term(name: str, section: str, term: CLIPLossConfig | RewardConfig) -> None:
    """Checks that one setting says the weight, that there is a model, and a method that adds the term."""
    if not term.used:
        return
    key, value = ("weight", term.weight) if term.weight else ("gradient_ratio", term.gradient_ratio)
    if not METHODS[name].extra_terms:
        raise ValueError(
            f"{section}.{key}: got {value}, but method={name} does not add this term; expected 0, or method=f-distill"
        )
    if term.weight and term.gradient_ratio:
        raise ValueError(
            f"{section}.weight: got {term.weight}, but {section}.gradient_ratio={term.gradient_ratio} sets that weight "
            f"in every update; expected one of them: set {section}.weight=0 or {section}.gradient_ratio=0"
        )
    if term.weights is None:
        raise ValueError(
            f"{section}.{key}: got {value}, but {section}.weights is null; expected 0, or the file of the weights of "
            f"{section}.model={term.model}"
        )


def check_few_step_term(
    name: str, term: str, weight: float, student: StudentConfig, level: float | Sequence[float] | None
) -> None:
    """Checks that a term about the steps of a student has several of them, and a method that adds it."""
    if not weight:
        return
    if not METHODS[name].extra_terms:
        raise ValueError(
            f"{term}.weight: got {weight}, but method={name} does not add this term; expected 0, or method=f-distill"
        )
    steps = student.steps or (len(level) if isinstance(level, Sequence) else 1)
    if steps == 1 or not STUDENT_KINDS[student.generator].steps:
        raise ValueError(
            f"{term}.weight: got {weight}, but the student takes one step; expected 0, or student.steps above 1"
        )


def check_diversity(weight: float, segment: float, student: StudentConfig) -> None:
    """Checks that nothing is set that would train single steps."""
    if not weight:
        return
    if segment:
        raise ValueError(
            f"segment.weight: got {segment}, but with diversity.weight the student's updates take all steps, not one; "
            "expected 0, or diversity.weight=0"
        )
    for setting, value, unset in (("any_step", student.any_step, False), ("simulated", student.simulated, 1.0)):
        if value != unset:
            raise ValueError(
                f"student.{setting}: got {value}, but with diversity.weight the student's updates take all steps, from "
                f"noise; expected {unset}, or diversity.weight=0"
            )


def check_phases(
    student: StudentConfig, level: float | Sequence[float] | None, *, diversity: float, regression: float
) -> None:
    """Checks that experts by noise interval are adapters, that each has a step, and that no term needs them all."""
    if student.phases == 1:
        if student.previous_phase is not None:
            raise ValueError(
                f"student.previous_phase: got {student.previous_phase!r}, but student.phases=1; expected null, or the "
                "number of phases of that run"
            )
        return
    steps = student.steps or (len(level) if isinstance(level, Sequence) else 1)
    if student.phases > steps:
        raise ValueError(
            f"student.phases: got {student.phases}, but the student takes {steps} steps; expected at most {steps}"
        )
    if not student.lora_rank:
        raise ValueError(
            f"student.phases: got {student.phases}, but student.lora_rank=0, and experts are adapters on one base; "
            "expected a rank, such as student.lora_rank=32"
        )
    for setting, value, unset, why in (
        ("student.sampler", student.sampler, "stochastic", "the phase's end needs new noise"),
        ("student.any_step", student.any_step, False, "other numbers of steps skip the experts' first levels"),
        ("diversity.weight", diversity, 0.0, "this term trains all steps at once"),
        ("regression.weight", regression, 0.0, "pairs say what a whole student makes of noise"),
    ):
        if value != unset:
            raise ValueError(
                f"{setting}: got {value}, but with student.phases={student.phases} {why}; expected {unset}, or "
                "student.phases=1"
            )
