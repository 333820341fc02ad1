"""Tensor names of an AutoencoderKL in latent-diffusion (LDM), which ComfyUI reads."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from fdistill.adapters.original_names import Layout, Place, Table, assemble, look_up, make_layout

_ATTENTION: Table = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    # names in diffusers before version 0.18; files of that time are still in use
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}
_NAMED = re.compile(r"(?:(encoder|decoder)\.)?(.+)")
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def autoencoder_layout(names: Collection[str]) -> Layout:
    """The layout of an AutoencoderKL. LDM numbers the resolutions of the decoder from the finest.

    Raises:
        CheckpointError: a tensor has no name in LDM.
    """
    matches = [re.match(r"decoder\.up_blocks\.(\d+)\.", name) for name in names]
    last = max((int(match[1]) for match in matches if match), default=0)

    def inner(name: str) -> str | None:
        if match := _BLOCK.fullmatch(name):
            side, block, kind, number, rest = match.groups()
            level = int(block) if side == "down" else last - int(block)
            if kind == "resnets":
                return f"{side}.{level}.block.{number}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
            return f"{side}.{level}.{side}sample.{rest}"
        if match := _MIDDLE.fullmatch(name):
            kind, number, rest = match.groups()
            if kind == "resnets":
                return f"mid.block_{int(number) + 1}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
            found = look_up(rest, _ATTENTION)
            return f"mid.attn_{int(number) + 1}.{found[0]}" if found else None
        if name.startswith(("conv_in.", "conv_norm_out.", "conv_out.")):
            return name.replace("conv_norm_out", "norm_out")
        return None

    def place(name: str) -> Place | None:
        match = _NAMED.fullmatch(name)
        assert match is not None
        side, rest = match.groups()
        if side is None:
            return (name, 0) if name.startswith(("quant_conv.", "post_quant_conv.")) else None
        found = inner(rest)
        return (f"{side}.{found}", 0) if found else None

    return make_layout(names, place)


def original_autoencoder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original tensors of an AutoencoderKL; in LDM its attention layers are 1x1 convolutions."""
    made = assemble(autoencoder_layout(tensors), tensors)
    return {
        name: value[:, :, None, None] if ".attn_" in name and value.ndim == 2 else value for name, value in made.items()
    }
