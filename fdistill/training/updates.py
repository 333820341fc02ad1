"""The two updates of an iteration, as a config describes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fdistill.config.schema import DistillConfig
from fdistill.config.sections import LevelsConfig
from fdistill.divergence import Divergence
from fdistill.methods import METHODS
from fdistill.noise import LEVEL_SAMPLERS
from fdistill.ratio import DensityRatio
from fdistill.step import (
    LevelDraw,
    Networks,
    StepResult,
    critic_step,
    diffratio_step,
    generator_step,
    ratio_critic_step,
    sid_step,
    sim_step,
    uni_instruct_step,
)

Update = Callable[..., StepResult]


def critic_update(config: DistillConfig, networks: Networks) -> Update:
    """(real x0, condition, generator, ...) -> StepResult, with everything the config says bound."""
    levels = level_draw(config.critic_levels)
    if METHODS[config.method].objective == "diffratio":
        return partial(ratio_critic_step, networks, levels=levels, r1_weight=config.discriminator.r1_weight)
    return partial(
        critic_step,
        networks,
        levels=levels,
        weighting=config.fake_score.weighting,
        min_snr_gamma=config.fake_score.min_snr_gamma,
        gan_weight=config.discriminator.gan_weight,
        gan_weighting=config.discriminator.gan_weighting,
        r1_weight=config.discriminator.r1_weight,
    )


def student_update(config: DistillConfig, networks: Networks, divergence: Divergence, ratio: DensityRatio) -> Update:
    """(condition, generator, batch_size, ...) -> StepResult, likewise."""
    objective, generator = METHODS[config.method].objective, config.generator
    common: dict[str, Any] = {"levels": level_draw(config.matching_levels)}
    if objective == "sim":
        assert config.objective.huber_c is not None
        return partial(sim_step, networks, **common, huber_c=config.objective.huber_c)
    common.update(weighting=generator.weighting)
    if objective == "diffratio":
        return partial(diffratio_step, networks, **common)
    common.update(gan_weight=generator.gan_weight)
    if objective == "sid":
        assert config.objective.alpha is not None
        return partial(sid_step, networks, **common, alpha=config.objective.alpha)
    common.update(divergence=divergence, ratio=ratio)
    if objective == "uni-instruct":
        return partial(uni_instruct_step, networks, **common, detach_weight=config.objective.detach_weight)
    return partial(
        generator_step,
        networks,
        **common,
        gan_gradient_ratio=generator.gan_gradient_ratio,
        noise_kl_weight=config.student.noise_kl_weight,
        regression_weight=config.regression.weight,
    )


def level_draw(config: LevelsConfig) -> LevelDraw:
    """The level sampler a config section describes."""
    used = {
        "karras": {"low", "high", "rho"},
        "uniform": {"low", "high"},
        "shifted": {"low", "high", "shift"},
        "lognormal": {"mean", "std"},
    }[config.sampler]
    return partial(LEVEL_SAMPLERS[config.sampler], **config.model_dump(include=used))
