"""The networks that take part in a step, the result of a step, and helpers that all steps share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fdistill.base import rng
from fdistill.base.errors import ArgumentError
from fdistill.condition import Condition
from fdistill.denoiser import Denoiser
from fdistill.discriminator import ChannelMean, Discriminator
from fdistill.divergence import Divergence, Function, get_divergence
from fdistill.generator import FewStepGenerator, Student
from fdistill.guidance import GuidedDenoiser
from fdistill.kernels import renoise as kernels
from fdistill.noise import NoiseSchedule
from fdistill.prediction import Preconditioning
from fdistill.ratio import DensityRatio
from fdistill.rollout import Rollout

__all__ = ["LevelDraw", "Networks", "PerSample", "StepResult", "frozen", "renoise"]

#: The roles that are trained: attributes of `Networks`, sections of a config, and the first part of what steps log.
ROLES = ("generator", "fake_score", "discriminator")

LevelDraw = Callable[[NoiseSchedule, Tensor], Tensor]


@dataclass(frozen=True)
class Networks:
    """The roles of a distillation.

    Attributes:
        generator: (noise, condition) -> x0, with a `sample_shape` (C, H, W): a `Student`, or any other differentiable
            module, such as an image or a field seen under random views.
        discriminator: None for methods that have none.
        tapped: the network that the discriminator reads: `fake_score` or `teacher`; None without one.
        compared: the guided fake score for the student's update; None means `fake_score` without guidance.
        learning: the guided fake score for its own update; None means `fake_score` without guidance.
    """

    teacher: Denoiser
    fake_score: Denoiser
    generator: nn.Module
    discriminator: Discriminator | ChannelMean | None = None
    tapped: Denoiser | None = None
    compared: Denoiser | None = None
    learning: Denoiser | None = None

    @property
    def pair(self) -> tuple[Denoiser, Denoiser]:
        """Teacher and fake score, whose difference the student follows."""
        return self.teacher, self.compared or self.fake_score

    @property
    def unguided(self) -> Networks:
        """The same with the teacher's conditional prediction alone."""
        if not isinstance(self.teacher, GuidedDenoiser):
            return self
        plain = self.teacher.denoiser
        return replace(self, teacher=plain, tapped=plain if self.tapped is self.teacher else self.tapped)

    def resize(self, height: int, width: int) -> None:
        """Sets the height and width of all networks' samples, as `Denoiser.resize`; raises what it does."""
        student = self.generator if isinstance(self.generator, Student) else None
        for network in (self.teacher, self.fake_score, self.compared, self.learning, student):
            if network is not None:
                network.resize(height, width)

    def taps(self, network: Denoiser) -> tuple[str, ...]:
        """The names of the features of `network` that the discriminator reads; () if it reads none."""
        if self.discriminator is None:
            return ()
        plain = self.fake_score if network in (self.compared, self.learning) else network
        return self.discriminator.features if plain is self.tapped else ()

    def tapped_discriminator(self) -> tuple[Discriminator | ChannelMean, Denoiser]:
        """The discriminator and the network it reads; ArgumentError if there is none."""
        if self.discriminator is None or self.tapped is None:
            raise ArgumentError(
                "networks: this step needs a discriminator's logits; expected `discriminator` and `tapped`, got None"
            )
        return self.discriminator, self.tapped

    def draw_samples(
        self, generator: torch.Generator, batch: int, condition: Condition | None, rollout: Rollout | None = None
    ) -> Tensor:
        """Student samples [batch, C, H, W]; the rollout is for a `FewStepGenerator`, whose default it is."""
        student: Any = self.generator
        shape = student.noise_shape(rollout) if isinstance(student, Student) else student.sample_shape
        noise = rng.normal(generator, batch, shape)
        x0: Tensor = student(noise, condition) if rollout is None else student(noise, condition, rollout)
        return x0

    def draw_last_step(
        self, generator: torch.Generator, batch: int, condition: Condition | None, rollout: Rollout | None = None
    ) -> tuple[Tensor, Tensor]:
        """Samples [batch, C, H, W] of a `FewStepGenerator`, and the noisy input of its last step; ArgumentError for
        other generators.
        """
        student = self.generator
        if not isinstance(student, FewStepGenerator):
            raise ArgumentError(f"segment: expected a student of several steps, got {type(student).__name__}")
        return student.last_step(rng.normal(generator, batch, student.noise_shape(rollout)), condition, rollout)

    def draw_samples_with_noise(
        self, generator: torch.Generator, batch: int, condition: Condition | None
    ) -> tuple[Tensor, Tensor]:
        """Samples [batch, C, H, W] of a `Student`, and the noise [batch, K, C, H, W] that it predicted while sampling;
        ArgumentError for generators that predict none.
        """
        student = self.generator
        if not isinstance(student, Student):
            raise ArgumentError(
                f"noise_kl_weight: {type(student).__name__} predicts no noise while sampling; expected 0, or a Student"
            )
        return student.sample_with_predictions(rng.normal(generator, batch, student.sample_shape), condition)


class Noised(NamedTuple):
    """Noised samples x_t [B, C, H, W] at levels t, and each network's input and preconditioning at these levels."""

    x_t: Tensor
    inputs: list[Tensor]
    forms: list[Preconditioning]


def renoise(
    networks: Sequence[Denoiser], x0: Tensor, t: Tensor, generator: torch.Generator, *, backend: str = "auto"
) -> Noised:
    """Noises x0 [B, C, H, W] to levels t with the generator, for networks that share a schedule. Gradients flow from
    the inputs and x_t to x0. The noise of a sample does not depend on how a batch is split over processes and parts.
    """
    main, schedule = networks[0], networks[0].schedule
    _, dtype, channels_last = main.input_form()
    form = main.preconditioning(t)
    x_t, network_input = kernels.renoise_seeded(
        x0,
        rng.device_seed(generator),
        rng.share()[0] * len(x0),
        schedule.alpha(t),
        schedule.sigma(t),
        input_scale=form.input_scale,
        input_dtype=dtype,
        channels_last=channels_last,
        backend=backend,
    )
    alike = [network.input_form() == main.input_form() for network in networks]
    return Noised(
        x_t,
        [network_input if a else network.network_input(x_t, t) for a, network in zip(alike, networks, strict=True)],
        [form if a else network.preconditioning(t) for a, network in zip(alike, networks, strict=True)],
    )


def checked_divergence(divergence: str | Divergence | Function, ratio: DensityRatio | None) -> Divergence:
    """The divergence as `get_divergence` returns it; ArgumentError if it needs a ratio and `ratio` is None."""
    resolved = get_divergence(divergence)
    if resolved.needs_ratio and ratio is None:
        raise ArgumentError(f"ratio: divergence {resolved.name!r} weighs by a density ratio; expected a DensityRatio")
    return resolved


class PerSample(NamedTuple):
    """A logged quantity [B] and the level t [B] at which each sample had it."""

    value: Tensor
    t: Tensor


@dataclass(frozen=True)
class StepResult:
    """`loss` is the scalar to call backward on; `logs` are detached and stay on the device."""

    loss: Tensor
    logs: dict[str, PerSample]


@contextmanager
def frozen(*modules: nn.Module | None) -> Iterator[None]:
    """Freezes the modules' parameters inside the block; gradients still flow through the modules to their inputs."""
    parameters = [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
