"""Decoupled DMD's term: the score of the condition given the noised sample, by autograd on a mixture in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fdistill.base import rng
from fdistill.base.errors import ArgumentError, ConfigError
from fdistill.condition import Condition
from fdistill.config.reading import load_config
from fdistill.denoiser import Denoiser, Features
from fdistill.guidance import GuidedDenoiser
from fdistill.losses import score_difference_weight
from fdistill.noise import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule, karras_levels, uniform_levels
from fdistill.prediction import Preconditioning
from fdistill.rollout import Rollout
from fdistill.step import Augmentation, Networks, augmentation, generator_step
from fdistill.step.augmentation import augmentation_loss
from fdistill.step.roles import renoise
from fdistill.training.build import build

MEANS, STDS = torch.tensor([-1.0, 0.4, 1.3], dtype=torch.float64), torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
NONE = 3
SCALE = 4.0


def log_density(x_t: Tensor, alpha: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """Of noised samples [B], of their own component, or of the mixture of all for the label NONE."""
    mean = alpha[:, None] * MEANS
    std = (alpha[:, None] ** 2 * STDS**2 + sigma[:, None] ** 2).sqrt()
    each = torch.distributions.Normal(mean, std).log_prob(x_t[:, None])
    own = each.gather(1, labels.clamp(max=2)[:, None])[:, 0]
    return torch.where(labels == NONE, each.logsumexp(1) - torch.tensor(3.0).double().log(), own)


class Mixture(Denoiser):
    """The exact posterior mean of three normals, one for each class, by Tweedie's formula."""

    def __init__(self, schedule: NoiseSchedule):
        super().__init__()
        self.schedule, self.sample_shape, self.sigma_data = schedule, (1, 1, 1), 1.0
        self.num_classes, self.null_class, self.text_shapes = NONE, NONE, None
        self.feature_shapes, self.kind = {}, "mixture"
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def preconditioning(self, t: Tensor) -> Preconditioning:
        return Preconditioning()

    def run(
        self,
        network_input: Tensor,
        t: Tensor,
        condition: Condition | None,
        features: Sequence[str],
        *,
        output: bool,
        output_grad: bool,
    ) -> tuple[Tensor | None, Features]:
        assert isinstance(condition, Tensor)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        with torch.enable_grad():
            x_t = network_input.detach().flatten().double().requires_grad_(True)
            (score,) = torch.autograd.grad(log_density(x_t, alpha, sigma, condition).sum(), x_t)
        x0 = (x_t.detach() + sigma**2 * score) / alpha
        return x0.reshape(network_input.shape), {}


class Shift(nn.Module):
    """x0 = noise + shift."""

    sample_shape = (1, 1, 1)
    levels = (1.5,)

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

    def forward(self, noise: Tensor, condition: Any = None) -> Tensor:
        return noise.double() + self.shift


SCHEDULES: dict[str, tuple[NoiseSchedule, float]] = {
    "edm": (EDMSchedule(), 1.5),
    "flow": (FlowSchedule(), 0.6),
    "vp": (VPSchedule(torch.linspace(0.999, 0.01, 100).double()), 60.0),
}


def networks(schedule: NoiseSchedule) -> Networks:
    return Networks(GuidedDenoiser(Mixture(schedule), SCALE), Mixture(schedule), Shift())


