"""Checks that a config fits its teacher, its divergence and its data.

Checks that need nothing but the values of settings are in `config/combinations.py`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fdistill.base.errors import ArgumentError, ConfigError, DataError
from fdistill.config.schema import DistillConfig
from fdistill.data import TEACHER_SAMPLES, Source
from fdistill.data.account import account_of, say
from fdistill.data.embeddings import Captions, EmbeddingSource
from fdistill.data.latents import LatentBucket, LatentSource
from fdistill.denoiser import Denoiser
from fdistill.divergence import Divergence, get_divergence
from fdistill.generator import Student
from fdistill.kernels.checks import check_positive
from fdistill.step import Networks


def read_divergence(config: DistillConfig) -> Divergence:
    """The divergence that a config names; reverse KL for a method that has no choice of divergence.

    Raises:
        ConfigError: no divergence has that name, it needs a density ratio but no discriminator is trained, or h
            overflows within the ratio's bounds.
    """
    try:
        divergence = get_divergence(config.divergence or "reverse-kl")
    except ArgumentError as error:
        raise ConfigError(f"config: {error}") from error
    if divergence.needs_ratio and not config.discriminator.gan_weight:
        raise ConfigError(
            f"config: divergence {divergence.name!r} weights by a density ratio that only a trained discriminator "
            "estimates; expected discriminator.gan_weight > 0, or divergence=reverse-kl"
        )
    lower, upper = config.ratio.lower, config.ratio.upper
    r = torch.tensor([lower / upper, upper / lower], dtype=torch.float64)  # after division by the bins' means
    for at, h in zip(r.tolist(), divergence.weight(r).tolist(), strict=True):
        if not 0 <= h < 1e300:
            raise ConfigError(
                f"divergence {divergence.name!r}: h({at:g}) is {h:g}, more than a float holds; expected ratio.lower "
                "and ratio.upper closer together, or a divergence that grows less"
            )
    return divergence


def check_teacher(config: DistillConfig, teacher: Denoiser) -> None:
    """Checks the settings of guidance and conditions, and the schedule, against the teacher.

    Raises:
        ConfigError: such a setting would have no effect with this teacher.
        ArgumentError: sigma(t_min) of the teacher's schedule is not positive, and losses divide by it.
    """
    check_positive(
        "sigma(t_min) of the teacher's schedule", teacher.schedule.sigma(torch.tensor(teacher.schedule.t_min))
    )
    _check_guidance(config, teacher.embedded_guidance is not None)
    if config.condition_dropout and teacher.text_shapes is None and teacher.null_class is None:
        raise ConfigError(
            f"condition_dropout: got {config.condition_dropout}, but the teacher has no label for 'no class'; "
            "expected 0, or null_class set to that label"
        )
    reward = config.reward
    for term, value in (
        ("clip_loss.weight", config.clip_loss.weight),
        ("clip_loss.gradient_ratio", config.clip_loss.gradient_ratio),
        ("reward.weight", reward.weight),
        ("reward.gradient_ratio", reward.gradient_ratio),
    ):
        if value and teacher.text_shapes is None:
            raise ConfigError(
                f"{term}: got {value}, but the teacher takes no prompts; expected 0, or a text-to-image teacher"
            )


def _check_guidance(config: DistillConfig, embedded: bool) -> None:
    """`embedded` says that the guidance scale is an input of the network, and of its copies."""
    fake = config.fake_score
    of_fake = {"guidance_scale": fake.guidance_scale, "training_guidance_scale": fake.training_guidance_scale}
    if embedded and config.augmentation.weight:
        raise ConfigError(
            f"augmentation.weight: got {config.augmentation.weight:g}, but the teacher takes guidance_scale as an "
            "input, so that its guidance cannot be told apart; expected 0"
        )
    if embedded:
        for name, scale in of_fake.items():
            if scale != 1:
                raise ConfigError(
                    f"fake_score.{name}: got {scale:g}, but this network takes guidance_scale as an input, as the "
                    "teacher does; expected 1"
                )
    if config.guidance_teacher is not None and (embedded or config.guidance_scale == 1):
        why = (
            "the teacher takes guidance_scale as an input" if embedded else "guidance_scale is 1, which is no guidance"
        )
        raise ConfigError(f"guidance_teacher: got {config.guidance_teacher!r}, but {why}; expected null")
    if set(of_fake.values()) != {1.0}:
        return
    if embedded or config.guidance_scale == 1:
        unread = {"guidance_rescale": config.guidance_rescale, "negative_prompt": config.negative_prompt}
        for name, value in unread.items():
            if value:
                raise ConfigError(f"{name}: got {value!r}, but guidance is off; expected guidance_scale above 1")
    elif config.guidance_teacher is not None and config.negative_prompt and not config.condition_dropout:
        raise ConfigError(
            f"negative_prompt: got {config.negative_prompt!r}, but guidance leads away from guidance_teacher; expected "
            '""'
        )


def check_alike(setting: str, name: str, start: Denoiser, teacher: Denoiser) -> None:
    """Checks the checkpoint `name` that a role starts from, as `setting` says.

    Raises:
        ConfigError: its sample shape, number of classes or kind of prompts is not the teacher's.
    """
    alike = [(each.sample_shape, each.num_classes, (each.text_shapes or {}).keys()) for each in (start, teacher)]
    if alike[0] != alike[1]:
        raise ConfigError(
            f"{setting} {name!r}: makes samples {start.sample_shape} of {start.num_classes} "
            f"classes, the teacher {teacher.sample_shape} of {teacher.num_classes}; expected the same of both, and "
            "prompts for both or none"
        )


def check_prompts(config: DistillConfig, teacher: Denoiser) -> None:
    """Raises ConfigError if the config names prompts that the run would not read."""
    if config.prompts is None:
        return
    if teacher.text_shapes is None:
        raise ConfigError(
            f"prompts: got {config.prompts!r}, but teacher {config.teacher!r} takes no prompts; expected null"
        )
    if config.data not in (None, TEACHER_SAMPLES):
        raise ConfigError(
            f"prompts: got {config.prompts!r} beside data {config.data!r}, whose captions are the prompts; expected "
            f"data={TEACHER_SAMPLES} or data=null"
        )


def check_prompts_named(config: DistillConfig) -> None:
    """Raises ConfigError if a text-to-image teacher has neither captioned data nor a file of prompts."""
    if config.prompts is not None:
        return
    if config.data not in (None, TEACHER_SAMPLES):
        raise ConfigError(
            f"data {config.data!r}: images, but teacher {config.teacher!r} sees latents and prompts; encode them "
            f"once with `{_cache_command(config)}`, and pass data=FOLDER"
        )
    raise ConfigError(
        f"prompts: got null, but teacher {config.teacher!r} is a text-to-image model; expected a file with one a line, "
        "or data of captioned images"
    )


def check_captions(config: DistillConfig, captions: Captions | None, wanted: Mapping[str, Any]) -> None:
    """Checks the captions of cached latents.

    Args:
        captions: None for latents without captions.
        wanted: how this run encodes prompts, as `fdistill.training.cache.text_facts` says.

    Raises:
        ConfigError: there are none.
        DataError: they were encoded in another way.
    """
    if captions is None:
        raise ConfigError(
            f"data {config.data!r}: latents without captions, but teacher {config.teacher!r} is a text-to-image model; "
            "expected latents of captioned images"
        )
    source = captions.embeddings
    assert isinstance(source, EmbeddingSource)
    if source.meta["encoder"] != wanted["encoder"]:
        raise DataError(
            f"data {source.name}: its captions were encoded by other text encoders, for another resolution or in "
            "another frozen_precision; make them again with fdistill cache"
        )
    if source.meta["null_prompt"] != wanted["null_prompt"]:
        raise DataError(
            f"data {source.name}: was cached with negative prompt {source.meta['null_prompt']!r}, but negative_prompt "
            f"is {wanted['null_prompt']!r}; make it again with fdistill cache --negative-prompt, or change the setting"
        )


def check_encoding(config: DistillConfig, *, encoded: bool, latent_teacher: bool) -> None:
    """Raises ConfigError if data are encoded latents and the teacher makes pixels, or the other way round."""
    if encoded and not latent_teacher:
        raise ConfigError(
            f"data {config.data!r}: latents, but teacher {config.teacher!r} makes pixels; expected images"
        )
    if latent_teacher and not encoded:
        raise ConfigError(
            f"data {config.data!r}: images, but teacher {config.teacher!r} sees latents; encode them once with "
            f"`{_cache_command(config)}`, and pass data=FOLDER"
        )


def _cache_command(config: DistillConfig) -> str:
    """The command that encodes the config's images as its runs need them."""
    options = {
        "--teacher": config.teacher,
        "--teacher-base": config.teacher_base,
        "--teacher-lora": config.teacher_lora,
        "--teacher-lora-scale": config.teacher_lora_scale if config.teacher_lora_scale != 1 else None,
        "--vae": config.vae,
        "--resolution": config.resolution,
        "--negative-prompt": config.negative_prompt or None,
        "--precision": config.encoder_precision if config.encoder_precision != "fp32" else None,
        "--recipe": config.images.recipe if config.images.recipe != "exact" else None,
        "--flip": "" if config.images.flip else None,
    }
    given = [part for name, value in options.items() if value is not None for part in (name, str(value)) if part]
    return shlex.join(["fdistill", "cache", str(config.data), *given, "--output", "FOLDER"])


