"""Exponential moving averages of a module's parameters: float32 whatever the module's dtype, several decays at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fdistill.errors import ArgumentError
from fdistill.kernels.ema import ema


class EMA:
    """Shadow copies of `module`'s parameters and buffers, one set for each decay; they start as copies.

    Args:
        decays: each in [0, 1); after every `update`, shadow = decay * shadow + (1 - decay) * parameter. Integer
            buffers are copied.
    """

    def __init__(self, module: nn.Module, decays: Sequence[float]):
        for decay in decays:
            if not 0 <= decay < 1:
                raise ArgumentError(f"decays: expected each in [0, 1), got {decay}")
        self.decays = tuple(float(decay) for decay in decays)
        self._module = module
        self.shadows: dict[float, dict[str, Tensor]] = {
            decay: {name: self._shadow(value) for name, value in module.state_dict().items()} for decay in self.decays
        }

    @staticmethod
    def _shadow(value: Tensor) -> Tensor:
        value = value.detach()
        return value.float().clone() if value.is_floating_point() else value.clone()

    @torch.no_grad()
    def update(self) -> None:
        current = {name: value.detach() for name, value in self._module.state_dict().items()}
        floats = [name for name, value in current.items() if value.is_floating_point()]
        ema(
            [shadow[name] for shadow in self.shadows.values() for name in floats],
            [current[name] for name in floats],
            list(self.shadows),
            "auto",
        )
        for shadow in self.shadows.values():
            for name in current.keys() - set(floats):
                shadow[name].copy_(current[name])

    @contextmanager
    def applied(self, decay: float) -> Iterator[None]:
        """The module holds the averaged weights inside the block, and its own again afterwards."""
        own = {name: value.clone() for name, value in self._module.state_dict().items()}
        self._module.load_state_dict(self.shadows[decay])
        try:
            yield
        finally:
            self._module.load_state_dict(own)

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{decay}.{name}": value for decay, shadow in self.shadows.items() for name, value in shadow.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copies a `state_dict` back; its names must be exactly this EMA's."""
        own = self.state_dict()
        if own.keys() != state.keys():
            raise ArgumentError(f"EMA state: names differ, for example {sorted(own.keys() ^ state.keys())[:3]}")
        for name, value in own.items():
            value.copy_(state[name])
