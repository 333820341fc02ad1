"""Untrained text-to-image pipelines of a few thousand parameters, whose components are all real: what recipes are tried
out on. Latents are 8 x 8, images 16 x 16 pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from fdistill.base.errors import ArgumentError, did_you_mean

#: Pixels of a side of the images.
RESOLUTION = 16

_LATENTS = 8
_START, _END = "<|startoftext|>", "<|endoftext|>"
_T5_SPECIAL = ("<pad>", "</s>", "<unk>")
_HEAD = 8  # channels of a text encoder's attention head
_CLIP, _CLIP_2, _T5 = 16, 24, 32  # widths of text encoders
#: Betas of every Stable Diffusion.
_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def untrained(make: Callable[[], nn.Module]) -> Any:
    """A module in eval mode with the same weights every time; a layer that starts at zero gets others, as its output
    would not depend on its input. The caller's random numbers are not touched.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().eval()
        for parameter in module.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return module


def clip_tokenizer(pad: str = _END) -> Any:
    """All 256 bytes, alone and at the end of a word, and a few merges; 77 tokens."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("b", "o"), ("l", "d</w>"), ("bo", "ld</w>"), ("d", "i"), ("g", "i"), ("t", "h")]
    vocabulary = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges), _START, _END]
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": _START,
        "eos_token": _END,
        "unk_token": _END,
        "pad_token": pad,
    }
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return AutoTokenizer.from_pretrained(folder)


def t5_tokenizer() -> Any:
    """A unigram model of letters and a few words; 512 tokens."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["▁a", "▁bold", "▁thin", "▁digit", "▁seven"]
    scores = [(token, 0.0) for token in _T5_SPECIAL] + [("▁", -2.0)]
    scores += [(word, -3.0) for word in words] + [(letter, -6.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    config = {
        "tokenizer_class": "T5TokenizerFast",
        "model_max_length": 512,
        "extra_ids": 0,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    with TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return AutoTokenizer.from_pretrained(folder, extra_ids=0)


def clip_encoder(tokenizer: Any, width: int, *, projected: bool) -> Any:
    """Of a width that heads of 8 channels divide."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=width // _HEAD,
        max_position_embeddings=77,
        initializer_factor=5.0,  # prompts differ, and attention to them does not saturate, which magnifies rounding
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return untrained(lambda: (CLIPTextModelWithProjection if projected else CLIPTextModel)(config))


def t5_encoder(tokenizer: Any, width: int) -> Any:
    """Of any width."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=_HEAD,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return untrained(lambda: T5EncoderModel(config))


def autoencoder(**changes: Any) -> AutoencoderKL:
    """2 pixels a latent, 4 channels unless settings say otherwise."""
    settings: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": RESOLUTION,
        "scaling_factor": 0.5,
    }
    return untrained(lambda: AutoencoderKL(**(settings | changes)))


def wide_autoencoder() -> AutoencoderKL:
    """Of the kind of Stable Diffusion 3 and Flux: 16 channels, and a shift."""
    return autoencoder(
        latent_channels=16, scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False
    )


def condition_unet(**changes: Any) -> UNet2DConditionModel:
    """Of Stable Diffusion 1, unless settings say otherwise."""
    settings: dict[str, Any] = {
        "sample_size": _LATENTS,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": _CLIP,
    }
    unet: UNet2DConditionModel = untrained(lambda: UNet2DConditionModel(**(settings | changes)))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "attn2.to_out.0.weight" in name:
                parameter.mul_(100)  # so that prompts make as much of a difference as in a trained network
    return unet


def sd3_transformer(**changes: Any) -> SD3Transformer2DModel:
    """Of Stable Diffusion 3.5: a block attends to the image twice."""
    settings: dict[str, Any] = {
        "sample_size": _LATENTS,
        "num_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "caption_projection_dim": 16,
        "pooled_projection_dim": _CLIP + _CLIP_2,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    return untrained(lambda: SD3Transformer2DModel(**(settings | changes)))


def flux_transformer(**changes: Any) -> FluxTransformer2DModel:
    """Of FLUX.1-dev, which is told a guidance scale."""
    settings: dict[str, Any] = {
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": _T5,
        "pooled_projection_dim": _CLIP,
        "axes_dims_rope": (4, 6, 6),
        "guidance_embeds": True,
    }
    return untrained(lambda: FluxTransformer2DModel(**(settings | changes)))


def pixart_transformer(**changes: Any) -> PixArtTransformer2DModel:
    """Of PixArt, with learned variances."""
    settings: dict[str, Any] = {
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 4,
        "cross_attention_dim": 24,
        "sample_size": _LATENTS,
        "caption_channels": 24,
        "attention_bias": True,
    }
    return untrained(lambda: PixArtTransformer2DModel(**(settings | changes)))


def _stable_diffusion(changes: Mapping[str, Any], scheduler: SchedulerMixin | None) -> DiffusionPipeline:
    unet, tokenizer = condition_unet(**changes), clip_tokenizer()
    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=clip_encoder(tokenizer, unet.config.cross_attention_dim, projected=False),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler or PNDMScheduler(**_BETAS, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_xl(changes: Mapping[str, Any], scheduler: SchedulerMixin | None) -> DiffusionPipeline:
    """Two encoders side by side, the second one's pooled output, and sizes; the empty prompt is zeros."""
    own: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "cross_attention_dim": _CLIP + _CLIP_2,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": _CLIP_2 + 6 * 8,
    }
    first, second = clip_tokenizer(), clip_tokenizer(pad="!")
    return StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=clip_encoder(first, _CLIP, projected=False),
        text_encoder_2=clip_encoder(second, _CLIP_2, projected=True),
        tokenizer=first,
        tokenizer_2=second,
        unet=condition_unet(**{**own, **changes}),
        scheduler=scheduler or EulerDiscreteScheduler(**_BETAS, steps_offset=1, timestep_spacing="leading"),
        add_watermarker=False,
    )


def _stable_diffusion_3(changes: Mapping[str, Any], scheduler: SchedulerMixin | None) -> DiffusionPipeline:
    transformer = sd3_transformer(**changes)
    first, second, third = clip_tokenizer(), clip_tokenizer(pad="!"), t5_tokenizer()
    return StableDiffusion3Pipeline(
        vae=wide_autoencoder(),
        text_encoder=clip_encoder(first, _CLIP, projected=True),
        text_encoder_2=clip_encoder(second, _CLIP_2, projected=True),
        text_encoder_3=t5_encoder(third, transformer.config.joint_attention_dim),
        tokenizer=first,
        tokenizer_2=second,
        tokenizer_3=third,
        transformer=transformer,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux(changes: Mapping[str, Any], scheduler: SchedulerMixin | None) -> DiffusionPipeline:
    transformer = flux_transformer(**changes)
    first, second = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        vae=wide_autoencoder(),
        text_encoder=clip_encoder(first, _CLIP, projected=False),
        text_encoder_2=t5_encoder(second, transformer.config.joint_attention_dim),
        tokenizer=first,
        tokenizer_2=second,
        transformer=transformer,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def _pixart(
    pipeline: type[PixArtAlphaPipeline | PixArtSigmaPipeline],
    changes: Mapping[str, Any],
    scheduler: SchedulerMixin | None,
) -> DiffusionPipeline:
    transformer, tokenizer = pixart_transformer(**changes), t5_tokenizer()
    return pipeline(
        tokenizer=tokenizer,
        text_encoder=t5_encoder(tokenizer, transformer.config.caption_channels),
        vae=autoencoder(),
        transformer=transformer,
        scheduler=scheduler or DPMSolverMultistepScheduler(),
    )


_PIPELINES: dict[str, Callable[[Mapping[str, Any], SchedulerMixin | None], DiffusionPipeline]] = {
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _stable_diffusion_xl,
    "StableDiffusion3Pipeline": _stable_diffusion_3,
    "FluxPipeline": _flux,
    "PixArtAlphaPipeline": lambda *settings: _pixart(PixArtAlphaPipeline, *settings),
    "PixArtSigmaPipeline": lambda *settings: _pixart(PixArtSigmaPipeline, *settings),
}


def tiny_pipeline(
    class_name: str, network: Mapping[str, Any] | None = None, scheduler: SchedulerMixin | None = None
) -> DiffusionPipeline:
    """A pipeline to be saved with `save_pretrained`.

    Args:
        class_name: one of diffusers' classes, such as "StableDiffusionPipeline".
        network: settings over those of its tiny UNet or transformer; the text encoder gets the width they ask for.
        scheduler: in place of the one that its teachers are published with.

    Raises:
        ArgumentError: another class.
        TypeError, ValueError: settings of which diffusers makes no network.
    """
    if class_name not in _PIPELINES:
        raise ArgumentError(f"pipeline: got {class_name!r}; {did_you_mean(class_name, _PIPELINES)}")
    return _PIPELINES[class_name](network or {}, scheduler)
