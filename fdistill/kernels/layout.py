"""Memory layouts of sample tensors [B, ...], so that two of them can be walked together."""

from __future__ import annotations

import torch
from torch import Tensor


def _within_a_sample(value: Tensor) -> list[tuple[int, int]]:
    return [(size, step) for size, step in zip(value.shape[1:], value.stride()[1:], strict=True) if size > 1]


def laid_out_like(value: Tensor, like: Tensor) -> Tensor:
    """`value` with its samples laid out as those of `like`, which must be dense; a copy only if they are not."""
    if _within_a_sample(value) == _within_a_sample(like):
        return value
    return torch.empty_like(like, dtype=value.dtype).copy_(value)


def network_input_like(x0: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """An empty tensor for the network's input: with channels last, or laid out like x0."""
    form = torch.channels_last if channels_last else torch.preserve_format
    return torch.empty_like(x0, dtype=dtype, memory_format=form)


def is_channels_last(value: Tensor) -> bool:
    """Whether the samples of a dense tensor [B, C, H, W] hold all channels of a pixel side by side."""
    return value.ndim == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last)
