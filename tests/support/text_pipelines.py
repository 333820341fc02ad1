"""What text-to-image pipelines of diffusers have, as their families read it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel
from torch import Tensor, nn

from fdistill.adapters import FAMILIES, wrap
from fdistill.adapters.family import Family, TextToImage
from fdistill.adapters.parametrisation import scheduler_config
from fdistill.adapters.text_to_image import TextDenoiser
from fdistill.condition import TextCondition
from support.text_families_flux2 import own_flux2_output

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
    denoiser.resize(SIZE)
    return denoiser


def encoders(pipeline: Any) -> Any:
    """The pipeline as `PromptEncoder` has it: without network and autoencoder."""
    return type(pipeline)(**pipeline.components | {family_of(pipeline)[0].component: None, "vae": None})


@torch.no_grad()
def condition_of(pipeline: Any, prompts: Sequence[str], resolution: int) -> TextCondition:
    """Prompts as its family encodes them."""
    return text_of(pipeline).encode_prompts(encoders(pipeline), prompts, resolution)


def own_output(network: Any, x_t: Tensor, t: Tensor, condition: TextCondition) -> Any:
    """What the transformer says when it is called as its pipeline calls it, [B, C, H, W]."""
    if isinstance(network, PixArtTransformer2DModel):
        sizes = ("resolution", "aspect_ratio")
        told = {key: condition[key] if network.config.sample_size == 128 else None for key in sizes}
        return network(
            x_t,
            encoder_hidden_states=condition["prompt_embeds"],
            encoder_attention_mask=condition["prompt_attention_mask"],
            timestep=t.long(),
            added_cond_kwargs=told,
        ).sample
    if type(network).__name__.startswith("Sana"):
        return network(
            x_t,
            encoder_hidden_states=condition["prompt_embeds"],
            encoder_attention_mask=condition["prompt_attention_mask"],
            timestep=(1000 * t) * network.config.timestep_scale,
        ).sample
    if type(network).__name__.startswith("Flux2"):
        return own_flux2_output(network, x_t, t, condition["prompt_embeds"])
    count, channels, height, width = x_t.shape
    tokens = network(
        hidden_states=diffusers.QwenImagePipeline._pack_latents(x_t, count, channels, height, width),
        timestep=t,
        encoder_hidden_states_mask=condition["prompt_embeds_mask"],
        encoder_hidden_states=condition["prompt_embeds"],
        img_shapes=[[(1, height // 2, width // 2)]] * count,
    ).sample
    return unpacked_qwen(tokens)


def blocks_of(network: Any) -> list[nn.Module]:
    """Its transformer blocks, in the order in which they run."""
    return [*network.transformer_blocks, *getattr(network, "single_transformer_blocks", [])]


def unpacked_qwen(tokens: Tensor) -> Tensor:
    """Tokens of Qwen-Image as latents."""
    latents: Tensor = diffusers.QwenImagePipeline._unpack_latents(tokens, 2 * SIZE, 2 * SIZE, 2)
    return latents[:, :, 0]
