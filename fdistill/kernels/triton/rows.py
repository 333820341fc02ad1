"""What the kernels over samples share: each sample is one dense row, walked in chunks of a block's work."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fdistill.kernels.layout import laid_out_like

#: Elements in flight of one block: 8 for each of 256 threads, two 16-byte loads of float32.
BLOCK, WARPS = 2048, 8
#: Elements one block works through. A sample of no more, such as 4x64x64, is finished by its block alone.
CHUNK = 16384


class Plan(NamedTuple):
    """How a sample of `size` elements is split: `splits` blocks of `chunk` elements."""

    size: int
    chunk: int
    splits: int


def plan(value: Tensor) -> Plan:
    """Of the samples of `value` [B, ...]; at most 1,024 splits, so that one block can add up their sums."""
    size = value.shape[1:].numel()
    whole = max(BLOCK, triton.next_power_of_2(size))
    chunk = max(min(CHUNK, whole), triton.next_power_of_2(triton.cdiv(size, 1024)))
    return Plan(size, chunk, triton.cdiv(size, chunk))


def rows(like: Tensor, *values: Tensor | None) -> list[Tensor]:
    """The tensors laid out as `like`; the first of them in the place of one that is None, which will not be read."""
    return [laid_out_like(values[0] if value is None else value, like) for value in values]  # type: ignore[arg-type]


def vectors(like: Tensor, *values: Tensor | None) -> list[Tensor]:
    """Contiguous [B] coefficients; `like` in the place of one that is None."""
    return [like if value is None else value.contiguous() for value in values]


def on_device(value: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(value.device) if value.is_cuda else nullcontext()
