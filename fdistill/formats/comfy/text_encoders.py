"""CLIP text encoders in the format of Stable Diffusion checkpoints: OpenAI's, and OpenCLIP's with its own names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from fdistill.adapters.original_names import Layout, Place, Table, assemble, look_up, make_layout

_OPEN_CLIP: Table = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}
_OPEN_CLIP_LAYER: Table = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    **{
        f"self_attn.{name}_proj.{leaf}": (f"attn.in_proj_{leaf}", i)
        for i, name in enumerate("qkv")
        for leaf in ("weight", "bias")
    },
}
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")


def without_wrapper(name: str) -> str:
    """A tensor's name without the prefix "text_model.", which only some versions of transformers write."""
    return name.removeprefix("text_model.")


def original_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of OpenAI's CLIP as "text_model.*", without the projection, which published checkpoints omit."""
    kept = {without_wrapper(name): value for name, value in tensors.items()}
    return {
        f"text_model.{name}": value
        for name, value in kept.items()
        if name not in ("text_projection.weight", "embeddings.position_ids")
    }


def open_clip_layout(names: Collection[str]) -> Layout:
    """The layout of an OpenCLIP text encoder, for names without the prefix "text_model.".

    Raises:
        CheckpointError: a tensor has no name in OpenCLIP.
    """

    def place(name: str) -> Place | None:
        match = _LAYER.fullmatch(name)
        if match is None:
            return look_up(name, _OPEN_CLIP)
        found = look_up(match[2], _OPEN_CLIP_LAYER)
        return (f"transformer.resblocks.{match[1]}.{found[0]}", found[1]) if found else None

    return make_layout(names, place)


def original_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under OpenCLIP's names, with queries, keys and values in one matrix and the projection transposed."""
    kept = {without_wrapper(name): value for name, value in tensors.items()}
    kept.pop("embeddings.position_ids", None)
    made = assemble(open_clip_layout(kept), kept)
    if "text_projection" in made:
        made["text_projection"] = made["text_projection"].T
    return made
