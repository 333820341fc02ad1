"""Exponential moving averages of many tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ema(shadows: Sequence[Tensor], values: Sequence[Tensor], decays: Sequence[float]) -> None:
    """shadow = decay shadow + (1 - decay) value, in place, for each decay in turn: shadows holds len(values) float32
    tensors for the first decay, as many for the second, and so on.
    """
    if not values:
        return
    wide = [value.float() for value in values]
    for k, decay in enumerate(decays):
        torch._foreach_lerp_(list(shadows[k * len(values) : (k + 1) * len(values)]), wide, 1 - decay)
