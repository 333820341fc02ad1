"""FLUX.2's latents, patched and normalised, on their way from images over the cache and a run to a student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from fdistill import distill
from fdistill.adapters.step_levels import step_levels
from fdistill.base.images import to_unit
from fdistill.config.reading import load_config
from fdistill.data.latents import LatentSource
from fdistill.generation.generate import generate
from fdistill.planning.weightless import open_without_weights
from fdistill.teachers.teacher import TeacherSettings, open_teacher
from fdistill.training.cache import cache
from support.text_families import RESOLUTION
from support.text_families_flux2 import HAS_FLUX2, klein
from support.text_runs import LORA, PROMPTS, SETTINGS


@pytest.mark.thorough
@pytest.mark.skipif(not HAS_FLUX2, reason="this diffusers has no FLUX.2")
def test_from_captioned_images_to_a_student_of_three_steps(tmp_path: Path) -> None:
    teacher, images = klein(tmp_path / "klein"), tmp_path / "images"
    images.mkdir()
    random = np.random.default_rng(0)
    pixels = [random.integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8) for _ in PROMPTS]
    for i, prompt in enumerate(PROMPTS):
        Image.fromarray(pixels[i]).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(prompt, encoding="utf-8")
    folder = cache(images, teacher=teacher, output=tmp_path / "latents", workers=1, resolution=RESOLUTION)
    source, pipeline = LatentSource(folder), DiffusionPipeline.from_pretrained(teacher)
    assert tuple(source.shape) == (16, 8, 8)
    assert source.text is not None
    means = source.moments(torch.arange(len(PROMPTS)))[0]
    for row, prompt in enumerate(source.text.prompts(torch.arange(len(PROMPTS)))):
        image = torch.from_numpy(pixels[PROMPTS.index(prompt)]).permute(2, 0, 1)[None]
        with torch.no_grad():
            expected = pipeline._patchify_latents(pipeline.vae.encode(to_unit(image)).latent_dist.mean)
        torch.testing.assert_close(means[row : row + 1].float(), expected, rtol=1e-2, atol=1e-2)

    settings: dict[str, Any] = {
        **SETTINGS,
        **LORA,
        "teacher": str(teacher),
        "data": str(folder),
        "resolution": RESOLUTION,
        "discriminator.features": ["depth50"],
        "student.steps": 3,
        "iterations": 1,
    }
    planned = open_without_weights(load_config("digits", settings))
    opened = open_teacher(TeacherSettings(str(teacher), resolution=RESOLUTION))
    assert planned.denoiser.sample_shape == opened.denoiser.sample_shape == (16, 8, 8)
    student = distill("digits", output=tmp_path / "run", **settings)
    call = json.loads((student / "fdistill_student.json").read_text())["call"]
    assert call["sigmas"] == pytest.approx(step_levels(opened.denoiser, 3, scheduler=pipeline.scheduler.config))
    assert (call["guidance_scale"], call["height"], call["width"]) == (1.0, RESOLUTION, RESOLUTION)
    made = [
        np.asarray(
            Image.open(
                next(generate(student, num_images=1, output=tmp_path / name, prompts=["a cat"], **how).glob("*.png"))
            )
        )
        for name, how in (("own", {}), ("pipeline", {"sampler": "pipeline"}))
    ]
    assert all(image.shape == (RESOLUTION, RESOLUTION, 3) and image.std() > 1 for image in made)
