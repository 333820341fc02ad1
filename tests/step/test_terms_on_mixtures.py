"""Terms for students of two steps against derivatives of their expectations, on a mixture of normals in float64.

The teacher is exact, and the student is affine in its input. Each expectation is written out here for the flow
x_t = (1 - t) x0 + t eps, with its own rule of quadrature, and differentiated by differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fdistill.config.reading import load_config
from fdistill.denoiser import Denoiser, Features
from fdistill.divergence import get_divergence
from fdistill.generator import FewStepGenerator
from fdistill.losses import regression_loss, score_difference_loss
from fdistill.noise import FlowSchedule, add_noise
from fdistill.prediction import Preconditioning
from fdistill.ratio import DensityRatio
from fdistill.rollout import Rollout
from fdistill.sampler import heun_states
from fdistill.step import Diversity, Networks, Pairs, Segment
from fdistill.step.diversity import draw_supervised
from fdistill.step.pairs import student_of_pairs
from fdistill.step.roles import Noised
from fdistill.step.segment import segment_loss
from fdistill.student_kinds import Sampler
from fdistill.students.phases import PhasedGenerator, Phases
from fdistill.training.updates import student_update
from support.testbed import F64, TEACHER_1D, product, trapezoid

START = (0.6, 0.2, -0.25)  # a, b and c of x0 = (a + c t) x_t + b
LEVELS = (1.0, 0.6)
Parameters = Sequence[float]

samplers = pytest.mark.parametrize("sampler", ["stochastic", "deterministic"])


class Exact(Denoiser):
    """The exact posterior mean of a mixture of normals in one dimension."""

    def __init__(self, weights: Tensor, means: Tensor, stds: Tensor):
        super().__init__()
        self.weights, self.means, self.stds = weights, means, stds
        self.schedule, self.sample_shape, self.num_classes = FlowSchedule(), (1, 1, 1), None
        self.sigma_data, self.feature_shapes = 0.5, {}

    def run(
        self, network_input: Tensor, t: Tensor, condition: Any, features: Sequence[str], **_: Any
    ) -> tuple[Tensor, Features]:
        x_t, alpha, sigma = network_input.reshape(-1, 1), 1 - t.double()[:, None], t.double()[:, None]
        variance = alpha**2 * self.stds**2 + sigma**2
        distance = x_t - alpha * self.means
        own = (self.weights.log() - distance**2 / (2 * variance) - variance.log() / 2).softmax(1)
        x0 = (own * (self.means + alpha * self.stds**2 / variance * distance)).sum(1)
        return x0.reshape(network_input.shape), {}


class Affine(Denoiser):
    """x0 = (a + c t) x_t + b."""

    def __init__(self) -> None:
        super().__init__()
        self.values = torch.nn.Parameter(torch.tensor(START, dtype=F64))
        self.schedule, self.sample_shape, self.num_classes = FlowSchedule(), (1, 1, 1), None
        self.sigma_data, self.feature_shapes = 0.5, {}

    def run(
        self, network_input: Tensor, t: Tensor, condition: Any, features: Sequence[str], **_: Any
    ) -> tuple[Tensor, Features]:
        a, b, c = self.values
        return (a + c * t.double().reshape(-1, 1, 1, 1)) * network_input + b, {}

    def gradient(self, losses: Tensor, weights: Tensor) -> Tensor:
        (found,) = torch.autograd.grad((weights * losses).sum(), self.values)
        return found


TEACHER = Exact(TEACHER_1D.weights, TEACHER_1D.means[:, 0], TEACHER_1D.stds)


# The same by hand: the student, the teacher as an integral over its images, and a step of the flow.

IMAGES = torch.linspace(-6, 7, 1301, dtype=F64)
PRIOR = TEACHER_1D.log_density(IMAGES[:, None], 1.0, 0.0)
NODES, WEIGHTS = (each.flatten() for each in trapezoid(8.0, 129))


def student_x0(values: Parameters, x_t: Tensor, t: float) -> Tensor:
    return (values[0] + values[2] * t) * x_t + values[1]


def teacher_x0(x_t: Tensor, t: float) -> Tensor:
    likelihood = -((x_t[:, None] - (1 - t) * IMAGES) ** 2) / (2 * t**2)
    return (PRIOR + likelihood).softmax(1) @ IMAGES


def euler(x_t: Tensor, x0: Tensor, t: float, to: float) -> Tensor:
    """Along the velocity of the line from x0 to the noise."""
    return x_t + (to - t) * (x_t - x0) / t


def derivative(expectation: Callable[[Parameters], Tensor]) -> Tensor:
    """Of a function of (a, b, c) at START, by differences of fourth order."""
    step, found = 1e-3, []
    for place in range(3):
        at = [[value + k * step * (index == place) for index, value in enumerate(START)] for k in (-2, -1, 1, 2)]
        low, lower, upper, high = (expectation(values) for values in at)
        found.append((low - 8 * lower + 8 * upper - high) / (12 * step))
    return torch.stack(found)


def assert_same(got: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    assert (wanted.abs() > 1e-3).all()
    error = ((got - wanted).norm() / wanted.norm()).item()
    assert error <= tolerance, f"relative error {error:.2e}"


def inputs(sampler: Sampler, step: int) -> tuple[Tensor, Tensor]:
    """(x_t, weights) of the student's step, made by its earlier one."""
    if step == 0:
        return NODES, WEIGHTS
    first = student_x0(START, NODES, LEVELS[0])
    if sampler == "deterministic":
        return euler(NODES, first, *LEVELS), WEIGHTS
    x_t = (1 - LEVELS[1]) * first[:, None] + LEVELS[1] * NODES
    return x_t.flatten(), (WEIGHTS[:, None] * WEIGHTS).flatten()


