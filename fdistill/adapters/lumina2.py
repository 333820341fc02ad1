"""The transformer of Lumina Image 2.0 (rectified flow, arXiv 2503.21758)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

import fdistill.adapters.tiny_language as tiny_language
import fdistill.adapters.tiny_parts as tiny
from fdistill.adapters.blocks import run_block
from fdistill.adapters.family import Family, TextToImage
from fdistill.adapters.original_names import SELF_ATTENTION, Table, fused, lists_layout
from fdistill.adapters.parametrisation import Parametrisation, flow_from_scheduler
from fdistill.adapters.text_to_image import TokenDenoiser
from fdistill.base.errors import CheckpointError
from fdistill.condition import TextCondition

_TOKENS = 256  # max_sequence_length of its pipeline
_FACTOR = 8  # pixels of a latent, whatever the autoencoder's config says
#: What its pipeline puts before each prompt, to its language model.
INSTRUCTION = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start>"
)


class Lumina2Denoiser(TokenDenoiser):
    """A Lumina2Transformer2DModel.

    The network's time is 1 - sigma and its output x0 - eps; here, as in Lumina2Pipeline, both are turned around.
    """

    def __init__(self, network: Lumina2Transformer2DModel, parametrisation: Parametrisation):
        config: Any = network.config
        if config.out_channels not in (None, config.in_channels) or config.axes_lens[0] <= _TOKENS:
            raise CheckpointError(
                f"Lumina2Transformer2DModel with {config.in_channels} input and {config.out_channels} output channels "
                f"and axes_lens {list(config.axes_lens)}: expected as many outputs as inputs, and more than {_TOKENS} "
                "positions for captions"
            )
        text = {"prompt_embeds": (_TOKENS, config.cap_feat_dim), "prompt_attention_mask": (_TOKENS,)}
        super().__init__(
            network, parametrisation, channels=config.in_channels, size=config.sample_size, text_shapes=text
        )
        # The network's own call is kept, so that what hangs on it (sharding, hooks, checkpointing) works.
        self.network.forward = MethodType(_forward, self.network)

    def guidance_norm(self, output: Tensor) -> Tensor:
        """The norm of each row of latents, [B, C, H, 1], as in Lumina2Pipeline's `cfg_normalization`."""
        norm: Tensor = torch.linalg.vector_norm(output, dim=-1, keepdim=True)
        return norm

    def _blocks(self) -> Sequence[nn.Module]:
        network: Any = self.network
        return list(network.layers)

    def _width(self) -> int:
        network: Any = self.network
        return int(network.config.hidden_size)

    def _most_tokens(self) -> int | None:
        network: Any = self.network
        return int(min(network.config.axes_lens[1:]))

    def _read(self, name: str, result: Any) -> Tensor:
        _, height, width = self.feature_shapes[name]
        tokens: Tensor = result  # of the image first, then of the caption
        return rearrange(tokens[:, : height * width], "b (h w) c -> b c h w", h=height)

    def _call(self, network_input: Tensor, timestep: Tensor, condition: TextCondition) -> Tensor:
        embeds, mask = self._cast(condition["prompt_embeds"]), condition["prompt_attention_mask"]
        output: Tensor = self.network(self._cast(network_input), 1 - timestep, embeds, mask, return_dict=False)[0]
        return -output


def _forward(
    network: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_attention_mask: Tensor,
    attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
) -> Any:
    """The `forward` of a network: that of its class, without waiting for the lengths of the captions.

    The class's own forward puts each caption's tokens, and no padding, before those of the image, for which the host
    has to know how many they are. Here the image comes first and captions keep their padding, which attention does not
    see; positions are told to both, so that the order does not matter.

    Args:
        hidden_states: latents [B, C, H, W].
        timestep: 1 - sigma, [B].
        encoder_hidden_states: captions [B, L, D].
        encoder_attention_mask: [B, L], nonzero for tokens of the caption, which come before the padding.

    Returns:
        x0 - eps, [B, C, H, W], in a tuple.
    """
    if return_dict or attention_kwargs:
        own = Lumina2Transformer2DModel.forward
        inputs = hidden_states, timestep, encoder_hidden_states, encoder_attention_mask
        return own(network, *inputs, attention_kwargs=attention_kwargs, return_dict=return_dict)
    p = network.config.patch_size
    height, width = (side // p for side in hidden_states.shape[-2:])
    temb, caption = network.time_caption_embed(hidden_states, timestep, encoder_hidden_states)
    lengths = encoder_attention_mask.bool().sum(1)
    places = torch.arange(caption.shape[1], device=caption.device)
    seen = places < lengths[:, None]
    rotary = network.rope_embedder._get_freqs_cis
    caption_rotary = rotary(F.pad(places[:, None], (0, 2)).expand(len(caption), -1, -1))
    for block in network.context_refiner:
        caption = run_block(network, block, caption, seen, caption_rotary)

    image = network.x_embedder(rearrange(hidden_states, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p))
    image_rotary = rotary(_image_positions(lengths, height, width))
    for block in network.noise_refiner:
        image = run_block(network, block, image, None, image_rotary, temb)

    tokens = torch.cat([image, caption], dim=1)
    both_rotary, seen = torch.cat([image_rotary, caption_rotary], dim=1), F.pad(seen, (image.shape[1], 0), value=True)
    for block in network.layers:
        tokens = run_block(network, block, tokens, seen, both_rotary, temb)
    made = network.norm_out(tokens, temb)[:, : height * width]
    return (rearrange(made, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=p, q=p),)


def _image_positions(after: Tensor, height: int, width: int) -> Tensor:
    """Positions int64 [B, height * width, 3] of an image's tokens: (`after`[b], row, column)."""
    axes = (torch.arange(side, device=after.device) for side in (1, height, width))
    return torch.cartesian_prod(*axes) + F.pad(after[:, None, None], (0, 2))


def wrap(network: Lumina2Transformer2DModel, scheduler: Mapping[str, Any] | None) -> Lumina2Denoiser:
    """Builds the denoiser from a network and its scheduler's config; raises CheckpointError if they do not fit."""
    return Lumina2Denoiser(network, flow_from_scheduler("Lumina2Transformer2DModel", scheduler, time_scale=1.0))


def encode_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str], resolution: int) -> TextCondition:
    """Encodes prompts into the network's inputs, the same at every resolution.

    The pipeline's own instruction to its language model is put before each prompt.
    """
    embeds, mask, _, _ = pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, max_sequence_length=_TOKENS
    )
    return TextCondition({"prompt_embeds": embeds, "prompt_attention_mask": mask})


