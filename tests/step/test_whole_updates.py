"""Whole updates against their formulas written out on the same draws: loss, gradients in every role, and what networks
are asked for. Signs, weights, levels and conditions are all in there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import softplus

from fdistill.adapters.parametrisation import DirectPrediction
from fdistill.adapters.unet2d import UNet2DDenoiser
from fdistill.base import rng
from fdistill.denoiser import Denoiser
from fdistill.generator import FewStepGenerator
from fdistill.kernels.reference.renoise import counter_normal
from fdistill.losses import noise_kl_loss
from fdistill.noise import (
    EDMSchedule,
    NoiseSchedule,
    karras_levels,
    lognormal_levels,
    uniform_levels,
    vp_schedule_from_config,
)
from fdistill.ratio import DensityRatio
from fdistill.rollout import Rollout
from fdistill.step import Networks, Pairs, critic_step, diffratio_step, generator_step, ratio_critic_step
from fdistill.students.tiue import TiUEGenerator
from support.denoisers import GaussianDenoiser, tiny_unet
from support.networks import ExactLogRatio, LinearGenerator, real_networks

P, Q, SIZE = (0.3, 0.8), (-0.2, 0.6), 3


class LearntLogRatio(ExactLogRatio):
    """Parameters to have a gradient in, and two heads."""

    def __init__(self) -> None:
        super().__init__(P, Q, EDMSchedule())
        self.scale, self.shift = nn.Parameter(torch.tensor([0.7, 1.3])), nn.Parameter(torch.tensor([0.2, -0.1]))

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        return self.scale * super().forward(features)[:, None] + self.shift


def gaussian_networks(source: str = "fake") -> Networks:
    teacher, fake = GaussianDenoiser(*P, size=SIZE).requires_grad_(False), GaussianDenoiser(*Q, size=SIZE)
    teacher.sigma_data = 0.7
    tapped = fake if source == "fake" else teacher
    student = LinearGenerator(a=0.5, b=-0.1, size=SIZE)
    return Networks(teacher, fake, student, LearntLogRatio(), tapped)  # type: ignore[arg-type]


def noised(random: torch.Generator, x0: Tensor, levels: Any, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """(x_t, t): the level is drawn first, then the seed of the noise."""
    batch = len(x0)
    t = levels(schedule, rng.uniform(random, batch))
    eps = counter_normal(rng.device_seed(random), 0, batch, x0[0].numel()).reshape(x0.shape)
    alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in (schedule.alpha(t), schedule.sigma(t)))
    return alpha * x0 + sigma * eps, t


def weight_at(name: str, t: Tensor, gamma: float = 5.0) -> Tensor:
    """Of EDM's levels, for sigma_data = 0.7."""
    return {
        "uniform": torch.ones_like(t),
        "edm": 1 / t**2 + 1 / 0.7**2,
        "inverse-sigma2": 1 / t**2,
        "min-snr": (1 / t**2).clamp(max=gamma),
    }[name]


