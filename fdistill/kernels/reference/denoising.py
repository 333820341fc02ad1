"""Squared error of an x0-prediction."""

from __future__ import annotations

from torch import Tensor

from fdistill.kernels.checks import given, wide
from fdistill.kernels.layout import as_results, expand


def denoising(
    prediction: Tensor,
    x_t: Tensor | None,
    x0: Tensor,
    skip: Tensor | None,
    out: Tensor | None,
    weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss weight mean(e^2) [B], residual e = skip x_t + out prediction - x0 like the prediction, and scale [B]:
    d loss / d prediction = scale e. If x_t is None, the prediction is an x0-prediction. Statistics are float32.
    """
    dtype = wide(prediction.dtype)
    residual, slope = prediction.to(dtype), weight.to(dtype)
    if x_t is not None:
        skip, out = given(skip, out)
        residual = expand(skip.to(dtype), x_t) * x_t.to(dtype) + expand(out.to(dtype), x_t) * residual
        slope = slope * out.to(dtype)
    residual = residual - x0.to(dtype)
    loss = weight.to(dtype) * residual.square().flatten(1).mean(1)
    residual = as_results(residual, prediction, prediction.dtype)
    return loss, residual, 2 / x0.shape[1:].numel() * slope
