"""The two updates of f-distill as plain functions: a batch in, a loss to call backward on out.

Devices, optimisers, logging and files belong to the caller. Each loss reaches the parameters of its own role only: the
other networks are frozen while the step's graph is built, so a plain `loss.backward()` is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fdistill import rng
from fdistill.denoiser import Denoiser
from fdistill.discriminator import Discriminator
from fdistill.divergence import Divergence
from fdistill.generator import OneStepGenerator
from fdistill.losses import (
    denoising_loss,
    denoising_weight,
    gan_discriminator_loss,
    gan_generator_loss,
    matching_loss,
    r1_penalty,
)
from fdistill.noise import NoiseSchedule, add_noise, karras_levels, noise_to_signal
from fdistill.ratio import DensityRatio

LevelDraw = Callable[[NoiseSchedule, Tensor], Tensor]


@dataclass(frozen=True)
class Networks:
    """The roles of a distillation. `tapped` is the network that the discriminator reads: `fake_score` or `teacher`."""

    teacher: Denoiser
    fake_score: Denoiser
    generator: OneStepGenerator
    discriminator: Discriminator
    tapped: Denoiser

    def taps(self, network: Denoiser) -> tuple[str, ...]:
        """The features to ask of `network`."""
        return self.discriminator.features if network is self.tapped else ()


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
def frozen(*modules: nn.Module) -> Iterator[None]:
    """The modules' parameters take part in the block as constants; gradients still flow through to their inputs."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def critic_step(
    networks: Networks,
    real_x0: Tensor,
    condition: Tensor | None,
    generator: torch.Generator,
    *,
    levels: LevelDraw = karras_levels,
    weighting: str = "edm",
    min_snr_gamma: float = 5.0,
    gan_weight: float = 1e-2,
    r1_weight: float = 0.0,
) -> StepResult:
    """One update of the critic: the fake-score network learns to denoise what the student makes now, and the
    discriminator to tell noised data from noised student samples.

    loss = mean(lambda(t) |fake_score(x_t) - x0|^2) + gan_weight (mean softplus(l_fake) + mean softplus(-l_real)
           + r1_weight / 2 mean |d l_real / d x_t|^2)

    It reaches the fake-score network and the discriminator. Where the heads sit on the fake-score network, the GAN
    loss trains that network as well (DMD2, arXiv 2405.14867); where they sit on the teacher, the heads alone. Real
    samples have levels of their own.

    Args:
        networks: the roles.
        real_x0: [B, C, H, W] data in [-1, 1].
        condition: [B] class labels of the data, also those the student is asked for; None if unconditional.
        generator: source of all randomness; its device is where the networks live.
        levels: (schedule, uniform draws [B]) -> t [B].
        weighting, min_snr_gamma: see `denoising_weight`.
        gan_weight, r1_weight: 0 leaves the term out.
    """
    batch, shape = len(real_x0), real_x0.shape[1:]
    schedule = networks.teacher.schedule
    with torch.no_grad():
        fake_x0 = networks.generator(rng.normal(generator, batch, shape), condition)
    with frozen(networks.teacher):
        t = levels(schedule, rng.uniform(generator, batch))
        x_t = add_noise(schedule, fake_x0, rng.normal(generator, batch, shape), t)
        prediction, features = networks.fake_score.denoise_with_features(
            x_t, t, condition, networks.taps(networks.fake_score)
        )
        weight = denoising_weight(
            weighting,
            schedule.alpha(t),
            schedule.sigma(t),
            sigma_data=networks.teacher.sigma_data,
            min_snr_gamma=min_snr_gamma,
        )
        denoising = denoising_loss(prediction, fake_x0, weight)
        loss = denoising.mean()
        logs = {"fake_score/denoising": PerSample(denoising.detach(), t)}
        if not gan_weight:
            return StepResult(loss, logs)

        discriminator, tapped = networks.discriminator, networks.tapped
        if tapped is networks.teacher:
            features = tapped.features(x_t, t, condition, discriminator.features)
        fake_logits = discriminator(features)
        t_real = levels(schedule, rng.uniform(generator, batch))
        real_x_t = add_noise(schedule, real_x0, rng.normal(generator, batch, shape), t_real).requires_grad_(
            r1_weight > 0
        )
        # The fused attention kernels have no second derivative, which R1 needs.
        with sdpa_kernel(SDPBackend.MATH) if r1_weight else nullcontext():
            real_logits = discriminator(tapped.features(real_x_t, t_real, condition, discriminator.features))
        gan_real = gan_discriminator_loss(real_logits, real=True)
        gan_fake = gan_discriminator_loss(fake_logits, real=False)
        loss = loss + gan_weight * (gan_real.mean() + gan_fake.mean())
        logs["discriminator/gan_real"] = PerSample(gan_real.detach(), t_real)
        logs["discriminator/gan_fake"] = PerSample(gan_fake.detach(), t)
        logs["discriminator/accuracy_real"] = PerSample((real_logits.detach().mean(1) > 0).float(), t_real)
        logs["discriminator/accuracy_fake"] = PerSample((fake_logits.detach().mean(1) < 0).float(), t)
        if r1_weight:
            penalty = r1_penalty(real_logits, real_x_t)
            loss = loss + gan_weight * r1_weight / 2 * penalty.mean()
            logs["discriminator/r1"] = PerSample(penalty.detach(), t_real)
    return StepResult(loss, logs)


