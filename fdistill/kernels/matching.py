"""Score difference with its per-sample normaliser: the operator behind `losses.matching_loss`; see `kernels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdistill.kernels import implementation
from fdistill.kernels.checks import check_rows, wide
from fdistill.kernels.layout import empty_samples_like
from fdistill.kernels.outputs import NetworkOutput, check_predictions, coefficients, guided_output
from fdistill.kernels.scale_rows import scale_rows


@torch.library.custom_op("fdistill::matching", mutates_args=())
def _matching(
    x0: Tensor,
    x_t: Tensor | None,
    teacher: Tensor,
    unconditional: Tensor | None,
    fake: Tensor,
    teacher_skip: Tensor | None,
    teacher_out: Tensor | None,
    fake_skip: Tensor | None,
    fake_out: Tensor | None,
    weight: Tensor,
    floor: float | None,
    guidance_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [B], direction like x0 and scale [B], as `reference.matching`; the loss has a gradient in x0 alone."""
    results: tuple[Tensor, Tensor, Tensor] = implementation("matching", backend, x0).matching(
        x0,
        x_t,
        teacher,
        unconditional,
        fake,
        teacher_skip,
        teacher_out,
        fake_skip,
        fake_out,
        weight,
        floor,
        guidance_scale,
    )
    return results


@_matching.register_fake
def _(x0: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, scale = (x0.new_empty(x0.shape[:1], dtype=wide(x0.dtype)) for _ in range(2))
    return loss, empty_samples_like(x0), scale


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)  # direction and scale have no gradient
    ctx.backend = inputs[-1]


def _backward(ctx: Any, loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if loss is None:
        return None, *[None] * 12
    direction, scale = ctx.saved_tensors
    return scale_rows(direction, scale, loss, direction.dtype, ctx.backend), *[None] * 12


_matching.register_autograd(_backward, setup_context=_keep)


def matching(
    x0: Tensor,
    teacher_x0: NetworkOutput,
    fake_x0: NetworkOutput,
    weight: Tensor,
    *,
    floor: float | None,
    x_t: Tensor | None,
    backend: str,
) -> Tensor:
    """Loss [B] whose gradient in x0 is weight (F - T) / numel, over the normaliser max(mean|x0 - T|, floor) unless
    floor is None; T and F are the x0-predictions of teacher and fake score. `reference.matching` writes it out.
    """
    x_t = check_predictions(x0, x_t, teacher_x0=teacher_x0, fake_x0=fake_x0)
    check_rows("weight", weight, x0)
    loss: Tensor
    loss, _, _ = _matching(
        x0,
        x_t,
        teacher_x0.output,
        teacher_x0.unconditional,
        guided_output(fake_x0),
        *coefficients(teacher_x0, x_t),
        *coefficients(fake_x0, x_t),
        weight,
        floor,
        teacher_x0.guidance_scale,
        backend,
    )
    return loss
