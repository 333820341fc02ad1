"""The two updates of an iteration: the step functions that a method names, with the config's settings bound to them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fdistill.base.functions import import_function
from fdistill.config.schema import DistillConfig
from fdistill.config.sections import LevelsConfig
from fdistill.divergence import Divergence
from fdistill.methods import METHODS
from fdistill.noise import LEVEL_SAMPLERS
from fdistill.ratio import DensityRatio
from fdistill.step import LevelDraw, Networks, StepResult

Update = Callable[..., StepResult]


def critic_update(config: DistillConfig, networks: Networks) -> Update:
    """The critic's update as a function (real x0, condition, generator, ...) -> StepResult."""
    return _bound(
        METHODS[config.method].critic,
        networks,
        {
            "levels": level_draw(config.critic_levels),
            "weighting": config.fake_score.weighting,
            "min_snr_gamma": config.fake_score.min_snr_gamma,
            "gan_weight": config.discriminator.gan_weight,
            "gan_weighting": config.discriminator.gan_weighting,
            "r1_weight": config.discriminator.r1_weight,
        },
    )


def student_update(config: DistillConfig, networks: Networks, divergence: Divergence, ratio: DensityRatio) -> Update:
    """The student's update as a function (condition, generator, batch_size, ...) -> StepResult."""
    return _bound(
        METHODS[config.method].student,
        networks,
        {
            "levels": level_draw(config.matching_levels),
            "weighting": config.generator.weighting,
            "divergence": divergence,
            "ratio": ratio,
            "gan_weight": config.generator.gan_weight,
            "gan_gradient_ratio": config.generator.gan_gradient_ratio,
            "noise_kl_weight": config.student.noise_kl_weight,
            "regression_weight": config.regression.weight,
            **config.objective.model_dump(),
        },
    )


def _bound(name: str, networks: Networks, settings: Mapping[str, Any]) -> Update:
    """Binds to a step function the networks and those settings that its signature names.

    Other settings are dropped: `config.combinations` has already refused values that the method does not read.
    """
    step: Update = import_function(name)
    read = inspect.signature(step).parameters
    return partial(step, networks, **{key: value for key, value in settings.items() if key in read})


def level_draw(config: LevelsConfig) -> LevelDraw:
    """The level sampler that a config section describes."""
    sampler = LEVEL_SAMPLERS[config.sampler]
    return partial(sampler, **config.model_dump(include=set(inspect.signature(sampler).parameters)))
