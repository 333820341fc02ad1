"""The transformer of FLUX.1 dev and schnell (rectified flow; Black Forest Labs 2024, arXiv 2506.15742 section 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings
from einops import rearrange
from torch import Tensor, nn

from fdistill.adapters.parametrisation import DirectPrediction, Parametrisation, parametrisation_from_scheduler
from fdistill.adapters.text_to_image import TextDenoiser, TokenDenoiser
from fdistill.base.errors import ArgumentError, CheckpointError
from fdistill.condition import TextCondition

NETWORK = FluxTransformer2DModel
PIPELINES: tuple[type[DiffusionPipeline], ...] = (FluxPipeline,)
COMPONENT = "transformer"
_T5_TOKENS = 512
#: With what its pipeline draws as a student does: unguided, at the size it is told.
UNGUIDED: dict[str, Any] = {"guidance_scale": 0.0}
#: Tokenizers of its pipeline, and how many tokens of a prompt are read: None is what the tokenizer says.
TOKENIZERS: dict[str, int | None] = {"tokenizer": None, "tokenizer_2": _T5_TOKENS}

_PATCH = 2  # of latents in a token
_SIZE = 128  # of latents where nobody says otherwise, as in FluxPipeline
_GUIDANCE = 3.5  # FluxPipeline's default


class FluxDenoiser(TokenDenoiser):
    """A FluxTransformer2DModel; latents [B, C, H, W] become tokens of 2 x 2 here. Features, all images of its image
    tokens: "block0", "block1", ... (blocks of two streams, then those of one, counted on) and the blocks at a share of
    its depth, "depth25", "depth50", "depth75" and "depth99".

    Attributes:
        embedded_guidance: the guidance scale that the network is told, 3.5 at first; None for a network that is not
            told any, as that of schnell.
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
        """The same reading of another network of this class, for latents of the same size and the same guidance."""
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
    """[height * width, 3]: 0, row and column of every token."""
    axes = (torch.arange(side, device=device, dtype=torch.float32) for side in (1, height, width))
    return torch.cartesian_prod(*axes)


@torch.no_grad()
def fold_guidance(network: FluxTransformer2DModel, scale: float) -> None:
    """Makes a network that is told a guidance scale into one that is told none and acts as under this one.

    The scale only adds guidance_embedder(scale), a constant, to the embedding of the timestep, so that it becomes part
    of that embedding's last bias. Changes the network in place, whose `guidance_embeds` is False afterwards; it then
    runs in FluxPipeline whatever the `guidance_scale` there.

    Raises:
        ArgumentError: a network that is told no guidance scale.
    """
    model: Any = network
    if not model.config.guidance_embeds:
        raise ArgumentError("network: has no guidance embedding; expected one with guidance_embeds, as FLUX.1-dev's")
    told = model.time_text_embed
    bias: Tensor = told.timestep_embedder.linear_2.bias
    frequencies = told.time_proj(1000 * torch.tensor([scale], dtype=bias.dtype, device=bias.device))
    bias += told.guidance_embedder(frequencies.to(bias.dtype))[0]
    untold = CombinedTimestepTextProjEmbeddings(model.inner_dim, model.config.pooled_projection_dim)
    untold.timestep_embedder, untold.text_embedder = told.timestep_embedder, told.text_embedder
    model.time_text_embed = untold.train(told.training)
    model.register_to_config(guidance_embeds=False)


def wrap(network: FluxTransformer2DModel, scheduler: Mapping[str, Any] | None) -> FluxDenoiser:
    """The denoiser of a network and the config of the scheduler beside it; CheckpointError if they do not fit."""
    form = parametrisation_from_scheduler(scheduler)
    if not isinstance(form, DirectPrediction) or form.prediction != "flow":
        raise CheckpointError(
            f"FluxTransformer2DModel with {dict(scheduler or {}).get('_class_name')}: expected a flow-matching "
            "scheduler, such as FlowMatchEulerDiscreteScheduler"
        )
    return FluxDenoiser(network, DirectPrediction(form.schedule, "flow", time_scale=1.0))


def encode_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str], resolution: int) -> TextCondition:
    """What the network is told of prompts; the same at every resolution. CheckpointError if an encoder is missing."""
    encoders: Any = pipeline
    if encoders.text_encoder is None or encoders.text_encoder_2 is None:
        raise CheckpointError("FluxPipeline without text_encoder or text_encoder_2: expected both")
    embeds, pooled, _ = encoders.encode_prompt(
        list(prompts), None, device=encoders.text_encoder.device, max_sequence_length=_T5_TOKENS
    )
    return TextCondition({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})


def encode_null(pipeline: DiffusionPipeline, negative_prompt: str, resolution: int) -> TextCondition:
    """What guidance leads away from: a negative prompt, or the empty one."""
    return encode_prompts(pipeline, [negative_prompt], resolution)