def check_data(
    config: DistillConfig, teacher: Denoiser, source: Source | LatentSource, shape: tuple[int, ...] | None
) -> None:
    """Checks that classes and shape are the teacher's.

    Args:
        shape: (C, H, W), if it is known before any item is read.

    Raises:
        ConfigError: classes or shape differ from the teacher's.
    """
    if shape is not None and shape != tuple(teacher.sample_shape):
        raise ConfigError(
            f"data {config.data!r} has samples of shape {shape} (C, H, W), but teacher {config.teacher!r} makes "
            f"{tuple(teacher.sample_shape)}; expected data like the teacher's, or images.recipe=center-box"
        )
    highest = int(source.labels.max())
    if teacher.num_classes is not None and highest >= teacher.num_classes:
        raise ConfigError(
            f"data {config.data!r} has class {highest}, but teacher {config.teacher!r} knows 0 to "
            f"{teacher.num_classes - 1}; expected data like the teacher's, and these are "
            f"{_described(source)}"
        )
    if teacher.num_classes is not None and source.num_classes is None:
        raise ConfigError(
            f"data {config.data!r} has no class labels, but teacher {config.teacher!r} is class-conditional; expected "
            "class folders, or a dataset.json, labels or cls entry for each image, and these are "
            f"{_described(source)}"
        )