@samplers
@pytest.mark.parametrize("step", [0, 1])
def test_intra_segment_guidance(sampler: Sampler, step: int) -> None:
    begin, middle, end = (1.0, 0.85, 0.6) if step == 0 else (0.6, 0.25, None)
    own = Affine()
    student = FewStepGenerator(own, LEVELS, sampler)
    stochastic = sampler == "stochastic"
    noise, weights = product(*trapezoid(7.5, 91), 1 + (step if stochastic else 0))
    shape = (len(noise), *student.noise_shape(Rollout(LEVELS[: step + 1])))
    x0, x_t = student.last_step(noise.reshape(shape), None, Rollout(LEVELS[: step + 1]))
    losses = segment_loss(Networks(TEACHER, TEACHER, student), x0, x_t, None, Segment(1.0, begin, middle, end))

    x, of_x = inputs(sampler, step)
    handed_over = euler(x, teacher_x0(x, begin), begin, middle)
    detour = student_x0(START, handed_over, middle)

    def expectation(values: Parameters) -> Tensor:
        direct = student_x0(values, x, begin)
        difference = direct - detour
        if end is not None:
            difference = euler(x, direct, begin, end) - euler(handed_over, detour, middle, end)
        return (of_x * difference**2).sum()

    assert_same(own.gradient(losses, weights), derivative(expectation))


