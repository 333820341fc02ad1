"""A UNet in parts: embedding, encoder and decoder one after another are the model's own forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fdistill.adapters.unet_blocks import decode, embed, encode
from fdistill.condition import TextCondition
from support.denoisers import tiny_unet
from support.families import randomised
from support.text_families import tiny_condition_unet
from support.unets import ARCHITECTURES, CONDITION_ARCHITECTURES


@pytest.mark.parametrize("name", CONDITION_ARCHITECTURES)
def test_encoder_and_decoder_at_one_level_are_the_text_networks_forward(name: str) -> None:
    unet = tiny_condition_unet(**CONDITION_ARCHITECTURES[name])
    size = unet.config.sample_size
    sample, t = torch.randn(3, 4, size, size), torch.tensor([999.0, 500.0, 0.0])
    width = 12 if name == "projected-text" else unet.config.cross_attention_dim
    text = {"prompt_embeds": torch.randn(3, 5, width)}
    added = {"text_embeds": torch.randn(3, 24), "time_ids": torch.rand(3, 6)} if name == "sdxl" else {}
    expected = unet(sample, t, text["prompt_embeds"], added_cond_kwargs=added).sample
    embedding, attended = embed(unet, t, TextCondition(text | added), sample.dtype)
    encoded = encode(unet, sample, embedding, attended)
    assert torch.equal(decode(unet, encoded, embedding, attended, t), expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_encoder_and_decoder_at_one_level_are_the_label_networks_forward(name: str) -> None:
    torch.manual_seed(0)
    unet = randomised(tiny_unet(**ARCHITECTURES[name]))
    sample, t = torch.randn(3, unet.config.in_channels, 8, 8), torch.tensor([990.0, 500.0, 1.0])
    labels = torch.tensor([0, 3, 9]) if unet.config.num_class_embeds else None
    expected = unet(sample, t, labels).sample
    embedding, text = embed(unet, t, labels, sample.dtype)
    assert torch.equal(decode(unet, encode(unet, sample, embedding, text), embedding, text, t), expected)


def test_a_feature_is_the_last_layer_of_its_resolution() -> None:
    """What the block's downsampler is given; of the last resolution, which has none, what the middle is given."""
    torch.manual_seed(0)
    unet = randomised(tiny_unet(layers_per_block=2, num_class_embeds=None))
    given: list[Tensor] = []
    for module in (unet.down_blocks[0].downsamplers[0], unet.mid_block):
        module.register_forward_pre_hook(lambda _module, inputs: given.append(inputs[0]))
    sample, t = torch.randn(2, 1, 8, 8), torch.tensor([500.0, 1.0])
    unet(sample, t)
    expected = dict(zip(("down0", "down1"), given, strict=True))
    embedding, _ = embed(unet, t, None, sample.dtype)
    features = encode(unet, sample, embedding, None, ("down0", "down1", "mid")).features
    assert features.keys() == {"down0", "down1", "mid"}
    assert all(torch.equal(features[name], value) for name, value in expected.items())
    assert encode(unet, sample, embedding, None).features == {}
