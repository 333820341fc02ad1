"""The transformer of Z-Image (rectified flow, arXiv 2511.22699); importing this needs diffusers 0.36."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

import fdistill.adapters.tiny_parts as tiny
from fdistill.adapters.blocks import run_block
from fdistill.adapters.family import Family, TextToImage, chat_tokens
from fdistill.adapters.original_names import SELF_ATTENTION, Table, fused, lists_layout
from fdistill.adapters.parametrisation import Parametrisation, flow_from_scheduler
from fdistill.adapters.text_to_image import TokenDenoiser
from fdistill.base.errors import CheckpointError
from fdistill.condition import TextCondition

_TOKENS = 512  # max_sequence_length of its pipeline
_PATCH = 2  # side of the patch of latents in a token
_SIZE = 128  # default height and width of latents, as in ZImagePipeline
_MULTIPLE = 32  # the network pads captions and images to multiples of this many tokens


class ZImageDenoiser(TokenDenoiser):
    """A ZImageTransformer2DModel.

    The network's time is 1 - sigma and its output x0 - eps; here, as in ZImagePipeline, both are turned around.
    """

    patch = _PATCH

    def __init__(self, network: ZImageTransformer2DModel, parametrisation: Parametrisation):
        config: Any = network.config
        if _PATCH not in config.all_patch_size or 1 not in config.all_f_patch_size or config.axes_lens[0] < _TOKENS + 2:
            raise CheckpointError(
                f"ZImageTransformer2DModel with all_patch_size {list(config.all_patch_size)}, all_f_patch_size "
                f"{list(config.all_f_patch_size)} and axes_lens {list(config.axes_lens)}: expected patches of {_PATCH} "
                f"and 1, and at least {_TOKENS + 2} positions, for captions of {_TOKENS} tokens"
            )
        text = {"prompt_embeds": (_TOKENS, config.cap_feat_dim), "prompt_embeds_mask": (_TOKENS,)}
        super().__init__(network, parametrisation, channels=config.in_channels, size=_SIZE, text_shapes=text)
        # The network's own call is kept, so that what hangs on it (sharding, hooks, checkpointing) works.
        self.network.forward = MethodType(_forward, self.network)

    def _blocks(self) -> Sequence[nn.Module]:
        network: Any = self.network
        return list(network.layers)

    def _width(self) -> int:
        network: Any = self.network
        return int(network.config.dim)

    def _most_tokens(self) -> int | None:
        network: Any = self.network
        return int(min(network.config.axes_lens[1:]))

    def _read(self, name: str, result: Any) -> Tensor:
        _, height, width = self.feature_shapes[name]
        tokens: Tensor = result  # of the image first, then of the caption
        return rearrange(tokens[:, : height * width], "b (h w) c -> b c h w", h=height)

    def _call(self, network_input: Tensor, timestep: Tensor, condition: TextCondition) -> Tensor:
        embeds, mask = self._cast(condition["prompt_embeds"]), condition["prompt_embeds_mask"]
        output: Tensor = self.network(self._cast(network_input), 1 - timestep, embeds, mask)
        return -output


def _forward(network: Any, x: Any, t: Tensor, cap_feats: Any, cap_mask: Tensor | None = None, **options: Any) -> Any:
    """The `forward` of a network: as its class has it for lists, as pipelines call it, and `_batched` for tensors."""
    if cap_mask is None:
        return ZImageTransformer2DModel.forward(network, x, t, cap_feats, **options)
    return _batched(network, x, t, cap_feats, cap_mask)


def _batched(network: Any, x: Tensor, t: Tensor, embeds: Tensor, mask: Tensor) -> Tensor:
    """Evaluates a ZImageTransformer2DModel on captions that are padded to one length.

    The class's own forward takes lists, whose lengths it has to know before it can start. Here only the device knows
    them, so that a training step does not wait for it. Hence captions are computed at their full length, however short
    the prompts are, and attention does not see what is beyond a caption's own multiple of 32.

    Args:
        network: its blocks, embedders and last layer are called.
        x: latents [B, C, H, W], in the network's dtype.
        t: 1 - sigma, [B].
        embeds: captions [B, L, D], in the network's dtype.
        mask: [B, L], nonzero for tokens of the caption, which come before the padding.

    Returns:
        x0 - eps, [B, C, H, W].
    """
    count, (height, width) = len(x), (side // _PATCH for side in x.shape[-2:])
    adaln = network.t_embedder(t * network.t_scale).type_as(x)
    lengths = mask.bool().sum(1)
    # A caption's own padding is seen by attention, as a learned token. An empty one consists of nothing else.
    padded = ((lengths + _MULTIPLE - 1) // _MULTIPLE).clamp(min=1) * _MULTIPLE

    patches = rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=_PATCH, q=_PATCH)
    image = network.all_x_embedder[f"{_PATCH}-1"](patches)
    more = -image.shape[1] % _MULTIPLE
    image = torch.cat([image, network.x_pad_token.type_as(image).expand(count, more, -1)], dim=1)
    image_rotary = _rotary(network, _image_positions(padded, height, width, more))
    for block in network.noise_refiner:
        image = run_block(network, block, image, None, image_rotary, adaln)

    embeds = F.pad(embeds, (0, 0, 0, -embeds.shape[1] % _MULTIPLE))
    places = torch.arange(embeds.shape[1], device=x.device)
    caption = network.cap_embedder(embeds)
    caption = torch.where((places < lengths[:, None])[..., None], caption, network.cap_pad_token.type_as(caption))
    seen = places < padded[:, None]
    caption_rotary = _rotary(network, F.pad((places + 1)[:, None], (0, 2)).expand(count, -1, -1))
    for block in network.context_refiner:
        caption = run_block(network, block, caption, seen, caption_rotary)

    tokens, rotary = torch.cat([image, caption], dim=1), torch.cat([image_rotary, caption_rotary], dim=1)
    seen = F.pad(seen, (image.shape[1], 0), value=True)
    for block in network.layers:
        tokens = run_block(network, block, tokens, seen, rotary, adaln)
    made: Tensor = network.all_final_layer[f"{_PATCH}-1"](tokens, adaln)[:, : height * width]
    return rearrange(made, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=_PATCH, q=_PATCH)


def _image_positions(after: Tensor, height: int, width: int, more: int) -> Tensor:
    """Positions int64 [B, height * width + more, 3] of an image's tokens: (`after`[b] + 1, row, column), then zeros."""
    axes = (torch.arange(side, device=after.device) for side in (1, height, width))
    grid = torch.cartesian_prod(*axes).expand(len(after), -1, -1)
    offset = F.pad((after + 1)[:, None, None], (0, 2))
    return F.pad(grid + offset, (0, 0, 0, more))


