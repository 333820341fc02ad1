"""Untrained text-to-image pipelines of a few thousand parameters, on which recipes are tried out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, SchedulerMixin

from fdistill.adapters import FAMILIES
from fdistill.base.errors import ArgumentError, did_you_mean


def tiny_pipeline(
    class_name: str, network: Mapping[str, Any] | None = None, scheduler: SchedulerMixin | None = None
) -> DiffusionPipeline:
    """A pipeline to be saved with `save_pretrained`. Latents are 8 x 8, images 16 x 16 pixels.

    Args:
        class_name: one of diffusers' classes, such as "StableDiffusionPipeline", of which a family has a tiny one.
        network: settings over those of its tiny UNet or transformer; the text encoder gets the width they ask for.
        scheduler: in place of the one that its teachers are published with.

    Raises:
        ArgumentError: another class.
        TypeError, ValueError: settings of which diffusers makes no network.
    """
    families = [family.text for family in FAMILIES.values() if family.text is not None]
    tiny = {name: arguments for family in families for name, arguments in family.tiny.items()}
    if class_name not in tiny:
        raise ArgumentError(f"pipeline: got {class_name!r}; {did_you_mean(class_name, tiny)}")
    arguments = tiny[class_name](network or {})
    if scheduler is not None:
        arguments["scheduler"] = scheduler
    pipeline: DiffusionPipeline = getattr(diffusers, class_name)(**arguments)
    return pipeline
