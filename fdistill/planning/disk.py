"""What a run keeps on disk: encoded images and prompts, the teacher's samples, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from fdistill.base.files import read_json_object
from fdistill.config.schema import DistillConfig
from fdistill.data import TEACHER_SAMPLES, is_embedded, open_source
from fdistill.data.latents import META_FILE
from fdistill.data.prompts import read_prompts
from fdistill.teachers.teacher import Teacher


@dataclass(frozen=True)
class Stored:
    """Something on disk.

    Attributes:
        what: in words.
        each: bytes of one.
        count: how many; None where that is not known before the data are there.
    """

    what: str
    each: int
    count: int | None


def stored(config: DistillConfig, teacher: Teacher, checkpoint: int) -> list[Stored]:
    """What a run of the config writes or reads beside images as they are.

    Args:
        checkpoint: bytes of one.

    Raises:
        DataError: the file of prompts cannot be read.
    """
    denoiser = teacher.denoiser
    found, sample = [], 4 * prod(denoiser.sample_shape)
    images = config.data is not None and config.data != TEACHER_SAMPLES
    count = _count(config.data) if images and config.data is not None else None
    if images and _has_latents(config, teacher):
        found.append(Stored("latents (mean and deviation of each image)", 2 * sample, count))
    if denoiser.text_shapes is not None:
        width = 4 if config.frozen_precision == "fp32" else 2
        prompts = _count_prompts(config.prompts)
        size = width * sum(map(prod, denoiser.text_shapes.values()))
        found.append(Stored("encoded prompts", size, prompts))
    if config.data == TEACHER_SAMPLES:
        found.append(Stored("the teacher's samples", sample, config.teacher_samples.count))
    if any(stage.regression.weight for stage in config.stage_configs()):
        steps = config.student.steps or len(config.student_levels or [0])
        found.append(Stored("the teacher's pairs", steps * sample, config.regression.pairs))
    kept = config.log.keep_checkpoints + config.log.keep_best
    found.append(Stored("checkpoints that are kept (trained weights, optimisers, averages)", checkpoint, kept))
    return found


def _has_latents(config: DistillConfig, teacher: Teacher) -> bool:
    folder = teacher.checkpoint.folder
    return config.vae is not None or (folder is not None and (folder / "vae").is_dir())


def _count_prompts(path: str | None) -> int | None:
    """Prompts of a file, if it is there."""
    return len(read_prompts(Path(path))) if path is not None and Path(path).is_file() else None


def _count(data: str) -> int | None:
    """Images of an embedded data set, or of a folder of cached latents."""
    if is_embedded(data):
        return len(open_source(data))
    try:
        return int(read_json_object(Path(data) / META_FILE)["count"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
