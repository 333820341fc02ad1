"""Discriminator heads on tapped features of the fake-score network or of the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fdistill.base.errors import ArgumentError, did_you_mean
from fdistill.denoiser import Denoiser, Features


def _group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups of at least 16 channels each: on one pixel a smaller group is normalised to almost nothing."""
    most = max(1, min(32, channels // 16))
    groups = next(n for n in range(most, 0, -1) if channels % n == 0)
    return nn.GroupNorm(groups, channels)


def _head(channels: int, height: int, width: int) -> nn.Sequential:
    """[B, C, H, W] -> [B, 1, 1, 1]: halves to 4 pixels or fewer, then one convolution over the rest (DMD2)."""
    layers: list[nn.Module] = []
    while min(height, width) > 4:
        layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), _group_norm(channels), nn.SiLU()]
        height, width = height // 2, width // 2
    layers += [nn.Conv2d(channels, channels, (height, width)), _group_norm(channels), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))


def _pooled_head(channels: int, height: int, width: int) -> nn.Sequential:
    """[B, C, H, W] -> [B, 1, 1, 1]: a convolution that halves both, and the mean of one logit per pixel.

    It has an eighth of the other's parameters where features are 32 x 32. FastGen reads transformers by such a head.
    """
    inner = max(channels // 2, 1)
    return nn.Sequential(
        nn.Conv2d(channels, inner, 4, stride=2, padding=1),
        _group_norm(inner),
        nn.SiLU(),
        nn.Conv2d(inner, 1, 1),
        nn.AdaptiveAvgPool2d(1),
    )


_HEADS = {"convolutional": _head, "pooled": _pooled_head}


class Discriminator(nn.Module):
    """One head for each tapped feature.

    At its optimum a logit is log(p_teacher / p_student) at the noised sample. It does not take the noise level
    or the condition as an input: the features depend on them already.

    Args:
        denoiser: the network whose features are tapped (only its shapes are read; the network is not stored).
        features: names from `denoiser.feature_shapes`, at least one.
        head: "convolutional" convolves until one pixel is left (DMD2); "pooled" has two layers and takes the mean.
    """

    def __init__(self, denoiser: Denoiser, features: Sequence[str], head: str = "convolutional"):
        super().__init__()
        if not features:
            raise ArgumentError(f"features: expected at least one of {', '.join(denoiser.feature_shapes)}")
        for name in features:
            if name not in denoiser.feature_shapes:
                raise ArgumentError(f"features: got {name!r}; {did_you_mean(name, denoiser.feature_shapes)}")
        if head not in _HEADS:
            raise ArgumentError(f"head: got {head!r}; {did_you_mean(head, _HEADS)}")
        self.features = tuple(features)
        self.heads = nn.ModuleDict({name: _HEADS[head](*denoiser.feature_shapes[name]) for name in features})

    def forward(self, features: Mapping[str, Tensor] | Features) -> Tensor:
        """{name: [B, C, H, W]} -> logits [B, H], one column per head."""
        return torch.cat([self.heads[name](features[name]).flatten(1) for name in self.features], dim=1)


class ChannelMean(nn.Module):
    """A discriminator without parameters of its own: its logits are the mean over channels of one tapped feature, one
    logit per pixel (SiDA, arXiv 2410.14919). Its loss trains the tapped network.

    Args:
        denoiser: the network whose feature is tapped; it must be a trained one.
        features: a sequence with one name, that of the feature.
    """

    def __init__(self, denoiser: Denoiser, features: Sequence[str]):
        super().__init__()
        if len(features) != 1 or features[0] not in denoiser.feature_shapes:
            raise ArgumentError(
                f"features: expected one of {', '.join(denoiser.feature_shapes)} for the channel-mean head, "
                f"got {list(features)}"
            )
        self.features = tuple(features)

    def forward(self, features: Mapping[str, Tensor] | Features) -> Tensor:
        """{name: [B, C, H, W]} -> logits [B, H * W]."""
        return features[self.features[0]].mean(1).flatten(1)
