"""A plain convolutional network that predicts eps, as a family of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from fdistill.adapters.family import Family
from fdistill.adapters.parametrisation import Parametrisation, parametrisation_from_scheduler
from fdistill.adapters.taps import run_tapped
from fdistill.condition import Condition
from fdistill.denoiser import Denoiser, Features
from fdistill.prediction import Preconditioning


class ConvNet(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """x_t [B, C, H, W] and timesteps [B] in [0, 1000) -> eps [B, C, H, W]."""

    @register_to_config
    def __init__(self, channels: int = 1, size: int = 8, width: int = 32):
        super().__init__()
        self.first = nn.Conv2d(channels + 1, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x_t: Tensor, timestep: Tensor) -> Tensor:
        level = (timestep / 1000).to(x_t.dtype).reshape(-1, 1, 1, 1).expand(-1, 1, *x_t.shape[2:])
        hidden = torch.relu(self.first(torch.cat([x_t, level], dim=1)))
        eps: Tensor = self.last(torch.relu(self.middle(hidden)))
        return eps


class ConvDenoiser(Denoiser):
    """A ConvNet and what the scheduler beside it says. Features: "middle"."""

    def __init__(self, network: ConvNet, parametrisation: Parametrisation):
        super().__init__()
        config: Any = network.config
        self.network, self.parametrisation = network, parametrisation
        self.schedule, self.sigma_data = parametrisation.schedule, parametrisation.sigma_data
        self.sample_shape, self.num_classes = (config.channels, config.size, config.size), None
        self.feature_shapes = {"middle": (config.width, config.size, config.size)}

    def with_network(self, network: ConvNet) -> ConvDenoiser:
        """The same reading of another network of this class, for smaller students."""
        return ConvDenoiser(network, self.parametrisation)

    def preconditioning(self, t: Tensor) -> Preconditioning:
        return self.parametrisation.preconditioning(t)

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
        timestep = self.parametrisation.timestep(t)
        return run_tapped(
            lambda: self.network(network_input, timestep),
            {"middle": self.network.middle},
            lambda name, result: result,
            features,
            output=output,
            output_grad=output_grad,
        )


def wrap(network: ConvNet, scheduler: Mapping[str, Any] | None) -> ConvDenoiser:
    """The denoiser of a network and the config of the scheduler beside it; CheckpointError if they do not fit."""
    return ConvDenoiser(network, parametrisation_from_scheduler(scheduler))


FAMILY = Family(ConvNet, wrap)
