"""The transformer of FLUX.2 (rectified flow; Black Forest Labs 2025); importing this needs diffusers 0.37."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from einops import rearrange
from torch import Tensor, nn

import fdistill.adapters.tiny_parts as tiny
from fdistill.adapters.family import Family, TextToImage, chat_tokens
from fdistill.adapters.original_names import ADDED_ATTENTION, SELF_ATTENTION, Table, fused, transformer_layout
from fdistill.adapters.parametrisation import Parametrisation, flow_from_scheduler
from fdistill.adapters.text_to_image import TextDenoiser, TokenDenoiser
from fdistill.base.errors import CheckpointError
from fdistill.condition import TextCondition

_TOKENS = 512  # to which prompts are padded; the network attends to the padding too
_SIZE = 64  # default height and width of latents, as in the pipelines: 1024 pixels
_GUIDANCE = 4.0  # Flux2Pipeline's default


class Flux2Denoiser(TokenDenoiser):
    """A Flux2Transformer2DModel, for which each pixel of the latents [B, C, H, W] is a token.

    Features, all as images with one pixel per image token: "block0", "block1", ... (first the two-stream blocks, then
    the single-stream blocks, numbered on), and "depth25", "depth50", "depth75" and "depth99", the blocks at that
    percentage of the depth.

    Attributes:
        embedded_guidance: the guidance scale that the network takes as input, 4 at first; None for a network that takes
            none, such as klein's.
    """

    patch = 1

    def __init__(self, network: Flux2Transformer2DModel, parametrisation: Parametrisation):
        config: Any = network.config
        outputs = config.out_channels or config.in_channels
        if config.patch_size != 1 or outputs != config.in_channels or len(config.axes_dims_rope) != 4:
            raise CheckpointError(
                f"Flux2Transformer2DModel with {config.in_channels} input and {outputs} output channels, patch_size "
                f"{config.patch_size} and axes_dims_rope {list(config.axes_dims_rope)}: expected as many outputs as "
                "inputs, patch_size 1 and four axes, as the published networks have"
            )
        super().__init__(
            network,
            parametrisation,
            channels=config.in_channels,
            size=_SIZE,
            text_shapes={"prompt_embeds": (_TOKENS, config.joint_attention_dim)},
        )
        self.embedded_guidance = _GUIDANCE if config.guidance_embeds else None

    def with_network(self, network: nn.Module) -> TextDenoiser:
        """A denoiser of another network of this class, with the same parametrisation, size of latents and guidance."""
        other = super().with_network(network)
        if None not in (other.embedded_guidance, self.embedded_guidance):
            other.embedded_guidance = self.embedded_guidance
        return other

    def schedule_shift(self, steps: int) -> float:
        """`compute_empirical_mu` of the pipelines: linear in the number of steps between those for 10 and 200 steps,
        which are linear in the number of tokens; of large images it is that for 200 steps.
        """
        tokens = self.sample_shape[1] * self.sample_shape[2]
        of_200 = 0.00016927 * tokens + 0.45666666
        if tokens > 4300:
            return of_200
        of_10 = 8.73809524e-05 * tokens + 1.89833333
        return of_10 + (of_200 - of_10) * (steps - 10) / 190

    def _blocks(self) -> Sequence[nn.Module]:
        network: Any = self.network
        return [*network.transformer_blocks, *network.single_transformer_blocks]

    def _call(self, network_input: Tensor, timestep: Tensor, condition: TextCondition) -> Tensor:
        height, width = network_input.shape[-2:]
        text, device = self._cast(condition["prompt_embeds"]), network_input.device
        tokens: Tensor = self.network(
            self._cast(rearrange(network_input, "b c h w -> b (h w) c")),
            encoder_hidden_states=text,
            timestep=timestep,
            img_ids=_positions((1, height, width, 1), device),
            txt_ids=_positions((1, 1, 1, text.shape[1]), device),
            guidance=None if self.embedded_guidance is None else torch.full_like(timestep, self.embedded_guidance),
            return_dict=False,
        )[0]
        return rearrange(tokens, "b (h w) c -> b c h w", h=height)


def _positions(sides: Sequence[int], device: torch.device) -> Tensor:
    """Positions [product of sides, 4] of tokens: time, row, column, place in the text."""
    return torch.cartesian_prod(*(torch.arange(side, device=device) for side in sides))


def wrap(network: Flux2Transformer2DModel, scheduler: Mapping[str, Any] | None) -> Flux2Denoiser:
    """Builds the denoiser from a network and its scheduler's config; raises CheckpointError if they do not fit."""
    return Flux2Denoiser(network, flow_from_scheduler("Flux2Transformer2DModel", scheduler, time_scale=1.0))


