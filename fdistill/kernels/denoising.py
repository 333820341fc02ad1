"""Squared error of an x0-prediction: the operator behind `losses.denoising_loss`; see `kernels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdistill.kernels import implementation
from fdistill.kernels.checks import wide
from fdistill.kernels.layout import empty_samples_like
from fdistill.kernels.scale_rows import scale_rows


@torch.library.custom_op("fdistill::denoising", mutates_args=())
def denoising(
    prediction: Tensor,
    x_t: Tensor | None,
    x0: Tensor,
    skip: Tensor | None,
    out: Tensor | None,
    weight: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [B], residual like the prediction and scale [B], as `reference.denoising`; the loss has a gradient in the
    prediction alone.
    """
    results: tuple[Tensor, Tensor, Tensor] = implementation("denoising", backend, prediction).denoising(
        prediction, x_t, x0, skip, out, weight
    )
    return results


@denoising.register_fake
def _(prediction: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, scale = (prediction.new_empty(prediction.shape[:1], dtype=wide(prediction.dtype)) for _ in range(2))
    return loss, empty_samples_like(prediction), scale


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)  # of direction and scale: nothing flows back through them
    ctx.backend = inputs[-1]


def _backward(ctx: Any, loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if loss is None:
        return None, *[None] * 6
    direction, scale = ctx.saved_tensors
    return scale_rows(direction, scale, loss, direction.dtype, ctx.backend), *[None] * 6


denoising.register_autograd(_backward, setup_context=_keep)