def generator_step(
    networks: Networks,
    condition: Tensor | None,
    generator: torch.Generator,
    *,
    ratio: DensityRatio,
    divergence: str | Divergence,
    batch_size: int,
    levels: LevelDraw = karras_levels,
    ratio_ramp: float = 1.0,
    gan_weight: float = 1e-3,
    backend: str = "auto",
) -> StepResult:
    """One update of the student along h(r) (score_teacher - score_fake), plus the GAN term.

    loss = mean(matching_loss(x0, teacher_x0, fake_x0, weight=h)) + gan_weight mean softplus(-l_fake)

    It reaches the student alone. Logits are read at the same (x_t, t) as the score difference; where the heads sit on
    the network that is evaluated there anyway, they cost no evaluation of their own.

    Args:
        networks: the roles.
        condition: [B] class labels, or None.
        generator: source of all randomness.
        ratio: turns logits into weights; its bins are updated.
        divergence: a name that `get_divergence` knows, or a Divergence.
        batch_size: B.
        levels: (schedule, uniform draws [B]) -> t [B].
        ratio_ramp: in [0, 1]: the weight is 1 + ratio_ramp (h - 1), for the time in which the discriminator is
            untrained.
        gan_weight: 0 leaves the term out.
        backend: of `matching_loss`.
    """
    schedule = networks.teacher.schedule
    shape = networks.generator.sample_shape
    x0 = networks.generator(rng.normal(generator, batch_size, shape), condition)
    t = levels(schedule, rng.uniform(generator, batch_size))
    noise = rng.normal(generator, batch_size, shape)
    with frozen(networks.teacher, networks.fake_score, networks.discriminator):
        x_t = add_noise(schedule, x0, noise, t)
        # Without a GAN term nothing needs a gradient in x_t, and no network keeps activations.
        if not gan_weight:
            x_t = x_t.detach()
        predictions, features = {}, {}
        for network in (networks.teacher, networks.fake_score):
            taps = networks.taps(network)
            predictions[network], tapped = network.denoise_with_features(
                x_t if taps else x_t.detach(), t, condition, taps, x0_grad=False
            )
            features.update(tapped)
        logits = networks.discriminator(features)

    sigma = noise_to_signal(schedule, t) if ratio.bin_edges == "log-sigma" else t
    result = ratio.evaluate(logits, sigma, divergence)
    weight = 1 + ratio_ramp * (result.weight - 1)
    matching = matching_loss(
        x0, predictions[networks.teacher], predictions[networks.fake_score], weight=weight, backend=backend
    )
    loss = matching.mean()
    logs = {
        "generator/matching": PerSample(matching.detach(), t),
        "generator/h": PerSample(result.h, t),
        "generator/weight": PerSample(weight, t),
        "generator/clamped_ratios": PerSample(result.clamped, t),
    }
    if gan_weight:
        gan = gan_generator_loss(logits)
        loss = loss + gan_weight * gan.mean()
        logs["generator/gan"] = PerSample(gan.detach(), t)
    return StepResult(loss, logs)
