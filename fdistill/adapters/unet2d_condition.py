"""The UNets of Stable Diffusion 1, 2 and XL (arXiv 2112.10752, 2307.01952)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

import fdistill.adapters.tiny_parts as tiny
from fdistill.adapters.family import Family, Shapes, TextToImage
from fdistill.adapters.float32_layers import amplified_output_in_float32
from fdistill.adapters.ldm_names import unet_layout
from fdistill.adapters.parametrisation import Parametrisation, parametrisation_from_scheduler
from fdistill.adapters.text_to_image import TextDenoiser
from fdistill.base.errors import CheckpointError
from fdistill.condition import SIZES, TextCondition

_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
#: Limit of most CLIP tokenizers; the network takes any number.
TOKENS = 77
_SIZE_CONDITIONS = 6  # original height and width, top and left of the crop, target height and width


class UNet2DConditionDenoiser(TextDenoiser):
    """A UNet2DConditionModel.

    Features: "down0", "down1", ..., the outputs of the last layer of each resolution, and "mid", the middle block's.
    """

    def __init__(self, network: UNet2DConditionModel, parametrisation: Parametrisation):
        config: Any = network.config
        if config.out_channels != config.in_channels:
            raise CheckpointError(
                f"UNet2DConditionModel with {config.in_channels} input and {config.out_channels} output channels: "
                "expected as many outputs as inputs; inpainting and upscaling networks are not supported"
            )
        width = config.cross_attention_dim
        text: dict[str, tuple[int, ...]] = {"prompt_embeds": (TOKENS, width if isinstance(width, int) else width[0])}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - _SIZE_CONDITIONS * config.addition_time_embed_dim
            text |= {"text_embeds": (pooled,), "time_ids": (_SIZE_CONDITIONS,)}
        size = config.sample_size
        if not isinstance(size, int):
            raise CheckpointError(f"UNet2DConditionModel: expected one integer as sample_size, got {size!r}")
        amplified_output_in_float32(network, "conv_out", parametrisation)
        super().__init__(network, parametrisation, channels=config.in_channels, size=size, text_shapes=text)

    def _feature_shapes(self, height: int, width: int) -> dict[str, tuple[int, int, int]]:
        config: Any = self.network.config
        names = [f"down{i}" for i in range(len(config.block_out_channels))]
        shapes = {
            name: (channels, -(-height >> i), -(-width >> i))  # strided convolutions round up
            for i, (name, channels) in enumerate(zip(names, config.block_out_channels, strict=True))
        }
        return shapes if self.network.mid_block is None else {**shapes, "mid": shapes[names[-1]]}

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
    """Builds the denoiser from a network and its scheduler's config; raises CheckpointError if they do not fit."""
    return UNet2DConditionDenoiser(network, parametrisation_from_scheduler(scheduler))


def encode_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str], resolution: int) -> TextCondition:
    """Encodes prompts into the network's inputs, for square images of `resolution` pixels."""
    if isinstance(pipeline, StableDiffusionXLPipeline):
        embeds, _, pooled, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        return _with_size(embeds, pooled, resolution)
    embeds, _ = pipeline.encode_prompt(list(prompts), pipeline.device, 1, do_classifier_free_guidance=False)
    return TextCondition({"prompt_embeds": embeds})


def encode_negative(pipeline: DiffusionPipeline, negative_prompt: str, resolution: int) -> TextCondition:
    """Encodes a negative prompt, which may be empty; XL uses zeros for the empty one."""
    if isinstance(pipeline, StableDiffusionXLPipeline):
        _, embeds, _, pooled = pipeline.encode_prompt(
            "", do_classifier_free_guidance=True, negative_prompt=negative_prompt or None
        )
        return _with_size(embeds, pooled, resolution)
    return encode_prompts(pipeline, [negative_prompt], resolution)


def _with_size(embeds: Tensor, pooled: Tensor, resolution: int) -> TextCondition:
    time_ids = embeds.new_tensor(SIZES["time_ids"](resolution, resolution)).expand(len(embeds), -1)
    return TextCondition({"prompt_embeds": embeds, "text_embeds": pooled, "time_ids": time_ids})