@samplers
def test_the_diversity_term(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its expectation is that of DP-DMD: the first velocity against that of the teacher's Euler steps."""
    own, passed = Affine(), (1.0, 0.9, 0.75)
    student = FewStepGenerator(own, LEVELS, sampler)
    nodes, weights = trapezoid(7.5, 91)
    noise = nodes.reshape(-1, 1, 1, 1)
    if sampler == "stochastic":
        noise = torch.stack([noise, noise.flip(0)], 1)
    monkeypatch.setattr("fdistill.step.diversity.rng.normal", lambda *_: noise)
    networks = Networks(TEACHER, TEACHER, student)
    found = draw_supervised(networks, torch.Generator(), len(noise), None, Diversity(1.0, passed))

    z = NODES
    for level, following in ((1.0, 0.9), (0.9, 0.75)):
        z = euler(z, teacher_x0(z, level), level, following)
    velocity = (NODES - z) / (1 - 0.75)

    def expectation(values: Parameters) -> Tensor:
        return (WEIGHTS * (NODES - student_x0(values, NODES, 1.0) - velocity) ** 2).sum()

    assert_same(own.gradient(found.loss, weights), derivative(expectation))


def quantile(share: Tensor, t: float) -> Tensor:
    """Of the teacher's noised samples at level t, by bisection."""
    spread = ((1 - t) ** 2 * TEACHER_1D.stds**2 + t**2).sqrt()
    normals = torch.distributions.Normal((1 - t) * TEACHER_1D.means[:, 0], spread)
    low, high = torch.full_like(share, -12.0), torch.full_like(share, 12.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = normals.cdf(middle[:, None]) @ TEACHER_1D.weights < share
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


@samplers
@pytest.mark.parametrize("step", [0, 1])
def test_regression_on_the_odes_trajectory(sampler: Sampler, step: int) -> None:
    """In one dimension the ODE keeps the order of points, so that it maps quantiles to quantiles; Heun's method comes
    near to that.
    """
    own = Affine()
    student = FewStepGenerator(own, LEVELS, sampler)
    nodes, weights = trapezoid(5.0, 61)
    noise = nodes.reshape(-1, 1, 1, 1)
    x0, states = heun_states(TEACHER, noise, None, 300, LEVELS)
    pairs = Pairs(noise, x0, None, LEVELS[step], states[:, 0] if step else None)
    losses = regression_loss(student_of_pairs(Networks(TEACHER, TEACHER, student), pairs), pairs.x0)

    z, of_z = (each.flatten() for each in trapezoid(5.0, 201))
    share = torch.special.ndtr(z)
    images, entered = quantile(share, 0.0), quantile(share, LEVELS[step]) if step else z

    def expectation(values: Parameters) -> Tensor:
        return (of_z * (student_x0(values, entered, LEVELS[step]) - images) ** 2).sum()

    assert_same(own.gradient(losses, weights), derivative(expectation), 1e-3)


PHASES = Phases((1.0, 0.7, 0.4, 0.2), (0, 2))


def moments(values: Parameters) -> tuple[float, float]:
    """Mean and variance of the first phase's samples; its first step has no gradient."""
    first, last = START[0] + START[2], values[0] + 0.7 * values[2]
    return last * 0.3 * START[1] + values[1], last**2 * (0.3**2 * first**2 + 0.7**2)


def matching(values: Parameters, low: float) -> Tensor:
    """The mean over levels t from `low` of (t / (1 - t))^2 KL(student || teacher) of samples noised to t."""
    mean, variance = moments(values)
    points, weights = np.polynomial.legendre.leggauss(40)
    high, total = 0.001 + 0.98 * 0.999, torch.zeros((), dtype=F64)
    x = torch.linspace(-12, 12, 2401, dtype=F64)
    for point, weight in zip(points, weights, strict=True):
        t = float(low + (high - low) * (point + 1) / 2)
        noised = (1 - t) ** 2 * variance + t**2
        log_q = -((x - (1 - t) * mean) ** 2) / (2 * noised) - math.log(2 * math.pi * noised) / 2
        kl = (log_q.exp() * (log_q - TEACHER_1D.log_density(x[:, None], 1 - t, t))).sum() * (x[1] - x[0])
        total = total + weight / 2 * (t / (1 - t)) ** 2 * kl
    return total


def test_a_first_phase_descends_the_divergence_above_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole update of the student, at nodes in place of what it draws."""
    nodes, of_nodes = trapezoid(6.0, 31)
    draws, of_draws = product(nodes, of_nodes, 3)
    points, of_points = np.polynomial.legendre.leggauss(16)
    u = torch.from_numpy(points + 1).repeat_interleave(len(draws)) / 2
    draws = draws.repeat(16, 1)
    weights = torch.from_numpy(of_points / 2).repeat_interleave(len(of_draws)) * of_draws.repeat(16)
    kept = weights > 1e-12 * weights.max()
    draws, u, weights = draws[kept], u[kept], weights[kept]

    def renoise(networks: Sequence[Denoiser], x0: Tensor, t: Tensor, *_: Any, **__: Any) -> Noised:
        x_t = add_noise(FlowSchedule(), x0, draws[:, 2].reshape(-1, 1, 1, 1), t)
        return Noised(x_t, [x_t] * len(networks), [Preconditioning()] * len(networks))

    def weighted(*arguments: Any, **options: Any) -> Tensor:
        return len(weights) * weights * score_difference_loss(*arguments, **options)

    monkeypatch.setattr("fdistill.step.matching.rng.normal", lambda *_: draws[:, :2].reshape(-1, 2, 1, 1, 1))
    monkeypatch.setattr("fdistill.step.matching.rng.uniform", lambda *_: u)
    monkeypatch.setattr("fdistill.step.evaluated.renoise", renoise)
    monkeypatch.setattr("fdistill.step.matching.score_difference_loss", weighted)
    own = Affine()
    mean, variance = moments(START)
    fake = Exact(*(torch.tensor([value], dtype=F64) for value in (1.0, mean, variance**0.5)))
    networks = Networks(TEACHER, fake, PhasedGenerator(own, PHASES))
    config = load_config(None, {"method": "diff-instruct", "matching_levels.sampler": "uniform"})
    assert config.generator.weighting == "uniform"
    update: Any = student_update(config, networks, get_divergence("reverse-kl"), DensityRatio())
    (got,) = torch.autograd.grad(update(None, torch.Generator(), batch_size=len(draws)).loss, own.values)

    wanted = derivative(lambda values: matching(values, 0.4))
    assert_same(got, wanted)
    everywhere = derivative(lambda values: matching(values, 0.001 + 0.02 * 0.999))
    assert (everywhere - wanted).norm() > 0.1 * wanted.norm()  # or the comparison would not see the levels
