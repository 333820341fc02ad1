"""Argument checks of the operators: shapes, dtypes, devices. Values are not read, since that would wait for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fdistill.base.errors import ArgumentError


def check_samples(name: str, value: Tensor, like: Tensor | None = None) -> None:
    """`value` must be a float tensor [B, ...]; with the shape and on the device of `like`, if that is given."""
    if like is None:
        if not value.is_floating_point() or value.ndim < 2:
            raise ArgumentError(f"{name}: expected a float tensor [B, ...], got {value.dtype} {tuple(value.shape)}")
    elif value.shape != like.shape or value.device != like.device or not value.is_floating_point():
        raise ArgumentError(
            f"{name}: expected a float tensor {tuple(like.shape)} on {like.device}, "
            f"got {value.dtype} {tuple(value.shape)} on {value.device}"
        )
    elif (value.dtype == torch.float64) != (like.dtype == torch.float64):
        raise ArgumentError(f"{name}: float64 cannot be mixed with other dtypes; got {value.dtype} beside {like.dtype}")


def check_rows(name: str, value: Tensor, like: Tensor) -> None:
    """`value` must be a float tensor [B], one number for each sample of `like`, on its device."""
    if value.shape != like.shape[:1] or value.device != like.device or not value.is_floating_point():
        raise ArgumentError(
            f"{name}: expected a float tensor ({len(like)},) on {like.device}, "
            f"got {value.dtype} {tuple(value.shape)} on {value.device}"
        )


def check_positive(name: str, value: Tensor) -> None:
    """A divisor must be above 0. It is checked only on the CPU: on a GPU the check would wait for the device, and a
    training run checks its divisors once, when it is built.
    """
    looked_at = type(value) is Tensor and value.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked_at and not bool((value > 0).all()):
        raise ArgumentError(f"{name}: it is a divisor, so expected values above 0, got {value.min().item():g}")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums and weights are computed: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def given(*values: Tensor | None) -> list[Tensor]:
    """Optional arguments that are known to be given, typed as tensors."""
    return [value for value in values if value is not None]


def widened(r: Tensor) -> Tensor:
    """r in float64, in which no weight overflows; unchanged on MPS, which has no float64."""
    return r if r.device.type == "mps" else r.double()
