"""The transformer of Qwen-Image (rectified flow, arXiv 2508.02324); importing this needs diffusers 0.35."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImageTransformer2DModel,
)
from einops import rearrange, reduce, repeat
from torch import Tensor
from torch.nn import functional as F

import fdistill.adapters.tiny_language as tiny_language
import fdistill.adapters.tiny_parts as tiny
from fdistill.adapters.family import Family, TextToImage
from fdistill.adapters.original_names import make_layout
from fdistill.adapters.parametrisation import Parametrisation, flow_from_scheduler
from fdistill.adapters.text_to_image import TokenDenoiser
from fdistill.base.errors import CheckpointError
from fdistill.condition import TextCondition

_TOKENS = 512  # max_sequence_length of its pipeline
_PATCH = 2  # side of the patch of latents in a token
_SIZE = 128  # default height and width of latents, as in QwenImagePipeline
#: What QwenImagePipeline puts around a prompt; it drops the first 34 tokens.
_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


class QwenImageDenoiser(TokenDenoiser):
    """A QwenImageTransformer2DModel; this class turns latents [B, C, H, W] into tokens of 2 x 2."""

    patch = _PATCH

    def __init__(self, network: QwenImageTransformer2DModel, parametrisation: Parametrisation):
        config: Any = network.config
        channels, rest = divmod(config.in_channels, _PATCH**2)
        if rest or config.patch_size != _PATCH or config.out_channels not in (None, channels):
            raise CheckpointError(
                f"QwenImageTransformer2DModel with {config.in_channels} input and {config.out_channels} output "
                f"channels and patch_size {config.patch_size}: expected patch_size {_PATCH}, and {_PATCH**2} times as "
                "many inputs as outputs"
            )
        text = {"prompt_embeds": (_TOKENS, config.joint_attention_dim), "prompt_embeds_mask": (_TOKENS,)}
        super().__init__(network, parametrisation, channels=channels, size=_SIZE, text_shapes=text)

    def guidance_norm(self, output: Tensor) -> Tensor:
        """The norm of each token [B, 1, H, W]; QwenImagePipeline rescales a guided prediction to these norms."""
        squares = reduce(output.square(), "b c (h p) (w q) -> b 1 h w", "sum", p=_PATCH, q=_PATCH)
        return repeat(squares.sqrt(), "b 1 h w -> b 1 (h p) (w q)", p=_PATCH, q=_PATCH)

    def _call(self, network_input: Tensor, timestep: Tensor, condition: TextCondition) -> Tensor:
        height, width = (side // _PATCH for side in network_input.shape[-2:])
        patches = rearrange(network_input, "b c (h p) (w q) -> b (h w) (c p q)", p=_PATCH, q=_PATCH)
        tokens: Tensor = self.network(
            hidden_states=self._cast(patches),
            timestep=timestep,
            encoder_hidden_states=self._cast(condition["prompt_embeds"]),
            encoder_hidden_states_mask=condition["prompt_embeds_mask"],
            img_shapes=[[(1, height, width)]] * len(patches),
            return_dict=False,
        )[0]
        return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=_PATCH, q=_PATCH)


def wrap(network: QwenImageTransformer2DModel, scheduler: Mapping[str, Any] | None) -> QwenImageDenoiser:
    """Builds the denoiser from a network and its scheduler's config.

    Raises:
        CheckpointError: they do not fit, or this version of diffusers lets the network attend to padding tokens.
    """
    if tuple(int(part) for part in diffusers.__version__.split(".")[:2]) < (0, 37):
        raise CheckpointError(
            f"QwenImageTransformer2DModel: diffusers {diffusers.__version__} lets it attend to the padding of prompts; "
            "install diffusers 0.37 or later"
        )
    return QwenImageDenoiser(network, flow_from_scheduler("QwenImageTransformer2DModel", scheduler, time_scale=1.0))


def encode_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str], resolution: int) -> TextCondition:
    """Encodes prompts into the network's inputs, the same at every resolution.

    Prompts are padded to 512 tokens, and a mask hides the padding.
    """
    embeds, mask = pipeline.encode_prompt(list(prompts), max_sequence_length=_TOKENS)
    if mask is None:
        mask = embeds.new_ones(embeds.shape[:2], dtype=torch.long)
    missing = _TOKENS - embeds.shape[1]
    return TextCondition(
        {"prompt_embeds": F.pad(embeds, (0, 0, 0, missing)), "prompt_embeds_mask": F.pad(mask, (0, missing))}
    )


def tiny_transformer(**changes: Any) -> QwenImageTransformer2DModel:
    """A tiny transformer for the latents of `tiny_autoencoder`."""
    settings: dict[str, Any] = {
        "patch_size": _PATCH,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": (4, 6, 6),
    }
    return tiny.untrained(lambda: QwenImageTransformer2DModel(**(settings | changes)))


def tiny_autoencoder() -> AutoencoderKLQwenImage:
    """2 pixels a latent, 4 channels, each with its own mean and standard deviation."""
    return tiny.untrained(
        lambda: AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[-0.7, 0.1, 0.4, -0.2],
            latents_std=[2.8, 1.4, 2.1, 1.7],
        )
    )


def tiny_arguments(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments of an untrained tiny pipeline."""
    transformer, tokenizer = tiny_transformer(**changes), tiny_language.qwen_tokenizer([_TEMPLATE])
    return {
        "tokenizer": tokenizer,
        "text_encoder": tiny_language.qwen25_vl_encoder(tokenizer, transformer.config.joint_attention_dim),
        "vae": tiny_autoencoder(),
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
    }


FAMILY = Family(
    QwenImageTransformer2DModel,
    wrap,
    component="transformer",
    text=TextToImage(
        pipelines=("QwenImagePipeline",),
        tokenizers={"tokenizer": _TOKENS},
        encode_prompts=encode_prompts,
        unguided={"true_cfg_scale": 1.0},
        tiny={"QwenImagePipeline": tiny_arguments},
    ),
    comfy_lora="diffusers",
    # The publisher's names are those of diffusers.
    original_layout=lambda names, config: make_layout(names, lambda name: (name, 0)),
)
