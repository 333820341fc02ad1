"""Refusals at the boundary of the operators: shapes, dtypes and devices, never values, which a GPU would wait for."""

from __future__ import annotations

import torch
from torch import Tensor

from fdistill.base.errors import ArgumentError


def check_samples(name: str, value: Tensor, like: Tensor | None = None) -> None:
    """`value` must be a float tensor [B, ...]; of the shape and on the device of `like`, where that is given."""
    if like is None:
        if not value.is_floating_point() or value.ndim < 2:
            raise ArgumentError(f"{name}: expected a float tensor [B, ...], got {value.dtype} {tuple(value.shape)}")
    elif value.shape != like.shape or value.device != like.device or not value.is_floating_point():
        raise ArgumentError(
            f"{name}: expected a float tensor {tuple(like.shape)} on {like.device}, "
            f"got {value.dtype} {tuple(value.shape)} on {value.device}"
        )
    elif (value.dtype == torch.float64) != (like.dtype == torch.float64):
        raise ArgumentError(f"{name}: float64 goes with float64 alone; got {value.dtype} beside {like.dtype}")


def check_rows(name: str, value: Tensor, like: Tensor) -> None:
    """`value` must be a float tensor [B], one number for each sample of `like`, on its device."""
    if value.shape != like.shape[:1] or value.device != like.device or not value.is_floating_point():
        raise ArgumentError(
            f"{name}: expected a float tensor ({len(like)},) on {like.device}, "
            f"got {value.dtype} {tuple(value.shape)} on {value.device}"
        )


def check_positive(name: str, value: Tensor) -> None:
    """What divides must not be 0. Looked at on the CPU alone: a GPU would have to be waited for, and what a training
    run divides by is checked once, when it is built.
    """
    looked_at = type(value) is Tensor and value.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked_at and not bool((value > 0).all()):
        raise ArgumentError(f"{name}: it divides, so expected values above 0, got {value.min().item():g}")


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums and weights are computed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def given(*values: Tensor | None) -> list[Tensor]:
    """Arguments that come together, once it is known that they came."""
    return [value for value in values if value is not None]


def widened(r: Tensor) -> Tensor:
    """r in float64, in which no weight overflows, where the device has it."""
    return r if r.device.type == "mps" else r.double()
