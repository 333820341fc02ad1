"""One update of the critic: the fake-score network, and the discriminator where the method has one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fdistill.base import rng
from fdistill.condition import Condition
from fdistill.losses import (
    approximate_r1,
    denoising_loss,
    denoising_weight,
    gan_discriminator_loss,
    r1_penalty,
)
from fdistill.noise import karras_levels
from fdistill.rollout import Rollout
from fdistill.step.roles import LevelDraw, Networks, PerSample, StepResult, frozen, renoise


def critic_step(
    networks: Networks,
    real_x0: Tensor,
    condition: Condition | None,
    generator: torch.Generator,
    *,
    fake_x0: Tensor | None = None,
    levels: LevelDraw = karras_levels,
    weighting: str = "edm",
    min_snr_gamma: float = 5.0,
    gan_weight: float = 1e-2,
    gan_weighting: str = "uniform",
    shared_noise: bool = False,
    r1_weight: float = 0.0,
    r1_sigma: float | None = None,
    rollout: Rollout | None = None,
    critic_condition: Condition | None = None,
    backend: str = "auto",
) -> StepResult:
    """One update of the critic: the fake-score network learns to denoise the student's current samples, and
    the discriminator to distinguish noised data from noised student samples.

    loss = mean(lambda(t) |fake_score(x_t) - x0|^2) + gan_weight (mean softplus(l_fake) + mean softplus(-l_real)
           + r1_weight / 2 mean |d l_real / d x_t|^2)

    With `r1_sigma` the last term is r1_weight mean (l_real(x_t) - l_real(x_t + r1_sigma n))^2, n standard normal.

    The loss trains the fake-score network and the discriminator. With heads on the fake-score network, the GAN loss
    trains that network as well (DMD2, arXiv 2405.14867); with heads on the teacher, it trains only the heads.

    Args:
        networks: the roles.
        real_x0: [B, C, H, W] data in [-1, 1]; without a GAN term only its shape is used.
        condition: [B] class labels or prompts of the data, given to the student as well; None if unconditional.
        generator: source of all randomness; its device is where the networks live.
        fake_x0: [B, C, H, W] samples of the student with `condition`, drawn before; None draws them here.
        levels: (schedule, uniform draws [B]) -> t [B].
        weighting, min_snr_gamma: see `denoising_weight`.
        gan_weight, r1_weight: 0 leaves the term out.
        r1_sigma: standard deviation of the noise of the approximate penalty; None means the exact one.
        gan_weighting: weight of the GAN losses over noise levels, a name for `denoising_weight`; SiDA uses "edm".
        shared_noise: whether sample i of the data gets the level and the noise of student sample i, so that the two
            differ by the image alone (FastGen's Flux and Qwen-Image); by default both are drawn separately.
        rollout: of a `FewStepGenerator`; None passes all of its levels.
        critic_condition: the condition for the critic, such as `condition` with some rows replaced by the null class or
            the null prompt; None means `condition` itself.
        backend: "auto", "triton" or "reference", for noise, weights and losses.
    """
    batch, schedule = len(real_x0), networks.teacher.schedule

    def level_weight(name: str, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return denoising_weight(name, alpha, sigma, sigma_data=networks.teacher.sigma_data, min_snr_gamma=min_snr_gamma)

    if fake_x0 is None:
        with torch.no_grad():
            fake_x0 = networks.draw_samples(generator, batch, condition, rollout)
    condition = condition if critic_condition is None else critic_condition
    fake_score = networks.learning or networks.fake_score
    real_draws = generator.clone_state() if shared_noise else generator
    with frozen(networks.teacher):
        t = levels(schedule, rng.uniform(generator, batch))
        read = [fake_score]
        if gan_weight and networks.tapped is networks.teacher:
            read.append(networks.teacher)
        x_t, inputs, forms = renoise(read, fake_x0, t, generator, backend=backend)
        taps = networks.taps(fake_score) if gan_weight else ()
        prediction, features = fake_score.predict(inputs[0], t, condition, taps, form=forms[0])
        denoising = denoising_loss(prediction, fake_x0, level_weight(weighting, t), x_t=x_t, backend=backend)
        loss = denoising.mean()
        logs = {"fake_score/denoising": PerSample(denoising.detach(), t)}
        if not gan_weight:
            return StepResult(loss, logs)

        discriminator, tapped = networks.tapped_discriminator()
        if tapped is networks.teacher:
            features = tapped.features(inputs[-1], t, condition, discriminator.features)
        gan = discriminator_losses(
            networks,
            real_x0,
            condition,
            real_draws,
            PerSample(discriminator(features), t),
            levels=levels,
            r1=R1(r1_weight, r1_sigma),
            backend=backend,
        )
        gan_loss = (level_weight(gan_weighting, gan.t_real) * gan.real).mean()
        gan_loss = gan_loss + (level_weight(gan_weighting, t) * gan.fake).mean() + gan.penalty
        return StepResult(loss + gan_weight * gan_loss, {**logs, **gan.logs})


class R1(NamedTuple):
    """The R1 penalty: its weight, 0 for none, and the noise of the approximate one; `sigma` None is the exact one."""

    weight: float
    sigma: float | None = None

    @property
    def exact(self) -> bool:
        """Whether the gradient of the logits is needed."""
        return self.weight > 0 and self.sigma is None


class DiscriminatorLosses(NamedTuple):
    """Per-sample losses [B] of real and fake samples, the R1 term (0-d), levels of the real samples, and logs."""

    real: Tensor
    fake: Tensor
    penalty: Tensor
    t_real: Tensor
    logs: dict[str, PerSample]


def discriminator_losses(
    networks: Networks,
    real_x0: Tensor,
    condition: Condition | None,
    generator: torch.Generator,
    fake: PerSample,
    *,
    levels: LevelDraw,
    r1: R1,
    backend: str = "auto",
) -> DiscriminatorLosses:
    """The discriminator's losses, given its logits `fake.value` [B, H] on student samples noised to levels `fake.t`."""
    batch, schedule = len(real_x0), networks.teacher.schedule
    discriminator, tapped = networks.tapped_discriminator()
    t_real = levels(schedule, rng.uniform(generator, batch))
    x_t, (real_input,), (form,) = renoise([tapped], real_x0, t_real, generator, backend=backend)
    real_input.requires_grad_(r1.exact)
    # The fused attention kernels have no second derivative, which exact R1 needs.
    with sdpa_kernel(SDPBackend.MATH) if r1.exact else nullcontext():
        real_logits = discriminator(tapped.features(real_input, t_real, condition, discriminator.features))
    real = gan_discriminator_loss(real_logits, real=True)
    fake_loss = gan_discriminator_loss(fake.value, real=False)
    logs = {
        "discriminator/gan_real": PerSample(real.detach(), t_real),
        "discriminator/gan_fake": PerSample(fake_loss.detach(), fake.t),
        "discriminator/accuracy_real": PerSample((real_logits.detach().mean(1) > 0).float(), t_real),
        "discriminator/accuracy_fake": PerSample((fake.value.detach().mean(1) < 0).float(), fake.t),
    }
    penalty = torch.zeros((), device=real_x0.device)
    if r1.exact:
        per_sample = r1_penalty(real_logits, real_input)
        if form.input_scale is not None:
            per_sample = form.input_scale.square() * per_sample
        penalty = r1.weight / 2 * per_sample.mean()
    elif r1.weight and r1.sigma is not None:
        moved = x_t + r1.sigma * rng.normal(generator, batch, real_x0.shape[1:])
        moved_input = tapped.network_input(moved, t_real)
        moved_logits = discriminator(tapped.features(moved_input, t_real, condition, discriminator.features))
        per_sample = approximate_r1(real_logits, moved_logits)
        penalty = r1.weight * per_sample.mean()
    if r1.weight:
        logs["discriminator/r1"] = PerSample(per_sample.detach(), t_real)
    return DiscriminatorLosses(real, fake_loss, penalty, t_real, logs)
