"""DP-DMD's term: the teacher's trajectory in closed form, what is detached, and that it trains a run's first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fdistill import distill
from fdistill.adapters.parametrisation import DirectPrediction
from fdistill.adapters.unet2d import UNet2DDenoiser
from fdistill.base import rng
from fdistill.base.errors import ConfigError
from fdistill.config.reading import load_config
from fdistill.generator import FewStepGenerator, OneStepGenerator
from fdistill.noise import EDMSchedule, FlowSchedule, vp_schedule_from_config
from fdistill.rollout import Rollout
from fdistill.step import Diversity, Networks, generator_step
from fdistill.step.diversity import draw_supervised, trajectory_x0
from fdistill.student_kinds import Sampler
from fdistill.training.build import build
from fdistill.training.journal import read_records
from support.denoisers import GaussianDenoiser, tiny_unet


@pytest.mark.parametrize("kind", ["edm", "flow"])
def test_the_trajectory_of_a_normal_teacher_is_its_ode(kind: str) -> None:
    """x_t of data N(m, s^2) moves as alpha m + sqrt(alpha^2 s^2 + sigma^2) z, with z its standardised start."""
    schedule: Any = EDMSchedule() if kind == "edm" else FlowSchedule()
    top, end = (80.0, 1.0) if kind == "edm" else (1.0, 0.4)
    teacher = GaussianDenoiser(0.7, 0.5, schedule)
    noise = torch.randn(5, 1, 1, 1, dtype=torch.float64)
    levels = tuple(torch.logspace(torch.tensor(top).log10(), torch.tensor(end).log10(), 4001).tolist())
    found = trajectory_x0(teacher, noise, None, (top, *levels[1:]))

    def moments(level: float) -> tuple[float, float]:
        alpha, sigma = (1.0, level) if kind == "edm" else (1 - level, level)
        return alpha * 0.7, (alpha**2 * 0.25 + sigma**2) ** 0.5

    start = noise * (80.0 if kind == "edm" else 1.0)
    (m0, s0), (m1, s1) = moments(top), moments(end)
    z = m1 + s1 * (start - m0) / s0
    expected = (top * z - end * start) / ((1.0 if kind == "edm" else 1 - end) * top - end * (kind == "edm"))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "levels", [(80.0, 30.0, 10.0), (2.5, 1.0), (1.0, 0.8), (0.75, 0.6, 0.4), (999.0, 900.0, 832.0)]
)
def test_a_teacher_that_knows_the_image_leads_to_it(levels: tuple[float, ...]) -> None:
    """Whatever the schedule, the first level and the number of steps."""
    schedule: Any = EDMSchedule() if levels[0] in (80.0, 2.5) else FlowSchedule()
    if levels[0] == 999:
        schedule = vp_schedule_from_config({"_class_name": "DDPMScheduler"})
    teacher = GaussianDenoiser(0.7, 0.0, schedule)
    noise = torch.randn(5, 1, 1, 1, dtype=torch.float64)
    found = trajectory_x0(teacher, noise, None, levels)
    torch.testing.assert_close(found, torch.full_like(found, 0.7), rtol=1e-4, atol=1e-4)


def unet(seed: int) -> UNet2DDenoiser:
    torch.manual_seed(seed)
    return UNet2DDenoiser(tiny_unet(num_class_embeds=None), DirectPrediction(FlowSchedule(), "flow", 1000.0))


@pytest.mark.parametrize("sampler", ["stochastic", "deterministic"])
def test_the_first_step_learns_the_velocity_and_later_steps_the_rest(sampler: Sampler) -> None:
    teacher, student = unet(0), FewStepGenerator(unet(1), [1.0, 0.7, 0.4], sampler)
    networks, term = Networks(teacher, unet(2), student), Diversity(0.05, (1.0, 0.9, 0.8))
    found = draw_supervised(networks, torch.Generator().manual_seed(3), 4, None, term)
    noise = rng.normal(torch.Generator().manual_seed(3), 4, student.noise_shape())
    eps = noise[:, 0] if sampler == "stochastic" else noise
    with torch.no_grad():  # the paper's Euler steps along the velocity
        z = eps
        for level, following in ((1.0, 0.9), (0.9, 0.8)):
            z = z + (following - level) * teacher.network(z, torch.full((4,), 1000 * level)).sample
        velocity = (eps - z) / (1 - 0.8)
    own = student.denoiser.network(eps, torch.full((4,), 1000.0)).sample
    expected = (own - velocity).square().flatten(1).mean(1)
    torch.testing.assert_close(found.loss, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.x0, student(noise), rtol=1e-4, atol=1e-5)  # as at inference

    # The gradient of x0: through the second step and the third, not into the first.
    with torch.no_grad():
        first = student(noise[:, :1] if sampler == "stochastic" else noise, None, Rollout((1.0,)))
    second_input = 0.3 * first + 0.7 * (noise[:, 1] if sampler == "stochastic" else eps)
    second = student.denoiser(second_input, torch.full((4,), 0.7))
    implied = (second_input - 0.3 * second) / 0.7
    third_input = 0.6 * second + 0.4 * (noise[:, 2] if sampler == "stochastic" else implied)
    x = student.denoiser(third_input, torch.full((4,), 0.4))
    parameters = list(student.parameters())
    got = torch.autograd.grad(found.x0.square().sum(), parameters, allow_unused=True)
    wanted = torch.autograd.grad(x.square().sum(), parameters, allow_unused=True)
    pairs = [(a, b) for a, b in zip(got, wanted, strict=True) if b is not None]
    norm = torch.stack([b.norm() for _, b in pairs]).norm()
    difference = torch.stack([(a if a is not None else 0 * b).sub(b).norm() for a, b in pairs]).norm()
    assert norm > 1e-2
    assert difference < 1e-3 * norm


def test_the_term_is_added_with_its_weight() -> None:
    teacher, student = unet(0), FewStepGenerator(unet(1), [1.0, 0.5])
    networks, levels = Networks(teacher, unet(2), student), (1.0, 0.8)

    def loss(weight: float) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(0)
        term = Diversity(weight, levels)
        made = generator_step(networks, None, random, batch_size=4, gan_weight=0.0, diversity=term)
        return made.loss, made.logs["generator/diversity"].value

    (small, term), (large, _) = loss(0.05), loss(1.0)
    torch.testing.assert_close(large - small, 0.95 * term.mean())
    one_step = Networks(teacher, unet(2), OneStepGenerator(unet(1), 1.0))
    with pytest.raises(ValueError, match="expected a student of several steps"):
        draw_supervised(one_step, torch.Generator(), 1, None, Diversity(1.0, levels))


@pytest.mark.thorough
def test_a_run_learns_the_first_step(tiny_teacher: Path, tmp_path: Path) -> None:
    """The term falls, and it alone trains the first step: the student's updates take all steps."""
    settings: dict[str, Any] = {
        "teacher": str(tiny_teacher),
        "method": "dmd2",
        "critic_steps": 1,
        "student.steps": 2,
        "diversity": {"weight": 1.0, "steps": 3, "of": 10},
        "batch_size": 16,
        "generator.lr": 2e-3,
        "log": {"samples_every": 0, "tracker": "none", "every": 1},
        "iterations": 18,
    }
    made = build(load_config("digits", settings), torch.device("cpu"))
    keywords: Any = made.stages[0].student_update
    assert len(keywords.keywords["diversity"].levels) == 4
    assert keywords.keywords["diversity"].levels[0] == made.student.levels[0]
    distill("digits", output=tmp_path / "run", **settings)
    losses = [record["generator/diversity"] for record in read_records(tmp_path / "run" / "metrics.jsonl")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "sid", "student.steps": 4}, "method=sid does not add this term"),
        ({}, "diversity.weight: got 0.05, but the student takes one step"),
        ({"student.steps": 4, "student.any_step": True}, "student.any_step: got True, but with diversity.weight"),
        ({"student.steps": 4, "student.simulated": 0.5}, "student.simulated: got 0.5, but with diversity.weight"),
        ({"student.steps": 4, "diversity.steps": 30}, "expected steps < of, got 30 and 30"),
        ({"student.generator": "tiue", "student_level": [60.0, 20.0]}, "diversity.weight: got 0.05, but the student"),
    ],
)
def test_settings_without_use_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("digits", {"diversity.weight": 0.05, **settings})
