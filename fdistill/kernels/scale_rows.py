"""Multiplies each sample by a number: the operator that the others' derivatives use; see `kernels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdistill.kernels import implementation
from fdistill.kernels.layout import empty_samples_like


@torch.library.custom_op("fdistill::scale_rows", mutates_args=())
def scale_rows(rows: Tensor, scale: Tensor, upstream: Tensor | None, dtype: torch.dtype, backend: str) -> Tensor:
    """rows scale upstream in `dtype`, as `reference.scale_rows`; differentiable in rows [B, ...] alone."""
    scaled: Tensor = implementation("scale_rows", backend, rows).scale_rows(rows, scale, upstream, dtype)
    return scaled


@scale_rows.register_fake
def _(rows: Tensor, scale: Tensor, upstream: Tensor | None, dtype: torch.dtype, backend: str) -> Tensor:
    return empty_samples_like(rows, dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, scale, upstream, _, ctx.backend = inputs
    ctx.save_for_backward(scale, upstream)
    ctx.dtype = rows.dtype


def _backward(ctx: Any, scaled: Tensor) -> tuple[Tensor | None, ...]:
    return scale_rows(scaled, *ctx.saved_tensors, ctx.dtype, ctx.backend), None, None, None, None


scale_rows.register_autograd(_backward, setup_context=_keep)
