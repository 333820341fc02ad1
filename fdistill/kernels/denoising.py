"""Squared error of an x0-prediction: the operator behind `losses.denoising_loss`; see `kernels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdistill.kernels import implementation
from fdistill.kernels.checks import check_rows, wide
from fdistill.kernels.layout import empty_samples_like
from fdistill.kernels.outputs import NetworkOutput, check_predictions, coefficients, guided_output
from fdistill.kernels.scale_rows import scale_rows


@torch.library.custom_op("fdistill::denoising", mutates_args=())
def _denoising(
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


@_denoising.register_fake
def _(prediction: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, scale = (prediction.new_empty(prediction.shape[:1], dtype=wide(prediction.dtype)) for _ in range(2))
    return loss, empty_samples_like(prediction), scale


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)  # direction and scale have no gradient
    ctx.backend = inputs[-1]


def _backward(ctx: Any, loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if loss is None:
        return None, *[None] * 6
    direction, scale = ctx.saved_tensors
    return scale_rows(direction, scale, loss, direction.dtype, ctx.backend), *[None] * 6


_denoising.register_autograd(_backward, setup_context=_keep)


def denoising(prediction: NetworkOutput, x0: Tensor, weight: Tensor, *, x_t: Tensor | None, backend: str) -> Tensor:
    """weight mean((prediction - x0)^2), [B], with a gradient in the network's output alone."""
    x_t = check_predictions(x0, x_t, prediction=prediction)
    check_rows("weight", weight, x0)
    loss: Tensor
    loss, _, _ = _denoising(guided_output(prediction), x_t, x0, *coefficients(prediction, x_t), weight, backend)
    return loss
