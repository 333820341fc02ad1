"""What text-to-image pipelines of diffusers have, as their families read it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from fdistill.adapters import FAMILIES, wrap
from fdistill.adapters.family import Family, TextToImage
from fdistill.adapters.parametrisation import scheduler_config
from fdistill.adapters.text_to_image import TextDenoiser
from fdistill.condition import TextCondition

#: Side of the latents of tiny pipelines.
SIZE = 8


def load_pipeline(folder: Path, **components: Any) -> Any:
    """A pipeline without progress bars."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def family_of(pipeline: Any) -> tuple[Family, TextToImage]:
    """The family that reads pipelines of this class."""
    for family in FAMILIES.values():
        if family.text is not None and type(pipeline).__name__ in family.text.pipelines:
            return family, family.text
    raise AssertionError(f"no family reads a {type(pipeline).__name__}")


def text_of(pipeline: Any) -> TextToImage:
    """What its family says of its prompts."""
    return family_of(pipeline)[1]


def network_of(pipeline: Any) -> Any:
    """Its network in eval mode."""
    return getattr(pipeline, family_of(pipeline)[0].component).eval()


def denoiser_of(pipeline: Any) -> TextDenoiser:
    """Its denoiser, for latents of the tiny pipelines' size."""
    denoiser = wrap(network_of(pipeline), scheduler_config(pipeline.scheduler))
    assert isinstance(denoiser, TextDenoiser)
    denoiser.resize(SIZE, SIZE)
    return denoiser


def encoders(pipeline: Any) -> Any:
    """The pipeline as `PromptEncoder` has it: without network and autoencoder."""
    return type(pipeline)(**pipeline.components | {family_of(pipeline)[0].component: None, "vae": None})


@torch.no_grad()
def condition_of(pipeline: Any, prompts: Sequence[str], resolution: int) -> TextCondition:
    """Prompts as its family encodes them."""
    return text_of(pipeline).encode_prompts(encoders(pipeline), prompts, resolution)
