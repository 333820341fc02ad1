"""Students of two and four steps: what they compute, what gets a gradient, and that plain diffusers draws the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from fdistill import distill, generate, load_student
from fdistill.adapters.parametrisation import DirectPrediction, EDMPreconditioning
from fdistill.adapters.unet2d import UNet2DDenoiser
from fdistill.base.errors import ArgumentError
from fdistill.generator import FewStepGenerator, student_generator
from fdistill.noise import EDMSchedule, FlowSchedule
from support.denoisers import tiny_unet


def denoiser() -> UNet2DDenoiser:
    torch.manual_seed(0)
    return UNet2DDenoiser(tiny_unet(), EDMPreconditioning(EDMSchedule(), 0.75, boundary=0.002, time_scale=250.0))


def test_each_step_denoises_the_noised_result_of_the_one_before() -> None:
    network, labels = denoiser(), torch.arange(3)
    noise = torch.randn(3, 2, 1, 8, 8)
    student = FewStepGenerator(network, [2.5, 0.5])
    first = network(2.5 * noise[:, 0], torch.full((3,), 2.5), labels)
    torch.testing.assert_close(student(noise[:, :1], labels), first)
    second = network(first + 0.5 * noise[:, 1], torch.full((3,), 0.5), labels)
    torch.testing.assert_close(student(noise, labels), second)
    assert student.noise_shape() == (2, 1, 8, 8)
    assert student_generator(network, [2.5]).noise_shape() == (1, 8, 8)


def test_signal_is_scaled_where_the_schedule_scales_it() -> None:
    network = UNet2DDenoiser(tiny_unet(num_class_embeds=None), DirectPrediction(FlowSchedule(), "flow", 1000.0))
    noise = torch.randn(3, 2, 1, 8, 8)
    first = network(noise[:, 0], torch.ones(3))
    second = network(0.6 * first + 0.4 * noise[:, 1], torch.full((3,), 0.4))
    torch.testing.assert_close(FewStepGenerator(network, [1.0, 0.4])(noise), second)


def test_only_the_last_step_has_a_gradient() -> None:
    student, labels, noise = FewStepGenerator(denoiser(), [2.5, 0.5]), torch.arange(3), torch.randn(3, 2, 1, 8, 8)
    student(noise, labels).square().sum().backward()
    got = [p.grad.clone() for p in student.parameters() if p.grad is not None]
    student.zero_grad()
    with torch.no_grad():
        first = student(noise[:, :1], labels)
    student.denoiser(first + 0.5 * noise[:, 1], torch.full((3,), 0.5), labels).square().sum().backward()
    for gradient, parameter in zip(got, (p for p in student.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


@pytest.mark.parametrize("levels", [[0.5, 2.5], [81.0, 2.5], [2.5, 0.001], []])
def test_levels_that_do_not_fall_within_the_schedule_are_refused(levels: list[float]) -> None:
    with pytest.raises(ArgumentError, match="expected falling numbers"):
        FewStepGenerator(denoiser(), levels)


def test_more_noise_than_steps_is_refused() -> None:
    with pytest.raises(ArgumentError, match="noise: expected"):
        FewStepGenerator(denoiser(), [2.5, 0.5])(torch.randn(3, 3, 1, 8, 8), torch.arange(3))
    with pytest.raises(ArgumentError, match=r"noise: expected \[B, 1 to 2, 1, 8, 8\], got \(3, 1, 8, 8\)"):
        FewStepGenerator(denoiser(), [2.5, 0.5])(torch.randn(3, 1, 8, 8), torch.arange(3))


@pytest.mark.parametrize("levels", [[2.5, 0.5], [80.0, 5.0, 1.0, 0.3]])
def test_plain_diffusers_draws_the_trainers_sample(tiny_teacher: Path, tmp_path: Path, levels: list[float]) -> None:
    settings = {"log.samples_every": 0, "log.tracker": "none"}
    folder = distill(
        "digits",
        output=tmp_path / "run",
        teacher=str(tiny_teacher),
        batch_size=8,
        iterations=1,
        student_level=levels,
        **settings,
    )
    facts = json.loads((folder / "fdistill_student.json").read_text())
    assert facts["levels"] == levels
    assert f"num_inference_steps=None, timesteps={facts['call']['timesteps']}" in (folder / "README.md").read_text()
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=4,
        class_labels=[0, 3, 5, 9],
        **facts["call"],
        generator=torch.Generator().manual_seed(4),
        output_type="np",
    ).images
    draws = torch.Generator().manual_seed(4)
    noise = torch.stack([torch.randn(4, 1, 8, 8, generator=draws) for _ in levels], 1)
    x0: Tensor = load_student(folder)(noise, torch.tensor([0, 3, 5, 9]))
    expected = (x0.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(expected - 0.5).max() > 0.1
    np.testing.assert_allclose(images, expected, atol=1e-4)

    manifests = []
    for name, batch_size in (("one", 3), ("two", 7)):
        made = generate(folder, num_images=7, output=tmp_path / name, batch_size=batch_size, seed=1)
        manifests.append(json.loads((made / "manifest.json").read_text()))
        assert manifests[-1]["evaluations_per_image"] == len(levels)
    for index in range(7):
        first, second = (tmp_path / name / f"{index:06d}.png" for name in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()
