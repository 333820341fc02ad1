"""Layers of the DDPM++, NCSN++ and ADM networks of Karras et al. 2022 (arXiv 2206.00364, appendix F)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdistill.base.errors import ArgumentError
from fdistill.networks.skeleton import Resampling


class PositionalEmbedding(nn.Module):
    """[B] -> [B, C]: cos, then sin, of c times C / 2 frequencies falling geometrically from 1 to 1 / 10000.

    With `endpoint` the last frequency is 1 / 10000 itself (DDPM++); without, the series stops one step before it (ADM).
    """

    def __init__(self, channels: int, endpoint: bool):
        super().__init__()
        self.count = channels // 2
        self.steps = self.count - int(endpoint)

    def forward(self, c: Tensor) -> Tensor:
        dtype = torch.promote_types(c.dtype, torch.float32)
        exponents = torch.arange(self.count, dtype=dtype, device=c.device) / self.steps
        angles = torch.outer(c.to(dtype), (1 / 10000) ** exponents)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """[B] -> [B, C]: cos, then sin, of 2 pi c times C / 2 random frequencies, normal of standard deviation 16."""

    freqs: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(channels // 2))

    def forward(self, c: Tensor) -> Tensor:
        dtype = torch.promote_types(c.dtype, torch.float32)
        angles = torch.outer(c.to(dtype), 2 * math.pi * self.freqs.to(dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


def separable_filter(taps: Sequence[float]) -> Tensor:
    """The outer product of the taps, [1, 1, K, K], scaled to sum 1.

    Raises:
        ArgumentError: the taps are not a symmetric filter of even length; any other would shift the image.
    """
    values = list(taps)
    if not values or len(values) % 2 or values != values[::-1]:
        raise ArgumentError(
            f"resample_filter: got {values}; expected a symmetric filter of even length, such as [1, 1]"
        )
    line = torch.tensor(values, dtype=torch.float32)
    return torch.outer(line, line)[None, None] / line.sum() ** 2


def _depthwise(kernel: Tensor, x: Tensor) -> Tensor:
    return kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)


def halve(x: Tensor, kernel: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, H / 2, W / 2], every channel filtered with kernel [1, 1, K, K]."""
    if kernel.shape[-1] == 2:  # the only symmetric filter of two taps is the box; this is several times as fast
        return F.avg_pool2d(x, 2)
    return F.conv2d(x, _depthwise(kernel, x), stride=2, padding=(kernel.shape[-1] - 1) // 2, groups=x.shape[1])


def double(x: Tensor, kernel: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, C, 2 H, 2 W], zeros are put between the pixels, then filtered with 4 kernel [1, 1, K, K]."""
    if kernel.shape[-1] == 2:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    padding = (kernel.shape[-1] - 1) // 2
    return F.conv_transpose2d(x, 4 * _depthwise(kernel, x), stride=2, padding=padding, groups=x.shape[1])


_RESAMPLE = {"down": halve, "up": double}


class Resample(nn.Module):
    """Resampling without weights; the filter is part of the checkpoint."""

    resample_filter: Tensor

    def __init__(self, resampling: Resampling, taps: Sequence[float]):
        super().__init__()
        self.resampling = resampling
        self.register_buffer("resample_filter", separable_filter(taps))

    def forward(self, x: Tensor) -> Tensor:
        return _RESAMPLE[self.resampling](x, self.resample_filter)


class FilteredConv(nn.Module):
    """A convolution and a resampling filter. It is not an nn.Conv2d, because low-rank adapters wrap those, and would
    see another resolution than the convolution inside.
    """

    resample_filter: Tensor

    def __init__(self, in_channels: int, out_channels: int, size: int, taps: Sequence[float]):
        super().__init__()
        initial = nn.Conv2d(in_channels, out_channels, size)
        self.weight, self.bias = initial.weight, initial.bias
        self.register_buffer("resample_filter", separable_filter(taps))

    def convolve(self, x: Tensor, padding: int) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=padding)


class ResampledConv(FilteredConv):
    """Resampling, then a convolution that keeps the size."""

    def __init__(self, in_channels: int, out_channels: int, size: int, resampling: Resampling, taps: Sequence[float]):
        super().__init__(in_channels, out_channels, size, taps)
        self.resampling = resampling

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(_RESAMPLE[self.resampling](x, self.resample_filter), self.weight.shape[-1] // 2)


class FusedDownConv(FilteredConv):
    """A convolution and the halving filter in one padding: at the border the filter sees the convolution's values
    beyond the image instead of zeros (the residual encoder of NCSN++).
    """

    def forward(self, x: Tensor) -> Tensor:
        wider = self.convolve(x, self.weight.shape[-1] // 2 + (self.resample_filter.shape[-1] - 1) // 2)
        return F.conv2d(wider, _depthwise(self.resample_filter, wider), stride=2, groups=wider.shape[1])


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """At most 32 groups, of at least 4 channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


@dataclass(frozen=True)
class BlockStyle:
    """The settings that all blocks of a network share.

    Attributes:
        emb_channels: channels of the embedding.
        head_channels: channels of an attention head; None for a single head.
        skip_scale: factor of the sum with the shortcut.
        eps: eps of the group norms.
        resample_filter: taps of the filter, such as [1, 1].
        project_resampled: whether a resampling shortcut has a 1x1 convolution even where the channels stay.
        adaptive_scale: True: the embedding scales and shifts the normalised activations; False: it is added before the
            normalisation.
    """

    emb_channels: int
    head_channels: int | None
    dropout: float
    skip_scale: float
    eps: float
    resample_filter: tuple[float, ...]
    project_resampled: bool
    adaptive_scale: bool


class UNetBlock(nn.Module):
    """The residual block, with resampling in its first convolution and self-attention at its end, both optional."""

    def __init__(
        self, in_channels: int, out_channels: int, resampling: Resampling | None, attention: bool, style: BlockStyle
    ):
        super().__init__()
        self.style = style
        self.dropout = nn.Dropout(style.dropout)
        self.norm0 = group_norm(in_channels, style.eps)
        self.conv0 = _convolution(in_channels, out_channels, 3, resampling, style)
        self.affine = nn.Linear(style.emb_channels, out_channels * (2 if style.adaptive_scale else 1))
        self.norm1 = group_norm(out_channels, style.eps)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip: nn.Module | None = None
        if in_channels != out_channels or (resampling is not None and style.project_resampled):
            self.skip = _convolution(in_channels, out_channels, 1, resampling, style)
        elif resampling is not None:
            self.skip = Resample(resampling, style.resample_filter)
        self.heads = 0
        if attention:
            self.heads = 1 if style.head_channels is None else out_channels // style.head_channels
            if style.head_channels is not None and out_channels % style.head_channels:
                raise ArgumentError(
                    f"attention at {out_channels} channels: expected a multiple of {style.head_channels}, the channels "
                    "of a head; change model_channels, channel_mult or attn_resolutions"
                )
            self.norm2 = group_norm(out_channels, style.eps)
            self.qkv = nn.Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        style = self.style
        hidden = self.conv0(F.silu(self.norm0(x)))
        modulation = self.affine(embedding)[:, :, None, None]
        if style.adaptive_scale:
            scale, shift = modulation.chunk(2, dim=1)
            hidden = torch.addcmul(shift, self.norm1(hidden), scale + 1)
        else:
            hidden = self.norm1(hidden + modulation)
        hidden = self.conv1(self.dropout(F.silu(hidden)))
        x = (hidden + (x if self.skip is None else self.skip(x))) * style.skip_scale
        if self.heads:
            x = (self.proj(self._attention(x)) + x) * style.skip_scale
        return x

    def _attention(self, x: Tensor) -> Tensor:
        # A head's channels hold (q, k, v) side by side for every one of its dimensions.
        qkv = self.qkv(self.norm2(x)).reshape(len(x), self.heads, x.shape[1] // self.heads, 3, -1)
        # Fused attention wants the dimensions of a head side by side; otherwise torch multiplies whole matrices.
        q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous().unbind()
        return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(x.shape)


def _convolution(
    in_channels: int, out_channels: int, size: int, resampling: Resampling | None, style: BlockStyle
) -> nn.Module:
    if resampling is None:
        return nn.Conv2d(in_channels, out_channels, size, padding=size // 2)
    return ResampledConv(in_channels, out_channels, size, resampling, style.resample_filter)
