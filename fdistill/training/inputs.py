"""What a run reads: images, latents or the teacher's own samples, checked against the teacher."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState

from fdistill.base import rng
from fdistill.base.distributed import everywhere, first_process_of_machine_first
from fdistill.base.errors import ArgumentError, ConfigError
from fdistill.base.images import to_uint8
from fdistill.condition import Condition
from fdistill.config.schema import DistillConfig
from fdistill.data import TEACHER_SAMPLES, Batching, ImageLoader, Source, open_source
from fdistill.data.buckets import bucket_sizes
from fdistill.data.embeddings import Captions, Embeddings
from fdistill.data.latents import META_FILE, LatentSource, check_latents
from fdistill.data.sample_loader import (
    FixedSamples,
    PromptsInShapes,
    SampleLoader,
    SampleSource,
    ScaledLatents,
    prompts_alone,
)
from fdistill.data.source import ArraySource
from fdistill.data.teacher_samples import SampleSet, TeacherSamples, draw_samples, teacher_samples
from fdistill.denoiser import Denoiser
from fdistill.training import checks
from fdistill.training.distillation import Distillation

Data = Source | SampleSource


@dataclass(frozen=True)
class TrainingData:
    """What a run reads: images or latents with labels or prompts, and the teacher's samples that it regresses on."""

    source: Data
    pairs: TeacherSamples | None

    @property
    def text(self) -> Captions | None:
        """The prompts of the source's rows; None if it has no encoded prompts."""
        return self.source.text if isinstance(self.source, SampleSource) else None

    def loader(self, config: DistillConfig, teacher: Denoiser, first: int) -> ImageLoader | SampleLoader:
        """This process's rows of batch number `first` and all after it."""
        batching = Batching(config.batch_size, config.seed, first, *rng.world())
        if isinstance(self.source, SampleSource):
            return SampleLoader(self.source, batching)
        images = config.images
        return ImageLoader(
            self.source,
            teacher.sample_shape,
            batching,
            recipe=images.recipe,
            flip=images.flip,
            workers=images.workers,
        )


