"""From pixels to the samples a latent teacher sees and back, against what its publisher's code or pipeline does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from fdistill.base.images import to_uint8, to_unit
from fdistill.networks import EDM2Network
from fdistill.teachers.autoencoder import LatentSpace
from fdistill.teachers.teacher import TeacherSettings, open_teacher
from support.families import dit
from support.text_families import TEXT_FAMILIES
from support.text_families_dit import TEXT_FAMILIES_DIT
from support.text_families_flux2 import HAS_FLUX2
from support.text_pipelines import load_pipeline
from support.tolerances import assert_rounded

if HAS_FLUX2:
    from diffusers import Flux2KleinPipeline

ARRAYS = Path(__file__).parent / "arrays"
PIPELINES = {name: family[0] for families in (TEXT_FAMILIES, TEXT_FAMILIES_DIT) for name, family in families.items()}


def pictures(size: int) -> torch.Tensor:
    """uint8 [3, 3, size, size] from black to white."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, size, size), dtype=np.uint8))


def test_edm2_sees_latents_of_images_from_0_to_1(tmp_path: Path) -> None:
    recorded = {name: torch.from_numpy(value) for name, value in np.load(ARRAYS / "edm2-pixels-latents.npz").items()}
    scaling = {name: recorded[name].tolist() for name in ("latent_scale", "latent_bias")}
    network = EDM2Network(8, 4, model_channels=64, channel_mult=[1], num_blocks=1, attn_resolutions=[], **scaling)
    network.save_pretrained(tmp_path / "teacher")
    AutoencoderKL.from_pretrained(ARRAYS / "edm2-autoencoder").save_pretrained(tmp_path / "teacher" / "vae")
    space = open_teacher(TeacherSettings(str(tmp_path / "teacher"))).latents
    assert space is not None
    mean, std = space.moments(to_unit(recorded["images_uint8"])).chunk(2, dim=1)
    assert_rounded(mean, recorded["raw_mean"])
    assert_rounded(std, recorded["raw_std"])
    assert_rounded(space.scaling.to_samples(mean), recorded["latents_of_means"])
    seen = ((space.decode(recorded["latents"]).clamp(-1, 1) + 1) * 127.5).double()
    # The publisher cuts off what is behind the point: each value is in [recorded, recorded + 1).
    off = seen - recorded["decoded_uint8"]
    assert off.min() > -1e-3
    assert off.max() < 1 + 1e-3


def as_pil(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def encoded(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The mean of the latents, by the autoencoder's own code."""
    with torch.no_grad():
        if type(vae).__name__ == "AutoencoderDC":
            return vae.encode(pixels).latent
        if type(vae).__name__ == "AutoencoderKLQwenImage":
            return vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
        if type(vae).__name__ == "AutoencoderKLFlux2":
            return Flux2KleinPipeline._patchify_latents(vae.encode(pixels).latent_dist.mode())
        return vae.encode(pixels).latent_dist.mode()


def decoded(vae: Any, z: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        z = Flux2KleinPipeline._unpatchify_latents(z) if type(vae).__name__ == "AutoencoderKLFlux2" else z
        return vae.decode(z[:, :, None]).sample[:, :, 0] if "Qwen" in type(vae).__name__ else vae.decode(z).sample


def space_of(folder: Path) -> LatentSpace:
    space = open_teacher(TeacherSettings(str(folder))).latents
    assert space is not None
    return space


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipelines_image_processor_agrees(name: str, tmp_path: Path) -> None:
    """`preprocess` of diffusers gives the autoencoder what this project does, and `postprocess` the same image."""
    folder = PIPELINES[name](tmp_path / name)
    space, pipeline = space_of(folder), load_pipeline(folder)
    images = pictures(32)
    pixels = pipeline.image_processor.preprocess(as_pil(images), height=32, width=32)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    mean = space.moments(to_unit(images)).chunk(2, dim=1)[0]
    assert_rounded(mean, encoded(pipeline.vae, pixels))
    found = to_uint8(space.decode(space.scaling.to_samples(mean)))
    expected = pipeline.image_processor.postprocess(decoded(pipeline.vae, mean), output_type="pil")
    shown = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in expected])
    assert (found.int() - shown.int()).abs().max() <= 1  # the scaling there and back rounds
    assert (found != shown).float().mean() < 0.01


def test_dits_published_code_encodes_images_from_minus_1_to_1(tmp_path: Path) -> None:
    """facebookresearch/DiT, train.py: Normalize(0.5, 0.5), `vae.encode(x)`; sample.py: decoded images in [-1, 1]."""
    folder = dit(tmp_path / "dit")
    space = space_of(folder)
    vae: Any = AutoencoderKL.from_pretrained(folder / "vae").eval()
    images = pictures(16)
    mean = space.moments(to_unit(images)).chunk(2, dim=1)[0]
    assert_rounded(mean, encoded(vae, (images / 255 - 0.5) / 0.5))
    assert_rounded(space.decode(space.scaling.to_samples(mean)), decoded(vae, mean))
