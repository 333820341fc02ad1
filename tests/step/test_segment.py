"""SenseFlow's term: by hand for linear networks, zero where it must be, and in a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fdistill import distill
from fdistill.base.errors import ConfigError
from fdistill.config.reading import load_config
from fdistill.denoiser import Denoiser, Features
from fdistill.generator import FewStepGenerator
from fdistill.noise import EDMSchedule, FlowSchedule, NoiseSchedule, vp_schedule_from_config
from fdistill.rollout import Rollout
from fdistill.step import Networks, Segment, generator_step
from fdistill.step.segment import segment_loss
from fdistill.student_kinds import Sampler
from fdistill.training.journal import read_records
from support.denoisers import GaussianDenoiser

DDPM = vp_schedule_from_config({"_class_name": "DDPMScheduler"})


class Linear(Denoiser):
    """x0 = (gain + t) x_t."""

    def __init__(self, gain: float, schedule: NoiseSchedule):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(gain, dtype=torch.float64))
        self.schedule, self.sample_shape, self.num_classes = schedule, (1, 1, 3), None
        self.sigma_data, self.feature_shapes = 0.5, {}

    def run(
        self, network_input: Tensor, t: Tensor, condition: Any, features: Sequence[str], *, output: bool, **_: Any
    ) -> tuple[Tensor | None, Features]:
        return (self.gain + t.reshape(-1, 1, 1, 1)) * network_input, {}


@pytest.mark.parametrize("sampler", ["stochastic", "deterministic"])
@pytest.mark.parametrize("end", [0.3, None])
def test_the_loss_and_its_gradient_by_hand(sampler: Sampler, end: float | None) -> None:
    teacher, own = Linear(0.2, FlowSchedule()), Linear(-0.4, FlowSchedule())
    student = FewStepGenerator(own, [1.0, 0.8, 0.3], sampler)
    x_t = torch.randn(4, 1, 1, 3, dtype=torch.float64)
    segment = Segment(1.0, 0.8, 0.5, end)
    loss = segment_loss(Networks(teacher, teacher, student), own(x_t, torch.full((4,), 0.8)), x_t, None, segment)
    (gradient,) = torch.autograd.grad(loss.sum(), own.gain)

    def euler(x0: Tensor, x: Tensor, t: float, to: float) -> Tensor:
        return x + (to - t) * (x - x0) / t  # along the velocity eps - x0 of the flow x = (1 - t) x0 + t eps

    handed_over = euler(1.0 * x_t, x_t, 0.8, 0.5)  # teacher: (0.2 + 0.8) x_t
    own_x0 = 0.1 * handed_over  # student at 0.5: (-0.4 + 0.5) x
    gain = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    direct_x0 = (gain + 0.8) * x_t
    if end is None:
        difference = direct_x0 - own_x0
    else:
        difference = euler(direct_x0, x_t, 0.8, end) - euler(own_x0, handed_over, 0.5, end)
    expected = difference.square().flatten(1).mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    (by_hand,) = torch.autograd.grad(expected.sum(), gain)
    torch.testing.assert_close(gradient, by_hand, rtol=1e-5, atol=1e-7)
    assert teacher.gain.grad is None


@pytest.mark.parametrize(
    ("schedule", "levels"), [(FlowSchedule(), (1.0, 0.6)), (EDMSchedule(), (80.0, 2.0)), (DDPM, (999.0, 400.0))]
)
def test_networks_that_know_the_image_agree(schedule: Any, levels: tuple[float, float]) -> None:
    """A teacher and a student whose x0 is the image lie on one straight path, whatever the schedule."""
    known = GaussianDenoiser(0.7, 0.0, schedule)
    student = FewStepGenerator(known, levels)
    x0, x_t = student.last_step(torch.randn(5, 1, 1, 1, 1, dtype=torch.float64), None, Rollout(levels[:1]))
    segment = Segment(1.0, levels[0], (levels[0] + levels[1]) / 2, levels[1])
    loss = segment_loss(Networks(known, known, student), x0, x_t, None, segment)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-8)
    other = GaussianDenoiser(-0.7, 0.0, schedule)
    assert (segment_loss(Networks(other, known, student), x0, x_t, None, segment) > 1e-3).all()


def test_the_term_is_added_with_its_weight() -> None:
    teacher, student = GaussianDenoiser(0.7, 0.5), FewStepGenerator(GaussianDenoiser(0.1, 0.6), [80.0, 5.0])

    def loss(weight: float) -> tuple[Tensor, Tensor]:
        made = generator_step(
            Networks(teacher, GaussianDenoiser(0.0, 0.4), student),
            None,
            torch.Generator().manual_seed(0),
            batch_size=4,
            gan_weight=0.0,
            rollout=Rollout((80.0, 5.0)),
            segment=Segment(weight, 5.0, 2.0, None),
        )
        return made.loss, made.logs["generator/segment"].value

    (small, term), (large, _) = loss(0.5), loss(2.0)
    torch.testing.assert_close(large - small, 1.5 * term.mean())
    assert term.min() > 0


@pytest.mark.thorough  # by day, its value and its gradient
def test_a_run_lowers_the_term(tiny_teacher: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "teacher": str(tiny_teacher),
        "student.steps": 2,
        "segment.weight": 1.0,
        "batch_size": 16,
        "generator.lr": 2e-3,
        "log": {"samples_every": 0, "tracker": "none", "every": 1},
        "iterations": 16,
    }
    distill("digits", output=tmp_path / "run", **settings)
    losses = [record["generator/segment"] for record in read_records(tmp_path / "run" / "metrics.jsonl")]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "segment.weight: got 0.5, but the student takes one step"),
        ({"method": "sid", "student.steps": 4}, "method=sid does not add this term"),
        ({"student.steps": 4, "diversity.weight": 0.05}, "segment.weight: got 0.5, but with diversity.weight"),
        ({"student.steps": 4, "segment.margin": 0.5}, "segment.margin"),
    ],
)
def test_where_it_does_not_fit_it_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("digits", {"segment.weight": 0.5, **settings})
