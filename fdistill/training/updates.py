"""The two updates of an iteration: the step functions that a method names, with the config's settings bound to them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from fdistill.base.constants import constant
from fdistill.base.errors import ConfigError
from fdistill.base.functions import import_function
from fdistill.config.schema import DistillConfig
from fdistill.config.sections import LevelsConfig
from fdistill.divergence import Divergence
from fdistill.generator import Student
from fdistill.methods import METHODS
from fdistill.noise import LEVEL_SAMPLERS, NoiseSchedule, share_below
from fdistill.ratio import DensityRatio
from fdistill.step import Augmentation, Diversity, LevelDraw, Networks, StepResult

Update = Callable[..., StepResult]


def critic_update(config: DistillConfig, networks: Networks) -> Update | None:
    """The critic's update as a function (real x0, condition, generator, ...) -> StepResult; None without a critic."""
    critic = METHODS[config.method].critic
    if critic is None:
        return None
    return _bound(
        critic,
        networks,
        _critic_arguments(config, networks),
        {
            "levels": _in_phase("critic_levels", config.critic_levels, networks),
            "weighting": denoising_weighting(config, networks),
            "min_snr_gamma": config.fake_score.min_snr_gamma,
            "gan_weight": config.discriminator.gan_weight,
            "gan_weighting": config.discriminator.gan_weighting,
            "shared_noise": config.discriminator.shared_noise,
            "r1_weight": config.discriminator.r1_weight,
            "r1_sigma": config.discriminator.r1_sigma if config.discriminator.r1 == "approximate" else None,
        },
    )


def denoising_weighting(config: DistillConfig, networks: Networks) -> str:
    """The name of the weight of the fake score's loss; by default the one its network, the teacher's, is trained with.

    Another one moves the gradient to levels where the network's output hardly matters: EDM's is 1 + 4 (sigma / alpha)^2
    times the loss of a network that predicts eps, so that the noisiest levels have nearly all of it.
    """
    return config.fake_score.weighting or networks.fake_score.loss_weighting


def student_update(
    config: DistillConfig,
    networks: Networks,
    divergence: Divergence,
    ratio: DensityRatio,
    trajectory: tuple[float, ...] = (),
) -> Update:
    """The student's update as a function (condition, generator, batch_size, ...) -> StepResult; `trajectory` has the
    levels of `Diversity`.
    """
    return _bound(
        METHODS[config.method].student,
        networks,
        _student_arguments(config, networks, divergence),
        {
            "levels": _in_phase("matching_levels", config.matching_levels, networks),
            "weighting": config.generator.weighting,
            "normaliser_floor": config.generator.normaliser_floor,
            "divergence": divergence,
            "ratio": ratio,
            "gan_weight": config.generator.gan_weight,
            "gan_gradient_ratio": config.generator.gan_gradient_ratio,
            "image_weight": config.clip_loss.weight,
            "image_gradient_ratio": config.clip_loss.gradient_ratio,
            "reward_weight": config.reward.weight,
            "reward_gradient_ratio": config.reward.gradient_ratio,
            "augmentation": _augmentation(config, networks),
            "diversity": Diversity(config.diversity.weight, trajectory) if config.diversity.weight else None,
            "noise_kl_weight": config.student.noise_kl_weight,
            "regression_weight": config.regression.weight,
            **config.objective.model_dump(),
        },
    )


def _augmentation(config: DistillConfig, networks: Networks) -> Augmentation | None:
    term, student = config.augmentation, networks.generator
    if not term.weight:
        return None
    levels = _in_phase("augmentation", term, networks)
    least = _lowest(levels, networks.teacher.schedule)
    if isinstance(student, Student) and least >= student.levels[-1]:
        raise ConfigError(
            f"augmentation.low: its levels begin at {least:g}, and the student's last step gets its input at "
            f"{student.levels[-1]:g}; expected levels that begin below it"
        )
    return Augmentation(term.weight, levels, term.weighting, term.normaliser_floor)


def _in_phase(section: str, config: LevelsConfig, networks: Networks) -> LevelDraw:
    """The level sampler of a section; for a student whose samples another network finishes, above its phase's end."""
    draw, student, schedule = level_draw(config), networks.generator, networks.teacher.schedule
    if not isinstance(student, Student) or not student.end:
        return draw
    share = share_below(draw, schedule, student.end)
    if share >= 1:
        raise ConfigError(
            f"{section}: its levels end below {student.end:g}, where this phase ends; expected levels above that"
        )
    return lambda schedule, u: draw(schedule, share + (1 - share) * u)


@constant
def _lowest(levels: LevelDraw, schedule: NoiseSchedule) -> float:
    return float(levels(schedule, torch.zeros(1, dtype=torch.float64)))


def _bound(name: str, networks: Networks, arguments: Mapping[str, str], settings: Mapping[str, Any]) -> Update:
    """Binds to a step function the networks and those settings that its signature names.

    Other settings are dropped: `config.combinations` has already refused values that the method does not read.

    Args:
        arguments: the arguments that `training.batches` will pass in this run, and what each is for.

    Raises:
        ConfigError: the function does not take one of these arguments.
    """
    step: Update = import_function(name)
    read = inspect.signature(step).parameters
    for argument, purpose in arguments.items():
        if argument not in read:
            raise ConfigError(f"method: {name} takes no {argument}, which is {purpose}")
    return partial(step, networks, **{key: value for key, value in settings.items() if key in read})


def _critic_arguments(config: DistillConfig, networks: Networks) -> dict[str, str]:
    arguments = {
        "real_x0": "the batch of data",
        "condition": "the labels or prompts of the batch",
        "generator": "the source of random numbers",
        **_rollout(networks),
    }
    if config.reuse_samples:
        arguments["fake_x0"] = "the student's samples, drawn before; without it, reuse_samples must be false"
    if config.condition_dropout:
        arguments["critic_condition"] = "the condition after condition_dropout; without it, condition_dropout must be 0"
    return arguments


def _student_arguments(config: DistillConfig, networks: Networks, divergence: Divergence) -> dict[str, str]:
    arguments = {
        "condition": "the labels or prompts of the batch",
        "generator": "the source of random numbers",
        "batch_size": "the number of samples to draw",
        **_rollout(networks),
    }
    if config.segment.weight:
        arguments["segment"] = "the segment of intra-segment guidance; without it, segment.weight must be 0"
    if divergence.needs_ratio and config.ratio.warmup:
        arguments["ratio_ramp"] = "the factor of the ratio's warmup; without it, ratio.warmup must be 0"
    if config.regression.weight:
        arguments["pairs"] = "the teacher's samples of the regression term; without it, regression.weight must be 0"
    if config.clip_loss.used:
        arguments["image_loss"] = "the CLIP loss; without it, clip_loss must have no weight and no ratio"
    if config.reward.used:
        arguments["reward_loss"] = "minus the preference score; without it, reward must have no weight and no ratio"
    return arguments


def _rollout(networks: Networks) -> dict[str, str]:
    student: Any = networks.generator
    if len(student.levels) == 1:
        return {}
    return {"rollout": "the levels that a few-step student passes; without it, it must have one level"}


def level_draw(config: LevelsConfig) -> LevelDraw:
    """The level sampler that a config section describes."""
    sampler = LEVEL_SAMPLERS[config.sampler]
    return partial(sampler, **config.model_dump(include=set(inspect.signature(sampler).parameters)))
