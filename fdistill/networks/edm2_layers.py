"""Layers that keep the magnitude of activations (Karras et al. 2023, arXiv 2312.02696, appendix B)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def unit_rms(x: Tensor, dims: Sequence[int], eps: float = 1e-4) -> Tensor:
    """x / (eps + its root mean square over `dims`), in x's dtype; the mean is computed in at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(x, dim=tuple(dims), keepdim=True, dtype=wide)
    count = math.prod(x.shape[dim] for dim in dims)
    return x / (eps + norm / math.sqrt(count)).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU that keeps the magnitude of normal inputs (eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b, scaled to keep the magnitude of uncorrelated inputs (eq. 88)."""
    length = math.hypot(1 - t, t)
    return torch.add(a * ((1 - t) / length), b, alpha=t / length)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Concatenated channels; b contributes the fraction t, whatever the numbers of channels (eq. 103)."""
    scale = math.sqrt((a.shape[1] + b.shape[1]) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(a.shape[1])), b * (scale * t / math.sqrt(b.shape[1]))], dim=1)


class MPFourier(nn.Module):
    """[B] -> [B, C]: sqrt(2) cos of random frequencies and phases (eq. 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, c: Tensor) -> Tensor:
        wide = torch.promote_types(c.dtype, torch.float32)
        angles = torch.outer(c.to(wide), self.freqs.to(wide)) + self.phases.to(wide)
        return angles.cos() * math.sqrt(2)


class MPConv(nn.Module):
    """A size x size convolution, or a matrix (size None), without bias, whose effective rows have unit length (eq. 47).

    The stored weight's scale has no effect on the result; `normalize_weight_` sets it to what training needs.
    """

    def __init__(self, in_channels: int, out_channels: int, size: int | None = None):
        super().__init__()
        kernel = () if size is None else (size, size)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        wide = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        rows = unit_rms(wide, range(1, wide.ndim)) * (gain / math.sqrt(wide[0].numel()))
        rows = rows.to(x.dtype)
        if rows.ndim == 2:
            return F.linear(x, rows)
        return F.conv2d(x, rows, padding=rows.shape[-1] // 2)

    @torch.no_grad()
    def normalize_weight_(self) -> None:
        self.weight.copy_(unit_rms(self.weight, range(1, self.weight.ndim)))
