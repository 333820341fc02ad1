"""DDPM++ and NCSN++ (Song et al. 2020, arXiv 2011.13456) in the settings of Karras et al. 2022 (arXiv 2206.00364)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdistill.base.errors import ArgumentError, did_you_mean
from fdistill.networks.edm_layers import (
    BlockStyle,
    FilteredConv,
    FourierEmbedding,
    FusedDownConv,
    PositionalEmbedding,
    UNetBlock,
    group_norm,
)
from fdistill.networks.skeleton import Levels, Resampling, UNet, build_decoder, build_encoder


class SongUNet(UNet):
    """DDPM++ (the defaults) or NCSN++ (fourier, residual, [1, 3, 3, 1], channel_mult_noise 2).

    Args:
        label_dim: number of classes; 0 for an unconditional network.
        augment_dim: number of augmentation labels, or 0.
        embedding_type: "positional" or "fourier".
        encoder_type: "standard" or "residual".
        resample_filter: taps of the resampling filter.

    Raises:
        ArgumentError: embedding_type or encoder_type is unknown, or the filter is not symmetric and of even length.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ):
        _check_choice("embedding_type", embedding_type, ("positional", "fourier"))
        _check_choice("encoder_type", encoder_type, ("standard", "residual"))
        channels = tuple(model_channels * factor for factor in channel_mult)
        super().__init__(Levels(img_resolution, channels, num_blocks, tuple(attn_resolutions)))
        noise_channels, emb_channels = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        taps = tuple(resample_filter)
        style = BlockStyle(
            emb_channels=emb_channels,
            head_channels=None,
            dropout=dropout,
            skip_scale=math.sqrt(0.5),
            eps=1e-6,
            resample_filter=taps,
            project_resampled=True,
            adaptive_scale=False,
        )

        self.map_noise = (
            PositionalEmbedding(noise_channels, endpoint=True)
            if embedding_type == "positional"
            else FourierEmbedding(noise_channels)
        )
        self.map_label = nn.Linear(label_dim, noise_channels) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(noise_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)

        def block(inputs: int, outputs: int, resampling: Resampling | None, attention: bool) -> nn.Module:
            return UNetBlock(inputs, outputs, resampling, attention, style)

        def shortcut(level: int) -> nn.Module:
            return FusedDownConv((img_channels, *channels)[level - 1], channels[level - 1], 3, taps)

        stem = nn.Conv2d(img_channels, model_channels, 3, padding=1)
        self.enc, skips = build_encoder(
            self.levels, stem, model_channels, block, shortcut if encoder_type == "residual" else None
        )
        self.dec = build_decoder(
            self.levels, skips, block, lambda size, index: index == num_blocks and size in attn_resolutions
        )
        self._last = f"{img_resolution}x{img_resolution}"
        self.dec[f"{self._last}_aux_norm"] = group_norm(channels[0], 1e-6)
        self.dec[f"{self._last}_aux_conv"] = nn.Conv2d(channels[0], img_channels, 3, padding=1)
        self._initialise()

    def _initialise(self) -> None:
        # Each block starts as its shortcut, and the network's output starts near 0.
        gains = {"conv1": 1e-5, "proj": 1e-5, f"{self._last}_aux_conv": 1e-5, "qkv": math.sqrt(0.2)}
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear | FilteredConv):
                nn.init.xavier_uniform_(module.weight, gains.get(name.rpartition(".")[2], 1.0))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(
        self, c_noise: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        cos, sin = self.map_noise(c_noise).chunk(2, dim=1)
        embedding: Tensor = torch.cat([sin, cos], dim=1).to(dtype)  # the order of the original networks
        if self.map_label is not None:
            rows = embedding.new_zeros(len(embedding), self.map_label.in_features)
            rows = rows if class_labels is None else class_labels.to(dtype)
            embedding = embedding + self.map_label(rows * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            embedding = embedding + self.map_augment(augment_labels.to(dtype))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))

    def join(self, hidden: Tensor, skip: Tensor) -> Tensor:
        return torch.cat([hidden, skip], dim=1)

    def head(self, hidden: Tensor) -> Tensor:
        normalised = self.dec[f"{self._last}_aux_norm"](hidden)
        output: Tensor = self.dec[f"{self._last}_aux_conv"](F.silu(normalised))
        return output


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ArgumentError(f"{name}: got {value!r}; {did_you_mean(value, choices)}")
