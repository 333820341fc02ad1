from __future__ import annotations

import pytest
import torch
from torch import nn

from fdistill.adapters.parametrisation import DirectPrediction
from fdistill.adapters.unet2d import UNet2DDenoiser
from fdistill.base.errors import ArgumentError
from fdistill.discriminator import ChannelMean, Discriminator
from fdistill.losses import gan_discriminator_loss
from fdistill.noise import FlowSchedule
from support.denoisers import tiny_unet


def denoiser(**changes: object) -> UNet2DDenoiser:
    return UNet2DDenoiser(tiny_unet(**changes), DirectPrediction(FlowSchedule(), "flow"))


@pytest.mark.parametrize("kind", ["convolutional", "pooled"])
def test_one_logit_a_head_at_every_size(kind: str) -> None:
    source = denoiser(sample_size=24)
    discriminator = Discriminator(source, ["down0", "mid"], kind)
    features = {name: torch.randn(5, *shape) for name, shape in source.feature_shapes.items()}
    assert source.feature_shapes == {"down0": (8, 24, 24), "down1": (16, 12, 12), "mid": (16, 12, 12)}
    assert discriminator(features).shape == (5, 2)


@pytest.mark.parametrize("kind", ["convolutional", "pooled"])
@pytest.mark.parametrize("channels", [(8, 16), (32, 64), (24, 40)])
def test_heads_learn_to_tell_two_feature_distributions_apart(channels: tuple[int, int], kind: str) -> None:
    """A head whose last group norm had one or two values a group would output a constant, or a sign."""
    torch.manual_seed(0)
    source = denoiser(block_out_channels=channels, norm_num_groups=4)
    head = Discriminator(source, ["mid"], kind)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    shape = source.feature_shapes["mid"]

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(64, *shape), torch.randn(64, *shape) * 1.3 + 0.2

    for _ in range(150):
        real, fake = draw()
        loss = gan_discriminator_loss(head({"mid": real}), real=True) + gan_discriminator_loss(
            head({"mid": fake}), real=False
        )
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    real, fake = draw()
    accuracy = torch.cat([head({"mid": real}) > 0, head({"mid": fake}) < 0]).float().mean()
    assert accuracy > 0.85


def test_group_norms_are_dmd2s_at_its_width() -> None:
    source = denoiser(block_out_channels=(32, 768), norm_num_groups=32)
    norms = [layer for layer in Discriminator(source, ["mid"]).modules() if isinstance(layer, nn.GroupNorm)]
    assert [norm.num_groups for norm in norms] == [32]


def test_a_pooled_head_has_an_eighth_of_the_parameters_where_features_are_large() -> None:
    """32 x 32 features, as those of FLUX.1-dev and of Qwen-Image for images of 512 pixels."""
    source = denoiser(sample_size=32, block_out_channels=(128, 128))
    assert source.feature_shapes["down0"] == (128, 32, 32)
    sizes = {
        kind: sum(parameter.numel() for parameter in Discriminator(source, ["down0"], kind).parameters())
        for kind in ("convolutional", "pooled")
    }
    assert sizes["pooled"] / sizes["convolutional"] == pytest.approx(1 / 8, rel=0.01)


def test_unknown_features_are_refused() -> None:
    with pytest.raises(ArgumentError, match="did you mean 'mid'"):
        Discriminator(denoiser(), ["middle"])
    with pytest.raises(ArgumentError, match="at least one"):
        Discriminator(denoiser(), [])
    with pytest.raises(ArgumentError, match="did you mean 'pooled'"):
        Discriminator(denoiser(), ["mid"], "poled")


def test_channel_mean_is_a_map_of_logits_without_parameters() -> None:
    source = denoiser()
    head = ChannelMean(source, ["mid"])
    feature = torch.randn(5, *source.feature_shapes["mid"])
    logits = head({"mid": feature})
    assert not list(head.parameters())
    assert logits.shape == (5, 16)
    torch.testing.assert_close(logits[2, 6], feature[2, :, 1, 2].mean())
    for features in ([], ["mid", "down0"], ["middle"]):
        with pytest.raises(ArgumentError, match="expected one of down0, down1, mid"):
            ChannelMean(source, features)
