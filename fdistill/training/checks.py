"""Whether a config fits its teacher and its divergence; what the values of settings tell is in
`config/combinations.py`.
"""

from __future__ import annotations

import torch

from fdistill.base.errors import ArgumentError, ConfigError
from fdistill.config.schema import DistillConfig
from fdistill.denoiser import Denoiser
from fdistill.divergence import Divergence, get_divergence
from fdistill.kernels.checks import check_positive


def read_divergence(config: DistillConfig) -> Divergence:
    """The divergence that a config names; reverse KL for a method that has no choice of it.

    Raises:
        ConfigError: there is none of that name, its ratio is not known, or h overflows within the ratio's bounds.
    """
    try:
        divergence = get_divergence(config.divergence or "reverse-kl")
    except ArgumentError as error:
        raise ConfigError(f"config: {error}") from error
    if divergence.needs_ratio and not config.discriminator.gan_weight:
        raise ConfigError(
            f"config: divergence {divergence.name!r} weights by a density ratio that only a trained discriminator "
            "knows; expected discriminator.gan_weight > 0, or divergence=reverse-kl"
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
    """Raises ConfigError where a setting of guidance or conditions is one that nothing reads, or ArgumentError where
    the teacher's schedule is one that cannot be divided by.
    """
    check_positive(
        "sigma(t_min) of the teacher's schedule", teacher.schedule.sigma(torch.tensor(teacher.schedule.t_min))
    )
    _check_guidance(config, teacher.embedded_guidance is not None)
    if config.condition_dropout and teacher.text_shapes is None and teacher.null_class is None:
        raise ConfigError(
            f"condition_dropout: got {config.condition_dropout}, but the teacher knows nothing that stands for no "
            "condition; expected 0, or null_class set to the teacher's label for it"
        )


def _check_guidance(config: DistillConfig, embedded: bool) -> None:
    """With `embedded` the guidance scale is an input of the network, and of its copies."""
    fake = config.fake_score
    of_fake = {"guidance_scale": fake.guidance_scale, "training_guidance_scale": fake.training_guidance_scale}
    if embedded:
        for name, scale in of_fake.items():
            if scale != 1:
                raise ConfigError(
                    f"fake_score.{name}: got {scale:g}, but this network is told guidance_scale, as the teacher is; "
                    "expected 1"
                )
    if (embedded or config.guidance_scale == 1) and set(of_fake.values()) == {1.0}:
        unread = {"guidance_rescale": config.guidance_rescale, "negative_prompt": config.negative_prompt}
        for name, value in unread.items():
            if value:
                raise ConfigError(f"{name}: got {value!r}, but nothing is guided; expected guidance_scale above 1")


def check_alike(name: str, student: Denoiser, teacher: Denoiser) -> None:
    """Raises ConfigError unless the checkpoint `name` that the student starts from makes samples like the teacher's."""
    alike = [(each.sample_shape, each.num_classes, (each.text_shapes or {}).keys()) for each in (student, teacher)]
    if alike[0] != alike[1]:
        raise ConfigError(
            f"student.checkpoint {name!r}: makes samples {student.sample_shape} of {student.num_classes} "
            f"classes, the teacher {teacher.sample_shape} of {teacher.num_classes}; expected the same of both, and "
            "prompts for both or none"
        )
