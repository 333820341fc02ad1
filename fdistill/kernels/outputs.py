"""The fields of a network's prediction that operators read, and the checks that predictions match."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fdistill.base.errors import ArgumentError
from fdistill.kernels.checks import check_rows, check_samples


class NetworkOutput(Protocol):
    """The fields of `fdistill.prediction.Prediction`, which says what they mean."""

    @property
    def output(self) -> Tensor:
        """[B, ...]."""

    @property
    def skip(self) -> Tensor | None:
        """[B], or None for an output that is x0."""

    @property
    def out(self) -> Tensor | None:
        """[B], or None for an output that is x0."""

    @property
    def unconditional(self) -> Tensor | None:
        """[B, ...], or None without guidance."""

    @property
    def guidance_scale(self) -> float:
        """1 without guidance."""


def guided_output(prediction: NetworkOutput) -> Tensor:
    """unconditional + guidance_scale (output - unconditional); the output itself without guidance."""
    if prediction.unconditional is None:
        return prediction.output
    return torch.lerp(prediction.unconditional, prediction.output, prediction.guidance_scale)


def check_predictions(x0: Tensor, x_t: Tensor | None, **predictions: NetworkOutput) -> Tensor | None:
    """Checks that samples x0 [B, ...], noised samples and predictions match.

    Returns:
        x_t, or None if all predictions are x0-predictions, which do not need it.

    Raises:
        ArgumentError: shapes, devices or dtypes do not match; the message names the argument.
    """
    check_samples("x0", x0)
    for name, prediction in predictions.items():
        check_samples(name, prediction.output, x0)
        if (prediction.skip is None) != (prediction.out is None):
            raise ArgumentError(f"{name}: expected a Prediction with both skip and out, or neither; got one of them")
        for part, coefficient in (("skip", prediction.skip), ("out", prediction.out)):
            if coefficient is not None:
                check_rows(f"{name}.{part}", coefficient, x0)
        if prediction.unconditional is not None:
            check_samples(f"{name}.unconditional", prediction.unconditional, x0)
        elif prediction.guidance_scale != 1:
            raise ArgumentError(
                f"{name}.unconditional: guidance_scale {prediction.guidance_scale:g} needs the network's output "
                "without a condition, got None"
            )
    if all(prediction.skip is None for prediction in predictions.values()):
        return None
    if x_t is None:
        raise ArgumentError("x_t: expected the noised samples, since the predictions are outputs of networks, got None")
    check_samples("x_t", x_t, x0)
    return x_t


def coefficients(prediction: NetworkOutput, x_t: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(skip, out) [B] with x0 = skip x_t + out output; 0 and 1 for an x0-prediction beside raw outputs of networks,
    and None, None if no prediction needs x_t.
    """
    if x_t is None or prediction.skip is not None:
        return prediction.skip, prediction.out
    batch, device = len(prediction.output), prediction.output.device
    return torch.zeros(batch, device=device), torch.ones(batch, device=device)
