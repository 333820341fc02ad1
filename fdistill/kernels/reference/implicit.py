"""Inner products of implicit score objectives (SiD, SIM, Uni-Instruct), and their derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

from fdistill.kernels.checks import given, wide
from fdistill.kernels.layout import as_results, expand


def _predictions(
    x_t: Tensor | None,
    teacher: Tensor,
    fake: Tensor,
    teacher_skip: Tensor | None,
    teacher_out: Tensor | None,
    fake_skip: Tensor | None,
    fake_out: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(fake_x0, teacher_x0 - fake_x0)."""
    teacher, fake = teacher.to(dtype), fake.to(dtype)
    if x_t is None:
        return fake, teacher - fake
    teacher_skip, teacher_out, fake_skip, fake_out = given(teacher_skip, teacher_out, fake_skip, fake_out)
    x_t = x_t.to(dtype)
    fake = expand(fake_out.to(dtype), x_t) * fake
    skip = expand(teacher_skip.to(dtype) - fake_skip.to(dtype), x_t)
    difference = skip * x_t + (expand(teacher_out.to(dtype), x_t) * teacher - fake)
    return expand(fake_skip.to(dtype), x_t) * x_t + fake, difference


def implicit(
    x0: Tensor,
    x_t: Tensor | None,
    teacher: Tensor,
    fake: Tensor,
    teacher_skip: Tensor | None,
    teacher_out: Tensor | None,
    fake_skip: Tensor | None,
    fake_out: Tensor | None,
) -> Tensor:
    """Means over a sample, [3, B], at least float32: (T - F)(F - x0), (T - F)^2 and |x0 - T|.

    T = teacher_skip x_t + teacher_out teacher and F = fake_skip x_t + fake_out fake; if x_t is None, the outputs
    are x0-predictions.
    """
    dtype = wide(x0.dtype)
    fake_x0, difference = _predictions(x_t, teacher, fake, teacher_skip, teacher_out, fake_skip, fake_out, dtype)
    error = fake_x0 - x0.to(dtype)
    values = (difference * error, difference.square(), (error + difference).abs())
    return torch.stack([value.flatten(1).mean(1) for value in values])


def implicit_backward(
    upstream: Tensor,
    x0: Tensor,
    x_t: Tensor | None,
    teacher: Tensor,
    fake: Tensor,
    teacher_skip: Tensor | None,
    teacher_out: Tensor | None,
    fake_skip: Tensor | None,
    fake_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x0, x_t, teacher and fake in their dtypes, laid out like x0, from upstream [3, B]; the third result
    has no derivative. The gradient of x_t is empty if x_t is None.
    """
    dtype = wide(x0.dtype)
    fake_x0, difference = _predictions(x_t, teacher, fake, teacher_skip, teacher_out, fake_skip, fake_out, dtype)
    inner, square = (expand(value.to(dtype), x0) / x0.shape[1:].numel() for value in upstream[:2])
    error = fake_x0 - x0.to(dtype)
    teacher_gradient = inner * error + 2 * square * difference
    fake_gradient = inner * difference - teacher_gradient
    gradients = [-inner * difference, x0.new_empty(0), teacher_gradient, fake_gradient]
    if x_t is not None:
        teacher_skip, teacher_out, fake_skip, fake_out = given(teacher_skip, teacher_out, fake_skip, fake_out)
        gradients[1] = (
            expand(teacher_skip.to(dtype), x_t) * teacher_gradient + expand(fake_skip.to(dtype), x_t) * fake_gradient
        )
        gradients[2] = expand(teacher_out.to(dtype), x_t) * teacher_gradient
        gradients[3] = expand(fake_out.to(dtype), x_t) * fake_gradient
    pairs = zip(gradients, (x0, x_t, teacher, fake), strict=True)
    outputs = [gradient if value is None else as_results(gradient, x0, value.dtype) for gradient, value in pairs]
    return outputs[0], outputs[1], outputs[2], outputs[3]
