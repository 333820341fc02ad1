"""Checks that a config fits its teacher and its divergence.

Checks that need nothing but the values of settings are in `config/combinations.py`.
"""

from __future__ import annotations

import torch

from fdistill.base.errors import ArgumentError, ConfigError
from fdistill.config.schema import DistillConfig
from fdistill.denoiser import Denoiser
from fdistill.divergence import Divergence, get_divergence
from fdistill.kernels.checks import check_positive


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


def _check_guidance(config: DistillConfig, embedded: bool) -> None:
    """`embedded` says that the guidance scale is an input of the network, and of its copies."""
    fake = config.fake_score
    of_fake = {"guidance_scale": fake.guidance_scale, "training_guidance_scale": fake.training_guidance_scale}
    if embedded:
        for name, scale in of_fake.items():
            if scale != 1:
                raise ConfigError(
                    f"fake_score.{name}: got {scale:g}, but this network takes guidance_scale as an input, as the "
                    "teacher does; expected 1"
                )
    if (embedded or config.guidance_scale == 1) and set(of_fake.values()) == {1.0}:
        unread = {"guidance_rescale": config.guidance_rescale, "negative_prompt": config.negative_prompt}
        for name, value in unread.items():
            if value:
                raise ConfigError(f"{name}: got {value!r}, but nothing is guided; expected guidance_scale above 1")


def check_alike(name: str, student: Denoiser, teacher: Denoiser) -> None:
    """Checks the checkpoint `name` that the student starts from.

    Raises:
        ConfigError: its sample shape, number of classes or kind of prompts is not the teacher's.
    """
    alike = [(each.sample_shape, each.num_classes, (each.text_shapes or {}).keys()) for each in (student, teacher)]
    if alike[0] != alike[1]:
        raise ConfigError(
            f"student.checkpoint {name!r}: makes samples {student.sample_shape} of {student.num_classes} "
            f"classes, the teacher {teacher.sample_shape} of {teacher.num_classes}; expected the same of both, and "
            "prompts for both or none"
        )
