"""Students of several steps: what they compute, what gets a gradient, and that plain diffusers draws the same."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from fdistill import distill, generate, load_student
from fdistill.adapters.parametrisation import DirectPrediction, EDMPreconditioning
from fdistill.adapters.unet2d import UNet2DDenoiser
from fdistill.base.errors import ArgumentError
from fdistill.base.images import to_uint8
from fdistill.base.rng import indexed_normal
from fdistill.generator import FewStepGenerator, OneStepGenerator, student_generator
from fdistill.noise import EDMSchedule, FlowSchedule
from fdistill.rollout import Rollout, levels_for
from fdistill.student_kinds import STUDENT_FILE, fall
from fdistill.students.fewer_steps import fewer_steps
from support.denoisers import tiny_unet


def denoiser() -> UNet2DDenoiser:
    torch.manual_seed(0)
    return UNet2DDenoiser(tiny_unet(), EDMPreconditioning(EDMSchedule(), 0.75, boundary=0.002, time_scale=250.0))


def test_each_step_denoises_the_noised_result_of_the_one_before() -> None:
    network, labels = denoiser(), torch.arange(3)
    noise = torch.randn(3, 2, 1, 8, 8)
    student = FewStepGenerator(network, [2.5, 0.5])
    first = network(2.5 * noise[:, 0], torch.full((3,), 2.5), labels)
    torch.testing.assert_close(student(noise[:, :1], labels, Rollout((2.5,))), first)
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
        first = student(noise[:, :1], labels, Rollout((2.5,)))
    student.denoiser(first + 0.5 * noise[:, 1], torch.full((3,), 0.5), labels).square().sum().backward()
    for gradient, parameter in zip(got, (p for p in student.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


@pytest.mark.parametrize("levels", [[0.5, 2.5], [81.0, 2.5], [2.5, 0.001], []])
def test_levels_that_do_not_fall_within_the_schedule_are_refused(levels: list[float]) -> None:
    with pytest.raises(ArgumentError, match="expected falling numbers"):
        FewStepGenerator(denoiser(), levels)


def test_noise_that_is_not_the_steps_is_refused() -> None:
    student = FewStepGenerator(denoiser(), [2.5, 0.5])
    for shape in ((3, 3, 1, 8, 8), (3, 1, 8, 8)):
        with pytest.raises(ArgumentError, match=r"noise: expected \[B, 2, 1, 8, 8\], got"):
            student(torch.randn(shape), torch.arange(3))
    with pytest.raises(ArgumentError, match=r"noise: expected \[B, 1, 1, 8, 8\], got"):
        student(torch.randn(3, 2, 1, 8, 8), torch.arange(3), Rollout((2.5,)))
    with pytest.raises(ArgumentError, match=r"noise: expected \[B, 1, 8, 8\], got"):
        FewStepGenerator(denoiser(), [2.5, 0.5], "deterministic")(torch.randn(3, 2, 1, 8, 8), torch.arange(3))


def test_a_rollout_begins_with_data_that_is_noised_to_its_level() -> None:
    network, labels = denoiser(), torch.arange(3)
    data, noise = torch.rand(3, 1, 8, 8) * 2 - 1, torch.randn(3, 1, 1, 8, 8)
    student = FewStepGenerator(network, [2.5, 1.0, 0.5])
    expected = network(data + 0.5 * noise[:, 0], torch.full((3,), 0.5), labels)
    torch.testing.assert_close(student(noise, labels, Rollout((0.5,), data)), expected)


@pytest.mark.parametrize("kind", ["edm", "flow"])
def test_deterministic_steps_are_eulers(kind: str) -> None:
    """dx / d sigma = (x - x0) / sigma for EDM; for a flow the network's own velocity."""
    noise = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    if kind == "edm":
        network, levels, x = denoiser().double(), [2.5, 1.0, 0.4], 2.5 * noise
    else:
        form = DirectPrediction(FlowSchedule(), "flow", 1000.0)
        network, levels, x = UNet2DDenoiser(tiny_unet(num_class_embeds=None), form).double(), [1.0, 0.7, 0.2], noise
    labels = torch.arange(3) if kind == "edm" else None
    for level, following in zip(levels, [*levels[1:], 0.0], strict=True):
        t = torch.full((3,), level, dtype=torch.float64)
        velocity = (x - network(x, t, labels)) / level if kind == "edm" else network.network(x, 1000 * t).sample
        x = x + (following - level) * velocity
    student = FewStepGenerator(network, levels, "deterministic")
    assert student.noise_shape() == (1, 8, 8)
    torch.testing.assert_close(student(noise, labels), x, rtol=1e-6, atol=1e-6)


