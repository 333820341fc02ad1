"""The prompts of a run of a text-to-image teacher, encoded once: by `fdistill cache` beside its latents, or here."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import PartialState

from fdistill import __version__
from fdistill.base.errors import ConfigError, DataError
from fdistill.base.files import made_once
from fdistill.config.schema import DistillConfig
from fdistill.data import CAPTIONED, TEACHER_SAMPLES, open_source
from fdistill.data.embeddings import Captions, EmbeddingSource, write_embeddings
from fdistill.data.latents import META_FILE, LatentSource
from fdistill.data.prompts import read_prompts
from fdistill.teachers.teacher import Teacher
from fdistill.teachers.text_encoders import encoding_facts, open_prompt_encoder, prompt_batches
from fdistill.training.cache import encode_data


def open_run_text(
    config: DistillConfig, teacher: Teacher, stored: Path | None, device: torch.device
) -> Captions | None:
    """Prompts and what they were encoded to; None for a teacher that is told none.

    Text encoders are loaded only where prompts are not in the cache yet, and are gone when this returns.

    Args:
        stored: the folder of cached latents, if the run reads some.

    Raises:
        ConfigError, DataError: no prompts, or such as were encoded for another teacher.
    """
    if teacher.denoiser.text_shapes is None:
        if config.prompts is not None:
            raise ConfigError(f"prompts: got {config.prompts!r}, but teacher {config.teacher!r} is told none")
        return None
    encoder = encoding_facts(_folder(teacher), teacher.image_size, config.frozen_precision)
    if config.prompts is not None and config.data not in (None, TEACHER_SAMPLES):
        raise ConfigError(
            f"prompts: got {config.prompts!r} beside data {config.data!r}, whose captions are the prompts; expected "
            f"data={TEACHER_SAMPLES} or data=null"
        )
    if stored is not None:
        captions = LatentSource(stored, config.seed).text
        if captions is None:
            raise ConfigError(
                f"data {config.data!r}: latents without captions, but teacher {config.teacher!r} is told prompts; "
                "expected latents of captioned images"
            )
        _check(captions.embeddings, encoder, config.negative_prompt)
        return captions
    if config.prompts is None:
        if config.data not in (None, TEACHER_SAMPLES):
            raise ConfigError(
                f"data {config.data!r}: images, but teacher {config.teacher!r} sees latents and prompts; encode them "
                f"once with `fdistill cache {config.data} --teacher {config.teacher} --output FOLDER`, and pass "
                "data=FOLDER"
            )
        raise ConfigError(
            f"prompts: got null, but teacher {config.teacher!r} is told prompts; expected a file with one a line, or "
            "data of captioned images"
        )
    prompts = read_prompts(Path(config.prompts))
    with PartialState().local_main_process_first():
        source = encoded_prompts(
            prompts,
            teacher,
            negative_prompt=config.negative_prompt,
            precision=config.frozen_precision,
            device=device,
        )
    return Captions(source, torch.arange(len(prompts)))


def _folder(teacher: Teacher) -> Path:
    if teacher.checkpoint.folder is None:
        raise ConfigError(
            f"teacher {teacher.checkpoint.name!r}: is a function, which has no text encoders; expected a pipeline "
            "folder"
        )
    return teacher.checkpoint.folder


def latents_folder(config: DistillConfig, teacher: Teacher, device: torch.device) -> Path | None:
    """The folder of cached latents that a config names, or that an embedded data set is encoded to now; None where it
    names neither.
    """
    if config.data is None or (Path(config.data) / META_FILE).is_file():
        return None if config.data is None else Path(config.data)
    if config.data not in CAPTIONED or teacher.latents is None:
        return None
    facts = {
        "teacher": teacher.checkpoint.fingerprint(teacher.denoiser),
        "encoders": encoding_facts(_folder(teacher), teacher.image_size, config.frozen_precision),
        "autoencoder": teacher.latents.facts(),
        "data": config.data,
        "recipe": config.images.recipe,
        "null_prompt": config.negative_prompt,
        "version": __version__,
    }

    def encode(folder: Path) -> None:
        encode_data(
            open_source(str(config.data)),
            teacher,
            folder,
            device=device,
            recipe=config.images.recipe,
            negative_prompt=config.negative_prompt,
            precision=config.frozen_precision,
        )

    with PartialState().local_main_process_first():
        return made_once("latents", facts, encode)


def _check(source: EmbeddingSource, encoder: str, negative_prompt: str) -> None:
    if source.meta["encoder"] != encoder:
        raise DataError(
            f"data {source.name}: its captions were encoded by other text encoders, for another resolution or in "
            "another frozen_precision; make them again with fdistill cache"
        )
    if source.meta["null_prompt"] != negative_prompt:
        raise DataError(
            f"data {source.name}: was cached with negative prompt {source.meta['null_prompt']!r}, but negative_prompt "
            f"is {negative_prompt!r}; make it again with fdistill cache --negative-prompt, or change the setting"
        )


def encoded_prompts(
    prompts: list[str],
    teacher: Teacher,
    *,
    negative_prompt: str,
    precision: str,
    device: torch.device,
) -> EmbeddingSource:
    """A prompt list's embeddings, from $FDISTILL_CACHE if they are there."""
    encoder = encoding_facts(_folder(teacher), teacher.image_size, precision)

    def encode(folder: Path) -> None:
        encoders = open_prompt_encoder(teacher.checkpoint, teacher.image_size, precision)
        with encoders.on(device):
            null, meta = encoders.null(negative_prompt), {"encoder": encoder, "null_prompt": negative_prompt}
            write_embeddings(folder, prompt_batches(encoders, prompts), null=null, meta=meta)

    facts = {"encoder": encoder, "null_prompt": negative_prompt, "prompts": prompts}
    return EmbeddingSource(made_once("text", facts, encode))
