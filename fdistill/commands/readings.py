"""Other readings of a checkpoint: what it would predict if its pixels, scale, schedule or prediction were other ones.

Each reading sees the same images under the same noise. The reading that is right has errors below those of the best
linear denoiser at every level, and a wrong one usually does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fdistill.adapters import FAMILIES, set_null_class
from fdistill.adapters.parametrisation import TIME_CONVENTION
from fdistill.base.errors import FDistillError
from fdistill.commands.predictions import LevelCheck, check_predictions, relative_error, rows
from fdistill.condition import Condition
from fdistill.denoiser import Denoiser, LatentScaling
from fdistill.noise import noise_to_signal_range
from fdistill.teachers.autoencoder import LatentSpace

_LEVELS = 6  # at which readings are compared, up to this noise-to-signal ratio: beyond it all see mere noise
_NOISIEST, _RHO = 20.0, 7.0
#: An alternative is likely if its error relative to the linear one is below this share of the present reading's.
_CLEARLY = 0.95
#: Of readings whose errors differ by less, the one that changes less is named.
_EQUAL = 1.02
#: The beta schedules of published networks: DDPM and DiT, Stable Diffusion, improved DDPM.
_BETAS: tuple[Mapping[str, Any], ...] = (
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
)
_PREDICTIONS = ("epsilon", "v_prediction", "sample")
#: The factors on an autoencoder's latents in published pipelines: none, Stable Diffusion 1 and 2, XL.
_SCALES = (1.0, 0.18215, 0.13025)
_DEFAULTS = {"prediction_type": "epsilon", "num_train_timesteps": 1000}
#: What the keys of a scheduler's config say; another class says both.
_CONCERNS = {
    "schedule": {"beta_schedule", "beta_start", "beta_end", "trained_betas", "sigma_data"},
    "prediction type": {"prediction_type", TIME_CONVENTION},
}
#: The values of black and white in images that published autoencoders read.
PIXEL_RANGES = ((-1.0, 1.0), (0.0, 1.0))


@dataclass(frozen=True)
class Reading:
    """One way to read a checkpoint, tried on images.

    Attributes:
        kind: "pixel range", "scale", "schedule" or "prediction type", or several of them.
        change: what would have to be other than it is, for people.
        checks: the errors by level.
    """

    kind: str
    change: str
    checks: list[LevelCheck]

    @property
    def makes_sense(self) -> bool:
        """Whether it does at every level."""
        return all(check.makes_sense for check in self.checks)

    @property
    def relative_error(self) -> float:
        """See the function `relative_error`."""
        return relative_error(self.checks)


@dataclass(frozen=True)
class Subject:
    """What is read: the checkpoint, and the images it is tried on.

    Attributes:
        denoiser: the checkpoint as it is read.
        scheduler: the config of its scheduler, or None.
        latents: its autoencoder, or None.
        images: [B, 3, H, W] in [-1, 1] if there is an autoencoder.
        samples: [B, C, h, w], the images as the denoiser sees them.
        condition: of the images.
    """

    denoiser: Denoiser
    scheduler: Mapping[str, Any] | None
    latents: LatentSpace | None
    images: Tensor
    samples: Tensor
    condition: Condition | None

    def first(self, count: int) -> Subject:
        """The same with the first images alone."""
        condition = rows(self.condition, 0, count)
        return Subject(
            self.denoiser, self.scheduler, self.latents, self.images[:count], self.samples[:count], condition
        )


@dataclass(frozen=True)
class Verdict:
    """The checkpoint's own reading and the one that is likely instead, both on the same images and levels.

    Attributes:
        own: as it is read.
        likely: another reading that fits clearly better; None if none does.
        others: all other readings that were tried.
    """

    own: Reading
    likely: Reading | None
    others: list[Reading]


def other_pixel_range(subject: Subject) -> Reading:
    """The checkpoint with the pixels of its images in the other of [-1, 1] and [0, 1]."""
    if subject.latents is None:
        return _read(subject, "pixel range", "pixels in [0, 1]", samples=(subject.samples + 1) / 2)
    scaling = subject.latents.scaling
    other = next(pixels for pixels in PIXEL_RANGES if pixels != scaling.pixel_range)
    change = f"the autoencoder reads pixels in [{other[0]:g}, {other[1]:g}]"
    return _read(subject, "pixel range", change, samples=encode(subject, scaling._replace(pixel_range=other)))


def round_trip(subject: Subject, pixel_range: tuple[float, float]) -> float:
    """The peak signal-to-noise ratio in dB of the images after the autoencoder, fed in a pixel range."""
    assert subject.latents is not None
    scaling = subject.latents.scaling._replace(pixel_range=pixel_range)
    space = LatentSpace(subject.latents.vae, scaling, subject.latents.sha256)
    decoded = space.decode(encode(subject, scaling)).clamp(-1, 1)
    return float(10 * torch.log10(4 / (decoded - subject.images).square().mean()))


def encode(subject: Subject, scaling: LatentScaling) -> Tensor:
    """The images as samples [B, C, h, w] under another scaling."""
    assert subject.latents is not None
    space = LatentSpace(subject.latents.vae, scaling, subject.latents.sha256)
    return scaling.to_samples(space.moments(subject.images).chunk(2, dim=1)[0])


def judge(subject: Subject) -> Verdict:
    """Tries other readings of a checkpoint, all at the same noise relative to the images."""
    own = _read(subject, "", "")
    tried = [other_pixel_range(subject), *_other_scales(subject), *_other_forms(subject)]
    better = [reading for reading in tried if reading.relative_error < _CLEARLY * own.relative_error]
    fitting = [reading for reading in better if reading.makes_sense]
    best = min((reading.relative_error for reading in fitting), default=0.0)
    equal = [reading for reading in fitting if reading.relative_error <= _EQUAL * best]
    likely = min(equal, key=lambda reading: (" and " in reading.kind, reading.relative_error), default=None)
    return Verdict(own, likely, tried)


def _read(
    subject: Subject, kind: str, change: str, denoiser: Denoiser | None = None, samples: Tensor | None = None
) -> Reading:
    low, high = noise_to_signal_range(subject.denoiser.schedule)
    ratios = torch.linspace(min(high, _NOISIEST) ** (1 / _RHO), low ** (1 / _RHO), _LEVELS) ** _RHO
    samples = subject.samples if samples is None else samples
    ratios = ratios * float(samples.std() / subject.samples.std())
    checked = subject.denoiser if denoiser is None else denoiser
    return Reading(kind, change, check_predictions(checked, samples, subject.condition, ratios))


def _other_scales(subject: Subject) -> Iterator[Reading]:
    """Other factors on the latents: those of published pipelines, and the one that gives unit variance."""
    if subject.latents is None:
        return
    scaling = subject.latents.scaling
    z = scaling.to_latents(subject.samples)
    for scale in (*_SCALES, round(1 / float(z.std()), 5)):
        if all(abs(scale / own - 1) > 0.05 for own in scaling.scale):
            samples = scale * (z - z.mean() if scale == scaling.scale[0] else z)
            yield _read(subject, "scale", f"scaling_factor {scale:g} instead of {scaling.scale[0]:g}", samples=samples)


def _other_forms(subject: Subject) -> Iterator[Reading]:
    """Other configs of the scheduler, which says what the network predicts at which noise."""
    network, config = subject.denoiser.network, subject.scheduler
    family = FAMILIES.get(type(network).__name__)
    if family is None or config is None:
        return
    for kind, change, other in _configs(config, float(subject.samples.std())):
        denoiser = _wrapped(family.wrap, network, other, subject.denoiser)
        if denoiser is not None:
            yield _read(subject, kind, change, denoiser)


def _wrapped(
    wrap: Callable[[Any, Mapping[str, Any]], Denoiser], network: Any, config: Mapping[str, Any], own: Denoiser
) -> Denoiser | None:
    """The network under another scheduler's config; None if it cannot be read so, or is as it was."""
    try:
        denoiser = wrap(network, config)
        set_null_class(denoiser, own.null_class)
    except FDistillError:
        return None
    if denoiser.sample_shape != own.sample_shape:
        denoiser.resize(*own.sample_shape[1:])
    denoiser.latent_scaling = own.latent_scaling
    return denoiser.eval().to(next(own.parameters()).device)