@pytest.mark.parametrize("weighting", ["uniform", "vsd", "normalised"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_it_is_the_score_of_the_condition(name: str, weighting: str) -> None:
    """Its gradient is -(s - 1) sigma^2 / alpha times that of log p(class | x_t), weighted."""
    schedule, top = SCHEDULES[name]
    roles, count = networks(schedule), 64
    labels = torch.arange(count) % 3
    x0 = torch.linspace(-2, 2, count).double().reshape(-1, 1, 1, 1).requires_grad_(True)
    seen: list[Tensor] = []
    predict = roles.teacher.predict

    def recorded(network_input: Tensor, *others: Any, **options: Any) -> Any:
        seen.append(network_input)
        return predict(network_input, *others, **options)

    roles.teacher.predict = recorded  # type: ignore[method-assign]
    floor = 0.5  # between the least and the largest distance here
    term = Augmentation(1.0, uniform_levels, weighting, floor)
    loss, t = augmentation_loss(roles, x0, labels, torch.Generator().manual_seed(0), term, top)
    (got,) = torch.autograd.grad(loss.sum(), x0)
    assert schedule.t_min <= float(t.min())
    assert 0.9 * top < float(t.max()) <= top
    alpha, sigma = schedule.alpha(t).double(), schedule.sigma(t).double()
    x_t = seen[0].detach().double().flatten().requires_grad_(True)
    posterior = log_density(x_t, alpha, sigma, labels) - log_density(x_t, alpha, sigma, torch.full_like(labels, NONE))
    (slope,) = torch.autograd.grad(posterior.sum(), x_t)
    difference = (SCALE - 1) * sigma**2 / alpha * slope
    if weighting == "normalised":
        clean = roles.teacher.denoiser(x_t.detach().reshape(-1, 1, 1, 1), t, labels).flatten()  # type: ignore[operator]
        weight = 1 / (x0.detach().flatten() - clean).abs().clamp(min=floor)
    else:
        weight = score_difference_weight(weighting, alpha, sigma)
    expected = -weight * difference
    assert expected.norm() > 1e-2
    assert (got.flatten() - expected).norm() < 1e-4 * expected.norm()


def test_levels_are_drawn_as_they_are_but_below_the_students() -> None:
    """Distribution: that of the sampler, given that the level is below the student's."""
    schedule, count = EDMSchedule(), 4000
    levels = partial(karras_levels, low=0.02, high=0.9)
    x0 = torch.zeros(count, 1, 1, 1, dtype=torch.float64)
    roles, labels = networks(schedule), torch.zeros(count, dtype=torch.long)
    term = Augmentation(1.0, levels)
    _, t = augmentation_loss(roles, x0, labels, torch.Generator().manual_seed(0), term, 2.5)
    whole = levels(schedule, torch.linspace(0, 1, 100001, dtype=torch.float64))
    wanted = whole[whole <= 2.5]
    for share in (0.1, 0.25, 0.5, 0.75, 0.9):
        near = wanted.quantile(share)
        assert (t <= near).double().mean() == pytest.approx(share, abs=0.03)


def test_with_one_level_for_both_terms_it_is_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    """T_s - F = (T_c - F) + (s - 1) (T_c - T_0): the two terms at the level and noise of the guided difference."""
    schedule = EDMSchedule()
    roles, labels = networks(schedule), torch.arange(12) % 3

    def fixed(schedule: NoiseSchedule, u: Tensor) -> Tensor:
        return torch.full_like(u, 1.0)

    def gradient(roles: Networks, term: Augmentation | None) -> Tensor:
        result = generator_step(
            roles,
            labels,
            torch.Generator().manual_seed(0),
            batch_size=12,
            levels=fixed,
            weighting="uniform",
            gan_weight=0.0,
            augmentation=term,
        )
        (found,) = torch.autograd.grad(result.loss, list(roles.generator.parameters()))
        return found

    def same_noise(networks: Any, x0: Tensor, t: Tensor, generator: torch.Generator, **options: Any) -> Any:
        """That of the matching term, which is drawn after the samples' noise and the levels."""
        again = torch.Generator().manual_seed(0)
        rng.normal(again, 12, (1, 1, 1))
        rng.uniform(again, 12)
        return renoise(networks, x0, t, again, **options)

    monkeypatch.setattr(augmentation, "renoise", same_noise)
    split = gradient(roles, Augmentation(1.0, fixed, "uniform"))
    torch.testing.assert_close(split, gradient(roles, None), rtol=1e-5, atol=1e-8)
    half = gradient(roles.unguided, None)
    assert (split - half).abs() > 0.1 * half.abs()


def test_a_teacher_without_guidance_is_refused() -> None:
    schedule = EDMSchedule()
    roles = replace(networks(schedule), teacher=Mixture(schedule))
    term = Augmentation(1.0, uniform_levels)
    with pytest.raises(ArgumentError, match="expected a guided teacher"):
        augmentation_loss(roles, torch.zeros(1, 1, 1, 1), torch.zeros(1).long(), torch.Generator(), term, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": 1.0}, "guidance_scale: got 1, which is no guidance, but augmentation.weight"),
        ({"guidance_rescale": 0.5}, "guidance_rescale: got 0.5, which augmentation.weight does not read"),
    ],
)
def test_settings_without_use_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("digits-decoupled-dmd", settings)
    late = load_config("digits-decoupled-dmd", {"augmentation.low": 0.5})
    with pytest.raises(
        ConfigError, match=r"augmentation.low: its levels begin at 499.5, and the student's last .* 249;"
    ):
        build(late, torch.device("cpu"))
    with pytest.raises(ConfigError, match="method=sid does not add this term"):
        load_config("digits", {"method": "sid", "augmentation.weight": 1.0})


def test_a_run_has_both_terms() -> None:
    """On the captioned digits, two steps: the level of the term is below that of the step that is trained."""
    settings = {"student.steps": 2, "batch_size": 4, "device": "cpu"}
    made = build(load_config("digits-decoupled-dmd", settings), torch.device("cpu"))
    teacher: Any = made.networks.teacher
    condition = teacher.null.to("cpu").repeated(4)
    for steps, top in ((1, made.student.levels[0]), (2, made.student.levels[1])):
        rollout = Rollout(made.student.levels[:steps])
        random = torch.Generator().manual_seed(0)
        result = made.student_update(condition, random, batch_size=4, rollout=rollout)
        assert torch.isfinite(result.loss)
        assert float(result.logs["generator/augmentation"].t.max()) <= top
        assert {"generator/matching", "generator/gan"} <= result.logs.keys()
