"""The UNets of Stable Diffusion 1, 2 and XL (arXiv 2112.10752, 2307.01952)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from fdistill.adapters.parametrisation import Parametrisation, parametrisation_from_scheduler
from fdistill.adapters.text_to_image import TextDenoiser
from fdistill.base.errors import CheckpointError
from fdistill.condition import TextCondition

NETWORK = UNet2DConditionModel
PIPELINES: tuple[type[DiffusionPipeline], ...] = (StableDiffusionPipeline, StableDiffusionXLPipeline)
COMPONENT = "unet"
#: With what its pipeline draws as a student does: unguided, at the size it is told.
UNGUIDED: dict[str, Any] = {"guidance_scale": 0.0}
#: Tokenizers of its pipelines, and how many tokens of a prompt are read: None is what the tokenizer says.
TOKENIZERS: dict[str, int | None] = {"tokenizer": None, "tokenizer_2": None}

_TOKENS = 77  # of CLIP's tokenizers; the network takes any number
_SIZE_CONDITIONS = 6  # original height and width, top and left of the crop, target height and width


class UNet2DConditionDenoiser(TextDenoiser):
    """A UNet2DConditionModel. Features: "down0", "down1", ... (last of each resolution) and "mid"."""

    def __init__(self, network: UNet2DConditionModel, parametrisation: Parametrisation):
        config: Any = network.config
        if config.out_channels != config.in_channels:
            raise CheckpointError(
                f"UNet2DConditionModel with {config.in_channels} input and {config.out_channels} output channels: "
                "expected as many outputs as inputs; inpainting and upscaling networks are not supported"
            )
        if config.addition_embed_type not in (None, "text_time") or network.class_embedding is not None:
            raise CheckpointError(
                f"UNet2DConditionModel with addition_embed_type {config.addition_embed_type!r} and class_embed_type "
                f"{config.class_embed_type!r}: expected a network of Stable Diffusion 1, 2 or XL"
            )
        width = config.cross_attention_dim
        text: dict[str, tuple[int, ...]] = {"prompt_embeds": (_TOKENS, width if isinstance(width, int) else width[0])}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - _SIZE_CONDITIONS * config.addition_time_embed_dim
            text |= {"text_embeds": (pooled,), "time_ids": (_SIZE_CONDITIONS,)}
        size = config.sample_size
        if not isinstance(size, int):
            raise CheckpointError(f"UNet2DConditionModel: expected one integer as sample_size, got {size!r}")
        super().__init__(network, parametrisation, channels=config.in_channels, size=size, text_shapes=text)

    def _feature_shapes(self, size: int) -> dict[str, tuple[int, int, int]]:
        config: Any = self.network.config
        channels = config.block_out_channels
        sides = [-(-size >> i) for i in range(len(channels))]  # strided convolutions round up
        shapes = {f"down{i}": (width, sides[i], sides[i]) for i, width in enumerate(channels)}
        if self.network.mid_block is not None:
            shapes["mid"] = (channels[-1], sides[-1], sides[-1])
        return shapes

    def _taps(self) -> dict[str, nn.Module]:
        network: Any = self.network
        taps = {f"down{i}": block for i, block in enumerate(network.down_blocks)}
        return taps | ({} if network.mid_block is None else {"mid": network.mid_block})

    def _read(self, name: str, result: Any) -> Tensor:
        if name == "mid":
            hidden: Tensor = result
            return hidden
        config: Any = self.network.config
        layers = config.layers_per_block
        count = layers if isinstance(layers, int) else layers[int(name.removeprefix("down"))]
        residual: Tensor = result[1][count - 1]  # before the block's downsampling
        return residual

    def _call(self, network_input: Tensor, timestep: Tensor, condition: TextCondition) -> Tensor:
        added = None
        if "time_ids" in self.text_shapes:
            added = {name: self._cast(condition[name]) for name in ("text_embeds", "time_ids")}
        output: Tensor = self.network(
            network_input,
            timestep,
            encoder_hidden_states=self._cast(condition["prompt_embeds"]),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return output


def wrap(network: UNet2DConditionModel, scheduler: Mapping[str, Any] | None) -> UNet2DConditionDenoiser:
    """The denoiser of a network and the config of the scheduler beside it; CheckpointError if they do not fit."""
    return UNet2DConditionDenoiser(network, parametrisation_from_scheduler(scheduler))


def encode_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str], resolution: int) -> TextCondition:
    """What the network is told of prompts, for square images of `resolution` pixels."""
    if isinstance(pipeline, StableDiffusionXLPipeline):
        embeds, _, pooled, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        return _with_size(embeds, pooled, resolution)
    embeds, _ = pipeline.encode_prompt(list(prompts), pipeline.device, 1, do_classifier_free_guidance=False)
    return TextCondition({"prompt_embeds": embeds})


def encode_null(pipeline: DiffusionPipeline, negative_prompt: str, resolution: int) -> TextCondition:
    """What guidance leads away from: a negative prompt, or the empty one, which XL replaces by zeros."""
    if isinstance(pipeline, StableDiffusionXLPipeline):
        _, embeds, _, pooled = pipeline.encode_prompt(
            "", do_classifier_free_guidance=True, negative_prompt=negative_prompt or None
        )
        return _with_size(embeds, pooled, resolution)
    return encode_prompts(pipeline, [negative_prompt], resolution)


def _with_size(embeds: Tensor, pooled: Tensor, resolution: int) -> TextCondition:
    size = torch.tensor([resolution, resolution, 0, 0, resolution, resolution], dtype=embeds.dtype)
    time_ids = size.to(embeds.device).expand(len(embeds), -1)
    return TextCondition({"prompt_embeds": embeds, "text_embeds": pooled, "time_ids": time_ids})
