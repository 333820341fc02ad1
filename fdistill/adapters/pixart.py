"""The transformers of PixArt-alpha (arXiv 2310.00426) and PixArt-Sigma (arXiv 2403.04692)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from fdistill.adapters.parametrisation import Parametrisation, parametrisation_from_scheduler
from fdistill.adapters.text_to_image import TokenDenoiser
from fdistill.base.errors import CheckpointError
from fdistill.condition import TextCondition

NETWORK = PixArtTransformer2DModel
PIPELINES: tuple[type[DiffusionPipeline], ...] = (PixArtAlphaPipeline, PixArtSigmaPipeline)
COMPONENT = "transformer"
_ALPHA_TOKENS, _TOKENS = 120, 300  # max_sequence_length in the calls of PixArt-alpha's pipeline and of Sigma's
#: With what its pipeline draws as a student does: unguided, at the size it is told.
UNGUIDED: dict[str, Any] = {"guidance_scale": 0.0, "use_resolution_binning": False}
#: The tokenizer of its pipelines, and how many tokens of a prompt Sigma reads; alpha reads 120.
TOKENIZERS: dict[str, int | None] = {"tokenizer": _TOKENS}


def _drop_variances(network: PixArtTransformer2DModel) -> None:
    """Cuts the outputs that only an ancestral sampler reads."""
    transformer: Any = network
    config = transformer.config
    last: nn.Linear = transformer.proj_out
    pixels, channels = config.patch_size**2, config.in_channels
    kept = nn.Linear(last.in_features, pixels * channels, device=last.weight.device, dtype=last.weight.dtype)
    for name, value in last.state_dict().items():
        both = value.unflatten(0, (pixels, 2 * channels))
        kept.get_parameter(name).data.copy_(both[:, :channels].flatten(0, 1))
    transformer.proj_out = kept
    transformer.out_channels = channels
    transformer.register_to_config(out_channels=channels)


class PixArtDenoiser(TokenDenoiser):
    """A PixArtTransformer2DModel.

    Every condition holds the resolution and the aspect ratio, which only the networks of PixArt-alpha for 1024 pixels
    are told.
    """

    def __init__(self, network: PixArtTransformer2DModel, parametrisation: Parametrisation):
        config: Any = network.config
        if config.out_channels == 2 * config.in_channels:
            _drop_variances(network)
        elif config.out_channels not in (None, config.in_channels):
            raise CheckpointError(
                f"PixArtTransformer2DModel with {config.in_channels} input and {config.out_channels} output channels: "
                "expected as many outputs as inputs, or twice as many where variances are learned"
            )
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
    """The denoiser of a network and the config of the scheduler beside it; CheckpointError if they do not fit."""
    return PixArtDenoiser(network, parametrisation_from_scheduler(scheduler))


def encode_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str], resolution: int) -> TextCondition:
    """What the network is told of prompts, for square images of `resolution` pixels; all padded to 300 tokens, which
    the mask hides.
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


def encode_null(pipeline: DiffusionPipeline, negative_prompt: str, resolution: int) -> TextCondition:
    """What guidance leads away from: a negative prompt, or the empty one."""
    return encode_prompts(pipeline, [negative_prompt], resolution)
