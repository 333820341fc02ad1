"""The forward of diffusers' UNets in three parts: embedding, encoder with middle, decoder.

The parts call the blocks of a `UNet2DModel` or `UNet2DConditionModel` in the order of the model's own forward. So
features can be read without hooks, the decoder can be left out, and TiUE can run one encoder and many decoders. Tests
check that the output equals that of the model's forward, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from fdistill.base.errors import ArgumentError
from fdistill.condition import Condition, TextCondition
from fdistill.denoiser import Features
from fdistill.kernels.layout import expand


class Encoded(NamedTuple):
    """The outputs of the encoder and the middle block of a UNet.

    Attributes:
        hidden: the middle block's output [B, D, h, w].
        residuals: the skip connections, in the encoder's order.
        features: the requested features, by name.
    """

    hidden: Tensor
    residuals: tuple[Tensor, ...]
    features: Features


def embed(
    network: nn.Module, timestep: Tensor, condition: Condition | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The inputs of all blocks: the embedding [B, D] of timesteps and condition, and the text [B, L, E] of prompts.

    Args:
        network: a `UNet2DModel` or `UNet2DConditionModel`.
        timestep: [B].
        condition: labels [B], a `TextCondition` of B prompts, or None.
        dtype: dtype of the network's input.

    Raises:
        ArgumentError: the network needs labels, but there are none.
    """
    unet: Any = network
    if isinstance(condition, TextCondition):
        own = next(unet.parameters()).dtype
        given = {
            name: value.to(own) if value.is_floating_point() else value for name, value in condition.tensors.items()
        }
        text = given.pop("prompt_embeds")
        embedding = unet.time_embedding(unet.time_proj(timestep).to(dtype))
        added = unet.get_aug_embed(embedding, text, given)
        embedding = embedding if added is None else embedding + added
        if unet.time_embed_act is not None:
            embedding = unet.time_embed_act(embedding)
        return embedding, unet.process_encoder_hidden_states(text, given)
    embedding = unet.time_embedding(unet.time_proj(timestep).to(unet.dtype))
    if unet.class_embedding is not None:
        if condition is None:
            raise ArgumentError(
                f"condition: this network wants class labels [B] in [0, {unet.config.num_class_embeds})"
            )
        labels = unet.time_proj(condition) if unet.config.class_embed_type == "timestep" else condition
        embedding = embedding + unet.class_embedding(labels).to(unet.dtype)
    return embedding, None


def encode(
    network: nn.Module, sample: Tensor, embedding: Tensor, text: Tensor | None, features: Sequence[str] = ()
) -> Encoded:
    """Runs the first convolution, all down blocks and the middle block on a sample [B, C, H, W].

    Args:
        network: a `UNet2DModel` or `UNet2DConditionModel`.
        sample: the network's input.
        embedding: [B, D], from `embed`.
        text: [B, L, E], from `embed`; None for a network that takes no prompts.
        features: names to return: "down0", "down1", ... are the outputs of the last layer of each resolution, before
            downsampling; "mid" is the middle block's output.
    """
    unet: Any = network
    if unet.config.center_input_sample:
        sample = 2 * sample - 1
    tapped: Features = {}
    skip, hidden = sample, unet.conv_in(sample)
    residuals: tuple[Tensor, ...] = (hidden,)
    for i, block in enumerate(unet.down_blocks):
        if hasattr(block, "skip_conv"):
            hidden, block_residuals, skip = block(hidden_states=hidden, temb=embedding, skip_sample=skip)
        else:
            hidden, block_residuals = block(hidden, embedding, **_attended(block, text))
        residuals += block_residuals
        if f"down{i}" in features:
            tapped[f"down{i}"] = block_residuals[len(block.resnets) - 1]
    if unet.mid_block is not None:
        hidden = unet.mid_block(hidden, embedding, **_attended(unet.mid_block, text))
        if "mid" in features:
            tapped["mid"] = hidden
    return Encoded(hidden, residuals, tapped)


def decode(network: nn.Module, encoded: Encoded, embedding: Tensor, text: Tensor | None, timestep: Tensor) -> Tensor:
    """Runs all up blocks and the output layers; returns the network's output [B, C, H, W]."""
    unet: Any = network
    hidden, residuals = encoded.hidden, encoded.residuals
    skip: Tensor | None = None
    for block in unet.up_blocks:
        count = len(block.resnets)
        residuals, block_residuals = residuals[:-count], residuals[-count:]
        if hasattr(block, "skip_conv"):
            hidden, skip = block(hidden, block_residuals, embedding, skip)
        elif text is None:
            hidden = block(hidden, block_residuals, embedding)
        else:
            # The size of the next block's skip connections is not always twice this block's.
            size = residuals[-1].shape[2:] if residuals else None
            hidden = block(hidden, block_residuals, embedding, upsample_size=size, **_attended(block, text))
    if unet.conv_norm_out is not None:
        hidden = unet.conv_act(unet.conv_norm_out(hidden))
    output: Tensor = unet.conv_out(hidden)
    if skip is not None:
        output = output + skip
    if isinstance(unet, UNet2DModel) and unet.config.time_embedding_type == "fourier":
        output = output / expand(timestep, output)
    return output


def _attended(block: nn.Module, text: Tensor | None) -> dict[str, Tensor | None]:
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
