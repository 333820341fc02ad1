"""The two updates: what they move, in which direction, and that nothing else moves."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fdistill.adapters.parametrisation import DirectPrediction
from fdistill.adapters.unet2d import UNet2DDenoiser
from fdistill.base import rng
from fdistill.discriminator import Discriminator
from fdistill.divergence import get_divergence
from fdistill.generator import OneStepGenerator
from fdistill.kernels.reference.renoise import counter_normal
from fdistill.noise import (
    EDMSchedule,
    FlowSchedule,
    NoiseSchedule,
    karras_levels,
    uniform_levels,
    vp_schedule_from_config,
)
from fdistill.ratio import DensityRatio
from fdistill.step import Networks, critic_step, frozen, generator_step, sid_step, sim_step, uni_instruct_step
from support.denoisers import GaussianDenoiser, tiny_unet
from support.networks import ExactLogRatio, LinearGenerator, real_networks

DIVERGENCES = ["rkl", "sf", "js", "sh", "kl", "jf", "neyman", "pearson", "alpha(0.3)"]


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("schedule", "floor"), [(EDMSchedule(), 1e-6), (FlowSchedule(), 0.4)], ids=["edm", "flow"])
def test_generator_gradient_is_h_times_the_score_difference(name: str, schedule: NoiseSchedule, floor: float) -> None:
    """Teacher N(0.3, 0.8^2), student N(b, a^2) with exact scores and exact density ratio, against float64 written out
    by hand."""
    size, batch = 3, 256
    p, q = (0.3, 0.8), (-0.2, 0.6)
    teacher, fake = (
        GaussianDenoiser(*p, schedule=schedule, size=size),
        GaussianDenoiser(*q, schedule=schedule, size=size),
    )
    student = LinearGenerator(a=q[1], b=q[0], size=size)
    networks = Networks(teacher, fake, student, ExactLogRatio(p, q, schedule), fake)  # type: ignore[arg-type]
    levels = karras_levels if isinstance(schedule, EDMSchedule) else uniform_levels
    ratio = DensityRatio(sigma_min=1e-3, sigma_max=1e3)
    result = generator_step(
        networks,
        None,
        torch.Generator().manual_seed(3),
        ratio=ratio,
        divergence=name,
        batch_size=batch,
        levels=levels,
        gan_weight=0.0,
        normaliser_floor=floor,
    )
    result.loss.backward()

    draws = torch.Generator().manual_seed(3)
    z = rng.normal(draws, batch, (1, 1, size)).double().flatten(1)
    t = levels(schedule, rng.uniform(draws, batch)).double()
    eps = counter_normal(rng.device_seed(draws), 0, batch, size).double()
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    x0 = q[1] * z + q[0]
    x_t = alpha * x0 + sigma * eps

    def score(mean: float, std: float) -> Tensor:
        return -(x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    def log_density(mean: float, std: float) -> Tensor:
        return torch.distributions.Normal(alpha * mean, (alpha**2 * std**2 + sigma**2).sqrt()).log_prob(x_t).sum(1)

    r = (log_density(*p) - log_density(*q)).clamp(-10, 10).exp().clamp(0.1, 20)
    noise_to_signal = (sigma / alpha)[:, 0]
    index = ratio.bin_index(noise_to_signal)
    means = torch.stack([r[index == k].mean() if bool((index == k).any()) else torch.tensor(1.0) for k in range(10)])
    h = get_divergence(name).weight(r / means[index])
    h = h / h.mean()
    # x0-predictions differ by sigma^2 / alpha times the scores (Tweedie); the normaliser is mean |x0 - teacher_x0|.
    teacher_x0 = (x_t + sigma**2 * score(*p)) / alpha
    distance = (x0 - teacher_x0).abs().mean(1)
    normaliser = distance.clamp(min=floor)
    assert (distance.min() < floor < distance.max()) == (floor > 1e-6)
    push = (h / normaliser)[:, None] * (sigma**2 / alpha) * (score(*p) - score(*q))
    expected_a, expected_b = -(push * z).mean(), -push.mean()
    for parameter, expected in ((student.a, expected_a), (student.b, expected_b)):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), expected, rtol=2e-4, atol=2e-6)


def test_a_student_equal_to_the_teacher_is_not_moved() -> None:
    teacher = GaussianDenoiser(0.3, 0.8, size=2)
    fake = GaussianDenoiser(0.3, 0.8, size=2)
    student = LinearGenerator(0.8, 0.3, 2)
    networks = Networks(teacher, fake, student, ExactLogRatio((0.3, 0.8), (0.3, 0.8), teacher.schedule), fake)  # type: ignore[arg-type]
    result = generator_step(
        networks,
        None,
        torch.Generator().manual_seed(0),
        ratio=DensityRatio(),
        divergence="js",
        batch_size=64,
        gan_weight=0.0,
    )
    result.loss.backward()
    assert student.a.grad == 0
    assert student.b.grad == 0


@pytest.mark.parametrize("name", ["rkl", "js", "kl"])
def test_exact_updates_bring_the_student_to_the_teacher(name: str) -> None:
    """Gradient descent with exact fake scores and ratio: N(1, 0.5^2) becomes N(0.3, 0.8^2)."""
    schedule = EDMSchedule()
    p = (0.3, 0.8)
    teacher, student = GaussianDenoiser(*p, size=4), LinearGenerator(0.5, 1.0, 4)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    for step in range(400):
        q = (student.b.item(), abs(student.a.item()))
        fake = GaussianDenoiser(*q, size=4)
        networks = Networks(teacher, fake, student, ExactLogRatio(p, q, schedule), fake)  # type: ignore[arg-type]
        result = generator_step(
            networks, None, generator, ratio=DensityRatio(), divergence=name, batch_size=256, gan_weight=0.0
        )
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 400)
        optimizer.step()
    assert abs(student.b.item() - 0.3) < 0.02
    assert abs(student.a.item() - 0.8) < 0.02


def moved(module: nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())


def untouched(module: nn.Module) -> bool:
    return all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("source", ["fake", "teacher"])
@pytest.mark.parametrize("r1_weight", [0.0, 1.0])
def test_critic_loss_reaches_fake_score_and_discriminator_alone(source: str, r1_weight: float) -> None:
    networks = real_networks(source, ("down0", "mid"))
    labels = torch.arange(6) % 10
    result = critic_step(
        networks, torch.rand(6, 1, 8, 8) * 2 - 1, labels, torch.Generator().manual_seed(0), r1_weight=r1_weight
    )
    result.loss.backward()
    assert moved(networks.fake_score)
    assert moved(networks.discriminator)
    assert untouched(networks.generator)
    assert untouched(networks.teacher)
    assert all(p.requires_grad for role in (networks.fake_score, networks.generator) for p in role.parameters())
    assert not any(p.requires_grad for p in networks.teacher.parameters())


@pytest.mark.parametrize("source", ["fake", "teacher"])
@pytest.mark.parametrize("gan_weight", [0.0, 1e-3])
def test_generator_loss_reaches_the_student_alone(source: str, gan_weight: float) -> None:
    networks = real_networks(source)
    result = generator_step(
        networks,
        torch.arange(6) % 10,
        torch.Generator().manual_seed(0),
        ratio=DensityRatio(),
        divergence="js",
        batch_size=6,
        gan_weight=gan_weight,
    )
    result.loss.backward()
    assert moved(networks.generator)
    assert untouched(networks.fake_score)
    assert untouched(networks.discriminator)
    assert untouched(networks.teacher)


@pytest.mark.parametrize("source", ["fake", "teacher"])
def test_gan_gradient_of_the_student_flows_through_the_tapped_network(source: str) -> None:
    """Matching and GAN gradients add up: with a huge GAN weight the direction is another, and a step along it makes the
    samples more like data to the discriminator."""
    gradients, gan = [], []
    for gan_weight in (0.0, 1e3, 2e3):
        networks = real_networks(source)
        step = functools.partial(
            generator_step,
            networks,
            torch.arange(6) % 10,
            ratio=DensityRatio(),
            divergence="js",
            batch_size=6,
            gan_weight=gan_weight,
        )
        step(torch.Generator().manual_seed(0)).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in networks.generator.parameters() if p.grad is not None]))
        if gan_weight:
            gan.append(moved_along_its_gradient(step, networks.generator, "generator/gan"))
    assert torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0) < 0.9
    torch.testing.assert_close(
        gradients[2] - gradients[0], 2 * (gradients[1] - gradients[0]), rtol=1e-3, atol=1e-4 * gradients[2].abs().max()
    )
    assert all(after < before for before, after in gan)


def moved_along_its_gradient(step: Any, module: nn.Module, *names: str) -> tuple[float, float]:
    """The sum of what is logged under these names, before and after a small step of the module against its gradient."""
    totals = []
    for _ in range(2):
        result = step(torch.Generator().manual_seed(0))
        totals.append(sum(result.logs[name].value.mean().item() for name in names))
        with torch.no_grad():
            norm = torch.stack([p.grad.square().sum() for p in module.parameters() if p.grad is not None]).sum().sqrt()
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad / norm
    return totals[0], totals[1]


def test_where_heads_sit_on_the_fake_score_network_its_gan_loss_trains_it() -> None:
    gradients: dict[str, Any] = {}
    for source in ("fake", "teacher"):
        networks = real_networks(source)
        real = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
        step = functools.partial(critic_step, networks, real, torch.arange(6) % 10, gan_weight=1e3)
        step(torch.Generator().manual_seed(0)).loss.backward()
        gradients[source] = torch.cat(
            [p.grad.flatten() for p in networks.fake_score.parameters() if p.grad is not None]
        )
        trained = networks.fake_score if source == "fake" else networks.discriminator
        before, after = moved_along_its_gradient(step, trained, "discriminator/gan_real", "discriminator/gan_fake")
        assert after < before
    assert not torch.allclose(gradients["fake"], gradients["teacher"])


class ConstantLogit(nn.Module):
    features = ("mid",)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        return torch.full((len(features["mid"]), 1), 2.0)


def test_the_critic_raises_real_logits_and_lowers_fake_ones() -> None:
    networks = dataclasses.replace(real_networks("fake"), discriminator=ConstantLogit())  # type: ignore[arg-type]
    result = critic_step(
        networks, torch.zeros(6, 1, 8, 8), torch.arange(6), torch.Generator().manual_seed(0), gan_weight=10.0
    )
    softplus = torch.nn.functional.softplus
    torch.testing.assert_close(result.logs["discriminator/gan_real"].value, softplus(torch.full((6,), -2.0)))
    torch.testing.assert_close(result.logs["discriminator/gan_fake"].value, softplus(torch.full((6,), 2.0)))
    assert result.logs["discriminator/accuracy_real"].value.tolist() == [1.0] * 6
    assert result.logs["discriminator/accuracy_fake"].value.tolist() == [0.0] * 6
    expected = result.logs["fake_score/denoising"].value.mean() + 10 * (
        softplus(torch.tensor(-2.0)) + softplus(torch.tensor(2.0))
    )
    torch.testing.assert_close(result.loss.detach(), expected)


def test_r1_is_in_the_critic_loss() -> None:
    networks = real_networks("fake")
    arguments = (networks, torch.rand(6, 1, 8, 8) * 2 - 1, torch.arange(6) % 10)
    losses = [
        critic_step(*arguments, torch.Generator().manual_seed(0), gan_weight=0.5, r1_weight=gamma)
        for gamma in (0.0, 2.0)
    ]
    penalty = losses[1].logs["discriminator/r1"].value.mean()
    torch.testing.assert_close(losses[1].loss - losses[0].loss, 0.5 * 2.0 / 2 * penalty, rtol=1e-3, atol=1e-6)


def test_weights_ramp_from_one() -> None:
    networks = real_networks("fake")
    weights = []
    for ramp in (0.0, 0.5, 1.0):
        result = generator_step(
            networks,
            torch.arange(6) % 10,
            torch.Generator().manual_seed(0),
            ratio=DensityRatio(),
            divergence="kl",
            batch_size=6,
            ratio_ramp=ramp,
        )
        weights.append(result.logs["generator/weight"].value)
    assert (weights[0] == 1).all()
    torch.testing.assert_close(weights[1], (1 + weights[2]) / 2)
    assert weights[2].std() > 0


def test_steps_are_functions_of_the_random_generator() -> None:
    networks = real_networks("fake")
    x0, labels = torch.rand(6, 1, 8, 8) * 2 - 1, torch.arange(6) % 10
    first, second, other = (
        critic_step(networks, x0, labels, torch.Generator().manual_seed(seed)).loss.item() for seed in (5, 5, 6)
    )
    assert first == second != other


def test_frozen_restores_what_was_trainable() -> None:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    with frozen(module):
        assert not module.weight.requires_grad
    assert module.weight.requires_grad
    assert not module.bias.requires_grad


ZERO_SNR = {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}


@pytest.mark.parametrize(
    "form",
    [DirectPrediction(FlowSchedule(), "flow", 1000.0), DirectPrediction(vp_schedule_from_config(ZERO_SNR), "v")],
    ids=["flow", "zero-terminal-snr"],
)
def test_levels_of_pure_noise_give_finite_losses_and_gradients(form: DirectPrediction) -> None:
    torch.manual_seed(0)
    teacher = UNet2DDenoiser(tiny_unet(num_class_embeds=None), form)
    teacher.requires_grad_(False)
    fake = copy.deepcopy(teacher).requires_grad_(True)
    for (
        parameter
    ) in fake.parameters():  # or there would be no score difference, and x_t does not depend on the student here
        parameter.data += 0.02 * torch.randn_like(parameter)
    student = OneStepGenerator(copy.deepcopy(teacher).requires_grad_(True), form.schedule.t_max)
    networks = Networks(teacher, fake, student, Discriminator(fake, ["mid"]), fake)

    def end(schedule: NoiseSchedule, u: Tensor) -> Tensor:
        return torch.full_like(u, schedule.t_max)

    critic = critic_step(networks, torch.zeros(4, 1, 8, 8), None, torch.Generator(), levels=end)
    update = generator_step(
        networks, None, torch.Generator(), ratio=DensityRatio(), divergence="js", batch_size=4, levels=end
    )
    critic.loss.backward()
    update.loss.backward()
    for module in (fake, student, networks.discriminator):
        assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in module.parameters())
    assert moved(fake)
    assert moved(student)


@pytest.mark.parametrize(
    "name", ["sid", "sida", "sid uniform", "sim", "kl", "kl gan", "kl detached", "js", "js vsd", "js cut"]
)
def test_implicit_steps_are_their_formulas(name: str) -> None:
    """Losses of whole steps, and their gradients in the student, against the same formulas written out, on the same
    draws and exact networks."""
    p, q, schedule, batch = (0.3, 0.8), (-0.2, 0.6), EDMSchedule(), 64
    teacher, fake = GaussianDenoiser(*p, size=3), GaussianDenoiser(*q, size=3)
    ratio_network, student = ExactLogRatio(p, q, schedule), LinearGenerator(a=q[1], b=q[0], size=3)
    networks = Networks(teacher, fake, student, ratio_network, fake)  # type: ignore[arg-type]
    name, _, weighting = name.partition(" ")
    levels = functools.partial(karras_levels, low=0.1, high=0.6) if weighting == "cut" else karras_levels
    common: dict[str, Any] = {"batch_size": batch, "levels": levels}
    extra: dict[str, Any] = {"gan": {"gan_weight": 0.5}, "detached": {"detach_weight": True}}.get(weighting, {})
    weighting = weighting if weighting in ("uniform", "vsd") else ""
    draws = torch.Generator().manual_seed(3)
    if name != "sim":
        common["weighting"] = weighting or "normalised"
    if name in ("sid", "sida"):
        weight = 0.5 if name == "sida" else 0.0
        result = sid_step(networks, None, draws, alpha=1.2, gan_weight=weight, **common)
    elif name == "sim":
        result = sim_step(networks, None, draws, huber_c=0.1, **common)
    else:
        result = uni_instruct_step(
            networks, None, draws, divergence=name, ratio=DensityRatio(), ratio_ramp=0.5, **common, **extra
        )

    draws = torch.Generator().manual_seed(3)
    x0 = student(rng.normal(draws, batch, (1, 1, 3)), None)
    t = levels(schedule, rng.uniform(draws, batch))
    eps = counter_normal(rng.device_seed(draws), 0, batch, 3).reshape(x0.shape)
    x_t = x0 + t[:, None, None, None] * eps
    fake_x0, teacher_x0 = fake(x_t, t), teacher(x_t, t)
    x0, x_t, fake_x0, teacher_x0 = (v.flatten(1) for v in (x0, x_t, fake_x0, teacher_x0))
    inner = ((teacher_x0 - fake_x0) * (fake_x0 - x0)).mean(1)
    square = (teacher_x0 - fake_x0).square().mean(1)
    normaliser = {"": (x0 - teacher_x0).detach().abs().mean(1), "uniform": 1.0, "vsd": (1 + t**2) / t}[weighting]
    logits = ratio_network({"x_t": x_t, "t": t})
    if name == "sim":
        expected = inner / (square + 0.01).sqrt()
    elif name in ("sid", "sida"):
        gan = torch.nn.functional.softplus(-logits) if name == "sida" else 0.0
        expected = (inner + (1 - 1.2) * square + 0.5 * gan) / normaliser
    else:
        r, _ = DensityRatio().ratio(logits.detach() if extra.get("detach_weight") else logits, t)
        h = {"kl": r, "js": r / (1 + r)}[name]
        rest = {"kl": torch.zeros_like(r), "js": (r / (1 + r)) ** 2}[name]  # h - r h'
        # Halfway from reverse KL, where both are 1, to the divergence with its mean weight of 1.
        mean = h.mean().detach()
        h, rest = 0.5 + 0.5 * h / mean, 0.5 + 0.5 * rest / mean
        gan = torch.nn.functional.softplus(-logits) if extra.get("gan_weight") else 0.0
        expected = (h * inner + rest / 2 * square + 0.5 * gan) / normaliser
    torch.testing.assert_close(result.loss, expected.mean(), rtol=1e-4, atol=1e-6)
    result.loss.backward()
    assert untouched(teacher)
    assert untouched(fake)
    gradients = torch.autograd.grad(expected.mean(), [student.a, student.b])
    for parameter, gradient in zip((student.a, student.b), gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


def test_the_critics_gan_losses_are_weighted_at_their_own_levels() -> None:
    networks = dataclasses.replace(real_networks("fake"), discriminator=ConstantLogit())  # type: ignore[arg-type]
    arguments = (networks, torch.zeros(6, 1, 8, 8), torch.arange(6))
    result = critic_step(*arguments, torch.Generator().manual_seed(0), gan_weight=10.0, gan_weighting="edm")
    weighted = torch.zeros(())
    for name in ("gan_real", "gan_fake"):
        value, t = result.logs[f"discriminator/{name}"]
        weighted = weighted + ((1 / t**2 + 1 / networks.teacher.sigma_data**2) * value).mean()
    expected = result.logs["fake_score/denoising"].value.mean() + 10 * weighted
    torch.testing.assert_close(result.loss.detach(), expected)


@pytest.mark.parametrize("source", ["fake", "teacher"])
def test_shared_noise_leaves_data_and_samples_to_differ_by_the_image_alone(source: str) -> None:
    """Where the images are the same too, the discriminator cannot tell them apart; and nothing else changes."""
    constant = LinearGenerator(a=0.0, b=0.4, size=8)
    constant.sample_shape = (1, 8, 8)
    networks = dataclasses.replace(real_networks(source), generator=constant)
    same, labels = torch.full((6, 1, 8, 8), 0.4), torch.arange(6)
    together, apart = (
        critic_step(networks, same, labels, torch.Generator().manual_seed(0), shared_noise=shared).logs
        for shared in (True, False)
    )
    real, fake = together["discriminator/gan_real"], together["discriminator/gan_fake"]
    assert torch.equal(real.t, fake.t)
    torch.testing.assert_close((-real.value).exp() + (-fake.value).exp(), torch.ones(6))  # of one logit
    assert not torch.equal(apart["discriminator/gan_real"].t, fake.t)
    for name in ("fake_score/denoising", "discriminator/gan_fake"):
        assert torch.equal(apart[name].value, together[name].value)
