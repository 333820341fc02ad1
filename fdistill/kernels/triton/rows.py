"""Helpers of the kernels over samples. Each sample is one dense row, and one block works through one chunk of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fdistill.kernels.layout import laid_out_like

#: Elements in flight of one block: 8 for each of 256 threads, two 16-byte loads of float32.
BLOCK, WARPS = 2048, 8
#: Elements that one block works through. One block finishes a sample of up to this size, such as 4x64x64.
CHUNK = 16384


class Plan(NamedTuple):
    """How a sample of `size` elements is split: `splits` blocks of `chunk` elements."""

    size: int
    chunk: int
    splits: int


def plan(value: Tensor) -> Plan:
    """How to split the samples of `value` [B, ...]: at most 1,024 splits, so that one block can add up their sums."""
    size = value.shape[1:].numel()
    whole = max(BLOCK, triton.next_power_of_2(size))
    chunk = max(min(CHUNK, whole), triton.next_power_of_2(triton.cdiv(size, 1024)))
    return Plan(size, chunk, triton.cdiv(size, chunk))


def rows(like: Tensor, *values: Tensor | None) -> list[Tensor]:
    """The tensors, laid out as `like`. The first of them replaces None, and the kernel does not read it there."""
    return [laid_out_like(values[0] if value is None else value, like) for value in values]  # type: ignore[arg-type]


def vectors(like: Tensor, *values: Tensor | None) -> list[Tensor]:
    """Contiguous [B] coefficients; `like` replaces None."""
    return [like if value is None else value.contiguous() for value in values]


def on_device(value: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device current, because Triton launches on the current device."""
    return torch.cuda.device(value.device) if value.is_cuda else nullcontext()
