"""The transformer of FLUX.1 dev and schnell (rectified flow; Black Forest Labs 2024, arXiv 2506.15742 section 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings
from einops import rearrange
from torch import Tensor, nn

import fdistill.adapters.tiny_parts as tiny
from fdistill.adapters.family import Family, TextToImage
from fdistill.adapters.original_names import ADDED_ATTENTION, SELF_ATTENTION, Table, fused, transformer_layout
from fdistill.adapters.parametrisation import Parametrisation, flow_from_scheduler
from fdistill.adapters.text_to_image import TextDenoiser, TokenDenoiser
from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.condition import TextCondition

_T5_TOKENS = 512
_PATCH = 2  # side of the patch of latents in a token
_SIZE = 128  # default height and width of latents, as in FluxPipeline
_GUIDANCE = 3.5  # FluxPipeline's default


class FluxDenoiser(TokenDenoiser):
    """A FluxTransformer2DModel; this class turns latents [B, C, H, W] into tokens of 2 x 2.

    Features, all as images with one pixel per image token: "block0", "block1", ... (first the two-stream blocks, then
    the single-stream blocks, numbered on), and "depth25", "depth50", "depth75" and "depth99", the blocks at that
    percentage of the depth.

    Attributes:
        embedded_guidance: the guidance scale that the network takes as input, 3.5 at first; None for a network that
            takes none, such as schnell's.
    """

    patch = _PATCH

    def __init__(self, network: FluxTransformer2DModel, parametrisation: Parametrisation):
        config: Any = network.config
        channels, rest = divmod(config.in_channels, _PATCH**2)
        outputs = config.out_channels or config.in_channels
        if rest or config.patch_size != 1 or outputs != config.in_channels:
            raise CheckpointError(
                f"FluxTransformer2DModel with {config.in_channels} input and {outputs} output channels and patch_size "
                f"{config.patch_size}: expected as many outputs as inputs, a multiple of {_PATCH**2}, and patch_size "
                "1; fill and control networks are not supported"
            )
        text = {
            "prompt_embeds": (_T5_TOKENS, config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }
        super().__init__(network, parametrisation, channels=channels, size=_SIZE, text_shapes=text)
        self.embedded_guidance = _GUIDANCE if config.guidance_embeds else None

    def with_network(self, network: nn.Module) -> TextDenoiser:
        """A denoiser of another network of this class, with the same parametrisation, size of latents and guidance."""
        other = super().with_network(network)
        assert isinstance(other, FluxDenoiser)
        if None not in (other.embedded_guidance, self.embedded_guidance):
            other.embedded_guidance = self.embedded_guidance
        return other

    def _blocks(self) -> Sequence[nn.Module]:
        network: Any = self.network
        return [*network.transformer_blocks, *network.single_transformer_blocks]

    def _call(self, network_input: Tensor, timestep: Tensor, condition: TextCondition) -> Tensor:
        height, width = (side // _PATCH for side in network_input.shape[-2:])
        text = self._cast(condition["prompt_embeds"])
        patches = rearrange(network_input, "b c (h p) (w q) -> b (h w) (c p q)", p=_PATCH, q=_PATCH)
        tokens: Tensor = self.network(
            self._cast(patches),
            encoder_hidden_states=text,
            pooled_projections=self._cast(condition["pooled_prompt_embeds"]),
            timestep=timestep,
            img_ids=_image_positions(height, width, network_input.device),
            txt_ids=torch.zeros(text.shape[1], 3, device=network_input.device),
            guidance=None if self.embedded_guidance is None else torch.full_like(timestep, self.embedded_guidance),
            return_dict=False,
        )[0]
        return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=_PATCH, q=_PATCH)


def _image_positions(height: int, width: int, device: torch.device) -> Tensor:
    """Positions [height * width, 3] float32: (0, row, column) of every token."""
    axes = (torch.arange(side, device=device, dtype=torch.float32) for side in (1, height, width))
    return torch.cartesian_prod(*axes)


@torch.no_grad()
def fold_guidance(network: FluxTransformer2DModel, scale: float) -> None:
    """Changes a network that takes a guidance scale into one that takes none and behaves as under this scale.

    The scale only adds a constant, guidance_embedder(scale), to the timestep's embedding, so the constant is added to
    the last bias of that embedding. The network is changed in place, and its `guidance_embeds` becomes False;
    FluxPipeline then ignores its own `guidance_scale`.

    Raises:
        ArgumentError: the network takes no guidance scale.
    """
    model: Any = network
    if not model.config.guidance_embeds:
        raise ArgumentError("network: has no guidance embedding; expected one with guidance_embeds, as FLUX.1-dev's")
    guided = model.time_text_embed
    bias: Tensor = guided.timestep_embedder.linear_2.bias
    frequencies = guided.time_proj(1000 * torch.tensor([scale], dtype=bias.dtype, device=bias.device))
    bias += guided.guidance_embedder(frequencies.to(bias.dtype))[0]
    folded = CombinedTimestepTextProjEmbeddings(model.inner_dim, model.config.pooled_projection_dim)
    folded.timestep_embedder, folded.text_embedder = guided.timestep_embedder, guided.text_embedder
    model.time_text_embed = folded.train(guided.training)
    model.register_to_config(guidance_embeds=False)


def wrap(network: FluxTransformer2DModel, scheduler: Mapping[str, Any] | None) -> FluxDenoiser:
    """Builds the denoiser from a network and its scheduler's config; raises CheckpointError if they do not fit."""
    return FluxDenoiser(network, flow_from_scheduler("FluxTransformer2DModel", scheduler, time_scale=1.0))


