"""Updates of the student whose gradient passes through both score networks: SiD, SiDA, SIM, Uni-Instruct.

The evaluations of teacher and fake score keep their graphs, so a step needs about twice the memory of
`matching.generator_step`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fdistill.base import rng
from fdistill.base.distributed import global_mean
from fdistill.condition import Condition
from fdistill.divergence import Divergence, Function
from fdistill.kernels.checks import widened
from fdistill.losses import (
    ImplicitMeans,
    gan_generator_loss,
    implicit_means,
    score_difference_weight,
    sid_loss,
    sim_loss,
    uni_instruct_loss,
)
from fdistill.noise import karras_levels
from fdistill.ratio import DensityRatio
from fdistill.rollout import Rollout
from fdistill.step.evaluated import evaluate, log_ratio
from fdistill.step.roles import LevelDraw, Networks, PerSample, StepResult, checked_divergence


class _Compared(NamedTuple):
    t: Tensor
    means: ImplicitMeans
    logits: Tensor | None


def _compare(
    networks: Networks,
    condition: Condition | None,
    generator: torch.Generator,
    batch_size: int,
    levels: LevelDraw,
    *,
    rollout: Rollout | None,
    read_logits: bool,
    backend: str,
) -> _Compared:
    x0 = networks.draw_samples(generator, batch_size, condition, rollout)
    t = levels(networks.teacher.schedule, rng.uniform(generator, batch_size))
    x_t, teacher, fake, logits = evaluate(
        networks, x0, t, condition, generator, read_logits=read_logits, output_grad=True, backend=backend
    )
    return _Compared(t, implicit_means(x0, teacher, fake, x_t=x_t, backend=backend), logits)


def _scale(networks: Networks, compared: _Compared, weighting: str) -> Tensor:
    """The factors [B] of the objective."""
    if weighting == "normalised":
        return 1 / compared.means.normaliser()
    schedule = networks.teacher.schedule
    return score_difference_weight(weighting, schedule.alpha(compared.t), schedule.sigma(compared.t))


def _result(
    compared: _Compared, objective: Tensor, scale: Tensor, gan_weight: float, logs: dict[str, PerSample]
) -> StepResult:
    t = compared.t
    logs["generator/implicit"] = PerSample((scale * objective).detach(), t)
    if compared.logits is not None:
        logs["generator/log_ratio"] = PerSample(log_ratio(compared.logits), t)
    if gan_weight and compared.logits is not None:
        gan = gan_generator_loss(compared.logits)
        objective = objective + gan_weight * gan
        logs["generator/gan"] = PerSample(gan.detach(), t)
    return StepResult((scale * objective).mean(), logs)


def sid_step(
    networks: Networks,
    condition: Condition | None,
    generator: torch.Generator,
    *,
    batch_size: int,
    levels: LevelDraw = karras_levels,
    alpha: float = 1.0,
    weighting: str = "normalised",
    gan_weight: float = 0.0,
    rollout: Rollout | None = None,
    backend: str = "auto",
) -> StepResult:
    """One update of the student by score identity distillation.

    loss = mean((`sid_loss` + gan_weight softplus(-l_fake)) / mean|x0 - teacher_x0|)

    SiD (arXiv 2404.04057) has no GAN term, SiDA (arXiv 2410.14919) has one and alpha = 1. The loss trains
    only the student.

    Args:
        networks: the roles; SiDA needs a discriminator.
        condition: [B] class labels, or None.
        generator: source of all randomness.
        batch_size: B.
        levels: (schedule, uniform draws [B]) -> t [B].
        alpha: see `sid_loss`.
        weighting: "normalised" divides by mean|x0 - teacher_x0|, as published. That factor depends on x0, so the
            implicit gradient does not hold exactly: the update is useful, but not the gradient of a divergence. With
            "uniform" and "vsd" (`score_difference_weight`), which depend only on the level, it is.
        gan_weight: 0 leaves the term out.
        rollout: of a `FewStepGenerator`; None passes all of its levels. The last evaluation is trained, as in few-step
            SiD (arXiv 2505.12674).
        backend: "auto", "triton" or "reference", for noise, weights and losses.
    """
    compared = _compare(
        networks, condition, generator, batch_size, levels, rollout=rollout, read_logits=gan_weight > 0, backend=backend
    )
    objective = sid_loss(compared.means, alpha=alpha)
    return _result(compared, objective, _scale(networks, compared, weighting), gan_weight, {})


def sim_step(
    networks: Networks,
    condition: Condition | None,
    generator: torch.Generator,
    *,
    batch_size: int,
    levels: LevelDraw = karras_levels,
    huber_c: float = 0.03,
    rollout: Rollout | None = None,
    backend: str = "auto",
) -> StepResult:
    """One update of the student by score implicit matching (arXiv 2410.16794): loss = mean(`sim_loss`), which trains
    only the student. Arguments are as in `sid_step`.
    """
    compared = _compare(
        networks, condition, generator, batch_size, levels, rollout=rollout, read_logits=False, backend=backend
    )
    objective = sim_loss(compared.means, huber_c=huber_c)
    return _result(compared, objective, torch.ones_like(compared.t), 0.0, {})


def uni_instruct_step(
    networks: Networks,
    condition: Condition | None,
    generator: torch.Generator,
    *,
    batch_size: int,
    divergence: str | Divergence | Function,
    ratio: DensityRatio | None = None,
    levels: LevelDraw = karras_levels,
    ratio_ramp: float = 1.0,
    weighting: str = "normalised",
    gan_weight: float = 0.0,
    detach_weight: bool = False,
    rollout: Rollout | None = None,
    backend: str = "auto",
) -> StepResult:
    """One update of the student by the expanded f-divergence (Uni-Instruct, arXiv 2505.20755).

    loss = mean((`uni_instruct_loss` / mean(h) + gan_weight softplus(-l_fake)) / mean|x0 - teacher_x0|)

    The discriminator gives the density ratio of each sample, and the gradient passes through it, except where the ratio
    is clamped: there the objective is biased, as with `detach_weight`. The loss trains only the student.

    Args:
        divergence: anything `get_divergence` takes.
        ratio: turns logits into ratios; its bins are updated. Needed unless h is constant.
        ratio_ramp: in [0, 1]: 0 is reverse KL, 1 is the divergence, and the loss is linear in between.
        detach_weight: True stops the gradient at the ratio: cheaper, but biased unless h is constant.

    Other arguments are as in `sid_step`.

    Raises:
        ArgumentError: the divergence needs a ratio, and `ratio` is None.
    """
    divergence = checked_divergence(divergence, ratio)
    read = gan_weight > 0 or divergence.needs_ratio
    compared = _compare(
        networks, condition, generator, batch_size, levels, rollout=rollout, read_logits=read, backend=backend
    )
    t, means, logits = compared
    h, slope = torch.ones_like(t), torch.zeros_like(t)
    logs = {}
    if ratio is not None and logits is not None and divergence.needs_ratio:
        level = ratio.bin_level(networks.teacher.schedule, t)
        r, clamped = ratio.ratio(logits.detach() if detach_weight else logits, level)
        h, slope = divergence.weight(widened(r)), divergence.weight_slope(widened(r))
        mean = global_mean(h)
        logs["generator/h"] = PerSample(h.detach().clamp(max=torch.finfo(torch.float32).max).float(), t)
        logs["generator/weight"] = PerSample((h / mean).detach().float(), t)
        logs["generator/clamped_ratios"] = PerSample(clamped, t)
        h, slope = (1 + ratio_ramp * (h / mean - 1)).float(), (ratio_ramp * slope / mean).float()
    objective = uni_instruct_loss(means, h, slope)
    return _result(compared, objective, _scale(networks, compared, weighting), gan_weight, logs)
