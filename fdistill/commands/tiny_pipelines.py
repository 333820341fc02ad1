"""Untrained text-to-image pipelines of a few thousand parameters, for trying recipes out."""

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
        class_name: a pipeline class of diffusers for which a family has a tiny pipeline, such as
            "StableDiffusionPipeline".
        network: settings that replace those of the tiny UNet or transformer; the text encoder gets the width that the
            network needs.
        scheduler: replaces the scheduler that teachers of this class are published with.

    Raises:
        ArgumentError: no family has a tiny pipeline of this class.
        TypeError, ValueError: diffusers cannot build a network from these settings.
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
