"""Tiny pipelines of transformers with one large text encoder: PixArt, Sana, Lumina 2, Qwen-Image, Z-Image, FLUX.2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers

from fdistill.adapters.pixart import tiny_transformer as pixart_transformer
from fdistill.adapters.sana import tiny_autoencoder as deep_compression_vae
from fdistill.adapters.sana import tiny_transformer as sana_transformer
from fdistill.adapters.tiny_parts import RESOLUTION
from fdistill.commands.tiny_pipelines import tiny_pipeline
from support.text_families_flux2 import TEXT_FAMILIES_FLUX2

__all__ = [
    "HAS_QWEN_IMAGE",
    "HAS_Z_IMAGE",
    "LUMINA2_RESOLUTION",
    "SANA_RESOLUTION",
    "TEXT_FAMILIES_DIT",
    "deep_compression_vae",
    "pixart_transformer",
    "qwen_transformer",
    "sana_transformer",
    "video_vae",
]

#: From diffusers 0.37 on Qwen-Image does not see the padding of prompts, and is supported.
HAS_QWEN_IMAGE = tuple(int(part) for part in diffusers.__version__.split(".")[:2]) >= (0, 37)
if HAS_QWEN_IMAGE:
    from fdistill.adapters.qwen_image import tiny_autoencoder as video_vae
    from fdistill.adapters.qwen_image import tiny_transformer as qwen_transformer

HAS_Z_IMAGE = hasattr(diffusers, "ZImagePipeline")

#: SanaPipeline takes multiples of 32.
SANA_RESOLUTION = 32
#: Lumina2Pipeline takes 8 pixels for a latent, whatever its autoencoder does.
LUMINA2_RESOLUTION = 64


def pixart(folder: Path) -> Path:
    """PixArt-Sigma: eps with learned variances, linear betas, captions of 300 tokens."""
    tiny_pipeline("PixArtSigmaPipeline").save_pretrained(folder)
    return folder


def pixart_alpha(folder: Path) -> Path:
    """PixArt-alpha for 1024 pixels: told the resolution and the aspect ratio, captions of 120 tokens.

    Its sample size of 128 is what PixArtAlphaPipeline knows it by; it draws 16 x 16 pixels if it is asked for them.
    """
    tiny_pipeline("PixArtAlphaPipeline", {"sample_size": 128}).save_pretrained(folder)
    return folder


def sana(folder: Path, **changes: Any) -> Path:
    """Sana: flow with a solver of shifted levels, a language model told how to enhance prompts."""
    tiny_pipeline("SanaPipeline", changes).save_pretrained(folder)
    return folder


def sana_timestep_scale(folder: Path) -> Path:
    """Sana that is told timesteps in [0, 1], as those of its later versions are."""
    return sana(folder, timestep_scale=0.001, qk_norm="rms_norm_across_heads")


def qwen_image(folder: Path) -> Path:
    """Qwen-Image: flow on packed latents, prompts of their own length each."""
    tiny_pipeline("QwenImagePipeline").save_pretrained(folder)
    return folder


def z_image(folder: Path) -> Path:
    """Z-Image: flow whose time runs the other way, prompts of their own length each."""
    tiny_pipeline("ZImagePipeline").save_pretrained(folder)
    return folder


def lumina2(folder: Path) -> Path:
    """Lumina Image 2: flow whose time runs the other way; its pipeline takes 8 pixels a latent."""
    tiny_pipeline("Lumina2Pipeline").save_pretrained(folder)
    return folder


def _call(resolution: int, **more: Any) -> dict[str, Any]:
    return {"num_inference_steps": 1, "height": resolution, "width": resolution, **more}


#: The pipelines of PixArt and Sana know some resolutions of their own, to which they would round.
_UNGUIDED: dict[str, Any] = {"guidance_scale": 0.0, "use_resolution_binning": False}

#: Name -> (what writes the pipeline, its class, what a one-step student of it is called with).
TEXT_FAMILIES_DIT: dict[str, tuple[Callable[[Path], Path], str, dict[str, Any]]] = {
    "pixart": (pixart, "PixArtSigmaPipeline", _call(RESOLUTION, **_UNGUIDED)),
    "pixart-alpha": (pixart_alpha, "PixArtAlphaPipeline", _call(RESOLUTION, **_UNGUIDED)),
    "sana": (sana, "SanaPipeline", _call(SANA_RESOLUTION, **_UNGUIDED)),
    "sana-timestep-scale": (sana_timestep_scale, "SanaPipeline", _call(SANA_RESOLUTION, **_UNGUIDED)),
}
TEXT_FAMILIES_DIT["lumina2"] = (lumina2, "Lumina2Pipeline", _call(LUMINA2_RESOLUTION, guidance_scale=0.0))
if HAS_QWEN_IMAGE:
    TEXT_FAMILIES_DIT["qwen-image"] = (qwen_image, "QwenImagePipeline", _call(RESOLUTION, true_cfg_scale=1.0))
if HAS_Z_IMAGE:
    TEXT_FAMILIES_DIT["z-image"] = (z_image, "ZImagePipeline", _call(RESOLUTION, guidance_scale=0.0))
TEXT_FAMILIES_DIT |= TEXT_FAMILIES_FLUX2
