"""Transformers of SD3, Flux, PixArt and Qwen-Image under the names of their publishers, which ComfyUI reads."""

from __future__ import annotations

import re
from collections.abc import Collection

from fdistill.formats.comfy.layout import Layout, Place, Table, look_up, make_layout


def _fused(target: str, *modules: str) -> dict[str, Place]:
    return {module: (target, i) for i, module in enumerate(modules)}


_SELF, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def _within(attention: str, modules: tuple[str, ...]) -> list[str]:
    return [f"{attention}.{module}" for module in modules]


_SD3: Table = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_SD3_BLOCK: Table = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    **_fused("x_block.attn.qkv", *_within("attn", _SELF)),
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    **_fused("x_block.attn2.qkv", *_within("attn2", _SELF)),
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    **_fused("context_block.attn.qkv", *_within("attn", _ADDED)),
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_add_out": "context_block.attn.proj",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}

_FLUX: Table = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    **{
        f"time_text_embed.{embedder}.linear_{i}": f"{name}_in.{layer}_layer"
        for embedder, name in (
            ("timestep_embedder", "time"),
            ("text_embedder", "vector"),
            ("guidance_embedder", "guidance"),
        )
        for i, layer in ((1, "in"), (2, "out"))
    },
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_FLUX_BLOCK: Table = {
    "norm1.linear": "img_mod.lin",
    **_fused("img_attn.qkv", *_within("attn", _SELF)),
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.to_out.0": "img_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "norm1_context.linear": "txt_mod.lin",
    **_fused("txt_attn.qkv", *_within("attn", _ADDED)),
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_add_out": "txt_attn.proj",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_FLUX_SINGLE: Table = {
    "norm.linear": "modulation.lin",
    **_fused("linear1", *_within("attn", _SELF), "proj_mlp"),
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
    "proj_out": "linear2",
}

_PIXART: Table = {
    "pos_embed.proj": "x_embedder.proj",
    "caption_projection.linear_1": "y_embedder.y_proj.fc1",
    "caption_projection.linear_2": "y_embedder.y_proj.fc2",
    **{
        f"adaln_single.emb.{embedder}.linear_{i}": f"{name}.mlp.{layer}"
        for embedder, name in (
            ("timestep_embedder", "t_embedder"),
            ("resolution_embedder", "csize_embedder"),
            ("aspect_ratio_embedder", "ar_embedder"),
        )
        for i, layer in ((1, 0), (2, 2))
    },
    "adaln_single.linear": "t_block.1",
    "proj_out": "final_layer.linear",
    "scale_shift_table": "final_layer.scale_shift_table",
}
_PIXART_BLOCK: Table = {
    "scale_shift_table": "scale_shift_table",
    **_fused("attn.qkv", *_within("attn1", _SELF)),
    "attn1.to_out.0": "attn.proj",
    "attn2.to_q": "cross_attn.q_linear",
    **_fused("cross_attn.kv_linear", "attn2.to_k", "attn2.to_v"),
    "attn2.to_out.0": "cross_attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}

#: Class -> tables of the whole network, and of its kinds of block: diffusers' name, the original name, the table.
_TABLES: dict[str, tuple[Table, dict[str, tuple[str, Table]]]] = {
    "SD3Transformer2DModel": (_SD3, {"transformer_blocks": ("joint_blocks", _SD3_BLOCK)}),
    "FluxTransformer2DModel": (
        _FLUX,
        {
            "transformer_blocks": ("double_blocks", _FLUX_BLOCK),
            "single_transformer_blocks": ("single_blocks", _FLUX_SINGLE),
        },
    ),
    "PixArtTransformer2DModel": (_PIXART, {"transformer_blocks": ("blocks", _PIXART_BLOCK)}),
}
_BLOCK = re.compile(r"((?:single_)?transformer_blocks)\.(\d+)\.(.+)")


def transformer_layout(class_name: str, names: Collection[str]) -> Layout | None:
    """The layout of a transformer's tensors; None for a class whose original names are not known here.

    Raises:
        CheckpointError: a tensor has no name there.
    """
    if class_name == "QwenImageTransformer2DModel":  # published under the names it has in diffusers
        return make_layout(names, lambda name: (name, 0))
    if class_name not in _TABLES:
        return None
    top, blocks = _TABLES[class_name]

    def place(name: str) -> Place | None:
        match = _BLOCK.fullmatch(name)
        if match is None:
            return look_up(name, top)
        kind, number, rest = match.groups()
        original, table = blocks.get(kind, ("", {}))
        found = look_up(rest, table)
        return (f"{original}.{number}.{found[0]}", found[1]) if found else None

    # The last block of SD3 has no output for the text: its norm is one of scale and shift, like the network's last.
    matches = [match for match in map(_BLOCK.fullmatch, names) if match]
    outputs = {match[2] for match in matches if match[3].startswith("attn.to_add_out.")}

    def swapped(name: str) -> bool:
        match = _BLOCK.fullmatch(name)
        if match is None:
            return name.startswith("norm_out.linear.")
        return match[3].startswith("norm1_context.linear.") and match[2] not in outputs

    return make_layout(names, place, swapped)
