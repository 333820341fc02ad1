"""A run without values that several tests read, and that takes two seconds to count."""

from __future__ import annotations

import functools
from typing import Any

from fdistill.config.reading import load_config
from fdistill.planning.placement import Footprint, footprint
from fdistill.planning.weightless import open_without_weights, run_without_weights
from fdistill.training.distillation import Distillation

DIGITS: dict[str, Any] = {"batch_size": 96, "critic_steps": 1, "images.workers": 1}


@functools.cache
def digits_run() -> Distillation:
    config = load_config("digits", DIGITS)
    return run_without_weights(config, open_without_weights(config))


@functools.cache
def digits() -> Footprint:
    return footprint(digits_run(), 1)
