"""Describes a checkpoint and what fdistill would do with it, and checks that its x0-predictions make sense."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdistill.adapters import FAMILIES
from fdistill.adapters.checkpoint import Checkpoint
from fdistill.adapters.parametrisation import read_scheduler_config, student_scheduler
from fdistill.base import rng
from fdistill.base.devices import autocast, start
from fdistill.base.errors import ArgumentError, CheckpointError, DataError
from fdistill.base.images import to_unit
from fdistill.commands.predictions import SEED, LevelCheck, at_once, check_predictions, describe_effect, rows
from fdistill.commands.readings import PIXEL_RANGES, Subject, Verdict, judge, round_trip
from fdistill.condition import Condition, TextCondition
from fdistill.data import Batching, ImageLoader, open_source
from fdistill.data.account import account_of, say
from fdistill.denoiser import Denoiser
from fdistill.sampler import heun_sample
from fdistill.students.folder import fetch_student, load_student
from fdistill.students.one_step_pipeline import OneStepPipeline
from fdistill.teachers.autoencoder import LatentSpace, attach_latent_space, image_shape, image_size
from fdistill.teachers.teacher import TeacherSettings, open_teacher
from fdistill.teachers.text_encoders import open_prompt_encoder

_PROMPT = "a photo"  # used if images have no captions
#: For networks of up to so many parameters: the number of images, and of those on which readings are compared. With
#: these a check takes less than a minute where the network belongs (docs/teachers.md).
_AMOUNTS: list[tuple[float, int, int]] = [(3e8, 64, 16), (2e9, 16, 4), (math.inf, 4, 2)]
_AMOUNTS_ON_CPU: list[tuple[float, int, int]] = [(1e7, 64, 16), (math.inf, 4, 2)]
#: Networks of more parameters compute in bf16 on a GPU.
_LARGE = 3e8
Report = tuple[dict[str, Any], list[LevelCheck], Verdict | None]


@dataclass(frozen=True)
class _Samples:
    """What a checkpoint is checked on: images in [-1, 1] and what it sees of them, or its own samples.

    Attributes:
        images: [B, 3, H, W] of a latent checkpoint; the samples themselves otherwise.
        x0: [B, C, h, w].
        condition: of the samples.
        null: the condition that guidance leads away from, one prompt or a label; None without guidance.
    """

    images: Tensor
    x0: Tensor
    condition: Condition | None
    null: TextCondition | int | None


def inspect(
    checkpoint: str | Path,
    *,
    data: str | None = None,
    recipe: str = "center-box",
    vae: str | None = None,
    resolution: int | None = None,
    num_images: int | None = None,
    device: str = "auto",
) -> Report:
    """Facts about a checkpoint, a check of its x0-predictions on noised data, and what other readings would give.

    Args:
        checkpoint: anything that `load_teacher` takes, or a student folder.
        data: images like those the checkpoint was trained on, as the setting `data` names them. By default the
            checkpoint's own samples, with which the check finds fewer mistakes, and other readings are not tried.
        recipe: how images are cropped and resized to the checkpoint's size.
        vae: the autoencoder, if a latent checkpoint has none.
        resolution: side in pixels of a text-to-image teacher's images; its own by default.
        num_images: number of images to check on; by default 64, 16 or 4, by the size of the network.
        device: "auto", "cpu", "cuda" or "mps".

    Raises:
        CheckpointError, DataError: the checkpoint or the data cannot be read.
        ArgumentError, ConfigError: the checkpoint makes no images of this resolution.
    """
    _, chosen = start(device)
    folder = fetch_student(checkpoint)
    if folder is not None:
        if resolution is not None:
            raise ArgumentError(f"resolution: {checkpoint} is a student, which has its own; leave it out")
        found, denoiser = Checkpoint(str(checkpoint), folder), load_student(folder).denoiser.to(chosen)
        latents = attach_latent_space(denoiser, found, vae)
    else:
        teacher = open_teacher(TeacherSettings(str(checkpoint), vae=vae, resolution=resolution))
        found, denoiser, latents = teacher.checkpoint, teacher.denoiser.to(chosen), teacher.latents
    size = sum(parameter.numel() for parameter in denoiser.parameters())
    amounts = _AMOUNTS_ON_CPU if chosen.type == "cpu" else _AMOUNTS
    images, compared = next((images, few) for most, images, few in amounts if size <= most)
    with autocast(chosen, "bf16" if size > _LARGE and chosen.type == "cuda" else "fp32"):
        return _report(found, denoiser, latents, data, recipe, (num_images or images, compared), chosen)


def _report(
    found: Checkpoint,
    denoiser: Denoiser,
    latents: LatentSpace | None,
    data: str | None,
    recipe: str,
    amounts: tuple[int, int],
    device: torch.device,
) -> Report:
    """What `inspect` returns, from so many images and so many of them for comparing readings."""
    count, compared = amounts
    parts = {"network": denoiser, **({} if latents is None else {"autoencoder": latents.vae})}
    for name, part in parts.items():
        damaged = next((key for key, value in part.named_parameters() if not torch.isfinite(value).all()), None)
        if damaged is not None:
            raise CheckpointError(
                f"checkpoint {found.name!r}: tensor {damaged} of its {name} is not finite, so its weights are damaged; "
                "expected the files as they were published, so get them again"
            )
    facts = _facts(found, denoiser, latents)
    samples = _samples(found, denoiser, latents, data, recipe, count, device)
    facts["checked on"] = f"{count} of {data}" if data else _OWN_SAMPLES
    if samples.null is not None and samples.condition is not None:
        facts["guidance"] = describe_effect(denoiser, samples.x0, samples.condition, samples.null)
    verdict = None
    if data is not None:
        scheduler = None if found.folder is None else read_scheduler_config(found.folder)
        subject = Subject(denoiser, scheduler, latents, samples.images, samples.x0, samples.condition)
        few = subject.first(compared)
        if latents is not None:
            facts["autoencoder"] = _round_trips(few)
        verdict = judge(few)
    return facts, check_predictions(denoiser, samples.x0, samples.condition), verdict


def _facts(found: Checkpoint, denoiser: Denoiser, latents: LatentSpace | None) -> dict[str, Any]:
    network = denoiser if denoiser.network is None else denoiser.network
    schedule = denoiser.schedule
    return {
        "network": f"{type(network).__name__}, {sum(p.numel() for p in denoiser.parameters()) / 1e6:.2f} M parameters",
        "adapter": f"{type(denoiser).__module__}.{type(denoiser).__name__}",
        "pipeline": found.index.get("_class_name", "none"),
        "samples": f"{denoiser.sample_shape}, {_space(latents)}",
        "condition": _condition(denoiser),
        "levels": f"{type(schedule).__name__}, t from {schedule.t_min:g} to {schedule.t_max:g}",
        "prediction": _prediction(denoiser),
        "features": describe_features(denoiser.feature_shapes),
        "student": f"one step from {schedule.t_max:g}, exported as {_export(denoiser, latents, found.index)}",
    }


def describe_features(shapes: Mapping[str, tuple[int, int, int]]) -> str:
    """Features and their shapes; neighbours that differ in their number alone are one entry."""
    groups = groupby(shapes, key=lambda name: (name.rstrip("0123456789"), shapes[name]))
    found = []
    for (kind, shape), group in groups:
        names = list(group)
        numbers = [name.removeprefix(kind) for name in names]
        consecutive = numbers == [str(int(numbers[0] or 0) + i) for i in range(len(names))]
        listed = f"{names[0]} to {names[-1]}" if consecutive and len(names) > 2 else ", ".join(names)
        found.append(f"{listed} {shape}")
    return ", ".join(found)


def _round_trips(subject: Subject) -> str:
    """How well the autoencoder returns the images, fed in either range of pixels."""
    assert subject.latents is not None
    own = subject.latents.scaling.pixel_range
    tried = {pixels: round_trip(subject, pixels) for pixels in dict.fromkeys((own, *PIXEL_RANGES))}
    first, *others = (f"{db:.1f} dB in [{low:g}, {high:g}]" for (low, high), db in tried.items())
    low, high = max(tried, key=lambda pixels: tried[pixels])
    return f"round trip {first} as it is read, {', '.join(others)}; [{low:g}, {high:g}] is better"


def _space(latents: LatentSpace | None) -> str:
    if latents is None:
        return "pixels"
    return f"latents of an autoencoder, {latents.factor} pixels each way"


def _condition(denoiser: Denoiser) -> str:
    if denoiser.text_shapes is not None:
        return "prompts, as " + ", ".join(f"{name} {shape}" for name, shape in denoiser.text_shapes.items())
    if denoiser.num_classes is None:
        return "none"
    null = "no label for `no class`" if denoiser.null_class is None else f"`no class` is {denoiser.null_class}"
    return f"{denoiser.num_classes} classes, {null}"


def _prediction(denoiser: Denoiser) -> str:
    form = denoiser.parametrisation
    if form is None:
        return "x0"
    return str(getattr(form, "prediction", type(form).__name__))


def _export(denoiser: Denoiser, latents: LatentSpace | None, index: dict[str, Any]) -> str:
    family = FAMILIES.get(type(denoiser.network).__name__)
    if family is None:
        return "weights for your own function"
    if denoiser.text_shapes is not None:
        runs = student_scheduler(denoiser.parametrisation, (denoiser.schedule.t_max,)) is not None
        return (
            f"diffusers.{index.get('_class_name')}"
            if runs
            else "nothing: no scheduler of diffusers runs it in one step"
        )
    vae = None if latents is None else latents.vae
    native = family.native_pipeline(denoiser, (denoiser.schedule.t_max,), index, vae)
    return f"diffusers.{type(native[0]).__name__}" if native is not None else f"fdistill.{OneStepPipeline.__name__}"


def _samples(
    checkpoint: Checkpoint,
    denoiser: Denoiser,
    latents: LatentSpace | None,
    data: str | None,
    recipe: str,
    count: int,
    device: torch.device,
) -> _Samples:
    classes = denoiser.num_classes
    if data is None:
        noise = rng.indexed_normal(SEED, range(count), denoiser.sample_shape).to(device)
        condition: Condition | None = torch.arange(count, device=device) % classes if classes else None
        null: TextCondition | int | None = denoiser.null_class
        if denoiser.text_shapes is not None:
            condition, null = _encoded(checkpoint, denoiser, latents, [_PROMPT] * count, device)
        few = at_once(denoiser.sample_shape)
        firsts = range(0, count, few)
        parts = zip(firsts, noise.split(few), strict=True)
        x0 = torch.cat([heun_sample(denoiser, part, rows(condition, first, first + few)) for first, part in parts])
        if not torch.isfinite(x0).all():
            raise CheckpointError(
                f"checkpoint {checkpoint.name!r}: its own samples are not finite, so its weights are damaged; expected "
                "the files as they were published, so get them again"
            )
        return _Samples(x0, x0, condition, null)
    source = open_source(data)
    say(f"data {data}", account_of(source, captioned=denoiser.text_shapes is not None).sentence())
    if classes and (source.num_classes is None or source.num_classes > classes):
        raise DataError(
            f"data {data}: has {source.num_classes or 'no'} classes, but the checkpoint has {classes}; expected data "
            "like those it was trained on"
        )
    with ImageLoader(source, image_shape(denoiser, latents), Batching(count, SEED), recipe=recipe) as loader:
        batch = next(loader)
    images = x0 = to_unit(batch.images.to(device))
    if latents is not None:
        x0 = latents.scaling.to_samples(latents.moments(images).chunk(2, dim=1)[0])
    if denoiser.text_shapes is not None:
        captions = source.captions
        prompts = [_PROMPT if captions is None else captions[row] for row in batch.rows.tolist()]
        return _Samples(images, x0, *_encoded(checkpoint, denoiser, latents, prompts, device))
    return _Samples(images, x0, batch.labels.to(device) if classes else None, denoiser.null_class)


def _encoded(
    checkpoint: Checkpoint, denoiser: Denoiser, latents: LatentSpace | None, prompts: list[str], device: torch.device
) -> tuple[Condition, TextCondition | None]:
    """The prompts, and the empty one; None for a network that takes a guidance scale instead."""
    encoders = open_prompt_encoder(checkpoint, image_size(denoiser, latents))
    with encoders.on(device):
        null = None if denoiser.embedded_guidance is not None else encoders.null().to(device)
        return encoders.encode(prompts).to(device), null


def describe(facts: dict[str, Any], checks: list[LevelCheck], verdict: Verdict | None) -> str:
    """The text that `fdistill inspect` prints."""
    lines = [f"{name:<12} {value}" for name, value in facts.items()]
    lines += ["", f"{'level':>10} {'noise/signal':>13} {'error of x0':>12} {'best linear':>12}"]
    for check in checks:
        remark = "" if check.judged else f"  (not judged: x0 amplifies the output {check.amplification:.0f} times)"
        remark = remark if check.makes_sense else "  <- does not make sense"
        lines.append(
            f"{check.t:>10.4g} {check.noise_to_signal:>13.4g} {check.error:>12.4f} {check.linear_error:>12.4f}{remark}"
        )
    wrong = sum(not check.makes_sense for check in checks)
    if wrong:
        sentences = [f"x0-predictions are wrong at {wrong} of {len(checks)} levels"]
    elif facts["checked on"] == _OWN_SAMPLES:
        sentences = [_CONSISTENT]
    else:
        sentences = ["x0-predictions make sense"]
    if verdict is not None and verdict.likely is not None:
        sentences.append(_LIKELY.format(likely=verdict.likely, own=verdict.own))
    elif wrong:
        sentences.append(_UNKNOWN if verdict is None else _NONE_FITS.format(count=len(verdict.others)))
    return "\n".join([*lines, "", *sentences])


_OWN_SAMPLES = "its own samples"
_CONSISTENT = (
    "x0-predictions agree with images that the checkpoint itself has made. That is a weak check: a checkpoint whose "
    "settings are wrong may pass it. Check again with --data DATA, images like those it was trained on"
)
_LIKELY = (
    "likely wrong: {likely.kind}; with {likely.change} the error is {likely.relative_error:.2f} of the best linear "
    "denoiser's, {own.relative_error:.2f} as it is read"
)
_NONE_FITS = (
    "no other reading fits, of {count} tried (pixel range, scale, schedule, prediction type): an untrained network, or "
    "other data than it was trained on"
)
_UNKNOWN = (
    "an untrained network, or a scheduler config (prediction_type, betas) that is not the network's; --data DATA tries "
    "other readings on images like those it was trained on"
)
