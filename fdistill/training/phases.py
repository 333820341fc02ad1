"""The student of a phase: its own expert, and the experts that earlier phases trained."""

from __future__ import annotations

from fdistill.base.errors import CheckpointError, ConfigError
from fdistill.config.sections import StudentConfig
from fdistill.denoiser import Denoiser
from fdistill.generator import Student
from fdistill.students.experts import experts_in, load_expert, phases_in
from fdistill.students.folder import checked_facts, student_folder
from fdistill.students.phases import PhasedGenerator, Phases
from fdistill.training import sharding


def phased_student(settings: StudentConfig, teacher: Denoiser, whole: Student, *, shared: bool) -> PhasedGenerator:
    """The student whose network is the expert that is trained, after the phases of `settings.previous_phase`.

    Args:
        teacher: the frozen network, on its device, which all experts share.
        whole: the same without phases: the expert that is trained, with all levels.
        shared: whether frozen weights will be sharded, so that every expert needs parameters of its own.

    Raises:
        ConfigError: the teacher is no text-to-image pipeline, there is no phase left, or the earlier ones have other
            levels.
        CheckpointError: an earlier phase cannot be read, or is of another teacher.
    """
    if teacher.text_shapes is None or teacher.parametrisation is None:
        raise ConfigError(
            f"student.phases: got {settings.phases}, but the experts of a student are exported as LoRA files of a "
            "text-to-image pipeline, which this teacher is not; expected 1"
        )
    phases = Phases.equal(whole.levels, settings.phases)
    earlier = _earlier(settings.previous_phase, teacher, phases) if settings.previous_phase is not None else []
    if shared:
        earlier = [sharding.aliased(expert) for expert in earlier]
    return PhasedGenerator(whole.denoiser, phases, earlier)


def _earlier(name: str, teacher: Denoiser, phases: Phases) -> list[Denoiser]:
    try:
        folder = student_folder(name)
    except CheckpointError as error:
        raise CheckpointError(f"student.previous_phase: {error}") from error
    facts = checked_facts(folder)
    if "phases" not in facts:
        raise ConfigError(
            f"student.previous_phase: {name!r} is a student without phases; expected the folder of a run with "
            f"student.phases={len(phases.starts)}"
        )
    theirs = phases_in(folder, facts)
    if theirs != phases:
        raise ConfigError(
            f"student.previous_phase: {name!r} has phases that begin at {_first(theirs)} of the levels "
            f"{_listed(theirs)}; expected {_first(phases)} of {_listed(phases)}, as in this config"
        )
    paths = experts_in(folder)
    if len(paths) == len(phases.starts):
        raise ConfigError(
            f"student.previous_phase: {name!r} has all its {len(paths)} phases; there is none left to train"
        )
    return [load_expert(teacher, path) for path in paths]


def _first(phases: Phases) -> str:
    return ", ".join(f"{phases.levels[start]:g}" for start in phases.starts)


def _listed(phases: Phases) -> str:
    return ", ".join(f"{level:g}" for level in phases.levels)
