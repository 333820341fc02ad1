"""The answer about the data: what kind they are, and whether the teacher can learn from them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from fdistill.base.errors import ArgumentError, DataError
from fdistill.commands.init.teachers import TeacherAnswer
from fdistill.config.reading import validate
from fdistill.data import TEACHER_SAMPLES, Source, is_embedded, open_source
from fdistill.data.embeddings import EmbeddingSource
from fdistill.data.latents import META_FILE, LatentSource
from fdistill.data.prompts import read_prompts
from fdistill.teachers.text_encoders import encoding_facts
from fdistill.training import checks

_PROMPTS = (".txt", ".jsonl")


@dataclass(frozen=True)
class DataAnswer:
    """What a run would read.

    Attributes:
        name: as it was answered.
        kind: images that are read as they are; images that `fdistill cache` has to encode first; latents that it has
            encoded; a list of prompts; or the teacher's own samples.
        resized: whether the images are of another size than the teacher's.
        resolution: side in pixels of the images behind latents.
        negative_prompt: of the captions behind latents.
        precision: in which these captions were encoded; None where there are none, or where it is not known.
        shapes: whether latents have several shapes.
    """

    name: str
    kind: Literal["images", "to encode", "latents", "prompts", "samples"]
    resized: bool = False
    resolution: int | None = None
    negative_prompt: str = ""
    precision: str | None = None
    shapes: bool = False


def read_data(text: str, teacher: TeacherAnswer) -> DataAnswer:
    """Opens what an answer names.

    Raises:
        ArgumentError: such data are of no use to this teacher.
        ConfigError, DataError: nothing is there, it is damaged, or of other classes than the teacher's.
    """
    if text == TEACHER_SAMPLES:
        if teacher.takes_prompts:
            raise ArgumentError(
                f"data: got {TEACHER_SAMPLES}, but {teacher.name!r} draws for prompts; expected a .txt file with one "
                "prompt a line, for which the samples are drawn"
            )
        return DataAnswer(text, "samples")
    path = Path(text)
    if path.suffix.lower() in _PROMPTS and not path.is_dir():
        if not teacher.takes_prompts:
            raise ArgumentError(
                f"data: got {text!r}, but {teacher.name!r} takes no prompts; expected images, or {TEACHER_SAMPLES}"
            )
        read_prompts(path)
        return DataAnswer(text, "prompts")
    config = validate({"teacher": teacher.name, "teacher_base": teacher.base, "data": text})
    if (path / META_FILE).is_file():
        checks.check_encoding(config, encoded=True, latent_teacher=teacher.factor is not None)
        cached = LatentSource(path, 0)
        if cached.buckets is None and teacher.denoiser.text_shapes is None:
            checks.check_data(config, teacher.denoiser, cached, cached.shape)
        return _latents(text, cached, teacher)
    source = open_source(text)
    checks.check_data(config, teacher.denoiser, source, None)
    if teacher.takes_prompts and source.captions is None:
        raise DataError(
            f"data {text!r}: has no captions, which {teacher.name!r} learns from; expected photo.txt beside photo.jpg, "
            "or a file of prompts alone"
        )
    if teacher.factor is not None and not (is_embedded(text) and source.captions is not None):
        return DataAnswer(text, "to encode")
    return DataAnswer(text, "images", resized=teacher.factor is None and _size(source) != (teacher.size, teacher.size))


def _latents(text: str, cached: LatentSource, teacher: TeacherAnswer) -> DataAnswer:
    resolution = int(cached.meta["resolution"])
    shapes = cached.buckets is not None
    if not teacher.takes_prompts:
        return DataAnswer(text, "latents", resolution=resolution, shapes=shapes)
    if cached.text is None:
        raise DataError(
            f"data {text!r}: latents without captions, which {teacher.name!r} learns from; expected latents of "
            "captioned images, or a file of prompts alone"
        )
    source = cached.text.embeddings
    assert isinstance(source, EmbeddingSource)
    encoders = {encoding_facts(teacher.folder, resolution, precision): precision for precision in ("fp32", "bf16")}
    return DataAnswer(
        text,
        "latents",
        resolution=resolution,
        negative_prompt=str(source.meta["null_prompt"]),
        precision=encoders.get(str(source.meta["encoder"])),
        shapes=shapes,
    )


def _size(source: Source) -> tuple[int, int]:
    """(width, height) of the first image."""
    first = source.encoded(0)
    if isinstance(first, np.ndarray):
        return int(first.shape[1]), int(first.shape[0])
    try:
        with Image.open(io.BytesIO(first)) as image:
            width, height = image.size
    except OSError as error:
        raise DataError(f"data {source.name}: {source.item_name(0)} cannot be read ({error})") from error
    return width, height
