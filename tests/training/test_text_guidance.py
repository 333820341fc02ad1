"""Guidance of prompts, of teacher and fake score; dropped prompts; the GAN weight that balances gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from fdistill.adapters import wrap
from fdistill.base.errors import ArgumentError
from fdistill.condition import TextCondition, concat, none_like, where
from fdistill.discriminator import Discriminator
from fdistill.generator import OneStepGenerator
from fdistill.guidance import GuidedDenoiser
from fdistill.losses import denoising_loss, gan_generator_loss, matching_loss
from fdistill.noise import shifted_levels, uniform_levels
from fdistill.step import Networks, critic_step, generator_step
from fdistill.step.matching import balanced
from fdistill.step.roles import frozen, renoise
from support.text_families import tiny_condition_unet

SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def denoiser(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    network = tiny_condition_unet()
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return wrap(network, SCHEDULER).requires_grad_(False).eval()


def prompts(count: int, seed: int = 3) -> TextCondition:
    generator = torch.Generator().manual_seed(seed)
    width = denoiser().text_shapes["prompt_embeds"][-1]
    return TextCondition({"prompt_embeds": torch.randn(count, 7, width, generator=generator)})


def noisy(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, *denoiser().sample_shape, generator=generator), torch.tensor([40.0, 300.0, 900.0])[:count]


def test_guidance_is_two_separate_calls() -> None:
    plain, told, null = denoiser(), prompts(3), prompts(1, seed=8)
    x_t, t = noisy(3)
    guided = GuidedDenoiser(plain, 3.5, null=null).denoise(x_t, t, told)
    conditional, unconditional = (plain.denoise(x_t, t, condition) for condition in (told, null.repeated(3)))
    assert isinstance(guided, Tensor)
    assert (guided - conditional).abs().max() > 0.1
    torch.testing.assert_close(guided, unconditional + 3.5 * (conditional - unconditional), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescaled_guidance_is_diffusers(rescale: float) -> None:
    plain, told, null = denoiser(), prompts(3), prompts(1, seed=8)
    x_t, t = noisy(3)
    prediction, _ = GuidedDenoiser(plain, 5.0, null=null, rescale=rescale).predict(x_t, t, told)
    conditional, unconditional = (plain.predict(x_t, t, c)[0].output for c in (told, null.repeated(3)))
    guided = unconditional + 5.0 * (conditional - unconditional)
    expected = rescale_noise_cfg(guided, conditional, guidance_rescale=rescale)
    torch.testing.assert_close(prediction.output, expected, rtol=1e-4, atol=1e-5)


def test_features_are_the_conditional_halfs() -> None:
    plain, told = denoiser(), prompts(2)
    x_t, t = noisy(2)
    _, features = GuidedDenoiser(plain, 2.0, null=prompts(1, seed=8)).predict(x_t, t, told, ("mid",))
    torch.testing.assert_close(features["mid"], plain.features(x_t, t, told, ("mid",))["mid"], rtol=1e-4, atol=1e-5)


def test_guidance_of_prompts_wants_a_null_prompt() -> None:
    with pytest.raises(ArgumentError, match="expected one prompt, such as the empty one, as a TextCondition"):
        GuidedDenoiser(denoiser(), 2.0)
    with pytest.raises(ArgumentError, match="a guided network takes prompts"):
        GuidedDenoiser(denoiser(), 2.0, null=prompts(1)).predict(*noisy(2), None)


def test_labels_for_a_network_that_is_told_prompts() -> None:
    with pytest.raises(ArgumentError, match="got labels; this network wants a TextCondition"):
        denoiser().denoise(*noisy(2), torch.tensor([1, 2]))


def networks(**changes: Any) -> Networks:
    student = denoiser(2)
    teacher, fake = denoiser(0), denoiser(1).requires_grad_(True)
    torch.manual_seed(4)
    return Networks(
        **{
            "teacher": teacher,
            "fake_score": fake,
            "generator": OneStepGenerator(student.requires_grad_(True), 999.0),
            "discriminator": Discriminator(fake, ["mid"]),
            "tapped": fake,
            **changes,
        }
    )


def test_the_student_follows_guided_scores() -> None:
    """The matching loss of a step with both scores guided, against x0-predictions of separate calls."""
    null, told = prompts(1, seed=8), prompts(3)
    roles = networks()
    guided = networks(
        teacher=GuidedDenoiser(roles.teacher, 4.0, null=null),
        fake_score=roles.fake_score,
        tapped=roles.fake_score,
        discriminator=roles.discriminator,
        compared=GuidedDenoiser(roles.fake_score, 2.0, null=null),
        generator=roles.generator,
    )
    options: dict[str, Any] = {"batch_size": 3, "levels": uniform_levels, "gan_weight": 1e-3}
    result = generator_step(guided, told, torch.Generator().manual_seed(7), **options)

    from fdistill.base import rng

    random = torch.Generator().manual_seed(7)
    x0 = roles.generator(rng.normal(random, 3, roles.teacher.sample_shape), told)
    t = uniform_levels(roles.teacher.schedule, rng.uniform(random, 3))
    with torch.no_grad():
        x_t, _, _ = renoise((roles.teacher,), x0, t, random)

        def x0_of(network: Any, scale: float) -> Tensor:
            with_prompt, without = (network.denoise(x_t, t, c) for c in (told, null.repeated(3)))
            mixed: Tensor = without + scale * (with_prompt - without)
            return mixed

        expected = matching_loss(x0, x0_of(roles.teacher, 4.0), x0_of(roles.fake_score, 2.0))
        logits = roles.discriminator(roles.fake_score.features(x_t, t, told, ("mid",)))  # type: ignore[misc]
    torch.testing.assert_close(result.logs["generator/matching"].value, expected.detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(result.logs["generator/gan"].value, gan_generator_loss(logits), rtol=1e-3, atol=1e-5)


def test_the_critic_learns_guided_and_is_told_less() -> None:
    null, told = prompts(1, seed=8), prompts(3)
    roles = networks()
    kept = torch.tensor([True, False, True])
    less = where(kept, told, none_like(told, null))
    learning = GuidedDenoiser(roles.fake_score, 1.5, null=null)
    real = torch.zeros(3, *roles.teacher.sample_shape)
    options: dict[str, Any] = {
        "levels": uniform_levels,
        "gan_weight": 0.0,
        "weighting": "uniform",
        "critic_condition": less,
    }
    result = critic_step(
        networks(**vars(roles) | {"learning": learning}), real, told, torch.Generator().manual_seed(7), **options
    )

    from fdistill.base import rng

    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        x0 = roles.generator(rng.normal(random, 3, roles.teacher.sample_shape), told)  # of the whole prompts
        t = uniform_levels(roles.teacher.schedule, rng.uniform(random, 3))
        x_t, _, _ = renoise((roles.fake_score,), x0, t, random)
        with_prompt, without = (roles.fake_score.denoise(x_t, t, c) for c in (less, null.repeated(3)))
        assert isinstance(with_prompt, Tensor)
        assert isinstance(without, Tensor)
        mixed = without + 1.5 * (with_prompt - without)
        expected = denoising_loss(mixed, x0, torch.ones(3))
    torch.testing.assert_close(result.logs["fake_score/denoising"].value, expected, rtol=1e-3, atol=1e-4)
    result.loss.backward()
    assert all(p.grad is not None for p in roles.fake_score.parameters())


def test_conditions_are_joined_and_chosen_row_by_row() -> None:
    first, second = prompts(2), prompts(2, seed=8)
    both = concat(first, second)
    assert isinstance(both, TextCondition)
    assert torch.equal(both["prompt_embeds"][2:], second["prompt_embeds"])
    chosen = where(torch.tensor([False, True]), first, second)
    assert isinstance(chosen, TextCondition)
    assert torch.equal(chosen["prompt_embeds"], torch.stack([second["prompt_embeds"][0], first["prompt_embeds"][1]]))
    assert torch.equal(none_like(torch.tensor([3, 4]), 9), torch.tensor([9, 9]))
    with pytest.raises(ArgumentError, match="the same first dimension"):
        TextCondition({"a": torch.zeros(2, 1), "b": torch.zeros(3, 1)})
    with pytest.raises(ArgumentError, match="different encoders"):
        concat(first, TextCondition({"other": torch.zeros(2, 1)}))


def test_balanced_losses_have_gradients_of_the_norms_that_are_asked_for() -> None:
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x0 = weight.sin() * 2  # the student
    first, second = (x0**3).sum() / 7, (x0.exp() - x0).sum()
    a, b = (torch.autograd.grad(loss, x0, retain_graph=True)[0] for loss in (first, second))
    term, chosen = balanced(a, second, x0, 0.25)
    torch.testing.assert_close((chosen * b).norm(), 0.25 * a.norm(), rtol=1e-12, atol=0)
    term.backward()
    expected = chosen * b * 2 * weight.detach().cos()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=1e-12)


def test_a_step_balances_the_gan_term() -> None:
    told = prompts(3)
    options: dict[str, Any] = {"batch_size": 3, "levels": uniform_levels, "gan_weight": 1.0}
    gradients, weights = [], []
    for ratio in (0.0, 0.5):
        roles = networks()
        result = generator_step(roles, told, torch.Generator().manual_seed(7), gan_gradient_ratio=ratio, **options)
        if ratio:
            weights.append(result.logs["generator/gan_weight"].value[0].item())
        result.loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in roles.generator.parameters() if p.grad is not None]))
    fixed = networks()
    generator_step(
        fixed, told, torch.Generator().manual_seed(7), **{**options, "gan_weight": weights[0]}
    ).loss.backward()
    same = torch.cat([p.grad.flatten() for p in fixed.generator.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[1], same, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-2)


def test_shifted_levels_are_those_of_the_flow_scheduler() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    from fdistill.noise import FlowSchedule

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    u = torch.arange(1000, 0, -1) / 1000
    levels = shifted_levels(FlowSchedule(t_min=1e-6), u, shift=3.0)
    torch.testing.assert_close(levels, scheduler.sigmas[:1000].to(levels.dtype), rtol=1e-4, atol=1e-5)


def test_frozen_parameters_stay_frozen_where_activations_are_computed_again() -> None:
    """A step freezes networks while it evaluates them and lets them go before backward: with activations computed
    again the gradients are the same.
    """
    from fdistill.training.activation_checkpointing import checkpoint_activations

    gradients = []
    for again in (False, True):
        roles = networks()
        if again:
            for network in (roles.teacher, roles.fake_score, roles.generator.denoiser):
                checkpoint_activations(network)  # type: ignore[arg-type]
                network.train()  # type: ignore[operator]
        step = generator_step(
            roles, prompts(3), torch.Generator().manual_seed(7), batch_size=3, gan_weight=1.0, levels=uniform_levels
        )
        step.loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in roles.generator.parameters() if p.grad is not None]))
        assert all(p.grad is None for p in roles.fake_score.parameters())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)
    with frozen(roles.fake_score):
        assert not any(p.requires_grad for p in roles.fake_score.parameters())


def test_r1_where_activations_are_computed_again() -> None:
    """Its attention is differentiated twice, and its blocks run backward twice."""
    from fdistill.training.activation_checkpointing import checkpoint_activations

    gradients = []
    for again in (False, True):
        roles = networks()
        if again:
            checkpoint_activations(roles.fake_score)
            roles.fake_score.train()
        real = torch.randn(3, *roles.teacher.sample_shape, generator=torch.Generator().manual_seed(1))
        options: dict[str, Any] = {"levels": uniform_levels, "gan_weight": 1.0, "r1_weight": 1.0}
        critic_step(roles, real, prompts(3), torch.Generator().manual_seed(7), **options).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in roles.fake_score.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