def encode_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str], resolution: int) -> TextCondition:
    """Encodes prompts into the network's inputs, the same at every resolution.

    Raises:
        CheckpointError: an encoder is missing.
    """
    encoders: Any = pipeline
    if encoders.text_encoder is None or encoders.text_encoder_2 is None:
        raise CheckpointError("FluxPipeline without text_encoder or text_encoder_2: expected both")
    embeds, pooled, _ = encoders.encode_prompt(
        list(prompts), None, device=encoders.text_encoder.device, max_sequence_length=_T5_TOKENS
    )
    return TextCondition({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})


#: Black Forest Labs' names of the tensors outside of blocks, and of those in a block.
_NAMES: Table = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    **{
        f"time_text_embed.{embedder}.linear_{i}": f"{name}_in.{layer}_layer"
        for embedder, name in (
            ("timestep_embedder", "time"),
            ("text_embedder", "vector"),
            ("guidance_embedder", "guidance"),
        )
        for i, layer in ((1, "in"), (2, "out"))
    },
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_BLOCK_NAMES: Table = {
    "norm1.linear": "img_mod.lin",
    **fused("img_attn.qkv", "attn", SELF_ATTENTION),
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.to_out.0": "img_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "norm1_context.linear": "txt_mod.lin",
    **fused("txt_attn.qkv", "attn", ADDED_ATTENTION),
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_add_out": "txt_attn.proj",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE_BLOCK_NAMES: Table = {
    "norm.linear": "modulation.lin",
    **fused("linear1", "attn", SELF_ATTENTION, "proj_mlp"),
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "proj_out": "linear2",
}


def tiny_transformer(**changes: Any) -> FluxTransformer2DModel:
    """A tiny transformer of the kind of FLUX.1-dev, which takes a guidance scale."""
    settings: dict[str, Any] = {
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": tiny.T5_WIDTH,
        "pooled_projection_dim": tiny.CLIP_WIDTH,
        "axes_dims_rope": (4, 6, 6),
        "guidance_embeds": True,
    }
    return tiny.untrained(lambda: FluxTransformer2DModel(**(settings | changes)))


def tiny_arguments(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments of an untrained tiny pipeline."""
    transformer = tiny_transformer(**changes)
    first, second = tiny.clip_tokenizer(), tiny.t5_tokenizer()
    return {
        "vae": tiny.wide_autoencoder(),
        "text_encoder": tiny.clip_encoder(first, tiny.CLIP_WIDTH, projected=False),
        "text_encoder_2": tiny.t5_encoder(second, transformer.config.joint_attention_dim),
        "tokenizer": first,
        "tokenizer_2": second,
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }


FAMILY = Family(
    FluxTransformer2DModel,
    wrap,
    component="transformer",
    text=TextToImage(
        pipelines=("FluxPipeline",),
        tokenizers={"tokenizer": None, "tokenizer_2": _T5_TOKENS},
        encode_prompts=encode_prompts,
        fold_guidance=fold_guidance,
        tiny={"FluxPipeline": tiny_arguments},
    ),
    comfy_lora="diffusers",
    original_layout=transformer_layout(
        _NAMES,
        {
            "transformer_blocks": ("double_blocks", _BLOCK_NAMES),
            "single_transformer_blocks": ("single_blocks", _SINGLE_BLOCK_NAMES),
        },
    ),
    single_files={
        "Flux": lambda tensors: (
            "double_blocks.0.img_attn.norm.key_norm.scale" in tensors and "vector_in.in_layer.weight" in tensors
        )
    },
)
