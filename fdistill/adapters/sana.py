"""The transformer of Sana (rectified flow with linear attention, arXiv 2410.10629)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import (
    AutoencoderDC,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from torch import Tensor

import fdistill.adapters.tiny_language as tiny_language
import fdistill.adapters.tiny_parts as tiny
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
    return _encode(pipeline, list(prompts), _instruction(type(pipeline)))


def _instruction(pipeline: type) -> list[str]:
    instruction: list[str] = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
    return instruction


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


def tiny_transformer(**changes: Any) -> SanaTransformer2DModel:
    """A tiny transformer for the latents of `tiny_autoencoder`."""
    settings: dict[str, Any] = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 4,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 24,
        "sample_size": tiny.LATENTS,
        "patch_size": 1,
    }
    return tiny.untrained(lambda: SanaTransformer2DModel(**(settings | changes)))


def tiny_autoencoder() -> AutoencoderDC:
    """4 pixels a latent, since SanaPipeline takes multiples of 32 pixels; 8 channels, no posterior."""
    blocks: dict[str, Any] = {
        f"{half}_{name}": value
        for half in ("encoder", "decoder")
        for name, value in {
            "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
            "block_out_channels": (8, 8, 16),
            "layers_per_block": (1, 1, 1),
            "qkv_multiscales": ((), (), (5,)),
        }.items()
    }
    return tiny.untrained(lambda: AutoencoderDC(latent_channels=8, attention_head_dim=8, scaling_factor=0.41, **blocks))


def tiny_arguments(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments of an untrained tiny pipeline."""
    transformer = tiny_transformer(**changes)
    tokenizer = tiny_language.gemma_tokenizer(_instruction(SanaPipeline))
    return {
        "tokenizer": tokenizer,
        "text_encoder": tiny_language.gemma2_encoder(tokenizer, transformer.config.caption_channels),
        "vae": tiny_autoencoder(),
        "transformer": transformer,
        "scheduler": DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
        ),
    }


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
        tiny={"SanaPipeline": tiny_arguments},
    ),
)
