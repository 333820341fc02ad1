"""A LoRA under the names of its network's publisher, whose layers may join several of diffusers'."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fdistill.adapters.original_names import Layout, Original, swap_halves

#: First part of the names by which ComfyUI and diffusers know a publisher's layers.
_PREFIX = "diffusion_model."


def original_lora(
    tensors: Mapping[str, Tensor], component: str, layout: Layout, network: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A LoRA in diffusers' naming as "diffusion_model.<layer>.lora_A.weight" and ".lora_B.weight", of scale 1.

    Layers that the publisher joins get one adapter of their ranks' sum, which changes them alike: its A is theirs one
    below the other, and its B has theirs on the diagonal.

    Args:
        tensors: "<component>.<layer>.lora_A.weight" [rank, in] and ".lora_B.weight" [out, rank].
        component: the network's name in its pipeline, such as "transformer".
        layout: of all the network's tensors.
        network: the network's tensors, or tensors of their shapes.
    """
    made: dict[str, Tensor] = {}
    for target, original in layout.items():
        downs = [tensors.get(f"{component}.{name}", None) for name in _matrices(original, "A")]
        ups = [tensors.get(f"{component}.{name}", None) for name in _matrices(original, "B")]
        found = [down for down in downs if down is not None]
        if not found:
            continue
        blocks = [
            found[0].new_zeros(len(network[part]), 0) if up is None else up
            for part, up in zip(original.parts, ups, strict=True)
        ]
        up = torch.block_diag(*blocks)
        layer = _PREFIX + target.removesuffix(".weight")
        made[f"{layer}.lora_A.weight"] = torch.cat(found)
        made[f"{layer}.lora_B.weight"] = swap_halves(up) if original.swapped else up
    return made


def _matrices(original: Original, matrix: str) -> list[str]:
    return [f"{part.removesuffix('.weight')}.lora_{matrix}.weight" for part in original.parts]