def assert_gradients(loss: Tensor, expected: Tensor, *modules: nn.Module) -> None:
    """Of float32 sums over a batch."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    assert parameters
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True, retain_graph=True)
    scale = max(value.abs().max().item() for value in wanted if value is not None)
    assert scale > 1e-4
    for got, right in zip(found, wanted, strict=True):
        got, right = (torch.zeros(()) if value is None else value for value in (got, right))
        torch.testing.assert_close(got, right.expand_as(got), rtol=1e-3, atol=1e-4 * scale)


CRITICS: dict[str, dict[str, Any]] = {
    "no gan": {"gan_weight": 0.0},
    "defaults": {},
    "gan": {"weighting": "inverse-sigma2", "gan_weight": 0.3, "gan_weighting": "edm"},
    "r1": {"weighting": "min-snr", "min_snr_gamma": 1.5, "gan_weight": 0.4, "r1_weight": 0.7},
    "approximate r1": {"gan_weight": 0.4, "r1_weight": 30.0, "r1_sigma": 0.3},
    "lognormal": {"weighting": "uniform", "gan_weight": 2.0, "levels": lognormal_levels},
}


@pytest.mark.parametrize("source", ["fake", "teacher"])
@pytest.mark.parametrize("name", CRITICS)
def test_the_critics_update_is_its_formula(name: str, source: str) -> None:
    networks, options, batch = gaussian_networks(source), CRITICS[name], 64
    real_x0 = P[0] + P[1] * torch.randn(batch, 1, 1, SIZE, generator=torch.Generator().manual_seed(1))
    result = critic_step(networks, real_x0, None, torch.Generator().manual_seed(3), **options)

    random, levels = torch.Generator().manual_seed(3), options.get("levels", karras_levels)
    student, discriminator, schedule = networks.generator, networks.discriminator, EDMSchedule()
    with torch.no_grad():
        x0 = student(rng.normal(random, batch, (1, 1, SIZE)), None)
    x_t, t = noised(random, x0, levels, schedule)
    error = (networks.fake_score(x_t, t) - x0).square().mean((1, 2, 3))
    expected = (weight_at(options.get("weighting", "edm"), t, options.get("min_snr_gamma", 5.0)) * error).mean()
    gan_weight, gan_weighting = options.get("gan_weight", 1e-2), options.get("gan_weighting", "uniform")
    if gan_weight:
        real_x_t, t_real = noised(random, real_x0, levels, schedule)
        real_x_t.requires_grad_(True)
        assert discriminator is not None
        real, fake = discriminator({"x_t": real_x_t, "t": t_real}), discriminator({"x_t": x_t, "t": t})
        (slope,) = torch.autograd.grad(real.mean(1).sum(), real_x_t, create_graph=True)
        gan = weight_at(gan_weighting, t_real) * softplus(-real).mean(1)
        gan = gan + weight_at(gan_weighting, t) * softplus(fake).mean(1)
        if sigma := options.get("r1_sigma"):
            moved = real_x_t + sigma * rng.normal(random, batch, (1, 1, SIZE))
            gan = gan + options["r1_weight"] * (real - discriminator({"x_t": moved, "t": t_real})).square().mean(1)
        else:
            gan = gan + options.get("r1_weight", 0.0) / 2 * slope.square().sum((1, 2, 3))
        expected = expected + gan_weight * gan.mean()
        for log, value in (("accuracy_real", real.mean(1) > 0), ("accuracy_fake", fake.mean(1) < 0)):
            assert result.logs[f"discriminator/{log}"].value.tolist() == value.float().tolist()
            assert 0 < value.float().mean() < 1
        torch.testing.assert_close(result.logs["discriminator/gan_real"].t, t_real)
        torch.testing.assert_close(result.logs["discriminator/gan_fake"].t, t)
    torch.testing.assert_close(result.loss, expected, rtol=1e-4, atol=1e-5)
    assert_gradients(result.loss, expected, networks.fake_score, networks.discriminator)  # type: ignore[arg-type]
    assert all(p.grad is None for p in student.parameters())


@pytest.mark.parametrize("divergence", ["rkl", "js"])
@pytest.mark.parametrize("gan_weight", [0.25, 3.0])
def test_the_students_gan_term_is_its_formula(divergence: str, gan_weight: float) -> None:
    """gan_weight softplus(-logit), through x_t: it raises the logits of what the student makes."""
    networks, batch = gaussian_networks(), 64
    student, options = networks.generator, {"divergence": divergence, "batch_size": batch}
    results = [
        generator_step(
            networks, None, torch.Generator().manual_seed(3), ratio=DensityRatio(), gan_weight=weight, **options
        )
        for weight in (0.0, gan_weight)
    ]
    random = torch.Generator().manual_seed(3)
    x_t, t = noised(random, student(rng.normal(random, batch, (1, 1, SIZE)), None), karras_levels, EDMSchedule())
    assert networks.discriminator is not None
    expected = gan_weight * softplus(-networks.discriminator({"x_t": x_t, "t": t})).mean()
    torch.testing.assert_close(results[1].loss - results[0].loss, expected, rtol=1e-4, atol=1e-5)
    assert_gradients(results[1].loss - results[0].loss, expected, student)


def test_terms_of_the_student_are_weighted_and_reach_it() -> None:
    """A loss on images, and regression on pairs that have conditions of their own."""
    networks = gaussian_networks()
    student, batch = networks.generator, 16
    noise, x0 = torch.randn(2, 8, 1, 1, SIZE, generator=torch.Generator().manual_seed(1))

    def loss(**terms: Any) -> Tensor:
        return generator_step(
            networks, None, torch.Generator().manual_seed(3), batch_size=batch, gan_weight=0.0, **terms
        ).loss

    drawn = student(rng.normal(torch.Generator().manual_seed(3), batch, (1, 1, SIZE)), None)
    terms: list[tuple[dict[str, Any], Tensor]] = [
        (
            {"image_loss": lambda images: images.pow(3).mean((1, 2, 3)), "image_weight": 0.3},
            0.3 * drawn.pow(3).mean(),
        ),
        (
            {"reward_loss": lambda images: -images.sin().mean((1, 2, 3)), "reward_weight": 0.2},
            -0.2 * drawn.sin().mean(),
        ),
        (
            {"pairs": Pairs(noise, x0, None), "regression_weight": 0.7},
            0.7 * (student(noise, None) - x0).square().mean(),
        ),
    ]
    for options, expected in terms:
        difference = loss(**options) - loss()
        torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-6)
        assert_gradients(difference, expected, student)


@pytest.mark.parametrize("gan", [{"gan_weight": 0.0}, {"gan_weight": 0.3}, {"gan_gradient_ratio": 0.4}])
@pytest.mark.parametrize(("term", "other"), [("reward", "image"), ("image", "reward")])
def test_a_balanced_term_on_images_is_weighed_against_matching_alone(
    term: str, other: str, gan: dict[str, float]
) -> None:
    """Whatever weight the GAN term beside it has, fixed or balanced too."""
    networks, x0, ratio = gaussian_networks(), [], 0.5

    def loss(images: Tensor) -> Tensor:
        x0.append(images)
        return -images.sin().mean((1, 2, 3))

    def gradient(**terms: Any) -> Tensor:
        options: dict[str, Any] = {"batch_size": 16, "gan_weight": 0.0, f"{other}_loss": loss}
        result = generator_step(networks, None, torch.Generator().manual_seed(3), **{**options, **terms})
        found.append(result)
        return torch.autograd.grad(result.loss, x0[-1])[0]

    found: list[Any] = []
    matching = gradient()
    own = gradient(**{f"{other}_weight": 1.0}) - matching
    given = {"gan_weight": 1.0, **gan} if gan else gan
    added = gradient(**given, **{f"{term}_loss": loss, f"{term}_gradient_ratio": ratio}) - gradient(**given)
    torch.testing.assert_close(added, ratio * matching.norm() / own.norm() * own, rtol=1e-4, atol=1e-7)
    name = "reward_loss" if term == "reward" else term
    weight = found[2].logs[f"generator/{name}_weight"].value[0]
    torch.testing.assert_close(weight, ratio * matching.norm() / own.norm(), rtol=1e-4, atol=0)


def test_the_kl_of_predicted_noise_is_weighted_and_reaches_the_student() -> None:
    torch.manual_seed(0)
    form = DirectPrediction(vp_schedule_from_config({"beta_schedule": "scaled_linear"}), "v")
    teacher, fake, own = (UNet2DDenoiser(tiny_unet(num_class_embeds=None), form) for _ in range(3))
    student = TiUEGenerator(own, (751.0, 501.0, 251.0, 1.0))
    networks = Networks(teacher.requires_grad_(False), fake, student)

    def loss(weight: float) -> Tensor:
        random = torch.Generator().manual_seed(3)
        options: dict[str, Any] = {"batch_size": 4, "gan_weight": 0.0, "levels": uniform_levels}
        return generator_step(networks, None, random, noise_kl_weight=weight, **options).loss

    noise = rng.normal(torch.Generator().manual_seed(3), 4, (1, 8, 8))
    expected = 30.0 * noise_kl_loss(student.sample_with_predictions(noise, None)[1]).mean()
    difference = loss(30.0) - loss(0.0)
    torch.testing.assert_close(difference, expected, rtol=1e-3, atol=1e-4)
    assert_gradients(difference, expected, student)


LABELS, OTHERS = torch.tensor([0, 3, 9, 4, 1, 7]), torch.tensor([5, 2, 2, 8, 6, 0])
HEADS = ("down0", "mid")


def inner_levels(schedule: NoiseSchedule, u: Tensor) -> Tensor:
    return karras_levels(schedule, u, low=0.2, high=0.6)


def logits_of(networks: Networks, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    discriminator, tapped = networks.tapped_discriminator()
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        return discriminator(tapped.features(tapped.network_input(x_t, t), t, condition, discriminator.features))


def clean(network: Denoiser, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
    x0 = network.denoise(x_t, t, condition)
    assert isinstance(x0, Tensor)
    return x0


@pytest.mark.parametrize("source", ["fake", "teacher"])
def test_what_a_critics_networks_are_asked_for(source: str) -> None:
    """Samples are drawn of the condition, networks get `critic_condition`; R1 is of x_t, though they see it scaled."""
    networks = real_networks(source, HEADS)
    real_x0 = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    options: dict[str, Any] = {"critic_condition": OTHERS, "levels": inner_levels, "gan_weight": 0.5, "r1_weight": 2.0}
    result = critic_step(networks, real_x0, LABELS, torch.Generator().manual_seed(3), **options)

    random, schedule = torch.Generator().manual_seed(3), networks.teacher.schedule
    with torch.no_grad():
        x0 = networks.generator(rng.normal(random, 6, (1, 8, 8)), LABELS)
    x_t, t = noised(random, x0, inner_levels, schedule)
    real_x_t, t_real = noised(random, real_x0, inner_levels, schedule)
    real_x_t.requires_grad_(True)
    error = (clean(networks.fake_score, x_t, t, OTHERS) - x0).square().mean((1, 2, 3))
    denoising = (1 / t**2 + 1 / networks.teacher.sigma_data**2) * error
    real, fake = logits_of(networks, real_x_t, t_real, OTHERS), logits_of(networks, x_t, t, OTHERS)
    (slope,) = torch.autograd.grad(real.mean(1).sum(), real_x_t, create_graph=True)
    expected = {
        "fake_score/denoising": denoising,
        "discriminator/gan_real": softplus(-real).mean(1),
        "discriminator/gan_fake": softplus(fake).mean(1),
        "discriminator/r1": slope.square().sum((1, 2, 3)),
    }
    for name, value in expected.items():
        torch.testing.assert_close(result.logs[name].value, value.detach(), rtol=1e-3, atol=1e-5, msg=name)
    gan = expected["discriminator/gan_real"] + expected["discriminator/gan_fake"] + expected["discriminator/r1"]
    whole = (denoising + 0.5 * gan).mean()
    assert_gradients(result.loss, whole, networks.fake_score, networks.discriminator)  # type: ignore[arg-type]


@pytest.mark.parametrize("source", ["fake", "teacher"])
@pytest.mark.parametrize("weighting", ["normalised", "uniform", "vsd"])
def test_what_a_students_networks_are_asked_for(source: str, weighting: str) -> None:
    networks = real_networks(source, HEADS)
    options: dict[str, Any] = {"divergence": "kl", "ratio_ramp": 0.5, "batch_size": 6, "gan_weight": 0.2}
    pairs = Pairs(*torch.randn(2, 6, 1, 8, 8, generator=torch.Generator().manual_seed(1)), OTHERS)
    ratio = DensityRatio(bin_edges="linear")
    options |= {"levels": inner_levels, "weighting": weighting, "pairs": pairs, "regression_weight": 0.1}
    result = generator_step(networks, LABELS, torch.Generator().manual_seed(3), ratio=ratio, **options)

    random, schedule = torch.Generator().manual_seed(3), networks.teacher.schedule
    x0 = networks.generator(rng.normal(random, 6, (1, 8, 8)), LABELS)
    x_t, t = noised(random, x0, inner_levels, schedule)
    logits = logits_of(networks, x_t, t, LABELS)
    with torch.no_grad():
        found = DensityRatio(bin_edges="linear").evaluate(logits, t, "kl", ramp=0.5)
        teacher_x0, fake_x0 = (clean(network, x_t, t, LABELS) for network in (networks.teacher, networks.fake_score))
        scale = {
            "normalised": 1 / ((x0 - teacher_x0).abs().mean((1, 2, 3)) + 1e-6),
            "uniform": torch.ones_like(t),
            "vsd": t / (1 + t**2),
        }[weighting]
        push = (found.weight * scale).reshape(-1, 1, 1, 1) * (fake_x0 - teacher_x0)
    regression = (networks.generator(pairs.noise, OTHERS) - pairs.x0).square().mean()
    # A loss with the gradient that is asked for; its value is the logged one's only up to what x0 adds.
    expected = (push * x0).mean() + 0.2 * softplus(-logits).mean() + 0.1 * regression
    assert_gradients(result.loss, expected, networks.generator)
    for name, value in {
        "generator/matching": push.square().mean((1, 2, 3)) / 2,
        "generator/gan": softplus(-logits).mean(1).detach(),
        "generator/h": found.h,
        "generator/weight": found.weight,
        "generator/clamped_ratios": found.clamped,
    }.items():
        torch.testing.assert_close(result.logs[name].value, value, rtol=1e-3, atol=1e-7, msg=name)
        torch.testing.assert_close(result.logs[name].t, t)
    assert found.h.std() > 1e-3
    torch.testing.assert_close(
        result.loss,
        result.logs["generator/matching"].value.mean() + 0.2 * softplus(-logits).mean() + 0.1 * regression,
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize("weighting", ["uniform", "vsd"])
def test_diffratios_updates_are_their_formulas(weighting: str) -> None:
    """With two heads, whose mean is the logit, and a network that sees x_t scaled."""
    networks, schedule = real_networks("fake", HEADS), EDMSchedule()
    options: dict[str, Any] = {"levels": inner_levels}
    result = diffratio_step(
        networks, LABELS, torch.Generator().manual_seed(3), batch_size=6, weighting=weighting, **options
    )
    random = torch.Generator().manual_seed(3)
    x0 = networks.generator(rng.normal(random, 6, (1, 8, 8)), LABELS)
    x_t, t = noised(random, x0.detach(), inner_levels, schedule)
    x_t.requires_grad_(True)
    logits = logits_of(networks, x_t, t, LABELS).mean(1)
    (slope,) = torch.autograd.grad(logits.sum(), x_t)
    scale = {"uniform": torch.ones_like(t), "vsd": t / (1 + t**2)}[weighting]
    push = -(t**2 * scale).reshape(-1, 1, 1, 1) * slope  # towards higher logits
    assert_gradients(result.loss, (push * x0).mean(), networks.generator)
    torch.testing.assert_close(result.logs["generator/logit"].value, logits.detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        result.logs["generator/matching"].value, push.square().mean((1, 2, 3)) / 2, rtol=1e-3, atol=1e-9
    )
    assert all(p.grad is None for role in (networks.fake_score, networks.discriminator) for p in role.parameters())  # type: ignore[union-attr]

    real_x0 = torch.rand(6, 1, 8, 8, generator=random) * 2 - 1
    critic = ratio_critic_step(networks, real_x0, LABELS, torch.Generator().manual_seed(5), r1_weight=2.0, **options)
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        x0 = networks.generator(rng.normal(random, 6, (1, 8, 8)), LABELS)
    x_t, t = noised(random, x0, inner_levels, schedule)
    real_x_t, t_real = noised(random, real_x0, inner_levels, schedule)
    real_x_t.requires_grad_(True)
    real, fake = logits_of(networks, real_x_t, t_real, LABELS), logits_of(networks, x_t, t, LABELS)
    (slope,) = torch.autograd.grad(real.mean(1).sum(), real_x_t, create_graph=True)
    expected = softplus(-real).mean() + softplus(fake).mean() + slope.square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(critic.loss, expected, rtol=1e-3, atol=1e-5)
    assert_gradients(critic.loss, expected, networks.fake_score, networks.discriminator)  # type: ignore[arg-type]
    assert all(not p.requires_grad or p.grad is None for p in networks.generator.parameters())


@pytest.mark.parametrize("step", ["critic", "student"])
def test_a_few_step_student_takes_the_steps_it_is_told_to(step: str) -> None:
    networks = real_networks("fake")
    student = FewStepGenerator(networks.generator.denoiser, [2.5, 0.5])  # type: ignore[arg-type]
    networks = Networks(networks.teacher, networks.fake_score, student, networks.discriminator, networks.fake_score)
    updates: dict[str, Callable[..., Any]] = {
        "critic": lambda random, **k: critic_step(networks, torch.zeros(6, 1, 8, 8), LABELS, random, **k),
        "student": lambda random, **k: generator_step(networks, LABELS, random, batch_size=6, **k),
    }
    name = {"critic": "fake_score/denoising", "student": "generator/matching"}[step]
    data = torch.rand(6, 1, 8, 8) * 2 - 1
    for rollout in (Rollout((2.5,)), Rollout((2.5, 0.5)), None, Rollout((0.5,), data)):
        found = updates[step](torch.Generator().manual_seed(3), rollout=rollout, gan_weight=0.0).logs[name].value
        random = torch.Generator().manual_seed(3)
        with torch.no_grad():
            x0 = student(rng.normal(random, 6, student.noise_shape(rollout)), LABELS, rollout)
            x_t, t = noised(random, x0, karras_levels, networks.teacher.schedule)
            fake_x0, teacher_x0 = (clean(n, x_t, t, LABELS) for n in (networks.fake_score, networks.teacher))
            weight = 1 / t**2 + 1 / networks.teacher.sigma_data**2
            push = (fake_x0 - teacher_x0) / ((x0 - teacher_x0).abs().mean((1, 2, 3), keepdim=True) + 1e-6)
            expected = {
                "critic": weight * (fake_x0 - x0).square().mean((1, 2, 3)),
                "student": push.square().mean((1, 2, 3)) / 2,
            }[step]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-8)