def check_buckets(config: DistillConfig, networks: Networks, buckets: Sequence[LatentBucket] | None) -> None:
    """Checks that the networks and the run's settings can do with samples of several shapes, if the data have them.

    Raises:
        ConfigError: they cannot.
    """
    if buckets is None:
        return
    several = f"data {config.data!r}: has latents of {len(buckets)} shapes, but"
    if config.data is None:
        several = f"buckets: got {config.buckets}, which makes samples of {len(buckets)} shapes, but"
    channels, *own = networks.teacher.sample_shape
    try:
        for bucket in buckets:
            if bucket.shape[0] != channels:
                raise ArgumentError(f"latents of {bucket.shape[0]} channels; expected {channels}")
            networks.resize(*bucket.shape[1:])
    except ArgumentError as error:
        raise ConfigError(f"images of {bucket.width}x{bucket.height} pixels: {error}") from error
    finally:
        networks.resize(*own)
    if config.discriminator.head == "convolutional" and networks.discriminator is not None:
        raise ConfigError(
            f"{several} discriminator.head=convolutional is made for one; expected discriminator.head=pooled, or "
            "squares alone"
        )
    if any(stage.reuse_samples for stage in config.stage_configs()):
        raise ConfigError(
            f"{several} reuse_samples would show the critic samples of another shape than its data; expected "
            "reuse_samples=false"
        )
    if any(stage.regression.weight for stage in config.stage_configs()):
        raise ConfigError(
            f"{several} the teacher's pairs have one; expected regression.weight=0 with another method, or "
            "squares alone"
        )
    for bucket in buckets:
        if bucket.images < config.batch_size and config.data is not None:
            say(
                f"data {config.data}",
                f"only {bucket.images:,} of {bucket.width}x{bucket.height} pixels for a batch of {config.batch_size}, "
                "in which some come twice; a smaller batch_size, or fdistill cache with --bucket-images "
                f"{config.batch_size}, avoids it",
            )


def _described(source: Source | LatentSource) -> str:
    return f"{len(source):,} latents" if isinstance(source, LatentSource) else account_of(source).sentence()


def pairs_start(teacher: Denoiser, student: Student) -> float:
    """The level from which the teacher's sampler makes the student's pairs.

    It is the student's own level if the student's input there, start(level) times noise, is pure noise to the teacher
    as well. Where the teacher would expect signal in it, as a variance-preserving one does below its last levels, it is
    the teacher's highest level: the level then only tells the student's network that it is asked for an image (DMD2's
    SDXL student at timestep 399 learns from samples of the whole ODE).

    Raises:
        ConfigError: the student's level means another noise to the teacher.
    """
    levels = torch.tensor(student.levels, dtype=torch.float64)
    own, others = student.denoiser.schedule, teacher.schedule
    mine, theirs = (torch.stack([s.start(levels), s.alpha(levels), s.sigma(levels)]) for s in (own, others))
    if levels[0] > others.t_max or not torch.allclose(mine, theirs, rtol=1e-4):
        raise ConfigError(
            f"regression.weight: pairs start at the student's level {student.levels[0]:g}, which means another noise "
            "to the teacher; expected a student with the teacher's noise schedule, or a method without regression"
        )
    start, sigma = theirs[0, 0].item(), theirs[2, 0].item()
    return student.levels[0] if abs(start - sigma) <= 0.05 * sigma else others.t_max
