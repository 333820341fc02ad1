"""Roles of a distillation: exact ones of Gaussians, and tiny real ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fdistill.adapters.parametrisation import EDMPreconditioning
from fdistill.adapters.unet2d import UNet2DDenoiser
from fdistill.discriminator import Discriminator
from fdistill.generator import OneStepGenerator
from fdistill.noise import (
    EDMSchedule,
    NoiseSchedule,
)
from fdistill.step import Networks
from support.denoisers import tiny_unet


class LinearGenerator(nn.Module):
    """x0 = a z + b: samples of N(b, a^2), whose noised scores are known."""

    def __init__(self, a: float, b: float, size: int):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))
        self.sample_shape = (1, 1, size)

    def forward(self, noise: Tensor, condition: Tensor | None) -> Tensor:
        return self.a * noise + self.b


class ExactLogRatio(nn.Module):
    """log p_t(x_t) / q_t(x_t) of two Gaussian data distributions, as a discriminator would have learnt it."""

    features = ("x_t",)

    def __init__(self, p: tuple[float, float], q: tuple[float, float], schedule: NoiseSchedule):
        super().__init__()
        self.p, self.q, self.schedule = p, q, schedule

    def log_density(self, x_t: Tensor, t: Tensor, gaussian: tuple[float, float]) -> Tensor:
        mean, std = gaussian
        alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        return torch.distributions.Normal(alpha * mean, (alpha**2 * std**2 + sigma**2).sqrt()).log_prob(x_t).sum(1)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        x_t, t = features["x_t"].flatten(1), features["t"]
        return self.log_density(x_t, t, self.p) - self.log_density(x_t, t, self.q)


def real_networks(source: str, features: tuple[str, ...] = ("mid",)) -> Networks:
    torch.manual_seed(0)
    form = EDMPreconditioning(EDMSchedule(), 0.75, boundary=0.002, time_scale=250.0)
    teacher = UNet2DDenoiser(tiny_unet(), form).requires_grad_(False)
    fake = copy.deepcopy(teacher).requires_grad_(True)
    student = OneStepGenerator(copy.deepcopy(teacher).requires_grad_(True), 2.5)
    for network in (fake, student):  # copies of one network would have no score difference
        for parameter in network.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    return Networks(teacher, fake, student, Discriminator(fake, features), fake if source == "fake" else teacher)
