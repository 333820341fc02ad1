"""Memory layouts of sample tensors [B, ...], so that a kernel can walk through two of them in the same order.

Kernels read a sample as one dense run of memory, so results have the batch outermost. Each sample of a result has the
strides of the argument's samples if those are dense in some order of their dimensions, and is contiguous otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _steps(value: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions of a sample whose size is above 1."""
    return [(step, size) for size, step in zip(value.shape[1:], value.stride()[1:], strict=True) if size > 1]


def _dense(value: Tensor) -> bool:
    expected = 1
    for step, size in sorted(_steps(value)):
        if step != expected:
            return False
        expected *= size
    return True


def empty_samples_like(
    value: Tensor, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """An uninitialised tensor laid out for results about `value` [B, ...]; on the device "meta", only the layout."""
    dtype, device = dtype or value.dtype, device or value.device
    if not _dense(value):
        return torch.empty(value.shape, dtype=dtype, device=device)
    return torch.empty_strided(value.shape, (value.shape[1:].numel(), *value.stride()[1:]), dtype=dtype, device=device)


def layout_of(value: Tensor) -> Tensor:
    """The layout of results about `value`, as a tensor without memory."""
    return empty_samples_like(value, device="meta")


def laid_out_like(value: Tensor, like: Tensor) -> Tensor:
    """`value` with its samples laid out as those of `like`, which must be dense; a copy only if they are not."""
    if _steps(value) == _steps(like):
        return value
    copy = torch.empty_strided(like.shape, like.stride(), dtype=value.dtype, device=value.device)
    return copy.copy_(value)


def as_results(value: Tensor, about: Tensor, dtype: torch.dtype) -> Tensor:
    """`value` in `dtype`, with the strides that `empty_samples_like(about)` gives."""
    layout, value = layout_of(about), value.to(dtype)
    if value.stride() == layout.stride():
        return value
    return empty_samples_like(about, dtype, value.device).copy_(value)


def network_input_like(x0: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """An uninitialised tensor for the network's input: with channels last, or laid out like x0."""
    if channels_last:
        return torch.empty(x0.shape, dtype=dtype, device=x0.device, memory_format=torch.channels_last)
    return empty_samples_like(x0, dtype)


def is_channels_last(value: Tensor) -> bool:
    """Whether the samples of a dense tensor [B, C, H, W] hold all channels of a pixel side by side."""
    return value.ndim == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last)


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1] with as many dimensions as `like`."""
    return coefficient.reshape(-1, *[1] * (like.ndim - 1))
