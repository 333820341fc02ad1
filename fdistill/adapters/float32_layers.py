"""A last layer that computes in float32 in networks whose other layers compute in bf16.

x0 = (x_t - sigma eps) / alpha multiplies the rounding of a predicted eps by sigma / alpha (docs/rounding.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fdistill.adapters.parametrisation import DirectPrediction, Parametrisation
from fdistill.base.devices import without_autocast


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


class Float32Conv2d(nn.Conv2d):
    """A convolution that computes in float32 at least, whatever autocast and the precision of its weights say."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            bias = None if self.bias is None else _wide(self.bias)
            result: Tensor = self._conv_forward(_wide(x), _wide(self.weight), bias)
            return result


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 at least, whatever autocast and the precision of its weights say."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            return F.linear(_wide(x), _wide(self.weight), None if self.bias is None else _wide(self.bias))


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: Float32Conv2d, nn.Linear: Float32Linear}


def amplified_output_in_float32(network: nn.Module, last: str, parametrisation: Parametrisation) -> None:
    """Lets the last layer of a network that predicts eps compute in float32, in place; other networks stay as they are.

    The layer keeps its parameters and their names, so that the network is saved, copied and adapted as before.

    Args:
        network: a network of diffusers.
        last: name of its last layer, an nn.Conv2d or nn.Linear.
        parametrisation: says what the network predicts.
    """
    layer: Any = getattr(network, last)
    if isinstance(parametrisation, DirectPrediction) and parametrisation.prediction == "eps":
        layer.__class__ = _CLASSES.get(type(layer), type(layer))
