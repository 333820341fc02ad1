"""Score-difference gradient with its per-sample normaliser."""

from __future__ import annotations

import torch
from torch import Tensor


def matching(x0: Tensor, teacher_x0: Tensor, fake_x0: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Per-sample loss [B] and its gradient with respect to x0 [B, ...], both float32 (float64 for float64 inputs).

    With n = numel of one sample, g = weight (fake_x0 - teacher_x0) / (mean|x0 - teacher_x0| + eps): the gradient is g
    / n, and the loss is mean(g^2) / 2, the value of the pseudo-target regression mean((x0 - sg(x0 - g))^2) / 2 whose
    gradient that is.
    """
    dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
    x0, teacher_x0, fake_x0 = (value.to(dtype).flatten(1) for value in (x0, teacher_x0, fake_x0))
    scale = weight.to(dtype) / ((x0 - teacher_x0).abs().mean(1) + eps)
    g = scale[:, None] * (fake_x0 - teacher_x0)
    return g.square().mean(1) / 2, g / x0.shape[1]
