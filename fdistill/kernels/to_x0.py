"""A network's output as an x0-prediction: the operator behind `prediction.Prediction.x0`; see `kernels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdistill.kernels import implementation
from fdistill.kernels.checks import wide
from fdistill.kernels.layout import empty_samples_like
from fdistill.kernels.scale_rows import scale_rows


@torch.library.custom_op("fdistill::to_x0", mutates_args=())
def to_x0(output: Tensor, x_t: Tensor, skip: Tensor, out: Tensor, backend: str) -> Tensor:
    """skip x_t + out output, as `reference.to_x0`; differentiable in output and x_t, and so is its derivative."""
    x0: Tensor = implementation("to_x0", backend, x_t).to_x0(output, x_t, skip, out)
    return x0


@to_x0.register_fake
def _(output: Tensor, x_t: Tensor, skip: Tensor, out: Tensor, backend: str) -> Tensor:
    return empty_samples_like(output, wide(torch.promote_types(output.dtype, x_t.dtype)))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    raw, x_t, skip, out, ctx.backend = inputs
    ctx.save_for_backward(skip, out)
    ctx.dtypes = raw.dtype, x_t.dtype


def _backward(ctx: Any, x0: Tensor) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = [None, None]
    skip, out = ctx.saved_tensors
    for k, scale in enumerate((out, skip)):
        if ctx.needs_input_grad[k]:
            gradients[k] = scale_rows(x0, scale, None, ctx.dtypes[k], ctx.backend)
    return *gradients, None, None, None


to_x0.register_autograd(_backward, setup_context=_keep)
