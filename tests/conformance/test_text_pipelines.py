"""Text-to-image teachers against the pipelines of diffusers: prompts, network, guidance, x0 and pixels in one chain.

One step of a pipeline from any level down to 0 returns the guided x0-prediction at that level, decoded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from fdistill.adapters.checkpoint import Checkpoint
from fdistill.adapters.parametrisation import student_scheduler
from fdistill.guidance import GuidedDenoiser
from fdistill.noise import FlowSchedule
from fdistill.teachers.autoencoder import attach_latent_space
from support.text_families import RESOLUTION, TEXT_FAMILIES
from support.text_families_dit import TEXT_FAMILIES_DIT
from support.text_families_flux2 import TEXT_FAMILIES_FLUX2, network_latents
from support.text_pipelines import SIZE, condition_of, denoiser_of, encoders, load_pipeline, text_of
from support.thorough import at_night
from support.tolerances import assert_rounded

PIPELINES = {**TEXT_FAMILIES, **TEXT_FAMILIES_DIT}
PROMPTS = ["a bold handwritten seven", "a thin digit"]
SCALE = 3.0
#: Near the least noise, in the middle and at the end: timesteps, or levels of rectified flow.
PLACES = {"low": (20.0, 0.02), "middle": (499.0, 0.5), "high": (999.0, 1.0)}
#: What a pipeline is called with for guidance, where it is not guidance_scale; the negative prompt is empty.
GUIDANCE: dict[str, dict[str, Any]] = {
    "flux-dev": {"guidance_scale": 3.5},
    "flux-schnell": {},
    "qwen-image": {"true_cfg_scale": SCALE, "negative_prompt": " "},
    "z-image": {"guidance_scale": SCALE - 1},  # c + g (c - u)
    "flux2-dev": {"guidance_scale": 4.0},
}
#: Those whose pipelines give a guided prediction the norm of the one with the prompt.
NORMALISED = ("qwen-image", "lumina2")
EMBEDDED = ("flux-dev", "flux-schnell", "flux2-dev")  # with a guidance scale as an input, or with none


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("text")
    return {name: family[0](base / name) for name, family in PIPELINES.items()}


def packed(name: str, latents: Tensor) -> Tensor:
    """Latents as the pipeline takes them."""
    tokens = latents
    if name.startswith("flux-"):
        tokens = FluxPipeline._pack_latents(latents, *latents.shape)
    if name == "qwen-image":
        tokens = diffusers.QwenImagePipeline._pack_latents(latents, *latents.shape)
    return tokens


def unpacked(name: str, latents: Tensor, pipeline: Any) -> Tensor:
    images = latents
    if name in TEXT_FAMILIES_FLUX2:
        images = network_latents(pipeline, latents)
    if name.startswith("flux-"):
        images = FluxPipeline._unpack_latents(latents, RESOLUTION, RESOLUTION, RESOLUTION // SIZE)
    if name == "qwen-image":
        images = diffusers.QwenImagePipeline._unpack_latents(latents, 2 * SIZE, 2 * SIZE, 2)[:, :, 0]
    return images


@pytest.mark.parametrize("place", at_night(PLACES, lambda place: place != "middle"))
@pytest.mark.parametrize("name", at_night(PIPELINES, lambda name: name == "sd35-large"))
def test_x0_and_pixels_are_the_pipelines(name: str, place: str, folders: dict[str, Path]) -> None:
    pipeline = load_pipeline(folders[name])
    resolution = PIPELINES[name][2]["height"] if name in TEXT_FAMILIES_DIT else RESOLUTION
    denoiser, condition = denoiser_of(pipeline), condition_of(pipeline, PROMPTS, resolution)
    space = attach_latent_space(denoiser, Checkpoint(name, folders[name]), None)
    assert space is not None
    level = PLACES[place][isinstance(denoiser.schedule, FlowSchedule)]
    t, x_t = torch.full((2,), level), torch.randn(2, *denoiser.sample_shape, generator=torch.Generator().manual_seed(1))
    guided: Any = denoiser
    if name not in EMBEDDED:
        null = text_of(pipeline).encode_null(encoders(pipeline), " " if name == "qwen-image" else "", resolution)
        guided = GuidedDenoiser(denoiser, SCALE, null=null, rescale=1.0 if name in NORMALISED else 0.0)
    with torch.no_grad():
        x0 = guided(x_t, t, condition)
        pixels = space.decode(x0).div(2).add(0.5).clamp(0, 1)

    found = student_scheduler(denoiser.parametrisation, [level])
    assert found is not None
    pipeline.scheduler, call = found
    call = PIPELINES[name][2] | {"guidance_scale": SCALE} | GUIDANCE.get(name, {}) | call
    if name in ("qwen-image", "flux-schnell"):
        del call["guidance_scale"]
    call |= {"height": resolution, "width": resolution, "latents": packed(name, x_t)}
    if "sigmas" in call:
        del call["num_inference_steps"]
    # Z-Image's pipeline writes its template into the list.
    drawn = unpacked(name, pipeline(prompt=list(PROMPTS), output_type="latent", **call).images, pipeline)
    assert drawn.std() > 0.1
    assert_rounded(x0, drawn)
    assert_rounded(pixels, pipeline(prompt=list(PROMPTS), output_type="pt", **call).images, share=1e-4)