def stored_data(run: Distillation) -> Data:
    """The data that a run's config names, other than teacher-samples; for a text-to-image teacher with their prompts.

    Raises:
        ConfigError, DataError: nothing there, or data that do not fit the teacher.
    """
    config, teacher, latents = run.config, run.networks.teacher, run.latents
    if config.data is None and run.text is not None:
        return _prompts(run, run.text.embeddings)
    if config.data is None:
        # Nothing reads the images; the labels are the classes that the student is asked for, all equally often.
        classes = teacher.num_classes or 1
        count = classes * max(1, config.batch_size // classes)
        empty = torch.zeros(1, *teacher.sample_shape).expand(count, *teacher.sample_shape)
        return FixedSamples(empty, torch.arange(count) % classes)
    folder = run.latents_folder or Path(config.data)
    if (folder / META_FILE).is_file():
        cached = LatentSource(folder, config.seed)
        checks.check_encoding(config, encoded=True, latent_teacher=latents is not None)
        assert latents is not None
        check_latents(cached.meta, latents.facts())
        checks.check_data(config, teacher, cached, cached.shape)
        checks.check_buckets(config, run.networks, cached.buckets)
        return ScaledLatents(cached, latents.scaling)
    source = open_source(config.data)
    checks.check_encoding(config, encoded=False, latent_teacher=latents is not None)
    shape = None
    if isinstance(source, ArraySource) and config.images.recipe == "exact":
        shape = tuple(source.images.shape[1:])
    checks.check_data(config, teacher, source, shape)
    return source


def _prompts(run: Distillation, embeddings: Embeddings) -> SampleSource:
    """The prompts of a run without data, in squares or in the shapes that its config asks for.

    Raises:
        ConfigError: the networks make no samples of these shapes.
    """
    (channels, *own), latents, multiple = run.networks.teacher.sample_shape, run.latents, run.config.buckets
    if not multiple:
        return prompts_alone(embeddings, (channels, *own))
    factor = 1 if latents is None else latents.factor
    if multiple % factor:
        raise ConfigError(f"buckets: got {multiple}; expected a multiple of {factor}, the autoencoder's factor")
    try:
        sizes = bucket_sizes(run.image_size, multiple)
    except ArgumentError as error:
        raise ConfigError(str(error)) from error
    shapes = {(height, width): (channels, height // factor, width // factor) for height, width in sizes}
    source = PromptsInShapes(embeddings, shapes)
    checks.check_buckets(run.config, run.networks, source.buckets)
    return source


def data_samples(run: Distillation) -> SampleSet | None:
    """The teacher's samples that stand in for data; None if the config names other data or no data."""
    if run.config.data != TEACHER_SAMPLES:
        return None
    return _sample_set(run, run.config.teacher_samples.count, run.networks.teacher.schedule.t_max)


def pair_samples(run: Distillation) -> SampleSet | None:
    """The teacher's samples that the student regresses on, each from its own noise, and for a student of several steps
    what they were at its levels; None if it does not.

    Raises:
        ConfigError: the teacher's sampler cannot start where the student does.
    """
    if not any(stage.config.regression.weight for stage in run.stages):
        return None
    start = checks.pairs_start(run.networks.teacher, run.student)
    return replace(_sample_set(run, run.config.regression.pairs, start), stops=run.student.levels[1:])


def training_data(run: Distillation) -> TrainingData:
    """Opens what a run's config names; draws the teacher's samples that it needs and that are not cached.

    Raises:
        ConfigError, DataError: nothing there, or data that do not fit the teacher.
        OutputError: teacher samples cannot be cached.
    """
    teacher, text = run.networks.teacher, run.text

    def conditions(rows: range) -> Condition | None:
        index = torch.tensor(rows)
        if text is not None:
            return text.rows(index % len(text.index))
        return index % teacher.num_classes if teacher.num_classes else None

    def drawn(wanted: SampleSet) -> TeacherSamples:
        progress = PartialState().is_main_process
        draw = partial(draw_samples, teacher, wanted, conditions, device=run.device, progress=progress)
        if run.sharded and not everywhere(wanted.is_cached):
            made = draw()  # every process has a part of the teacher, so that none can sample alone
            draw = partial(dict, made)
        with first_process_of_machine_first():  # it draws them; the others find them in the cache
            return teacher_samples(wanted, teacher.num_classes, draw)

    samples = data_samples(run)
    source = stored_data(run) if samples is None else None
    pairs = pair_samples(run)  # refuses what does not fit before anything is drawn
    if samples is not None:
        source = _as_data(drawn(samples), run)
    assert source is not None
    return TrainingData(source, None if pairs is None else drawn(pairs))


def _as_data(samples: TeacherSamples, run: Distillation) -> Data:
    """Samples of pixels as images, samples of latents with the prompts they were drawn for."""
    if run.latents is None:
        return ArraySource(TEACHER_SAMPLES, to_uint8(samples.x0), samples.labels, run.networks.teacher.num_classes)
    if run.text is None:
        return FixedSamples(samples.x0, samples.labels)
    index = run.text.index[torch.arange(len(samples.x0)) % len(run.text.index)]
    return FixedSamples(samples.x0, samples.labels, Captions(run.text.embeddings, index))


def _sample_set(run: Distillation, count: int, start_level: float) -> SampleSet:
    return SampleSet(_made_of(run), count, run.config.teacher_samples.num_steps, start_level)


def _made_of(run: Distillation) -> str:
    """A hash of everything that the teacher's samples depend on, except the sampler's settings."""
    config, teacher = run.config, run.networks.teacher
    facts = [run.checkpoint.fingerprint(teacher)]
    if run.guide is not None:
        facts += [run.guide.joined(str(config.guidance_rescale))]
    if run.text is not None:
        text = run.text
        facts += [json.dumps(text.prompts(torch.arange(len(text.index)))), config.negative_prompt]
        facts += [str(teacher.sample_shape), str(config.guidance_rescale), str(config.guidance_scale)]
    if run.text is not None or config.frozen_precision != "fp32":
        facts += [config.frozen_precision]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()
