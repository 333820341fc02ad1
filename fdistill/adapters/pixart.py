"""The transformers of PixArt-alpha (arXiv 2310.00426) and PixArt-Sigma (arXiv 2403.04692)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from torch import Tensor
from torch.nn import functional as F

import fdistill.adapters.tiny_parts as tiny
from fdistill.adapters.family import Family, TextToImage
from fdistill.adapters.float32_layers import amplified_output_in_float32
from fdistill.adapters.original_names import SELF_ATTENTION, Table, fused, transformer_layout
from fdistill.adapters.parametrisation import Parametrisation, parametrisation_from_scheduler
from fdistill.adapters.text_to_image import TokenDenoiser
from fdistill.adapters.variances import without_variances
from fdistill.condition import TextCondition

_ALPHA_TOKENS, _TOKENS = 120, 300  # max_sequence_length of PixArt-alpha's and PixArt-Sigma's pipeline


class PixArtDenoiser(TokenDenoiser):
    """A PixArtTransformer2DModel.

    Every condition holds the resolution and the aspect ratio, but only PixArt-alpha's 1024-pixel networks use them.
    """

    def __init__(self, network: PixArtTransformer2DModel, parametrisation: Parametrisation):
        config: Any = network.config
        without_variances(network, "proj_out")
        amplified_output_in_float32(network, "proj_out", parametrisation)
        width = config.caption_channels or config.cross_attention_dim
        text: dict[str, tuple[int, ...]] = {
            "prompt_embeds": (_TOKENS, width),
            "prompt_attention_mask": (_TOKENS,),
            "resolution": (2,),
            "aspect_ratio": (1,),
        }
        super().__init__(
            network, parametrisation, channels=config.in_channels, size=config.sample_size, text_shapes=text
        )

    def _call(self, network_input: Tensor, timestep: Tensor, condition: TextCondition) -> Tensor:
        network: Any = self.network
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if network.use_additional_conditions:
            sizes = {name: self._cast(condition[name]) for name in sizes}
        output: Tensor = network(
            network_input,
            encoder_hidden_states=self._cast(condition["prompt_embeds"]),
            encoder_attention_mask=condition["prompt_attention_mask"],
            timestep=timestep,
            added_cond_kwargs=sizes,
            return_dict=False,
        )[0]
        return output


def wrap(network: PixArtTransformer2DModel, scheduler: Mapping[str, Any] | None) -> PixArtDenoiser:
    """Builds the denoiser from a network and its scheduler's config; raises CheckpointError if they do not fit."""
    return PixArtDenoiser(network, parametrisation_from_scheduler(scheduler))


def encode_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str], resolution: int) -> TextCondition:
    """Encodes prompts into the network's inputs, for square images of `resolution` pixels.

    Prompts are padded to 300 tokens, and a mask hides the padding.
    """
    read = _ALPHA_TOKENS if isinstance(pipeline, PixArtAlphaPipeline) else _TOKENS
    embeds, mask, _, _ = pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, clean_caption=True, max_sequence_length=read
    )
    return TextCondition(
        {
            "prompt_embeds": F.pad(embeds, (0, 0, 0, _TOKENS - read)),
            "prompt_attention_mask": F.pad(mask, (0, _TOKENS - read)),
            "resolution": embeds.new_full((len(embeds), 2), resolution),
            "aspect_ratio": embeds.new_ones(len(embeds), 1),
        }
    )


#: PixArt's own names of the tensors outside of blocks, and of those in a block.
_NAMES: Table = {
    "pos_embed.proj": "x_embedder.proj",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    **{
        f"adaln_single.emb.{embedder}.linear_{i}": f"{name}.mlp.{layer}"
        for embedder, name in (
            ("timestep_embedder", "t_embedder"),
            ("resolution_embedder", "csize_embedder"),
            ("aspect_ratio_embedder", "ar_embedder"),
        )
        for i, layer in ((1, 0), (2, 2))
    },
    "adaln_single.linear": "t_block.1",
    "proj_out": "final_layer.linear",
    "scale_shift_table": "final_layer.scale_shift_table",
}
_BLOCK_NAMES: Table = {
    "scale_shift_table": "scale_shift_table",
    **fused("attn.qkv", "attn1", SELF_ATTENTION),
    "attn1.to_out.0": "attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    **fused("cross_attn.kv_linear", "attn2", ("to_k", "to_v")),
    "attn2.to_out.0": "cross_attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}


def tiny_transformer(**changes: Any) -> PixArtTransformer2DModel:
    """A tiny transformer with learned variances."""
    settings: dict[str, Any] = {
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 4,
        "cross_attention_dim": 24,
        "sample_size": tiny.LATENTS,
        "caption_channels": 24,
        "attention_bias": True,
    }
    return tiny.untrained(lambda: PixArtTransformer2DModel(**(settings | changes)))


def tiny_arguments(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments of an untrained tiny pipeline."""
    transformer, tokenizer = tiny_transformer(**changes), tiny.t5_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": tiny.t5_encoder(tokenizer, transformer.config.caption_channels),
        "vae": tiny.autoencoder(),
        "transformer": transformer,
        "scheduler": DPMSolverMultistepScheduler(),
    }


def earlier_config(config: Mapping[str, Any]) -> bool:
    """Whether a config is of a PixArt network that an older diffusers saved as a Transformer2DModel."""
    return config.get("_class_name") == "Transformer2DModel" and config.get("norm_type") == "ada_norm_single"


FAMILY = Family(
    PixArtTransformer2DModel,
    wrap,
    component="transformer",
    text=TextToImage(
        pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
        tokenizers={"tokenizer": _TOKENS},  # PixArt-alpha reads fewer
        encode_prompts=encode_prompts,
        unguided={"guidance_scale": 0.0, "use_resolution_binning": False},
        tiny={"PixArtAlphaPipeline": tiny_arguments, "PixArtSigmaPipeline": tiny_arguments},
    ),
    comfy_lora="diffusers",
    original_layout=transformer_layout(_NAMES, {"transformer_blocks": ("blocks", _BLOCK_NAMES)}),
    original_variances="proj_out",
    earlier_config=earlier_config,
)