def _rotary(network: Any, positions: Tensor) -> Tensor:
    """Positions [B, N, 3] -> rotary embeddings complex64 [B, N, half of a head's channels]."""
    found: Tensor = network.rope_embedder(positions.flatten(0, 1))
    return rearrange(found, "(b n) c -> b n c", b=len(positions))


def wrap(network: ZImageTransformer2DModel, scheduler: Mapping[str, Any] | None) -> ZImageDenoiser:
    """Builds the denoiser from a network and its scheduler's config; raises CheckpointError if they do not fit."""
    return ZImageDenoiser(network, flow_from_scheduler("ZImageTransformer2DModel", scheduler, time_scale=1.0))


def encode_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str], resolution: int) -> TextCondition:
    """Encodes prompts into the network's inputs, the same at every resolution.

    Prompts are padded to 512 tokens, and a mask marks the padding.
    """
    # The pipeline writes its template into the list that it is given.
    embeds, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=_TOKENS)
    lengths = torch.tensor([len(each) for each in embeds], device=embeds[0].device)
    return TextCondition(
        {
            "prompt_embeds": torch.stack([F.pad(each, (0, 0, 0, _TOKENS - len(each))) for each in embeds]),
            "prompt_embeds_mask": (torch.arange(_TOKENS, device=lengths.device) < lengths[:, None]).long(),
        }
    )


#: The publisher's names of the tensors outside of blocks, and of those in a block, as diffusers' own
#: `convert_z_image_transformer_checkpoint_to_diffusers` reads them.
_NAMES: Table = {
    "all_x_embedder.2-1": "x_embedder",
    **{f"all_final_layer.2-1.{name}": f"final_layer.{name}" for name in ("linear", "adaLN_modulation.1")},
    **{name: name for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1")},
    **{name: name for name in ("x_pad_token", "cap_pad_token")},
}
_BLOCK_NAMES: Table = {
    **fused("attention.qkv", "attention", SELF_ATTENTION),
    "attention.norm_q": "attention.q_norm",
    "attention.norm_k": "attention.k_norm",
    "attention.to_out.0": "attention.out",
    **{name: name for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2", "adaLN_modulation.0")},
    **{name: name for name in ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")},
}


def tiny_transformer(**changes: Any) -> ZImageTransformer2DModel:
    """A tiny transformer for captions of full length; its embedding of timesteps alone has 0.3 M parameters."""
    settings: dict[str, Any] = {
        "dim": 24,
        "n_layers": 4,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 24,
        "axes_dims": (4, 4, 4),
        "axes_lens": (_TOKENS + 2, 64, 64),
    }
    return tiny.untrained(lambda: ZImageTransformer2DModel(**(settings | changes)))


def tiny_arguments(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments of an untrained tiny pipeline."""
    transformer, tokenizer = tiny_transformer(**changes), tiny.chat_tokenizer()
    return {
        "vae": tiny.wide_autoencoder(),
        "text_encoder": tiny.qwen3_encoder(tokenizer, transformer.config.cap_feat_dim),
        "tokenizer": tokenizer,
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


FAMILY = Family(
    ZImageTransformer2DModel,
    wrap,
    component="transformer",
    text=TextToImage(
        pipelines=("ZImagePipeline",),
        tokenizers={"tokenizer": _TOKENS},
        encode_prompts=encode_prompts,
        guidance_offset=-1.0,
        tokens_before=chat_tokens,
        tiny={"ZImagePipeline": tiny_arguments},
    ),
    comfy_lora="diffusers",
    original_layout=lists_layout(("layers", "noise_refiner", "context_refiner"), _NAMES, _BLOCK_NAMES),
    single_files={"Z-Image": lambda tensors: {"x_pad_token", "layers.0.attention.qkv.weight"} <= tensors.keys()},
)