def encoding_pipeline(index: Mapping[str, Any]) -> str:
    """The folder's own pipeline class if it is supported; otherwise XL's if there are two text encoders, or SD's."""
    name = str(index.get("_class_name"))
    if name in _PIPELINES:
        return name
    two = (index.get("text_encoder_2") or [None])[0] is not None
    return _PIPELINES[1 if two else 0]


#: Betas of all versions of Stable Diffusion.
_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_TINY_XL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": tiny.CLIP_WIDTH + tiny.CLIP_2_WIDTH,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": tiny.CLIP_2_WIDTH + _SIZE_CONDITIONS * 8,
}


def tiny_unet(**changes: Any) -> UNet2DConditionModel:
    """A tiny UNet of the kind of Stable Diffusion 1, unless `changes` say otherwise."""
    settings: dict[str, Any] = {
        "sample_size": tiny.LATENTS,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": tiny.CLIP_WIDTH,
    }
    unet: UNet2DConditionModel = tiny.untrained(lambda: UNet2DConditionModel(**(settings | changes)))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "attn2.to_out.0.weight" in name:
                parameter.mul_(100)  # so that prompts change the output as much as in a trained network
    return unet


def tiny_arguments(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments of an untrained tiny pipeline of Stable Diffusion 1."""
    unet, tokenizer = tiny_unet(**changes), tiny.clip_tokenizer()
    return {
        "vae": tiny.autoencoder(),
        "text_encoder": tiny.clip_encoder(tokenizer, unet.config.cross_attention_dim, projected=False),
        "tokenizer": tokenizer,
        "unet": unet,
        "scheduler": PNDMScheduler(**_BETAS, skip_prk_steps=True, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def tiny_xl_arguments(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments of an untrained tiny XL pipeline.

    It has two text encoders; the second also gives a pooled embedding.
    """
    first, second = tiny.clip_tokenizer(), tiny.clip_tokenizer(pad="!")
    return {
        "vae": tiny.autoencoder(),
        "text_encoder": tiny.clip_encoder(first, tiny.CLIP_WIDTH, projected=False),
        "text_encoder_2": tiny.clip_encoder(second, tiny.CLIP_2_WIDTH, projected=True),
        "tokenizer": first,
        "tokenizer_2": second,
        "unet": tiny_unet(**{**_TINY_XL, **changes}),
        "scheduler": EulerDiscreteScheduler(**_BETAS, steps_offset=1, timestep_spacing="leading"),
        "add_watermarker": False,
    }


def checkpoint_of(tensors: Shapes) -> str | None:
    """What people call a checkpoint of one file with these tensors of a UNet, under ldm's names; None if unknown."""
    if "input_blocks.0.0.weight" not in tensors:
        return None
    if "label_emb.0.0.weight" in tensors:
        return "Stable Diffusion XL"
    projection = next((shape for name, shape in tensors.items() if name.endswith(".1.proj_in.weight")), ())
    return "Stable Diffusion 2" if len(projection) == 2 else "Stable Diffusion 1"


FAMILY = Family(
    UNet2DConditionModel,
    wrap,
    text=TextToImage(
        pipelines=_PIPELINES,
        tokenizers={"tokenizer": None, "tokenizer_2": None},
        encode_prompts=encode_prompts,
        encode_negative=encode_negative,
        encoding_pipeline=encoding_pipeline,
        tiny=dict(zip(_PIPELINES, (tiny_arguments, tiny_xl_arguments), strict=True)),
    ),
    comfy_lora="kohya",
    original_layout=unet_layout,
    comfy_checkpoint="fdistill.formats.comfy.stable_diffusion:whole_checkpoint",
    single_files={
        "Stable Diffusion 1": lambda tensors: checkpoint_of(tensors) == "Stable Diffusion 1",
        "Stable Diffusion 2": lambda tensors: checkpoint_of(tensors) == "Stable Diffusion 2",
        "Stable Diffusion XL": lambda tensors: checkpoint_of(tensors) == "Stable Diffusion XL",
    },
)
