"""The schedulers that text-to-image students are exported with make their teacher's pipeline draw what they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxPipeline
from einops import rearrange
from torch import Tensor

from fdistill.adapters import flux
from fdistill.adapters.checkpoint import Checkpoint
from fdistill.adapters.parametrisation import student_scheduler
from fdistill.generator import student_generator
from fdistill.noise import FlowSchedule
from fdistill.student_kinds import Sampler
from fdistill.teachers.autoencoder import attach_latent_space
from support.text_families import RESOLUTION, TEXT_FAMILIES
from support.text_families_dit import HAS_Z_IMAGE, TEXT_FAMILIES_DIT
from support.text_families_flux2 import TEXT_FAMILIES_FLUX2, network_latents
from support.text_pipelines import SIZE, condition_of, denoiser_of, load_pipeline
from support.thorough import at_night

PROMPTS = ["a bold handwritten seven", "a thin digit"]
VP = ("pixart", "pixart-alpha")
#: Levels of timesteps and of flows.
STEPS: list[tuple[list[float], list[float], Sampler]] = [
    ([999], [1.0], "stochastic"),
    ([999, 749, 249], [1.0, 0.9, 0.5], "stochastic"),
    ([999, 600, 149], [1.0, 0.9, 0.3], "deterministic"),
]
LEVELS = [(name, levels[name not in VP], levels[2]) for name in TEXT_FAMILIES_DIT for levels in STEPS]
LEVELS += [(name, [400], "stochastic") for name in VP]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("text")
    return {name: write(base / name) for name, (write, _, _) in (TEXT_FAMILIES | TEXT_FAMILIES_DIT).items()}


def flux_latents(tokens: Tensor) -> Tensor:
    width = RESOLUTION * tokens.shape[1] * 4 // SIZE**2
    latents: Tensor = FluxPipeline._unpack_latents(tokens, RESOLUTION, width, RESOLUTION // SIZE)
    return latents


def qwen_latents(tokens: Tensor) -> Tensor:
    latents: Tensor = diffusers.QwenImagePipeline._unpack_latents(tokens, 2 * SIZE, tokens.shape[1] * 8 // SIZE, 2)
    return latents[:, :, 0]


#: Of the transformers with one large text encoder; both pipelines of FLUX.2 sample alike.
MORE = [*(["z-image"] if HAS_Z_IMAGE else []), *list(TEXT_FAMILIES_FLUX2)[:1]]
LEVELS_OF_STEPS: dict[str, tuple[list[float], list[float], Sampler]] = {
    "one": ([999], [1.0], "stochastic"),
    "one-earlier": ([749], [0.75], "stochastic"),
    "four": ([999, 749, 499, 249], [1.0, 0.9, 0.75, 0.5], "stochastic"),
    "three-deterministic": ([999, 600, 149], [1.0, 0.9, 0.3], "deterministic"),
    "two-deterministic-earlier": ([749, 499], [0.75, 0.5], "deterministic"),
}


#: By day, each family with one or two of these, in turns.
CASES = [(name, steps) for name in (*TEXT_FAMILIES, *MORE) for steps in LEVELS_OF_STEPS]


@pytest.mark.parametrize(
    ("name", "steps"),
    at_night(CASES, lambda case: CASES.index(case) % 2 == 1 or "earlier" in case[1] or case[0] == "sd35-large"),
)
def test_the_students_scheduler_makes_its_pipeline_the_student(
    name: str, steps: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    pipeline = load_pipeline(folders[name])
    denoiser, condition = denoiser_of(pipeline), condition_of(pipeline, PROMPTS, RESOLUTION)
    is_flow = isinstance(denoiser.schedule, FlowSchedule)
    levels, sampler = LEVELS_OF_STEPS[steps][is_flow], LEVELS_OF_STEPS[steps][2]
    found = student_scheduler(denoiser.parametrisation, levels, sampler)
    assert found is not None
    pipeline.scheduler, call = found
    pipeline.save_pretrained(tmp_path)
    student = load_pipeline(tmp_path)
    size = {"height": RESOLUTION, "width": RESOLUTION}
    if sampler == "deterministic":  # an image that is not square
        size["width"] *= 2
        denoiser.resize(SIZE, 2 * SIZE)
        condition = condition.at_size(**size)
    guidance = {"guidance_scale": 3.5 if name == "flux-dev" else 0.0}
    # The pipelines of SD 3, FLUX and Z-Image give their scheduler no generator.
    draws: dict[str, Any] = {} if is_flow else {"generator": torch.Generator().manual_seed(4)}
    torch.manual_seed(4)
    got = student(prompt=list(PROMPTS), **call, **size, **guidance, **draws, output_type="latent").images
    noise = torch.randn(len(levels), 2, *denoiser.sample_shape, generator=torch.Generator().manual_seed(4))
    if isinstance(denoiser, flux.FluxDenoiser):
        got = flux_latents(got)
        later = [flux_latents(one.reshape(2, -1, 64)) for one in noise[1:]]
        noise = torch.stack([noise[0], *later])
    if name in TEXT_FAMILIES_FLUX2:
        got = network_latents(student, got)
        later = [rearrange(one.reshape(2, SIZE, one.shape[-1], -1), "b h w c -> b c h w") for one in noise[1:]]
        noise = torch.stack([noise[0], *later])
    with torch.no_grad():
        one = len(levels) == 1 or sampler == "deterministic"
        expected = student_generator(denoiser, levels, sampler)(noise[0] if one else noise.transpose(0, 1), condition)
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "levels", "sampler"), at_night(LEVELS, lambda case: LEVELS.index(case) % 2 == 1))
def test_a_students_pipeline_draws_what_the_student_does(
    name: str, levels: list[float], sampler: Sampler, folders: dict[str, Path], tmp_path: Path
) -> None:
    pipeline = load_pipeline(folders[name])
    call = TEXT_FAMILIES_DIT[name][2]
    denoiser, condition = denoiser_of(pipeline), condition_of(pipeline, PROMPTS, call["height"])
    latents = attach_latent_space(denoiser, Checkpoint(name, folders[name]), None)
    assert latents is not None
    if sampler == "deterministic":  # an image that is not square
        call = {**call, "width": 2 * call["height"]}
        denoiser.resize(SIZE, 2 * SIZE)
        condition = condition.at_size(call["height"], call["width"])
    noise = torch.randn(2, *denoiser.sample_shape, generator=torch.Generator().manual_seed(1))
    given = noise if name != "qwen-image" else diffusers.QwenImagePipeline._pack_latents(noise, *noise.shape)
    drawn_later = torch.Generator().manual_seed(4)
    later = [torch.randn(given.shape, generator=drawn_later) for _ in levels[1:]]
    if name in TEXT_FAMILIES_FLUX2:
        later = [rearrange(one.reshape(2, SIZE, one.shape[-1], -1), "b h w c -> b c h w") for one in later]
    if name == "qwen-image":
        later = [qwen_latents(one) for one in later]
    entering = noise if len(levels) == 1 or sampler == "deterministic" else torch.stack([noise, *later], dim=1)
    student = student_generator(denoiser, levels, sampler).eval()
    with torch.no_grad():
        x0 = student(entering, condition)
    image = latents.decode(x0).div(2).add(0.5).clamp(0, 1)
    made = student_scheduler(denoiser.parametrisation, levels, sampler)
    assert made is not None
    scheduler, steps = made
    assert len(levels) > 1 or steps.items() <= call.items()
    pipeline.register_modules(transformer=denoiser.network, scheduler=scheduler)
    pipeline.save_pretrained(tmp_path / "student")
    loaded = load_pipeline(tmp_path / "student")
    assert type(loaded).__name__ == TEXT_FAMILIES_DIT[name][1]

    def drawn(output_type: str) -> Tensor:
        torch.manual_seed(4)  # schedulers of flows are given no generator
        images: Tensor = loaded(
            prompt=list(PROMPTS), latents=given, output_type=output_type, **{**call, **steps}
        ).images
        return images

    got = qwen_latents(drawn("latent")) if name == "qwen-image" else drawn("latent")
    got = network_latents(loaded, got) if name in TEXT_FAMILIES_FLUX2 else got
    torch.testing.assert_close(got, x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn("pt"), image, rtol=1e-4, atol=1e-4)
    assert image.std() > 0.01
