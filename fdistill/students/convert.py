"""Students that others trained, as student folders."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from fdistill.adapters.checkpoint import Checkpoint, load_denoiser
from fdistill.base.errors import ArgumentError
from fdistill.base.files import claimed_folder, sha256_of_files
from fdistill.generator import student_generator
from fdistill.students.folder import save_student
from fdistill.students.text_to_image import check_exportable
from fdistill.teachers.autoencoder import attach_latent_space
from fdistill.teachers.convert import STUDENT_LEVELS, Elsewhere, convert
from fdistill.teachers.convert_dit import NOTHING, Given

_UNKNOWN = Elsewhere()

#: What people write for the level of a network that is no student.
TEACHER = "none"


def read_levels(text: str) -> tuple[float, ...]:
    """Reads "80" or "999,749,499,249"; () for "none". Raises ArgumentError that says what published students have."""
    if text == TEACHER:
        return ()
    try:
        levels = tuple(float(number) for number in text.split(","))
    except ValueError:
        levels = ()
    if not levels or not all(math.isfinite(level) for level in levels):
        raise ArgumentError(f"student_level: got {text!r}; expected {STUDENT_LEVELS}")
    return levels


def convert_student(
    source: Path,
    output: Path,
    levels: tuple[float, ...],
    family: str | None = None,
    *,
    given: Given = NOTHING,
    elsewhere: Elsewhere = _UNKNOWN,
) -> Path:
    """Writes a student folder from a student that others trained; nothing in the file is executed.

    Args:
        source, family, elsewhere: as for `convert`.
        output: a folder that does not exist, or is empty.
        levels: the noise levels of the student's steps, falling, in the unit of its teacher.
        given: what the tensors of a DiT or SiT do not say.

    Returns:
        The output folder, which `generate`, `evaluate`, `student.checkpoint` and `teacher` take.

    Raises:
        CheckpointError, ArgumentError, OutputError: as `convert`; a level is outside the teacher's; or a student of
            latents has no autoencoder.
        ConfigError: no scheduler of diffusers runs a text-to-image student at these levels.
    """
    with (
        claimed_folder(output) as claimed,
        TemporaryDirectory(prefix=f".{claimed.name}.", dir=claimed.parent) as temporary,
    ):
        network, known = Path(temporary) / "network", replace(elsewhere, student=True)
        folder = convert(source, network, family, given=given, elsewhere=known)
        origin = Checkpoint(Path(source).name, folder)
        denoiser = load_denoiser(origin)
        student = student_generator(denoiser, levels).eval()
        if denoiser.text_shapes is not None:
            check_exportable(denoiser, student.levels)
        latents = attach_latent_space(denoiser, origin, None)
        card = {
            "teacher": elsewhere.base or elsewhere.like or "unknown",
            "trained": "elsewhere",
            "converted from": f"{Path(source).name}, sha256 {sha256_of_files([Path(source)])}",
        }
        save_student(student, claimed, origin=origin, latents=latents, card=card, config=None, samples=None)
    return claimed


def convert_any(
    source: Path,
    output: Path,
    level: str | None,
    family: str | None = None,
    *,
    given: Given = NOTHING,
    elsewhere: Elsewhere = _UNKNOWN,
) -> tuple[str, Path]:
    """Converts a file to a student's folder if there is a level, to a teacher's if there is none.

    Args:
        level: as people write it, see `read_levels`; None if they have not said whether it is a student.
        source, output, family, given, elsewhere: as for `convert_student`.

    Returns:
        "student" or "teacher", and the folder.

    Raises:
        CheckpointError, ArgumentError, OutputError, ConfigError: see `convert` and `convert_student`.
    """
    levels = () if level is None else read_levels(level)
    if levels:
        return "student", convert_student(source, output, levels, family, given=given, elsewhere=elsewhere)
    known = replace(elsewhere, student=None if level is None else False)
    return "teacher", convert(source, output, family, given=given, elsewhere=known)
