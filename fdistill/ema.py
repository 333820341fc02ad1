"""Moving averages of a module's weights, in float32 whatever the module's dtype. Several can be kept at once, each with
a constant decay or with a power function of `ema_profiles`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fdistill.base.distributed import part
from fdistill.base.errors import ArgumentError
from fdistill.ema_profiles import decay_at, gamma_from_sigma_rel, profile_name
from fdistill.kernels.ema import ema

#: A decay, or the name of a power-function average, such as "sigma_rel=0.1".
Average = float | str


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict without frozen parameters, which another network may share. For a network with adapters, buffers
    are left out too.
    """
    named = module.named_parameters(remove_duplicate=False)
    trained = {name: parameter.requires_grad for name, parameter in named}
    adapters = any(".lora_" in name for name in trained)
    return {name: value for name, value in module.state_dict().items() if trained.get(name, not adapters)}


class EMA:
    """Shadow copies of `module`'s trainable parameters and buffers, one set for each average.

    Args:
        decays: each in [0, 1); after every `update`, shadow = decay * shadow + (1 - decay) * parameter. Integer
            buffers are copied.
        sigma_rel: relative widths of power-function averages (see `ema_profiles`). Their decay grows from update to
            update; the first update copies the parameters.

    Attributes:
        shadows: {average: {name: tensor}}, where an average is a decay or `profile_name(sigma_rel)`.
        updates: the number of updates so far.
    """

    def __init__(self, module: nn.Module, decays: Sequence[float], sigma_rel: Sequence[float] = ()):
        for decay in decays:
            if not 0 <= decay < 1:
                raise ArgumentError(f"decays: expected each in [0, 1), got {decay}")
        self.decays = tuple(float(decay) for decay in decays)
        self.updates = 0
        self._gammas: dict[Average, float] = {profile_name(width): gamma_from_sigma_rel(width) for width in sigma_rel}
        self._module = module
        self.shadows: dict[Average, dict[str, Tensor]] = {
            average: {name: self._shadow(value) for name, value in trained_state(module).items()}
            for average in (*self.decays, *self._gammas)
        }

    @staticmethod
    def _shadow(value: Tensor) -> Tensor:
        value = value.detach()
        return value.float().clone() if value.is_floating_point() else value.clone()

    @torch.no_grad()
    def update(self, decays: Sequence[float] | None = None) -> None:
        """Takes the module's weights into the averages; `decays` are this update's, in the order of the averages."""
        self.updates += 1
        rates = dict(zip(self.decays, self.decays if decays is None else decays, strict=True))
        current = {name: value.detach() for name, value in trained_state(self._module).items()}
        floats = [name for name, value in current.items() if value.is_floating_point()]
        ema(
            [part(shadow[name]) for shadow in self.shadows.values() for name in floats],
            [part(current[name]) for name in floats],
            [self._decay(average, rates) for average in self.shadows],
            "auto",
        )
        for shadow in self.shadows.values():
            for name in current.keys() - set(floats):
                shadow[name].copy_(current[name])

    def _decay(self, average: Average, rates: Mapping[float, float]) -> float:
        return decay_at(self._gammas[average], self.updates) if isinstance(average, str) else rates[average]

    @contextmanager
    def applied(self, average: Average) -> Iterator[None]:
        """The module holds the averaged weights inside the block, and its own again afterwards."""
        own = {name: value.clone() for name, value in trained_state(self._module).items()}
        self._module.load_state_dict(self.shadows[average], strict=False)
        try:
            yield
        finally:
            self._module.load_state_dict(own, strict=False)

    def state_dict(self) -> dict[str, Tensor]:
        """The shadows and, if there are power-function averages, the number of updates."""
        shadows = self.shadows.items()
        state = {f"{average}.{name}": value for average, shadow in shadows for name, value in shadow.items()}
        return state | ({"updates": torch.tensor(self.updates)} if self._gammas else {})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copies a `state_dict` back; its names must be exactly this EMA's."""
        own = self.state_dict()
        if own.keys() != state.keys():
            raise ArgumentError(f"EMA state: names differ, for example {sorted(own.keys() ^ state.keys())[:3]}")
        for name, value in own.items():
            value.copy_(state[name])
        if self._gammas:
            self.updates = int(own["updates"])
