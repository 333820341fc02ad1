"""ADM (Dhariwal & Nichol 2021, arXiv 2105.05233) in the settings of Karras et al. 2022 (arXiv 2206.00364)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdistill.networks.edm_layers import BlockStyle, PositionalEmbedding, UNetBlock, group_norm
from fdistill.networks.skeleton import Levels, Resampling, UNet, build_decoder, build_encoder


class DhariwalUNet(UNet):
    """The ADM network; the defaults are those of ImageNet 64x64, without its 1000 classes.

    Args:
        label_dim: number of classes; 0 for an unconditional network.
        augment_dim: number of augmentation labels, or 0.

    Raises:
        ArgumentError: the channels of an attention layer are not a multiple of 64.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
    ):
        channels = tuple(model_channels * factor for factor in channel_mult)
        super().__init__(Levels(img_resolution, channels, num_blocks, tuple(attn_resolutions)))
        emb_channels = model_channels * channel_mult_emb
        style = BlockStyle(
            emb_channels=emb_channels,
            head_channels=64,
            dropout=dropout,
            skip_scale=1.0,
            eps=1e-5,
            resample_filter=(1, 1),
            project_resampled=False,
            adaptive_scale=True,
        )

        self.map_noise = PositionalEmbedding(model_channels, endpoint=False)
        self.map_augment = nn.Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(model_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        self.map_label = nn.Linear(label_dim, emb_channels, bias=False) if label_dim else None

        def block(inputs: int, outputs: int, resampling: Resampling | None, attention: bool) -> nn.Module:
            return UNetBlock(inputs, outputs, resampling, attention, style)

        stem = nn.Conv2d(img_channels, model_channels, 3, padding=1)
        self.enc, skips = build_encoder(self.levels, stem, model_channels, block)
        self.dec = build_decoder(self.levels, skips, block, lambda size, index: size in attn_resolutions)
        self.out_norm = group_norm(channels[0], 1e-5)
        self.out_conv = nn.Conv2d(channels[0], img_channels, 3, padding=1)
        self._initialise()

    def _initialise(self) -> None:
        # torch's own uniform initialisation, but blocks start as their shortcuts, and the network's output starts at 0.
        for name, module in self.named_modules():
            if name.rpartition(".")[2] in ("conv1", "proj", "out_conv", "map_augment"):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)

    def embed(
        self, c_noise: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        embedding: Tensor = self.map_noise(c_noise).to(dtype)
        if self.map_augment is not None and augment_labels is not None:
            embedding = embedding + self.map_augment(augment_labels.to(dtype))
        embedding = self.map_layer1(F.silu(self.map_layer0(embedding)))
        if self.map_label is not None and class_labels is not None:
            embedding = embedding + self.map_label(class_labels.to(dtype))
        return F.silu(embedding)

    def join(self, hidden: Tensor, skip: Tensor) -> Tensor:
        return torch.cat([hidden, skip], dim=1)

    def head(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.out_conv(F.silu(self.out_norm(hidden)))
        return output