def encode_negative(pipeline: DiffusionPipeline, negative_prompt: str, resolution: int) -> TextCondition:
    """Encodes a negative prompt, which may be empty, without the instruction."""
    _, _, embeds, mask = pipeline.encode_prompt([""], True, [negative_prompt], max_sequence_length=_TOKENS)
    return TextCondition({"prompt_embeds": embeds, "prompt_attention_mask": mask})


def tokens_before(pipeline: Any) -> int:
    """How many tokens of the limit the pipeline's instruction takes."""
    return len(pipeline.tokenizer(f"{pipeline.system_prompt} <Prompt Start>").input_ids)


#: The publisher's names of the tensors outside of blocks, and of those in a block, as diffusers' own
#: `convert_lumina2_to_diffusers` reads them.
_NAMES: Table = {
    "x_embedder": "x_embedder",
    "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    **{f"time_caption_embed.caption_embedder.{i}": f"cap_embedder.{i}" for i in (0, 1)},
    "norm_out.linear_1": "final_layer.adaLN_modulation.1",
    "norm_out.linear_2": "final_layer.linear",
}
_BLOCK_NAMES: Table = {
    **fused("attention.qkv", "attn", SELF_ATTENTION),
    "attn.norm_q": "attention.q_norm",
    "attn.norm_k": "attention.k_norm",
    "attn.to_out.0": "attention.out",
    "norm1": "attention_norm1",
    "norm1.norm": "attention_norm1",
    "norm1.linear": "adaLN_modulation.1",
    "norm2": "attention_norm2",
    **{name: name for name in ("ffn_norm1", "ffn_norm2")},
    **{f"feed_forward.linear_{i}": f"feed_forward.w{i}" for i in (1, 2, 3)},
}


def tiny_transformer(**changes: Any) -> Lumina2Transformer2DModel:
    """A tiny transformer for captions of full length, with fewer heads for keys and values."""
    settings: dict[str, Any] = {
        "sample_size": tiny.LATENTS,
        "hidden_size": 24,
        "num_layers": 4,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 8,
        "cap_feat_dim": 24,
        "axes_dim_rope": (4, 4, 4),
        "axes_lens": (_TOKENS + 1, 64, 64),
    }
    return tiny.untrained(lambda: Lumina2Transformer2DModel(**(settings | changes)))


def tiny_arguments(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments of an untrained tiny pipeline."""
    transformer = tiny_transformer(**changes)
    tokenizer = tiny_language.gemma_tokenizer([INSTRUCTION])
    return {
        "vae": tiny.wide_autoencoder(factor=_FACTOR),
        "text_encoder": tiny_language.gemma2_encoder(tokenizer, transformer.config.cap_feat_dim),
        "tokenizer": tokenizer,
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=6.0),
    }


FAMILY = Family(
    Lumina2Transformer2DModel,
    wrap,
    component="transformer",
    text=TextToImage(
        pipelines=("Lumina2Pipeline",),
        tokenizers={"tokenizer": _TOKENS},
        encode_prompts=encode_prompts,
        encode_negative=encode_negative,
        tokens_before=tokens_before,
        tiny={"Lumina2Pipeline": tiny_arguments},
    ),
    comfy_lora="publisher",  # its map of diffusers' names is Z-Image's
    original_layout=lists_layout(("layers", "noise_refiner", "context_refiner"), _NAMES, _BLOCK_NAMES),
)
