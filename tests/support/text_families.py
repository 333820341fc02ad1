"""Tiny text-to-image pipelines of real components, built from configs and saved as their owners publish them.

Latents are 8 x 8, images 16 x 16 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from fdistill.adapters.flux import tiny_transformer as flux_transformer
from fdistill.adapters.sd3 import tiny_transformer as sd3_transformer
from fdistill.adapters.tiny_parts import RESOLUTION, t5_encoder, t5_tokenizer
from fdistill.adapters.unet2d_condition import tiny_unet as tiny_condition_unet
from fdistill.commands.tiny_pipelines import tiny_pipeline

__all__ = [
    "RESOLUTION",
    "TEXT_FAMILIES",
    "flux_transformer",
    "sd3_transformer",
    "t5_encoder",
    "t5_tokenizer",
    "tiny_condition_unet",
]


def _saved(folder: Path, class_name: str, **settings: Any) -> Path:
    tiny_pipeline(class_name, **settings).save_pretrained(folder)
    return folder


def sd15(folder: Path) -> Path:
    return _saved(folder, "StableDiffusionPipeline")


def sd21v(folder: Path) -> Path:
    """Stable Diffusion 2.1: v, linear projections, heads by block."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    network = {"cross_attention_dim": 24, "use_linear_projection": True, "attention_head_dim": (1, 2)}
    return _saved(folder, "StableDiffusionPipeline", network=network, scheduler=scheduler)


def sdxl(folder: Path) -> Path:
    return _saved(folder, "StableDiffusionXLPipeline")


def sd3(folder: Path) -> Path:
    return _saved(folder, "StableDiffusion3Pipeline")


def sd35_large(folder: Path) -> Path:
    """Stable Diffusion 3.5 large: queries and keys are normalised, and no block attends to the image twice."""
    return _saved(folder, "StableDiffusion3Pipeline", network={"dual_attention_layers": ()})


def sd3_without_t5(folder: Path) -> Path:
    """The largest encoder left out, as on small machines; zeros stand for its output. diffusers loads such a folder
    only with `text_encoder_3=None, tokenizer_3=None`.
    """
    components = tiny_pipeline("StableDiffusion3Pipeline").components
    StableDiffusion3Pipeline(**components | {"text_encoder_3": None, "tokenizer_3": None}).save_pretrained(folder)
    return folder


def flux_dev(folder: Path) -> Path:
    """FLUX.1-dev: told a guidance scale; sampling levels shifted by resolution."""
    return _saved(folder, "FluxPipeline")


def flux_schnell(folder: Path) -> Path:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    return _saved(folder, "FluxPipeline", network={"guidance_embeds": False}, scheduler=scheduler)


_CALL: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 0.0}
#: FluxPipeline draws 1024 x 1024 pixels unless it is told.
_FLUX_CALL: dict[str, Any] = _CALL | {"height": RESOLUTION, "width": RESOLUTION}

#: Name -> (what writes the pipeline, its class, what a one-step student of it is called with).
TEXT_FAMILIES: dict[str, tuple[Callable[[Path], Path], str, dict[str, Any]]] = {
    "sd15": (sd15, "StableDiffusionPipeline", _CALL),
    "sd21v": (sd21v, "StableDiffusionPipeline", _CALL),
    "sdxl": (sdxl, "StableDiffusionXLPipeline", _CALL),
    "sd3": (sd3, "StableDiffusion3Pipeline", _CALL),
    "flux-dev": (flux_dev, "FluxPipeline", _FLUX_CALL),
    "flux-schnell": (flux_schnell, "FluxPipeline", _FLUX_CALL),
    "sd35-large": (sd35_large, "StableDiffusion3Pipeline", _CALL),
}
