"""The transformer of Stable Diffusion 3 and 3.5 (MMDiT with rectified flow, arXiv 2403.03206)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from fdistill.adapters.parametrisation import DirectPrediction, Parametrisation, parametrisation_from_scheduler
from fdistill.adapters.text_to_image import TokenDenoiser
from fdistill.base.errors import CheckpointError
from fdistill.condition import TextCondition

NETWORK = SD3Transformer2DModel
PIPELINES: tuple[type[DiffusionPipeline], ...] = (StableDiffusion3Pipeline,)
COMPONENT = "transformer"
_CLIP_TOKENS, _T5_TOKENS = 77, 256
#: With what its pipeline draws as a student does: unguided, at the size it is told.
UNGUIDED: dict[str, Any] = {"guidance_scale": 0.0}
#: Tokenizers of its pipeline, and how many tokens of a prompt are read: None is what the tokenizer says.
TOKENIZERS: dict[str, int | None] = {"tokenizer": None, "tokenizer_2": None, "tokenizer_3": _T5_TOKENS}


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
    """The denoiser of a network and the config of the scheduler beside it; CheckpointError if they do not fit."""
    form = parametrisation_from_scheduler(scheduler)
    if not isinstance(form, DirectPrediction) or form.prediction != "flow":
        raise CheckpointError(
            f"SD3Transformer2DModel with {dict(scheduler or {}).get('_class_name')}: expected a flow-matching "
            "scheduler, such as FlowMatchEulerDiscreteScheduler"
        )
    return SD3Denoiser(network, form)


def encode_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str], resolution: int) -> TextCondition:
    """What the network is told of prompts; the same at every resolution.

    Without its T5 encoder (text_encoder_3) the pipeline puts zeros in its place, as wide as its transformer reads.

    Raises:
        CheckpointError: a CLIP encoder is missing, or T5 and the transformer both.
    """
    encoders: Any = pipeline
    if encoders.text_encoder is None or encoders.text_encoder_2 is None:
        raise CheckpointError(
            "StableDiffusion3Pipeline without text_encoder or text_encoder_2: expected both; only text_encoder_3 can "
            "be left out"
        )
    if encoders.text_encoder_3 is None and encoders.transformer is None:
        raise CheckpointError(
            "StableDiffusion3Pipeline without text_encoder_3: zeros stand for its output, as wide as the transformer "
            "reads; expected the transformer beside the encoders (only its config is read)"
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


def encode_null(pipeline: DiffusionPipeline, negative_prompt: str, resolution: int) -> TextCondition:
    """What guidance leads away from: a negative prompt, or the empty one."""
    return encode_prompts(pipeline, [negative_prompt], resolution)