def encode_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str], resolution: int) -> TextCondition:
    """Encodes prompts into the network's input, the same at every resolution: three layers of a language model, joined.

    Raises:
        CheckpointError: the encoder is missing.
    """
    encoders: Any = pipeline
    if encoders.text_encoder is None:
        raise CheckpointError(f"{type(pipeline).__name__} without text_encoder: expected its language model")
    embeds, _ = encoders.encode_prompt(list(prompts), device=encoders.text_encoder.device, max_sequence_length=_TOKENS)
    return TextCondition({"prompt_embeds": embeds})


#: Black Forest Labs' names of the tensors outside of blocks, and of those in a block.
_NAMES: Table = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    **{
        f"time_guidance_embed.{embedder}_embedder.linear_{i}": f"{name}_in.{layer}_layer"
        for embedder, name in (("timestep", "time"), ("guidance", "guidance"))
        for i, layer in ((1, "in"), (2, "out"))
    },
    **{
        f"{modulation}.linear": f"{modulation}.lin"
        for modulation in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    },
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_BLOCK_NAMES: Table = {
    **fused("img_attn.qkv", "attn", SELF_ATTENTION),
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.to_out.0": "img_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    **fused("txt_attn.qkv", "attn", ADDED_ATTENTION),
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_add_out": "txt_attn.proj",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_SINGLE_BLOCK_NAMES: Table = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "attn.to_out": "linear2",
}


def tiny_transformer(**changes: Any) -> Flux2Transformer2DModel:
    """A tiny transformer of the kind of klein, which takes no guidance scale."""
    settings: dict[str, Any] = {
        "in_channels": 4 * tiny.FLUX2_CHANNELS,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 3 * tiny.QWEN_WIDTH,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (2, 2, 2, 2),
        "guidance_embeds": False,
    }
    return tiny.untrained(lambda: Flux2Transformer2DModel(**(settings | changes)))


@torch.no_grad()
def tiny_autoencoder() -> AutoencoderKLFlux2:
    """An autoencoder of one pixel a latent, before patches are cut, whose latents have means and variances."""
    settings: dict[str, Any] = {
        "block_out_channels": (8,),
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "latent_channels": tiny.FLUX2_CHANNELS,
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "sample_size": tiny.RESOLUTION,
    }
    vae = tiny.untrained(lambda: AutoencoderKLFlux2(**settings))
    channels = vae.bn.num_features
    vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, channels))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2.0, channels))
    return vae


def tiny_arguments(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments of an untrained tiny pipeline of klein."""
    transformer, tokenizer = tiny_transformer(**changes), tiny.chat_tokenizer()
    return {
        "vae": tiny_autoencoder(),
        "text_encoder": tiny.qwen3_encoder(
            tokenizer, transformer.config.joint_attention_dim // 3, layers=28, predicts_words=True
        ),  # of whose layers the pipeline reads the 9th, the 18th and the 27th
        "tokenizer": tokenizer,
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }


FAMILY = Family(
    Flux2Transformer2DModel,
    wrap,
    component="transformer",
    text=TextToImage(
        pipelines=("Flux2KleinPipeline", "Flux2Pipeline"),
        tokenizers={"tokenizer": _TOKENS},
        encode_prompts=encode_prompts,
        unguided={"guidance_scale": 1.0},
        guidance_argument="guidance_scale",  # no embedding has a bias that could hold it
        tokens_before=chat_tokens,
        student_index={"is_distilled": True},  # klein's then leaves guidance out, whatever the scale
        tiny={"Flux2KleinPipeline": tiny_arguments},
    ),
    comfy_lora="publisher",
    original_layout=transformer_layout(
        _NAMES,
        {
            "transformer_blocks": ("double_blocks", _BLOCK_NAMES),
            "single_transformer_blocks": ("single_blocks", _SINGLE_BLOCK_NAMES),
        },
    ),
    single_files={"FLUX.2": lambda tensors: "single_stream_modulation.lin.weight" in tensors},
)
