"""Every divergence trains every step of a student of several steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fdistill.divergence import DIVERGENCES
from fdistill.generator import FewStepGenerator
from fdistill.noise import EDMSchedule
from fdistill.ratio import DensityRatio
from fdistill.rollout import Rollout
from fdistill.step import Networks, generator_step
from support.denoisers import GaussianDenoiser
from support.networks import ExactLogRatio

P, Q, SIZE = (0.3, 0.8), (-0.2, 0.6), 3


@pytest.mark.parametrize("levels", [(2.5,), (2.5, 0.5)], ids=["first step", "second step"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_trains_each_step_of_a_student(divergence: str, levels: tuple[float, ...]) -> None:
    """Its gradient on what that step makes is reverse KL's times the weight, which has a mean of about 1."""
    made: list[Tensor] = []
    teacher, fake = GaussianDenoiser(*P, size=SIZE), GaussianDenoiser(*Q, size=SIZE)
    student = FewStepGenerator(GaussianDenoiser(*Q, size=SIZE), (2.5, 0.5))
    student.register_forward_hook(lambda _module, _given, x0: made.append(x0))
    networks = Networks(teacher, fake, student, ExactLogRatio(P, Q, EDMSchedule()), fake)  # type: ignore[arg-type]

    def update(name: str) -> tuple[Tensor, Any, list[Tensor]]:
        options: dict[str, Any] = {"batch_size": 64, "gan_weight": 0.0, "ratio": DensityRatio()}
        random = torch.Generator().manual_seed(3)
        result = generator_step(networks, None, random, divergence=name, rollout=Rollout(levels), **options)
        x0, *own = torch.autograd.grad(result.loss, [made[-1], *student.parameters()])
        return x0, result.logs, own

    gradient, logs, own = update(divergence)
    plain, _, _ = update("reverse-kl")
    weight = logs["generator/weight"].value if "generator/weight" in logs else torch.ones(64)
    torch.testing.assert_close(gradient, weight[:, None, None, None] * plain, rtol=1e-4, atol=1e-9)
    assert (weight.std() > 1e-2) == (divergence != "reverse-kl")
    assert all(each.abs().max() > 0 for each in own)
