"""DiffRatio: both updates use only a classifier that distinguishes data from student samples at all noise levels.

No score network is evaluated: the gradient of the classifier c(x_t, t) = log(p_t / q_t) is the score difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdistill.base import rng
from fdistill.condition import Condition
from fdistill.losses import score_difference_loss, score_difference_weight
from fdistill.noise import karras_levels
from fdistill.rollout import Rollout
from fdistill.step.critic import R1, discriminator_losses
from fdistill.step.roles import LevelDraw, Networks, PerSample, StepResult, frozen, renoise


def ratio_critic_step(
    networks: Networks,
    real_x0: Tensor,
    condition: Condition | None,
    generator: torch.Generator,
    *,
    fake_x0: Tensor | None = None,
    levels: LevelDraw = karras_levels,
    r1_weight: float = 0.0,
    r1_sigma: float | None = None,
    rollout: Rollout | None = None,
    backend: str = "auto",
) -> StepResult:
    """One update of the classifier: logistic regression of noised data against noised student samples.

    loss = mean softplus(-l_real) + mean softplus(l_fake) + r1_weight / 2 mean |d l_real / d x_t|^2

    The last term is another one with `r1_sigma`, see `critic_step`.

    The loss trains `networks.discriminator` and the part of `networks.tapped` below the tapped features.

    Args:
        networks: the roles; `tapped` is trained, and its decoder is never evaluated.
        real_x0: [B, C, H, W] data in [-1, 1].
        condition: [B] class labels of the data, given to the student as well; None if unconditional.
        generator: source of all randomness.
        levels: (schedule, uniform draws [B]) -> t [B].
        fake_x0, rollout, r1_weight, r1_sigma: as in `critic_step`.
        backend: "auto", "triton" or "reference", for noise, weights and losses.
    """
    batch, schedule = len(real_x0), networks.teacher.schedule
    discriminator, tapped = networks.tapped_discriminator()
    if fake_x0 is None:
        with torch.no_grad():
            fake_x0 = networks.draw_samples(generator, batch, condition, rollout)
    t = levels(schedule, rng.uniform(generator, batch))
    _, (network_input,), _ = renoise([tapped], fake_x0, t, generator, backend=backend)
    logits = discriminator(tapped.features(network_input, t, condition, discriminator.features))
    fake = PerSample(logits, t)
    r1 = R1(r1_weight, r1_sigma)
    losses = discriminator_losses(networks, real_x0, condition, generator, fake, levels=levels, r1=r1, backend=backend)
    return StepResult(losses.real.mean() + losses.fake.mean() + losses.penalty, losses.logs)


def diffratio_step(
    networks: Networks,
    condition: Condition | None,
    generator: torch.Generator,
    *,
    batch_size: int,
    levels: LevelDraw = karras_levels,
    weighting: str = "vsd",
    rollout: Rollout | None = None,
    backend: str = "auto",
) -> StepResult:
    """One update of the student along the gradient of the classifier's logit, which replaces s_teacher - s_fake.

    In units of x0 the difference is sigma^2 / alpha d l / d x_t; loss = mean(`score_difference_loss`). It trains
    only the student.

    Args:
        weighting: how the difference is weighted over noise levels, see `score_difference_weight`.

    Other arguments are as in `ratio_critic_step`.
    """
    schedule = networks.teacher.schedule
    discriminator, tapped = networks.tapped_discriminator()
    x0 = networks.draw_samples(generator, batch_size, condition, rollout)
    t = levels(schedule, rng.uniform(generator, batch_size))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    with frozen(tapped, discriminator):
        _, (network_input,), (form,) = renoise([tapped], x0.detach(), t, generator, backend=backend)
        network_input.requires_grad_(True)
        logits = discriminator(tapped.features(network_input, t, condition, discriminator.features)).float()
        logits = logits.reshape(batch_size, -1).mean(1)
        (slope,) = torch.autograd.grad(logits.sum(), network_input)
    weight = sigma.square() / alpha.clamp(min=1e-3) * score_difference_weight(weighting, alpha, sigma)
    if form.input_scale is not None:  # the slope is with respect to the network's input, not x_t
        weight = weight * form.input_scale
    matching = score_difference_loss(x0, slope, torch.zeros_like(slope), weight, backend=backend)
    logs = {"generator/matching": PerSample(matching.detach(), t), "generator/logit": PerSample(logits.detach(), t)}
    return StepResult(matching.mean(), logs)
