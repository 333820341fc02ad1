"""The structure that the U-Nets of Karras et al. share: where each block is, and the order in which they run.

A forward pass is `embed`, `encode`, `middle`, `decode`, so that features can be read in between, and parts
that nobody needs can be left out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Resampling = Literal["down", "up"]

#: (input channels, output channels, resampling, with attention) -> a block called with (x, embedding).
BlockMaker = Callable[[int, int, Resampling | None, bool], nn.Module]


@dataclass(frozen=True)
class Levels:
    """The resolutions of a U-Net, finest first: channels[i] at resolution >> i."""

    resolution: int
    channels: tuple[int, ...]
    num_blocks: int
    attention: tuple[int, ...]

    def resolutions(self) -> list[int]:
        return [self.resolution >> i for i in range(len(self.channels))]

    def feature_shapes(self) -> dict[str, tuple[int, int, int]]:
        """(C, H, W) of "enc<resolution>", the last encoder block of each resolution, and of "mid"."""
        sizes = list(zip(self.resolutions(), self.channels, strict=True))
        shapes = {f"enc{size}": (channels, size, size) for size, channels in sizes}
        lowest, channels = sizes[-1]
        return shapes | {"mid": (channels, lowest, lowest)}


def build_encoder(
    levels: Levels,
    stem: nn.Module,
    stem_channels: int,
    block: BlockMaker,
    shortcut: Callable[[int], nn.Module] | None = None,
) -> tuple[nn.ModuleDict, list[int]]:
    """The encoder's modules under their published names, and the channels of the skip connections they leave.

    Args:
        stem: the first convolution, with `stem_channels` outputs.
        shortcut: level -> the module that brings the image to it past the blocks; None if the encoder has no such path.
    """
    enc = nn.ModuleDict()
    width, skips = stem_channels, [stem_channels]
    for level, (size, channels) in enumerate(zip(levels.resolutions(), levels.channels, strict=True)):
        name = f"{size}x{size}"
        if level == 0:
            enc[f"{name}_conv"] = stem
        else:
            enc[f"{name}_down"] = block(width, width, "down", False)
            skips.append(width)
            if shortcut is not None:
                enc[f"{name}_aux_residual"] = shortcut(level)
        for index in range(levels.num_blocks):
            enc[f"{name}_block{index}"] = block(width, channels, None, size in levels.attention)
            width = channels
            skips.append(width)
    return enc, skips


def build_decoder(
    levels: Levels, skips: Sequence[int], block: BlockMaker, attention: Callable[[int, int], bool]
) -> nn.ModuleDict:
    """The decoder's modules under their published names, without the output layers.

    Args:
        skips: channels of the skip connections, from `build_encoder`.
        attention: (resolution, index of the block in its level) -> whether it has attention.
    """
    dec = nn.ModuleDict()
    remaining = list(skips)
    width = levels.channels[-1]
    for level in reversed(range(len(levels.channels))):
        size, channels = levels.resolution >> level, levels.channels[level]
        name = f"{size}x{size}"
        if level == len(levels.channels) - 1:
            dec[f"{name}_in0"] = block(width, width, None, True)
            dec[f"{name}_in1"] = block(width, width, None, False)
        else:
            dec[f"{name}_up"] = block(width, width, "up", False)
        for index in range(levels.num_blocks + 1):
            dec[f"{name}_block{index}"] = block(width + remaining.pop(), channels, None, attention(size, index))
            width = channels
    return dec


class UNet(nn.Module, ABC):
    """A U-Net of an encoder `enc` and a decoder `dec`, from `build_encoder` and `build_decoder`.

    Attributes:
        levels: the resolutions.
        feature_shapes: (C, H, W) of the features that `encode` and `middle` can return, from input to output.
    """

    enc: nn.ModuleDict
    dec: nn.ModuleDict
    # diffusers' enable_gradient_checkpointing sets both on every module that has the first
    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(self, levels: Levels):
        super().__init__()
        self.levels = levels
        self.feature_shapes = levels.feature_shapes()
        last = levels.num_blocks - 1
        self._feature_of = {f"{size}x{size}_block{last}": f"enc{size}" for size in levels.resolutions()}

    @abstractmethod
    def embed(
        self, c_noise: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """The embedding that every block takes. c_noise [B], class_labels [B, label_dim], augment_labels
        [B, augment_dim] -> [B, E] in `dtype`; None means zeros.
        """

    @abstractmethod
    def join(self, hidden: Tensor, skip: Tensor) -> Tensor:
        """The decoder's activation and the encoder's of the same resolution, concatenated."""

    @abstractmethod
    def head(self, hidden: Tensor) -> Tensor:
        """The output layers."""

    def encode(
        self, x: Tensor, embedding: Tensor, features: Sequence[str]
    ) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
        """x [B, C, H, W] -> the activation at the lowest resolution, the activations for the skip connections, and
        the named features of the encoder.
        """
        hidden, image = x, x
        skips: list[Tensor] = []
        tapped: dict[str, Tensor] = {}
        for name, module in self.enc.items():
            if name.endswith("_aux_residual"):
                hidden = image = (hidden + module(image)) / math.sqrt(2)
                skips[-1] = hidden
                continue
            hidden = module(hidden) if name.endswith("_conv") else self._run(module, hidden, embedding)
            skips.append(hidden)
            feature = self._feature_of.get(name)
            if feature in features:
                tapped[str(feature)] = hidden
        return hidden, skips, tapped

    def middle(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        """The two blocks at the lowest resolution that take no skip connection; their output is the feature "mid"."""
        for name, module in self.dec.items():
            if "_in" in name:
                hidden = self._run(module, hidden, embedding)
        return hidden

    def decode(self, hidden: Tensor, skips: Sequence[Tensor], embedding: Tensor) -> Tensor:
        """From `middle` and the skip connections of `encode` to the output [B, C, H, W]."""
        remaining = list(skips)
        for name, module in self.dec.items():
            if "_block" in name:
                hidden = self._run(module, self.join(hidden, remaining.pop()), embedding)
            elif name.endswith("_up"):
                hidden = self._run(module, hidden, embedding)
        return self.head(hidden)

    def _run(self, block: nn.Module, hidden: Tensor, embedding: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, hidden, embedding)
        output: Tensor = block(hidden, embedding)
        return output

    def forward(
        self, x: Tensor, c_noise: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """x [B, C, H, W] -> [B, C, H, W]; other arguments are as in `embed`."""
        embedding = self.embed(c_noise, class_labels, augment_labels, x.dtype)
        hidden, skips, _ = self.encode(x, embedding, ())
        return self.decode(self.middle(hidden, embedding), skips, embedding)
