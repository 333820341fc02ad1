"""The kinds of students, one row each: how a student is built from a network, loaded from a folder, and exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdistill.adapters import family_of
from fdistill.adapters.checkpoint import Checkpoint
from fdistill.adapters.parametrisation import load_scheduler, read_scheduler_config
from fdistill.denoiser import Denoiser
from fdistill.generator import FewStepGenerator, Student, student_generator
from fdistill.student_kinds import STUDENT_KINDS, KindName, Sampler
from fdistill.students.one_step_pipeline import OneStepPipeline
from fdistill.students.student_pipeline import pipeline_settings
from fdistill.students.text_to_image import check_exportable, save_text_pipeline
from fdistill.students.tiue import TiUEGenerator, leading_levels
from fdistill.students.tiue_pipeline import tiue_pipeline
from fdistill.teachers.autoencoder import LatentSpace
from fdistill.teachers.text_encoders import text_components


@dataclass(frozen=True)
class Kind:
    """One row of `KINDS`.

    Attributes:
        levels_key, steps: see `StudentKind`.
        make: builds the student from a network and levels (None for the kind's default levels). Raises ConfigError for
            levels at which the student could not be exported. The third argument is the sampler of a student of
            several steps, see `FewStepGenerator`.
        save_pipeline: fills a folder with a pipeline that runs the student; returns the name of the pipeline's class
            and the arguments to call it with. Takes the folder, the student, the student's network with adapters
            merged, the checkpoint that the network comes from, and the autoencoder.
    """

    levels_key: str
    steps: bool
    make: Callable[[Denoiser, Sequence[float] | None, Sampler], Student]
    save_pipeline: Callable[[Path, Student, Denoiser, Checkpoint, LatentSpace | None], tuple[str, dict[str, Any]]]

    def levels_in(self, facts: Mapping[str, Any]) -> list[float]:
        """The levels in a student's file; KeyError, TypeError or ValueError where there are none."""
        return [float(level) for level in facts[self.levels_key]]


def _make_steps(denoiser: Denoiser, levels: Sequence[float] | None, sampler: Sampler) -> Student:
    student = student_generator(denoiser, levels or (denoiser.schedule.t_max,), sampler)
    if denoiser.text_shapes is not None:
        check_exportable(denoiser, student.levels, sampler)
    return student


def _save_steps(
    folder: Path, student: Student, denoiser: Denoiser, origin: Checkpoint, latents: LatentSpace | None
) -> tuple[str, dict[str, Any]]:
    """Saves the pipeline of the network's family if it can run the student, otherwise a `OneStepPipeline`."""
    assert origin.folder is not None
    if denoiser.text_shapes is not None:
        assert latents is not None
        return save_text_pipeline(denoiser, student.levels, _sampler_of(student), origin.folder, folder, latents)
    vae = None if latents is None else latents.vae
    native = None
    if _sampler_of(student) == "stochastic":
        native = family_of(denoiser.network).native_pipeline(denoiser, student.levels, origin.index, vae)
    if native is not None:
        pipeline, call = native
    else:
        settings = pipeline_settings(denoiser, **student.settings())
        scheduler = load_scheduler(read_scheduler_config(origin.folder))
        pipeline, call = OneStepPipeline(denoiser.network, scheduler, vae, settings), {}
    pipeline.save_pretrained(folder)
    return type(pipeline).__name__, call


def _sampler_of(student: Student) -> Sampler:
    return student.sampler if isinstance(student, FewStepGenerator) else "stochastic"


def _make_tiue(denoiser: Denoiser, levels: Sequence[float] | None, _sampler: Sampler) -> Student:
    return TiUEGenerator(denoiser, levels or leading_levels(denoiser.schedule))


def _save_tiue(
    folder: Path, student: Student, denoiser: Denoiser, origin: Checkpoint, latents: LatentSpace | None
) -> tuple[str, dict[str, Any]]:
    assert origin.folder is not None
    scheduler = load_scheduler(read_scheduler_config(origin.folder))
    assert scheduler is not None
    copied = TiUEGenerator(denoiser, student.network_levels)  # of the network without adapters, on the CPU
    pipeline = tiue_pipeline(copied, scheduler, None if latents is None else latents.vae, text_components(origin))
    pipeline.save_pretrained(folder)
    return type(pipeline).__name__, {"num_inference_steps": 1, "guidance_scale": 0.0}


def _kind(name: KindName, *functions: Any) -> Kind:
    row = STUDENT_KINDS[name]
    return Kind(row.levels_key, row.steps, *functions)


#: Value of the setting student.generator -> the kind.
KINDS: dict[KindName, Kind] = {
    "denoiser": _kind("denoiser", _make_steps, _save_steps),
    "tiue": _kind("tiue", _make_tiue, _save_tiue),
}


def kind_of(student: Student) -> Kind:
    """The kind of a student."""
    return kind_in(student.settings())


def kind_in(facts: Mapping[str, Any]) -> Kind:
    """The kind of student that a student's file describes."""
    rows = [kind for kind in KINDS.values() if kind.levels_key in facts]
    return rows[-1] if rows else KINDS["denoiser"]
