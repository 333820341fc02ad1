"""The update of the student along a score difference that is treated as a constant: f-distill, DMD, DMD2,
Diff-Instruct, VSD.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fdistill.base import rng
from fdistill.base.distributed import sum_over_processes
from fdistill.condition import Condition
from fdistill.divergence import Divergence, Function
from fdistill.losses import (
    NORMALISER_FLOOR,
    gan_generator_loss,
    matching_loss,
    noise_kl_loss,
    regression_loss,
    score_difference_loss,
    score_difference_weight,
)
from fdistill.noise import NoiseSchedule, karras_levels
from fdistill.ratio import DensityRatio
from fdistill.rollout import Rollout
from fdistill.step.augmentation import Augmentation, augmentation_loss
from fdistill.step.diversity import Diversity, draw_supervised
from fdistill.step.evaluated import Evaluated, evaluate, log_ratio
from fdistill.step.pairs import Pairs, student_of_pairs
from fdistill.step.roles import LevelDraw, Networks, PerSample, StepResult, checked_divergence
from fdistill.step.segment import Segment, segment_loss


def generator_step(
    networks: Networks,
    condition: Condition | None,
    generator: torch.Generator,
    *,
    batch_size: int,
    divergence: str | Divergence | Function = "reverse-kl",
    ratio: DensityRatio | None = None,
    levels: LevelDraw = karras_levels,
    weighting: str = "normalised",
    normaliser_floor: float = NORMALISER_FLOOR,
    ratio_ramp: float = 1.0,
    gan_weight: float = 1e-3,
    gan_gradient_ratio: float = 0.0,
    augmentation: Augmentation | None = None,
    diversity: Diversity | None = None,
    segment: Segment | None = None,
    noise_kl_weight: float = 0.0,
    image_loss: Callable[[Tensor], Tensor] | None = None,
    image_weight: float = 0.0,
    image_gradient_ratio: float = 0.0,
    reward_loss: Callable[[Tensor], Tensor] | None = None,
    reward_weight: float = 0.0,
    reward_gradient_ratio: float = 0.0,
    pairs: Pairs | None = None,
    regression_weight: float = 0.25,
    rollout: Rollout | None = None,
    backend: str = "auto",
) -> StepResult:
    """One update of the student along h(r) (score_teacher - score_fake), plus the other terms.

    loss = mean(matching_loss(x0, teacher_x0, fake_x0, weight=h)) + augmentation.weight mean augmentation_loss
           + diversity.weight mean |first x0 - teacher's|^2 + segment.weight mean segment_loss
           + gan_weight mean softplus(-l_fake) + noise_kl_weight mean KL(predicted noise || normal)
           + image_weight mean image_loss(x0) + reward_weight mean reward_loss(x0)
           + regression_weight mean |student(z) - teacher's ODE(z)|^2

    The loss trains only the student. Logits are computed at the same (x_t, t) as the score difference; heads on a
    network that is evaluated there anyway need no evaluation of their own.

    Args:
        networks: the roles.
        condition: [B] class labels, prompts, or None.
        generator: source of all randomness.
        batch_size: B.
        divergence: anything `get_divergence` takes; with reverse KL h = 1, and no ratio is needed.
        ratio: turns logits into weights; its bins are updated. Needed unless h is constant.
        levels: (schedule, uniform draws [B]) -> t [B].
        weighting: "normalised" divides by mean|x0 - teacher_x0|, as DMD does (`matching_loss`); other names are
            those of `score_difference_weight`.
        normaliser_floor: the least that "normalised" divides by.
        ratio_ramp: in [0, 1]: the weight is 1 + ratio_ramp (h - 1). Values below 1 are for the first iterations, while
            the discriminator is untrained.
        gan_weight: 0 leaves the term out.
        gan_gradient_ratio: above 0, gan_weight is chosen anew in every update, so that the norm of the GAN term's
            gradient on x0 is this many times that of the matching loss's, over the global batch; the weight is logged.
            0 keeps gan_weight as it is.
        augmentation: if it is given, matching is without the teacher's guidance, which becomes a term of its own at
            levels of its own (`augmentation_loss`); the balance of other terms counts it with matching.
        diversity: if it is given, the student's first step learns from the teacher's trajectory and the other terms
            train the steps after it, all at once (`draw_supervised`); `rollout` is not read.
        segment: if it is given, the step of `rollout` also has to agree with a detour through the teacher
            (`segment_loss`).
        noise_kl_weight: weight of the KL term on the noise that `Student.sample_with_predictions` predicts
            (One-Way Ticket, arXiv 2505.21960); 0 leaves the term out.
        image_loss: x0 [B, C, H, W] -> [B], such as a `ClipHinge`; None leaves the term out.
        image_weight, image_gradient_ratio: as those of the GAN term.
        reward_loss: x0 [B, C, H, W] -> [B], such as a `RewardLoss`; None leaves the term out.
        reward_weight, reward_gradient_ratio: as those of the GAN term.
        pairs: for the regression term (DMD, arXiv 2311.18828); None leaves it out.
        regression_weight: weight of that term.
        rollout: of a `FewStepGenerator`; None passes all of its levels.
        backend: "auto", "triton" or "reference", for noise, weights and losses.

    Raises:
        ArgumentError: the divergence needs a ratio, and `ratio` is None.
    """
    divergence = checked_divergence(divergence, ratio)
    schedule = networks.teacher.schedule
    x0, terms = _drawn(networks, condition, generator, batch_size, rollout, (diversity, segment, noise_kl_weight))
    t = levels(schedule, rng.uniform(generator, batch_size))
    evaluated = evaluate(
        networks if augmentation is None else networks.unguided,
        x0 if gan_weight else x0.detach(),  # without a GAN term nothing needs a gradient in x_t
        t,
        condition,
        generator,
        read_logits=gan_weight > 0 or divergence.needs_ratio,
        output_grad=False,
        backend=backend,
    )
    weight, logs = None, {} if evaluated.logits is None else _logs(t, log_ratio=log_ratio(evaluated.logits))
    if ratio is not None and evaluated.logits is not None and divergence.needs_ratio:
        level = ratio.bin_level(schedule, t)
        weighted = ratio.evaluate(evaluated.logits, level, divergence, ramp=ratio_ramp, backend=backend)
        weight = weighted.weight
        logs |= _logs(t, h=weighted.h, weight=weighted.weight, clamped_ratios=weighted.clamped)
    total = _Total(_matching(x0, evaluated, weight, (weighting, normaliser_floor), schedule, t, backend), t, logs)
    if augmentation is not None:
        student = networks.generator
        levels_passed = rollout.levels if rollout is not None else getattr(student, "levels", (schedule.t_max,))
        entered = levels_passed[-1]
        added = augmentation_loss(networks, x0, condition, generator, augmentation, entered, backend=backend)
        total.add("augmentation", augmentation.weight, *added)
    beside = []
    if gan_weight and evaluated.logits is not None:
        gan = _Term("gan", gan_weight, gan_generator_loss(evaluated.logits), t)
        beside.append((gan, gan_gradient_ratio))
    if image_loss is not None:
        beside.append((_Term("image", image_weight, image_loss(x0), t), image_gradient_ratio))
    if reward_loss is not None:
        beside.append((_Term("reward_loss", reward_weight, reward_loss(x0), t), reward_gradient_ratio))
    total.add_beside(beside, x0)
    for term in terms:
        total.add(*term)
    if pairs is not None:
        regression = regression_loss(student_of_pairs(networks, pairs), pairs.x0)
        total.add("regression", regression_weight, regression, torch.full_like(regression, pairs.entered(schedule)))
    return StepResult(total.loss, total.logs)


class _Term(NamedTuple):
    """A term of the loss by name: its weight, and its losses [B] at levels t [B]."""

    name: str
    weight: float
    losses: Tensor
    t: Tensor


def _drawn(
    networks: Networks,
    condition: Condition | None,
    generator: torch.Generator,
    batch_size: int,
    rollout: Rollout | None,
    wanted: tuple[Diversity | None, Segment | None, float],
) -> tuple[Tensor, list[_Term]]:
    """The samples of an update, and the terms about how they came to be."""
    diversity, segment, noise_kl_weight = wanted

    def term(name: str, weight: float, losses: Tensor, level: float) -> list[_Term]:
        return [_Term(name, weight, losses, torch.full_like(losses, level))]

    if diversity is not None:
        x0, first_step = draw_supervised(networks, generator, batch_size, condition, diversity)
        return x0, term("diversity", diversity.weight, first_step, diversity.levels[0])
    if segment is not None:
        x0, x_t = networks.draw_last_step(generator, batch_size, condition, rollout)
        losses = segment_loss(networks, x0, x_t, condition, segment)
        return x0, term("segment", segment.weight, losses, segment.begin)
    if noise_kl_weight:
        x0, predicted = networks.draw_samples_with_noise(generator, batch_size, condition)
        return x0, term("noise_kl", noise_kl_weight, noise_kl_loss(predicted), networks.teacher.schedule.t_max)
    return networks.draw_samples(generator, batch_size, condition, rollout), []


def _matching(
    x0: Tensor,
    evaluated: Evaluated,
    weight: Tensor | None,
    weighted: tuple[str, float],
    schedule: NoiseSchedule,
    t: Tensor,
    backend: str,
) -> Tensor:
    """The matching loss [B], weighted by `weight` [B] (None for 1) and over noise levels as weighting and floor say."""
    weighting, floor = weighted
    x_t, teacher, fake, _ = evaluated
    if weighting == "normalised":
        return matching_loss(x0, teacher, fake, weight=weight, floor=floor, x_t=x_t, backend=backend)
    level_weight = score_difference_weight(weighting, schedule.alpha(t), schedule.sigma(t))
    weight = level_weight if weight is None else weight * level_weight
    return score_difference_loss(x0, teacher, fake, weight, x_t=x_t, backend=backend)


class _Total:
    """The mean of the matching loss [B], and what is added to it.

    Attributes:
        loss: 0-d.
        logs: of every term.
    """

    def __init__(self, matching: Tensor, t: Tensor, logs: dict[str, PerSample]):
        self.loss, self.logs = matching.mean(), {**logs, **_logs(t, matching=matching)}

    def add(self, name: str, weight: float, losses: Tensor, t: Tensor) -> None:
        """Adds weight mean(losses)."""
        self.loss = self.loss + weight * losses.mean()
        self.logs |= _logs(t, **{name: losses})

    def add_beside(self, terms: Sequence[tuple[_Term, float]], x0: Tensor) -> None:
        """Adds terms that are balanced with what is here so far: a gradient ratio above 0 beside a term decides about
        its weight, see `balanced`.
        """
        first = None
        if any(ratio for _, ratio in terms):
            # Matching and the GAN term both go through the noised x0.
            (first,) = torch.autograd.grad(self.loss, x0, retain_graph=True)
            self.loss = (x0 * first).sum()
        for term, ratio in terms:
            if first is None or not ratio:
                self.add(*term)
                continue
            balanced_term, chosen = balanced(first, term.losses.mean(), x0, ratio)
            self.loss = self.loss + balanced_term
            self.logs |= _logs(term.t, **{term.name: term.losses, f"{term.name}_weight": chosen.expand(len(x0))})


def _logs(t: Tensor, **values: Tensor) -> dict[str, PerSample]:
    return {f"generator/{name}": PerSample(value.detach(), t) for name, value in values.items()}


def balanced(first: Tensor, other: Tensor, x0: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """w other, with w such that |w d other / d x0| = ratio |first| over all processes; and w (0-d).

    Only the gradient of the result on x0 is meaningful, and flows on to the student; the value is not.

    Args:
        first: gradient on x0 of the loss that the other is balanced with.
        other: 0-d, a function of x0 alone.
        x0: any shape, part of a graph.
    """
    (second,) = torch.autograd.grad(other, x0)
    norms = sum_over_processes(torch.stack([first.square().sum(), second.square().sum()])).sqrt()
    weight = ratio * norms[0] / torch.maximum(norms[1], 1e-6 * norms[0]).clamp(min=torch.finfo(norms.dtype).tiny)
    return (x0 * (weight * second)).sum(), weight
