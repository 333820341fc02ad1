"""Describes a checkpoint and what fdistill would do with it, and checks that its x0-predictions make sense."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fdistill.adapters import FAMILIES
from fdistill.adapters.checkpoint import Checkpoint
from fdistill.adapters.parametrisation import student_scheduler
from fdistill.base import rng
from fdistill.base.devices import start
from fdistill.base.errors import DataError
from fdistill.base.images import to_unit
from fdistill.condition import Condition
from fdistill.data import Batching, ImageLoader, open_source
from fdistill.denoiser import Denoiser
from fdistill.noise import add_noise, noise_to_signal
from fdistill.sampler import heun_sample, sampling_levels
from fdistill.students.folder import find_student, load_student
from fdistill.students.one_step_pipeline import OneStepPipeline
from fdistill.teachers.autoencoder import LatentSpace, attach_latent_space, image_size
from fdistill.teachers.teacher import TeacherSettings, open_teacher
from fdistill.teachers.text_encoders import open_prompt_encoder

_LEVELS, _SEED = 8, 0
_PROMPT = "a photo"  # used if images have no captions
#: Largest error relative to the best linear denoiser's. A trained network is better than that denoiser at every level;
#: a network whose prediction is misinterpreted is worse at some level.
_TOLERANCE = 1.05


@dataclass(frozen=True)
class LevelCheck:
    """Root mean square errors of x0 at one level: the network's, and that of the best linear denoiser.

    The best linear denoiser uses only the data's mean and variance.
    """

    t: float
    noise_to_signal: float
    error: float
    linear_error: float

    @property
    def makes_sense(self) -> bool:
        """False if the error is above the tolerance or NaN."""
        return self.error <= _TOLERANCE * self.linear_error


@torch.no_grad()
def check_predictions(denoiser: Denoiser, x0: Tensor, condition: Condition | None) -> list[LevelCheck]:
    """Errors of x0-predictions on noised samples x0 [B, C, H, W], from the noisiest level to the cleanest."""
    schedule = denoiser.schedule
    mean = x0.mean(dim=(0, 2, 3), keepdim=True)
    variance = (x0 - mean).square().mean()
    noise = rng.indexed_normal(_SEED, range(len(x0)), x0.shape[1:]).to(x0.device)
    checks = []
    for level in sampling_levels(denoiser, _LEVELS).to(x0.device):
        t = level.expand(len(x0))
        prediction, _ = denoiser.denoise_with_features(add_noise(schedule, x0, noise, t), t, condition, ())
        alpha, sigma = schedule.alpha(level), schedule.sigma(level)
        linear = sigma**2 * variance / (alpha**2 * variance + sigma**2)
        checks.append(
            LevelCheck(
                level.item(),
                noise_to_signal(schedule, level).item(),
                (prediction - x0).square().mean().sqrt().item(),
                linear.sqrt().item(),
            )
        )
    return checks


def inspect(
    checkpoint: str | Path,
    *,
    data: str | None = None,
    recipe: str = "center-box",
    vae: str | None = None,
    num_images: int = 64,
    device: str = "auto",
) -> tuple[dict[str, Any], list[LevelCheck]]:
    """Facts about a checkpoint, and a check of its x0-predictions on noised data.

    Args:
        checkpoint: anything that `load_teacher` takes, or a student folder.
        data: images like those the checkpoint was trained on, as the setting `data` names them. By default the
            checkpoint's own samples, with which the check finds fewer mistakes.
        recipe: how images are cropped and resized to the checkpoint's size.
        vae: the autoencoder, if a latent checkpoint has none.
        num_images: number of images to check on.
        device: "auto", "cpu", "cuda" or "mps".

    Raises:
        CheckpointError, DataError: the checkpoint or the data cannot be read.
    """
    _, chosen = start(device)
    folder = find_student(checkpoint)
    if folder is not None:
        found, denoiser = Checkpoint(str(checkpoint), folder), load_student(folder).denoiser.to(chosen)
        latents = attach_latent_space(denoiser, found, vae)
    else:
        teacher = open_teacher(TeacherSettings(str(checkpoint), vae=vae))
        found, denoiser, latents = teacher.checkpoint, teacher.denoiser.to(chosen), teacher.latents
    network = denoiser if denoiser.network is None else denoiser.network
    schedule = denoiser.schedule
    facts = {
        "network": f"{type(network).__name__}, {sum(p.numel() for p in denoiser.parameters()) / 1e6:.2f} M parameters",
        "adapter": f"{type(denoiser).__module__}.{type(denoiser).__name__}",
        "pipeline": found.index.get("_class_name", "none"),
        "samples": f"{denoiser.sample_shape}, {_space(latents)}",
        "condition": _condition(denoiser),
        "levels": f"{type(schedule).__name__}, t from {schedule.t_min:g} to {schedule.t_max:g}",
        "prediction": _prediction(denoiser),
        "features": ", ".join(f"{name} {shape}" for name, shape in denoiser.feature_shapes.items()),
        "student": f"one step from {schedule.t_max:g}, exported as {_export(denoiser, latents, found.index)}",
    }
    x0, condition = _samples(found, denoiser, latents, data, recipe, num_images, chosen)
    facts["checked on"] = f"{num_images} of {data}" if data else _OWN_SAMPLES
    return facts, check_predictions(denoiser, x0, condition)


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
) -> tuple[Tensor, Condition | None]:
    classes = denoiser.num_classes
    if data is None:
        noise = rng.indexed_normal(_SEED, range(count), denoiser.sample_shape).to(device)
        condition: Condition | None = torch.arange(count, device=device) % classes if classes else None
        if denoiser.text_shapes is not None:
            condition = _encoded(checkpoint, denoiser, latents, [_PROMPT] * count, device)
        return heun_sample(denoiser, noise, condition), condition
    size = image_size(denoiser, latents)
    shape = (denoiser.sample_shape[0] if latents is None else 3, size, size)
    source = open_source(data)
    if classes and (source.num_classes is None or source.num_classes > classes):
        raise DataError(
            f"data {data}: has {source.num_classes or 'no'} classes, but the checkpoint has {classes}; expected data "
            "like those it was trained on"
        )
    with ImageLoader(source, shape, Batching(count, _SEED), recipe=recipe) as loader:
        batch = next(loader)
    x0 = to_unit(batch.images.to(device))
    if latents is not None:
        x0 = latents.scaling.to_samples(latents.moments(x0).chunk(2, dim=1)[0])
    if denoiser.text_shapes is not None:
        captions = source.captions
        prompts = [_PROMPT if captions is None else captions[row] for row in batch.rows.tolist()]
        return x0, _encoded(checkpoint, denoiser, latents, prompts, device)
    return x0, batch.labels.to(device) if classes else None


def _encoded(
    checkpoint: Checkpoint, denoiser: Denoiser, latents: LatentSpace | None, prompts: list[str], device: torch.device
) -> Condition:
    encoders = open_prompt_encoder(checkpoint, image_size(denoiser, latents))
    with encoders.on(device):
        return encoders.encode(prompts).to(device)


def describe(facts: dict[str, Any], checks: list[LevelCheck]) -> str:
    """The text that `fdistill inspect` prints."""
    lines = [f"{name:<12} {value}" for name, value in facts.items()]
    lines += ["", f"{'level':>10} {'noise/signal':>13} {'error of x0':>12} {'best linear':>12}"]
    for check in checks:
        verdict = "" if check.makes_sense else "  <- does not make sense"
        lines.append(
            f"{check.t:>10.4g} {check.noise_to_signal:>13.4g} {check.error:>12.4f} {check.linear_error:>12.4f}{verdict}"
        )
    wrong = sum(not check.makes_sense for check in checks)
    if wrong:
        verdict = _WRONG.format(wrong=wrong, levels=len(checks))
    else:
        verdict = "x0-predictions make sense" if facts["checked on"] != _OWN_SAMPLES else _CONSISTENT
    return "\n".join([*lines, "", verdict])


_OWN_SAMPLES = "its own samples"
_CONSISTENT = (
    "x0-predictions agree with its own samples, which a checkpoint that is read wrongly may do as well; --data DATA "
    "checks them on images like those it was trained on"
)
_WRONG = (
    "x0-predictions are wrong at {wrong} of {levels} levels: an untrained network, other data than it was trained on, "
    "or a scheduler config (prediction_type, betas) that is not the network's"
)
