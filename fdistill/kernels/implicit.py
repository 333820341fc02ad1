"""Inner products of implicit score objectives: the operator behind `losses.implicit_means`; see `kernels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdistill.kernels import implementation
from fdistill.kernels.checks import wide
from fdistill.kernels.layout import empty_samples_like
from fdistill.kernels.outputs import NetworkOutput, check_predictions, coefficients, guided_output


@torch.library.custom_op("fdistill::implicit", mutates_args=())
def _implicit(
    x0: Tensor,
    x_t: Tensor | None,
    teacher: Tensor,
    fake: Tensor,
    teacher_skip: Tensor | None,
    teacher_out: Tensor | None,
    fake_skip: Tensor | None,
    fake_out: Tensor | None,
    backend: str,
) -> Tensor:
    """The means [3, B] of `reference.implicit`; the first two are differentiable in x0, x_t, teacher and fake."""
    means: Tensor = implementation("implicit", backend, x0).implicit(
        x0, x_t, teacher, fake, teacher_skip, teacher_out, fake_skip, fake_out
    )
    return means


@_implicit.register_fake
def _(x0: Tensor, *rest: Any) -> Tensor:
    return x0.new_empty((3, len(x0)), dtype=wide(x0.dtype))


@torch.library.custom_op("fdistill::implicit_backward", mutates_args=())
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x0, x_t (empty if x_t is None), teacher and fake, as `reference.implicit_backward`."""
    gradients: tuple[Tensor, Tensor, Tensor, Tensor] = implementation("implicit", backend, x0).implicit_backward(
        upstream, x0, x_t, teacher, fake, teacher_skip, teacher_out, fake_skip, fake_out
    )
    return gradients


@implicit_backward.register_fake
def _(
    upstream: Tensor, x0: Tensor, x_t: Tensor | None, teacher: Tensor, fake: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_t_gradient = x0.new_empty(0) if x_t is None else empty_samples_like(x0, x_t.dtype)
    return (
        empty_samples_like(x0),
        x_t_gradient,
        empty_samples_like(x0, teacher.dtype),
        empty_samples_like(x0, fake.dtype),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    x0, x_t, teacher, fake = implicit_backward(upstream, *ctx.saved_tensors, ctx.backend)
    return x0, None if ctx.saved_tensors[1] is None else x_t, teacher, fake, *[None] * 5


_implicit.register_autograd(_backward, setup_context=_keep)


def implicit(
    x0: Tensor, teacher_x0: NetworkOutput, fake_x0: NetworkOutput, *, x_t: Tensor | None, backend: str
) -> Tensor:
    """Means over a sample, [3, B]: (T - F)(F - x0), (T - F)^2 and |x0 - T|, T and F being the x0-predictions of teacher
    and fake score; the first two are differentiable in everything.
    """
    x_t = check_predictions(x0, x_t, teacher_x0=teacher_x0, fake_x0=fake_x0)
    means: Tensor = _implicit(
        x0,
        x_t,
        guided_output(teacher_x0),
        guided_output(fake_x0),
        *coefficients(teacher_x0, x_t),
        *coefficients(fake_x0, x_t),
        backend,
    )
    return means
