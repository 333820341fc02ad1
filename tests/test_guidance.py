"""Guidance of a class-conditional teacher against two separate evaluations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import ConsistencyModelPipeline, EDMEulerScheduler
from torch import Tensor

from fdistill import GuidedDenoiser, distill, load_teacher
from fdistill.adapters.parametrisation import scheduler_config
from fdistill.adapters.unet2d import wrap
from fdistill.base.errors import ArgumentError, CheckpointError, ConfigError
from fdistill.denoiser import Denoiser
from fdistill.losses import implicit_means, matching_loss, score_difference_loss
from fdistill.training.activation_checkpointing import checkpoint_activations
from support.activations import kept_bytes
from support.denoisers import tiny_unet
from support.families import dit


@pytest.fixture
def teacher() -> Denoiser:
    torch.manual_seed(0)
    denoiser = wrap(tiny_unet(num_class_embeds=11), scheduler_config(EDMEulerScheduler(sigma_max=80.0)))
    denoiser.num_classes = denoiser.null_class = 10
    return denoiser.requires_grad_(False)


def test_it_is_two_evaluations_combined(teacher: Denoiser) -> None:
    guided = GuidedDenoiser(teacher, 2.5)
    x_t, t, labels = torch.randn(4, 1, 8, 8), torch.tensor([0.1, 1.0, 5.0, 70.0]), torch.tensor([0, 3, 9, 9])
    conditional = teacher.denoise(x_t, t, labels)
    unconditional = teacher.denoise(x_t, t, torch.full((4,), 10))
    assert isinstance(conditional, torch.Tensor)
    assert isinstance(unconditional, torch.Tensor)
    expected = unconditional + 2.5 * (conditional - unconditional)
    x0, features = guided.denoise(x_t, t, labels, ("mid",))
    torch.testing.assert_close(x0, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features["mid"], teacher.denoise(x_t, t, labels, ("mid",))[1]["mid"])
    assert not torch.allclose(expected, conditional, atol=1e-2)


def test_losses_see_the_guided_prediction(teacher: Denoiser) -> None:
    guided = GuidedDenoiser(teacher, 3.0)
    x0, t, labels = torch.randn(4, 1, 8, 8), torch.tensor([0.1, 1.0, 5.0, 70.0]), torch.tensor([0, 3, 9, 9])
    x_t = x0 + t.reshape(-1, 1, 1, 1) * torch.randn(4, 1, 8, 8)
    raw, _ = guided.predict(guided.network_input(x_t, t), t, labels)
    fake, _ = teacher.predict(teacher.network_input(x_t, t), t, labels)
    weight = torch.rand(4)
    teacher_x0, fake_x0 = raw.x0(x_t), fake.x0(x_t)
    close = {"rtol": 1e-4, "atol": 1e-6}
    fused = matching_loss(x0, raw, fake, x_t=x_t, weight=weight)
    torch.testing.assert_close(fused, matching_loss(x0, teacher_x0, fake_x0, weight=weight), **close)
    fused = score_difference_loss(x0, raw, fake, weight, x_t=x_t)
    torch.testing.assert_close(fused, score_difference_loss(x0, teacher_x0, fake_x0, weight), **close)
    for a, b in zip(implicit_means(x0, raw, fake, x_t=x_t), implicit_means(x0, teacher_x0, fake_x0), strict=True):
        torch.testing.assert_close(a, b, **close)


def test_a_teacher_without_a_label_for_no_class_is_refused(teacher: Denoiser) -> None:
    teacher.null_class = None
    with pytest.raises(ArgumentError, match="no label for `no class`"):
        GuidedDenoiser(teacher, 2.0)
    teacher.num_classes = None
    with pytest.raises(ArgumentError, match="the teacher has no classes"):
        GuidedDenoiser(teacher, 2.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import CMStochasticIterativeScheduler

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("null")
    scheduler = CMStochasticIterativeScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    ConsistencyModelPipeline(tiny_unet(num_class_embeds=11), scheduler).save_pretrained(path)
    return path


def test_the_last_label_may_stand_for_no_class(folder: Path, tmp_path: Path) -> None:
    assert load_teacher(folder).num_classes == 11
    with_null = load_teacher(folder, null_class=10)
    assert (with_null.num_classes, with_null.null_class) == (10, 10)
    with pytest.raises(CheckpointError, match="null_class: got 4; this teacher's can only be 10"):
        load_teacher(folder, null_class=4)
    settings = {"teacher": str(folder), "batch_size": 8, "iterations": 1, "log.samples_every": 0}
    with pytest.raises(ConfigError, match="guidance_scale: got 2"):
        distill("digits", output=tmp_path / "refused", guidance_scale=2.0, **settings)
    student = distill("digits", output=tmp_path / "run", guidance_scale=2.0, null_class=10, **settings)
    from fdistill import load_student

    assert load_student(student).num_classes == 10
    assert "| teacher_guidance | 2 |" in (student / "README.md").read_text()


def test_dit_brings_its_own(tmp_path: Path) -> None:
    teacher = load_teacher(dit(tmp_path / "dit"))
    guided = GuidedDenoiser(teacher, 4.0)
    x_t, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([100.0, 600.0]), torch.tensor([1, 2])
    conditional, unconditional = (teacher.denoise(x_t, t, c) for c in (labels, torch.tensor([10, 10])))
    expected = unconditional + 4 * (conditional - unconditional)  # type: ignore[operator]
    torch.testing.assert_close(guided.denoise(x_t, t, labels), expected, rtol=1e-4, atol=1e-4)


def guided_features(teacher: Denoiser, feature: str) -> tuple[int, Tensor, Tensor]:
    """Bytes kept by the evaluation of a frozen guided teacher whose feature a discriminator reads, the guided x0, and
    the gradient of the feature in x_t.
    """
    guided = GuidedDenoiser(teacher.requires_grad_(False), 1.5)
    torch.manual_seed(0)
    x_t, t, labels = torch.randn(4, *teacher.sample_shape), torch.full((4,), 500.0), torch.arange(4)
    x_t.requires_grad_()
    found: list[Tensor] = []

    def evaluate() -> Tensor:
        prediction, features = guided.predict(guided.network_input(x_t, t), t, labels, (feature,), output_grad=False)
        found.append(prediction.x0(x_t).detach())
        return features[feature].square().mean()

    kept, loss = kept_bytes(guided, evaluate)
    return kept, found[0], torch.autograd.grad(loss, x_t)[0]


def test_nothing_of_the_unconditional_half_is_kept(tmp_path: Path) -> None:
    """The features alone need a gradient. One batch of twice the size would keep twice as much."""
    teacher = load_teacher(dit(tmp_path / "dit")).requires_grad_(False)
    x_t, t, labels = torch.randn(4, 4, 8, 8), torch.full((4,), 500.0), torch.arange(4)
    seen = x_t.clone().requires_grad_()

    def tapped(count: int) -> Callable[[], Tensor]:
        fed, levels, classes = (torch.cat([each] * count) for each in (seen, t, labels))
        return lambda: teacher.predict(fed, levels, classes, ("block2",), output_grad=False)[1]["block2"]

    alone, of_both = kept_bytes(teacher, tapped(1))[0], kept_bytes(teacher, tapped(2))[0]
    kept, x0, gradient = guided_features(teacher, "block2")
    assert kept <= 1.05 * alone < 0.6 * of_both
    checkpoint_activations(teacher)
    recomputed, again, same = guided_features(teacher, "block2")
    assert recomputed < 0.5 * kept
    torch.testing.assert_close(again, x0)
    torch.testing.assert_close(same, gradient)


def test_evaluated_apart_or_together_it_is_the_same(tmp_path: Path) -> None:
    teacher = load_teacher(dit(tmp_path / "dit")).requires_grad_(False)
    _, apart, gradient = guided_features(teacher, "block1")
    guided = GuidedDenoiser(teacher, 1.5)
    torch.manual_seed(0)
    x_t, t, labels = torch.randn(4, *teacher.sample_shape), torch.full((4,), 500.0), torch.arange(4)
    x_t.requires_grad_()
    together, features = guided.denoise(x_t, t, labels, ("block1",))
    torch.testing.assert_close(apart, together.detach(), rtol=1e-4, atol=1e-5)
    (expected,) = torch.autograd.grad(features["block1"].square().mean(), x_t)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
