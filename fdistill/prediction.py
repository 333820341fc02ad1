"""A network's output and its conversion to x0. Only this module and `adapters/` distinguish eps, v and flow."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fdistill.base.errors import ArgumentError, did_you_mean
from fdistill.kernels.checks import wide
from fdistill.kernels.outputs import guided_output
from fdistill.kernels.to_x0 import to_x0

__all__ = ["Preconditioning", "Prediction", "PredictionKind"]


class Preconditioning(NamedTuple):
    """How a network is wrapped at levels t: its input is input_scale x_t, and x0 = skip x_t + out output. All fields
    are [B]; None means that the input is x_t itself, or the output is x0.
    """

    input_scale: Tensor | None = None
    skip: Tensor | None = None
    out: Tensor | None = None


class Prediction(NamedTuple):
    """A network's output [B, ...] in its own precision, and what turns it into x0 = skip x_t + out output; skip and
    out are [B], or None where the output is x0.

    `unconditional` is the output [B, ...] without a condition. If it is given, the prediction is that of
    unconditional + guidance_scale (output - unconditional): classifier-free guidance (arXiv 2207.12598).
    """

    output: Tensor
    skip: Tensor | None = None
    out: Tensor | None = None
    unconditional: Tensor | None = None
    guidance_scale: float = 1.0

    def guided(self) -> Prediction:
        """The same prediction with guidance applied, as a single output."""
        if self.unconditional is None:
            return self
        return Prediction(guided_output(self), self.skip, self.out)

    def x0(self, x_t: Tensor) -> Tensor:
        """The x0-prediction, at least float32."""
        output = self.guided().output
        if self.skip is None or self.out is None:
            return output.to(wide(output.dtype))
        x0: Tensor = to_x0(output, x_t, self.skip, self.out, "auto")
        return x0


def as_prediction(x0: Tensor | Prediction) -> Prediction:
    """Wraps an x0-prediction [B, ...] in a `Prediction`; returns a `Prediction` unchanged."""
    return x0 if isinstance(x0, Prediction) else Prediction(x0)


PredictionKind = Literal["x0", "eps", "v", "flow"]


def x0_coefficients(alpha: Tensor, sigma: Tensor, kind: PredictionKind) -> tuple[Tensor, Tensor]:
    """(skip, out) [B] with x0 = skip x_t + out prediction, for a network's prediction at x_t = alpha x0 + sigma eps.

    Kinds: "x0"; "eps" (the noise; not defined where alpha = 0); "v" = alpha eps - sigma x0 (Salimans & Ho 2022, arXiv
    2202.00512); "flow" = eps - x0 (the velocity dx/dt of rectified flow).
    """
    if kind == "x0":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if kind == "eps":
        return 1 / alpha, -sigma / alpha
    if kind == "v":
        square = alpha**2 + sigma**2
        return alpha / square, -sigma / square
    if kind == "flow":
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    raise ArgumentError(f"kind: got {kind!r}; {did_you_mean(str(kind), ('x0', 'eps', 'v', 'flow'))}")
