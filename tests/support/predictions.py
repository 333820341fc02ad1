"""Predictions of every kind as x0, and back: written out, to compare with."""

from __future__ import annotations

from torch import Tensor

from fdistill.base.errors import ArgumentError, did_you_mean
from fdistill.kernels.layout import expand
from fdistill.prediction import PredictionKind, x0_coefficients


def to_x0(prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, kind: PredictionKind) -> Tensor:
    """A network's prediction [B, ...] at x_t [B, ...], turned into an x0-prediction; see `x0_coefficients`."""
    skip, out = x0_coefficients(alpha, sigma, kind)
    return expand(skip, x_t) * x_t + expand(out, x_t) * prediction


def from_x0(x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, kind: PredictionKind) -> Tensor:
    """The inverse of `to_x0`; not defined where sigma = 0, except for kind "x0"."""
    alpha, sigma = expand(alpha, x_t), expand(sigma, x_t)
    if kind == "x0":
        return x0
    if kind == "eps":
        return (x_t - alpha * x0) / sigma
    if kind == "v":
        return (alpha * x_t - (alpha**2 + sigma**2) * x0) / sigma
    if kind == "flow":
        return (x_t - (alpha + sigma) * x0) / sigma
    raise ArgumentError(f"kind: got {kind!r}; {did_you_mean(str(kind), ('x0', 'eps', 'v', 'flow'))}")