def _changes(config: Mapping[str, Any], spread: float) -> Iterator[dict[str, Any]]:
    """Changes to a scheduler's config, each to one that a network may have been trained with instead."""
    discrete = {} if "beta_schedule" in config else {"_class_name": "DDPMScheduler"}
    no_flow = {"use_flow_sigmas": False} if "use_flow_sigmas" in config else {}
    for betas in _BETAS if discrete else ({}, *_BETAS):
        trained = {"trained_betas": None} if "beta_schedule" in betas else {}
        for prediction in _PREDICTIONS:
            yield {**discrete, **betas, **trained, **no_flow, "prediction_type": prediction}
    for name in ("CMStochasticIterativeScheduler", "EDMEulerScheduler"):
        for sigma_data in (0.5, round(spread, 2)):
            levels = {"sigma_min": config.get("sigma_min", 0.002), "sigma_max": config.get("sigma_max", 80.0)}
            yield {"_class_name": name, **levels, "sigma_data": sigma_data, "prediction_type": "epsilon"}
    for convention in (None, "sit"):
        yield {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            TIME_CONVENTION: convention,
        }


def _configs(config: Mapping[str, Any], spread: float) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(what is other, in words, the config) of other schedulers. Keys that fdistill adds stay in all of them."""
    seen = {""}
    for change in _changes(config, spread):
        new = {key: value for key, value in change.items() if config.get(key, _DEFAULTS.get(key)) != value}
        words = ", ".join(f"{key} {value}" for key, value in new.items() if value is not None)
        kinds = [name for name, keys in _CONCERNS.items() if "_class_name" in new or not keys.isdisjoint(new)]
        if words not in seen:
            yield " and ".join(kinds), words, {**config, **change}
        seen.add(words)
