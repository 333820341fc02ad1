"""Tensor names of Stable Diffusion 1, 2 and XL UNets in latent-diffusion (LDM), which ComfyUI reads."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from fdistill.adapters.original_names import Layout, Place, look_up, make_layout
from fdistill.base.errors import CheckpointError

_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_LAYER = re.compile(
    r"(down_blocks|mid_block|up_blocks)\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)


def unet_layout(names: Collection[str], config: Mapping[str, Any]) -> Layout:
    """The layout of a UNet2DConditionModel.

    LDM numbers the layers of all resolutions consecutively: input block 0 is the first convolution; then every
    resolution has `layers_per_block` layers and a downsampler. In the output blocks every resolution has one layer
    more, and the upsampler is part of its last layer.

    Raises:
        CheckpointError: a tensor has no name in LDM, or resolutions have different numbers of layers.
    """
    layers = config.get("layers_per_block")
    if not isinstance(layers, int):
        raise CheckpointError(f"UNet: expected one number as layers_per_block, got {layers!r}")
    matches = [match for match in map(_LAYER.fullmatch, names) if match]
    attending = {match[2] for match in matches if match[1] == "up_blocks" and match[3] == "attentions"}

    def place(name: str) -> Place | None:
        match = _LAYER.fullmatch(name)
        if match is None:
            return look_up(name, _TOP)
        side, block, kind, number, rest = match.groups()
        index = int(number)
        if kind == "resnets":
            found = look_up(rest, _RESNET)
            if found is None:
                return None
            rest = found[0]
        branch = 0 if kind == "resnets" else 1
        if side == "mid_block":
            return f"middle_block.{2 * index + branch}.{rest}", 0
        first = int(block) * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.{rest.replace('conv.', 'op.')}", 0
        if kind == "upsamplers":
            return f"output_blocks.{first + layers}.{2 if block in attending else 1}.{rest}", 0
        if side == "down_blocks":
            return f"input_blocks.{first + index + 1}.{branch}.{rest}", 0
        return f"output_blocks.{first + index}.{branch}.{rest}", 0

    return make_layout(names, place)
