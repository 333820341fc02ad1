"""Optimisers, and one step of a role: gradients clipped, and applied if they are finite."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fdistill.base.distributed import part
from fdistill.config.schema import DistillConfig
from fdistill.config.sections import OptimizerConfig
from fdistill.denoiser import Denoiser
from fdistill.step import ROLES, Networks
from fdistill.training import adamw_8bit
from fdistill.training.sharding import average_scalars, total_norm


class Role:
    """A trained module with its AdamW optimiser. Call `settle` before the first `step`.

    Attributes:
        parameters: those that are trained.
        weights: norms of the trained parameters before and after the last step, [2].
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer):
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._denoisers = [part for part in module.modules() if isinstance(part, Denoiser)]
        self._optimizer: Any = optimizer
        self._grad_clip = float("inf")
        self._norm = self._weight_norm()
        self.weights = torch.stack([self._norm, self._norm])

    def settle(self, section: OptimizerConfig, rate: float) -> None:
        """Takes the settings of a section, and the learning rate, for the steps that follow."""
        self._grad_clip = section.grad_clip
        settings = {"lr": rate, "eps": section.eps, "weight_decay": section.weight_decay}
        for group in self._optimizer.param_groups:
            group.update(settings, betas=(section.beta1, section.beta2))

    def step(self) -> Tensor:
        """Applies the gradients that `backward` left, and clears them; returns their norm before clipping, 0-d.

        If that is NaN or infinite, the same on every process, neither weights nor the optimiser's state change.
        """
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        average_scalars(gradients)
        norm = total_norm(gradients)
        torch._foreach_mul_([part(gradient) for gradient in gradients], (self._grad_clip / (norm + 1e-6)).clamp(max=1))
        if adamw_8bit.is_8bit(self._optimizer):
            adamw_8bit.step(self._optimizer, [parameter.grad for parameter in self.parameters], norm.isfinite())
        else:
            self._optimizer.found_inf = (~norm.isfinite()).float()  # read on the device, as torch's GradScaler has it
            self._optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None
        for denoiser in self._denoisers:
            denoiser.after_update()
        before, self._norm = self._norm, self._weight_norm()
        self.weights = torch.stack([before, self._norm])
        return norm

    @torch.no_grad()
    def _weight_norm(self) -> Tensor:
        return total_norm(self.parameters).float()


def make_optimizers(config: DistillConfig, networks: Networks, roles: Set[str]) -> dict[str, Optimizer]:
    """An AdamW optimiser for each of the roles that has trainable parameters.

    Raises:
        ConfigError: a role's moments shall be stored in 8 bits, and bitsandbytes is not installed.
    """
    found: dict[str, Optimizer] = {}
    for role in (role for role in ROLES if role in roles):
        module, section = getattr(networks, role), getattr(config, role)
        trained = [] if module is None else [p for p in module.parameters() if p.requires_grad]
        if trained:
            settings = {
                "lr": section.lr,
                "betas": (section.beta1, section.beta2),
                "eps": section.eps,
                "weight_decay": section.weight_decay,
            }
            if section.optimizer == "adamw-8bit":
                found[role] = adamw_8bit.make(trained, f"{role}.optimizer", **settings)
            else:
                found[role] = torch.optim.AdamW(trained, **settings, fused=True)
    return found
