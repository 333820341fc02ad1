"""Prompts and captioned images that must be encoded before training.

`open_inputs` finds them in the cache or encodes them. A dry run passes an `EncodingPlan`, which encodes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdistill import __version__
from fdistill.base.distributed import (
    everywhere,
    first_process_of_machine_first,
    is_first_of_machine,
    wait_for_everyone,
)
from fdistill.base.files import cached_folder, made_once
from fdistill.base.rng import world
from fdistill.condition import TextCondition
from fdistill.config.schema import DistillConfig
from fdistill.data import Source, is_embedded, open_source
from fdistill.data.embeddings import Captions, Embeddings, EmbeddingSource
from fdistill.data.latents import META_FILE, LatentSource
from fdistill.data.prompts import read_prompts
from fdistill.teachers.teacher import Teacher
from fdistill.training import checks
from fdistill.training.cache import Encoding, distinct_captions, encode_data, text_facts, write_prompts

#: Prompts for each process from which on all of them encode: fewer take less time than loading the encoders.
_WORTH_SHARING = 256


@dataclass(frozen=True)
class EncodingJob:
    """Something that is encoded once and kept in the cache.

    Attributes:
        kind, key: identify the result in the cache, as in `fdistill.base.files.made_once`.
        write: encodes into an empty folder.
        parts: what messages say is encoded, such as "12,000 prompts".
        share: does what `write` does where all processes call it; without a folder it encodes and writes nothing. None
            if one process does it alone.
    """

    kind: str
    key: Mapping[str, Any]
    write: Callable[[Path], None]
    parts: tuple[str, ...]
    share: Callable[[Path | None], None] | None = None

    @property
    def is_done(self) -> bool:
        """Whether the cache has it."""
        return cached_folder(self.kind, self.key).is_dir()


#: Returns the folder of what a job encodes, or None if it has not been encoded.
Obtain = Callable[[EncodingJob], Path | None]


def encode(job: EncodingJob) -> Path:
    """The folder of what a job encodes. The first process of each machine writes it, and the others find it; each of
    them encodes a part if the job can be shared.
    """
    share = job.share
    if share is None or everywhere(job.is_done):
        with first_process_of_machine_first():
            return made_once(job.kind, job.key, job.write)
    shared = False

    def take_part(folder: Path | None) -> None:
        nonlocal shared
        shared = True
        share(folder)

    if is_first_of_machine():
        made_once(job.kind, job.key, take_part)
    if not shared:  # also the first one, if its machine has the folder already
        take_part(None)
    wait_for_everyone()
    return cached_folder(job.kind, job.key)


class EncodingPlan:
    """In place of `encode` for a dry run: encodes nothing, and lists what would be encoded.

    Attributes:
        jobs: those that were asked for.
    """

    def __init__(self) -> None:
        self.jobs: list[EncodingJob] = []

    def __call__(self, job: EncodingJob) -> Path | None:
        self.jobs.append(job)
        return cached_folder(job.kind, job.key) if job.is_done else None


class PlannedPrompts:
    """Prompts that have not been encoded: zeros in the shapes of their embeddings, in place of an `EmbeddingSource`.

    Attributes:
        prompts: the N prompts.
        null: zeros as well.
    """

    def __init__(self, prompts: Sequence[str], teacher: Teacher):
        zeros = teacher.denoiser.example_condition(1, "cpu")
        assert isinstance(zeros, TextCondition)
        self.prompts, self.null = prompts, zeros

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, index: Tensor) -> TextCondition:
        """Zeros for the prompts of an index int64 [B]."""
        return self.null.repeated(len(index))


def open_inputs(
    config: DistillConfig, teacher: Teacher, device: torch.device, obtain: Obtain = encode
) -> tuple[Path | None, Captions | None]:
    """The folder of cached latents that a run reads, and its prompts; None for what it does not read.

    Text encoders are loaded only for prompts that are not cached, and are freed before this returns.

    Args:
        obtain: returns the folder of an encoded job; if it returns None, zeros stand for the prompts.

    Raises:
        ConfigError, DataError: prompts that are missing, superfluous, or encoded for another teacher.
    """
    encoding = Encoding(
        device,
        recipe=config.images.recipe,
        negative_prompt=config.negative_prompt,
        precision=config.encoder_precision,
    )
    checks.check_prompts(config, teacher.denoiser)
    source = _embedded_images(config, teacher)
    if source is not None:
        stored = obtain(_latents_job(source, teacher, encoding))
    else:
        stored = Path(config.data) if config.data is not None and _is_cached(config.data) else None
    if teacher.denoiser.text_shapes is None:
        return stored, None
    if stored is not None:
        return stored, _stored_captions(config, teacher, stored, encoding)
    if source is not None:
        prompts, index = distinct_captions(source, teacher)
        return None, Captions(PlannedPrompts(prompts, teacher), index)
    prompts = _listed_prompts(config)
    return None, Captions(open_prompts(prompts, teacher, encoding, obtain), torch.arange(len(prompts)))


def open_prompts(
    prompts: Sequence[str], teacher: Teacher, encoding: Encoding, obtain: Obtain = encode, name: str = "prompts"
) -> Embeddings:
    """The embeddings of a list of prompts; zeros if `obtain` returns None.

    Args:
        name: what messages call the prompts.
    """
    shared = world()[1] > 1 and len(prompts) >= _WORTH_SHARING * world()[1]
    job = EncodingJob(
        "text",
        {**text_facts(teacher, encoding), "prompts": list(prompts)},
        partial(write_prompts, prompts=prompts, teacher=teacher, encoding=encoding),
        (f"{len(prompts):,} {name}",),
        partial(write_prompts, prompts=prompts, teacher=teacher, encoding=encoding, shared=True) if shared else None,
    )
    folder = obtain(job)
    return PlannedPrompts(prompts, teacher) if folder is None else EmbeddingSource(folder)


def _is_cached(data: str) -> bool:
    return (Path(data) / META_FILE).is_file()


def _embedded_images(config: DistillConfig, teacher: Teacher) -> Source | None:
    """A captioned data set of the package, which a run encodes by itself; None if the config names other data."""
    if config.data is None or _is_cached(config.data) or teacher.latents is None or not is_embedded(config.data):
        return None
    source = open_source(config.data)
    return None if source.captions is None else source


def _latents_job(source: Source, teacher: Teacher, encoding: Encoding) -> EncodingJob:
    assert teacher.latents is not None
    key = {
        "teacher": teacher.checkpoint.fingerprint(teacher.denoiser),
        **text_facts(teacher, encoding),
        "autoencoder": teacher.latents.facts(),
        "data": source.name,
        "recipe": encoding.recipe,
        "version": __version__,
    }
    parts = [f"{len(source):,} images to latents"]
    if teacher.denoiser.text_shapes is not None:
        parts.append(f"{len(distinct_captions(source, teacher)[0]):,} prompts")
    return EncodingJob("latents", key, partial(encode_data, source, teacher, encoding=encoding), tuple(parts))


def _listed_prompts(config: DistillConfig) -> list[str]:
    """The prompts of the file that the config names."""
    checks.check_prompts_named(config)
    assert config.prompts is not None
    return read_prompts(Path(config.prompts))


def _stored_captions(config: DistillConfig, teacher: Teacher, stored: Path, encoding: Encoding) -> Captions:
    """The prompts beside cached latents, if they were encoded as this run needs them."""
    captions = LatentSource(stored, config.seed).text
    checks.check_captions(config, captions, text_facts(teacher, encoding))
    assert captions is not None
    return captions
