"""Exponential moving averages of many tensors: the operator behind `ema.EMA`; see `kernels`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdistill.kernels import implementation


@torch.library.custom_op("fdistill::ema", mutates_args=("shadows",))
def ema(shadows: Sequence[Tensor], values: Sequence[Tensor], decays: Sequence[float], backend: str) -> None:
    """shadow = decay shadow + (1 - decay) value, in place, as `reference.ema`."""
    if values:
        implementation("ema", backend, shadows[0]).ema(shadows, values, decays)


@ema.register_fake
def _(shadows: Sequence[Tensor], values: Sequence[Tensor], decays: Sequence[float], backend: str) -> None:
    return None