def test_a_deterministic_student_is_exported_and_loaded(tiny_teacher: Path, tmp_path: Path) -> None:
    """No pipeline of diffusers runs it: it comes with fdistill's own."""
    settings: dict[str, Any] = {"student.steps": 3, "student.sampler": "deterministic", "student_level": 2.5}
    folder = distill(
        "digits",
        output=tmp_path / "run",
        teacher=str(tiny_teacher),
        batch_size=8,
        iterations=1,
        method="sid",
        **settings,
        **{"log.samples_every": 0, "log.tracker": "none"},
    )
    student = load_student(folder)
    assert isinstance(student, FewStepGenerator)
    assert (student.sampler, len(student.levels)) == ("deterministic", 3)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    images = pipeline(class_labels=[0, 3, 5, 9], generator=torch.Generator().manual_seed(4), output_type="pt").images
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    expected = (student(noise, torch.tensor([0, 3, 5, 9])).clamp(-1, 1) / 2 + 0.5).numpy()
    np.testing.assert_allclose(images, expected, atol=1e-5)
    assert (
        "| between two steps | the image is noised again, with the noise that the step implies (Euler) |"
        in (folder / "README.md").read_text()
    )


def test_a_student_takes_other_numbers_of_steps(tiny_teacher: Path, tmp_path: Path) -> None:
    """As many as it learnt: silently. Others: with a warning."""
    common: dict[str, Any] = {"teacher": str(tiny_teacher), "batch_size": 8, "iterations": 1, "method": "diff-instruct"}
    common |= {"student_level": [2.5, 1.2, 0.6, 0.3], "log.samples_every": 0, "log.tracker": "none"}
    learnt = distill("digits", output=tmp_path / "any", **common, **{"student.any_step": True})
    four = distill("digits", output=tmp_path / "four", **common)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_student(learnt, steps=2).levels == (2.5, 0.6)
        assert load_student(four, steps=4).levels == (2.5, 1.2, 0.6, 0.3)
        assert isinstance(load_student(learnt, steps=1), OneStepGenerator)
    assert "fewer steps" not in (four / "README.md").read_text()
    with pytest.warns(UserWarning, match="takes 2 steps, but has learnt to take 4$"):
        student = load_student(four, steps=2)
    with pytest.warns(UserWarning, match="takes 5 steps, but has learnt to take 1 to 4$"):
        assert len(load_student(learnt, steps=5).levels) == 5
    with pytest.warns(UserWarning, match="takes 2 steps"):
        images = generate(four, num_images=3, output=tmp_path / "images", num_steps=2, seed=1)
    manifest = json.loads((images / "manifest.json").read_text())
    assert manifest["evaluations_per_image"] == 2
    noise = indexed_normal(1, range(3), (2, 1, 8, 8))
    expected = to_uint8(student(noise, torch.arange(3)))
    for index in range(3):
        image = torch.from_numpy(np.asarray(Image.open(images / f"{index:06d}.png")).copy())
        assert torch.equal(image, expected[index, 0])


def test_plain_diffusers_takes_fewer_steps(tiny_teacher: Path, tmp_path: Path) -> None:
    """Called as the card says; the pipeline's list begins with the last step."""
    settings = {"student.any_step": True, "log.samples_every": 0, "log.tracker": "none"}
    common: dict[str, Any] = {"teacher": str(tiny_teacher), "batch_size": 8, "iterations": 1}
    folder = distill("digits", output=tmp_path / "run", student_level=[2.5, 1.2, 0.6, 0.3], **common, **settings)
    facts, card = json.loads((folder / STUDENT_FILE).read_text()), (folder / "README.md").read_text()
    pipeline, labels = DiffusionPipeline.from_pretrained(folder), [0, 3, 5, 9]
    pipeline.set_progress_bar_config(disable=True)
    found = fewer_steps(facts)
    assert list(found) == [3, 2, 1]
    for steps, changed in found.items():
        assert f"timesteps={changed['timesteps']} for {steps} step" in card
        how: dict[str, Any] = {**facts["call"], **changed, "generator": torch.Generator().manual_seed(4)}
        images = pipeline(batch_size=4, class_labels=labels, output_type="pt", **how).images
        draws = torch.Generator().manual_seed(4)
        noise = torch.stack([torch.randn(4, 1, 8, 8, generator=draws) for _ in range(steps)], 1)
        x0 = load_student(folder, steps=steps)(noise if steps > 1 else noise[:, 0], torch.tensor(labels))
        torch.testing.assert_close(torch.as_tensor(images), x0.clamp(-1, 1) / 2 + 0.5, rtol=0, atol=1e-4)


def test_levels_for_other_numbers_of_steps() -> None:
    levels = (1.0, 0.9, 0.75, 0.5)
    assert levels_for(levels, 4) == levels
    assert levels_for(levels, 2) == (1.0, 0.75)
    assert levels_for(levels, 3) == (1.0, 0.9, 0.75)
    assert levels_for(levels, 1) == (1.0,)
    assert levels_for(levels, 8) == pytest.approx((1.0, 0.95, 0.9, 0.825, 0.75, 0.625, 0.5, 0.25))
    for steps in range(1, 9):
        assert fall(levels_for(levels, steps))


@pytest.mark.parametrize("levels", [[2.5, 0.5], [80.0, 24.0, 8.0, 2.5, 1.2, 0.6, 0.3, 0.1]])
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
