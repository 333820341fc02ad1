"""The transformer of Stable Diffusion 3 and 3.5 (MMDiT with rectified flow, arXiv 2403.03206)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor

import fdistill.adapters.tiny_parts as tiny
from fdistill.adapters.family import Family, TextToImage
from fdistill.adapters.original_names import ADDED_ATTENTION, SELF_ATTENTION, Table, fused, transformer_layout
from fdistill.adapters.parametrisation import Parametrisation, flow_from_scheduler
from fdistill.adapters.text_to_image import TokenDenoiser
from fdistill.base.errors import CheckpointError
from fdistill.condition import TextCondition

_CLIP_TOKENS, _T5_TOKENS = 77, 256


class SD3Denoiser(TokenDenoiser):
    """An SD3Transformer2DModel."""

    def __init__(self, network: SD3Transformer2DModel, parametrisation: Parametrisation):
        config: Any = network.config
        if config.out_channels not in (None, config.in_channels):
            raise CheckpointError(
                f"SD3Transformer2DModel with {config.in_channels} input and {config.out_channels} output channels: "
                "expected as many outputs as inputs; inpainting and editing networks are not supported"
            )
        text = {
            "prompt_embeds": (_CLIP_TOKENS + _T5_TOKENS, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }
        super().__init__(
            network, parametrisation, channels=config.in_channels, size=config.sample_size, text_shapes=text
        )

    def _call(self, network_input: Tensor, timestep: Tensor, condition: TextCondition) -> Tensor:
        output: Tensor = self.network(
            network_input,
            encoder_hidden_states=self._cast(condition["prompt_embeds"]),
            pooled_projections=self._cast(condition["pooled_prompt_embeds"]),
            timestep=timestep,
            return_dict=False,
        )[0]
        return output


def wrap(network: SD3Transformer2DModel, scheduler: Mapping[str, Any] | None) -> SD3Denoiser:
    """Builds the denoiser from a network and its scheduler's config; raises CheckpointError if they do not fit."""
    return SD3Denoiser(network, flow_from_scheduler("SD3Transformer2DModel", scheduler))


def encode_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str], resolution: int) -> TextCondition:
    """Encodes prompts into the network's inputs, the same at every resolution.

    If the T5 encoder (text_encoder_3) is missing, the pipeline uses zeros of the transformer's width for its output.

    Raises:
        CheckpointError: a CLIP encoder is missing, or both T5 and the transformer are.
    """
    encoders: Any = pipeline
    if encoders.text_encoder is None or encoders.text_encoder_2 is None:
        raise CheckpointError(
            "StableDiffusion3Pipeline without text_encoder or text_encoder_2: expected both; only text_encoder_3 can "
            "be left out"
        )
    if encoders.text_encoder_3 is None and encoders.transformer is None:
        raise CheckpointError(
            "StableDiffusion3Pipeline without text_encoder_3: zeros of the transformer's width replace its output; "
            "expected the transformer beside the encoders (only its config is read)"
        )
    embeds, _, pooled, _ = encoders.encode_prompt(
        list(prompts),
        None,
        None,
        device=encoders.text_encoder.device,
        do_classifier_free_guidance=False,
        max_sequence_length=_T5_TOKENS,
    )
    return TextCondition({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})


#: Stability AI's names of the tensors outside of blocks, and of those in a block.
_NAMES: Table = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_BLOCK_NAMES: Table = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    **fused("x_block.attn.qkv", "attn", SELF_ATTENTION),
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    **fused("x_block.attn2.qkv", "attn2", SELF_ATTENTION),
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    **fused("context_block.attn.qkv", "attn", ADDED_ATTENTION),
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_add_out": "context_block.attn.proj",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}


def tiny_transformer(**changes: Any) -> SD3Transformer2DModel:
    """A tiny transformer of the kind of Stable Diffusion 3.5, whose first blocks attend to the image twice."""
    settings: dict[str, Any] = {
        "sample_size": tiny.LATENTS,
        "num_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 48,
        "caption_projection_dim": 16,
        "pooled_projection_dim": tiny.CLIP_WIDTH + tiny.CLIP_2_WIDTH,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    return tiny.untrained(lambda: SD3Transformer2DModel(**(settings | changes)))


def tiny_arguments(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments of an untrained tiny pipeline."""
    transformer = tiny_transformer(**changes)
    first, second, third = tiny.clip_tokenizer(), tiny.clip_tokenizer(pad="!"), tiny.t5_tokenizer()
    return {
        "vae": tiny.wide_autoencoder(),
        "text_encoder": tiny.clip_encoder(first, tiny.CLIP_WIDTH, projected=True),
        "text_encoder_2": tiny.clip_encoder(second, tiny.CLIP_2_WIDTH, projected=True),
        "text_encoder_3": tiny.t5_encoder(third, transformer.config.joint_attention_dim),
        "tokenizer": first,
        "tokenizer_2": second,
        "tokenizer_3": third,
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


FAMILY = Family(
    SD3Transformer2DModel,
    wrap,
    component="transformer",
    text=TextToImage(
        pipelines=("StableDiffusion3Pipeline",),
        tokenizers={"tokenizer": None, "tokenizer_2": None, "tokenizer_3": _T5_TOKENS},
        encode_prompts=encode_prompts,
        tiny={"StableDiffusion3Pipeline": tiny_arguments},
    ),
    comfy_lora="diffusers",
    original_layout=transformer_layout(_NAMES, {"transformer_blocks": ("joint_blocks", _BLOCK_NAMES)}),
    single_files={"Stable Diffusion 3": lambda tensors: "joint_blocks.0.x_block.attn.qkv.weight" in tensors},
)
