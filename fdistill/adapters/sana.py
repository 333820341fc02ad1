"""The transformer of Sana (rectified flow with linear attention, arXiv 2410.10629)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline, SanaTransformer2DModel
from torch import Tensor

from fdistill.adapters.family import Family, TextToImage
from fdistill.adapters.parametrisation import Parametrisation, parametrisation_from_scheduler
from fdistill.adapters.text_to_image import TokenDenoiser
from fdistill.base.errors import CheckpointError
from fdistill.condition import TextCondition

_TOKENS = 300


class SanaDenoiser(TokenDenoiser):
    """A SanaTransformer2DModel."""

    def __init__(self, network: SanaTransformer2DModel, parametrisation: Parametrisation):
        config: Any = network.config
        if config.out_channels not in (None, config.in_channels):
            raise CheckpointError(
                f"SanaTransformer2DModel with {config.in_channels} input and {config.out_channels} output channels: "
                "expected as many outputs as inputs"
            )
        text = {"prompt_embeds": (_TOKENS, config.caption_channels), "prompt_attention_mask": (_TOKENS,)}
        super().__init__(
            network, parametrisation, channels=config.in_channels, size=config.sample_size, text_shapes=text
        )

    def _call(self, network_input: Tensor, timestep: Tensor, condition: TextCondition) -> Tensor:
        network: Any = self.network
        output: Tensor = network(
            network_input,
            encoder_hidden_states=self._cast(condition["prompt_embeds"]),
            encoder_attention_mask=condition["prompt_attention_mask"],
            timestep=timestep * network.config.timestep_scale,
            return_dict=False,
        )[0]
        return output


def wrap(network: SanaTransformer2DModel, scheduler: Mapping[str, Any] | None) -> SanaDenoiser:
    """Builds the denoiser from a network and its scheduler's config; raises CheckpointError if they do not fit."""
    return SanaDenoiser(network, parametrisation_from_scheduler(scheduler))


def encode_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str], resolution: int) -> TextCondition:
    """Encodes prompts into the network's inputs, the same at every resolution.

    The pipeline's own instruction to its language model is put before each prompt.
    """
    instruction = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
    return _encode(pipeline, list(prompts), instruction)


def encode_negative(pipeline: DiffusionPipeline, negative_prompt: str, resolution: int) -> TextCondition:
    """Encodes a negative prompt, which may be empty, without the instruction."""
    return _encode(pipeline, [negative_prompt], None)


def _encode(pipeline: Any, prompts: list[str], instruction: list[str] | None) -> TextCondition:
    embeds, mask, _, _ = pipeline.encode_prompt(
        prompts,
        do_classifier_free_guidance=False,
        clean_caption=True,
        max_sequence_length=_TOKENS,
        complex_human_instruction=instruction,
    )
    return TextCondition({"prompt_embeds": embeds, "prompt_attention_mask": mask})


FAMILY = Family(
    SanaTransformer2DModel,
    wrap,
    component="transformer",
    text=TextToImage(
        pipelines=("SanaPipeline",),
        tokenizers={"tokenizer": _TOKENS},  # for the prompt, beside those of the instruction
        encode_prompts=encode_prompts,
        encode_negative=encode_negative,
        unguided={"guidance_scale": 0.0, "use_resolution_binning": False},
    ),
)
