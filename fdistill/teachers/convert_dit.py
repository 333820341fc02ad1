"""Converts state dicts of DiT (Peebles and Xie 2022, arXiv 2212.09748) and SiT (arXiv 2401.08740) to diffusers' DiT."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fdistill.base.errors import ArgumentError, CheckpointError

#: Width of a published DiT or SiT (S, B, L, XL) -> number of attention heads, which cannot be read off tensor shapes.
ATTENTION_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
#: Rows of the label embedding of the published networks: ImageNet's classes and "no class".
_PUBLISHED_ROWS = 1001
LABELS = "y_embedder.embedding_table.weight"


#: Parts of the names in FastGen's DiT -> the published ones, to be replaced in this order.
_FASTGEN_NAMES = {
    "t_embedder.proj_net": "t_embedder.mlp",
    "y_embedder.class_embeddings": "y_embedder.embedding_table",
    "final_layer.projection": "final_layer.linear",
    "final_layer.adaptive_params": "final_layer.adaLN_modulation",
    ".conditioning_net.": ".adaLN_modulation.",
    ".attention.": ".attn.",
    ".feed_forward.": ".mlp.",
}


class Given(NamedTuple):
    """What the tensors of a DiT or SiT do not say, and the caller has to.

    Attributes:
        num_classes: if the label embedding has another number of rows than ImageNet's 1,001: the number of rows, if the
            network was trained without class dropout, and one less if it was trained with it.
        heads: number of attention heads of a network of another width than the published ones.
    """

    num_classes: int | None = None
    heads: int | None = None


#: For networks of the published widths and classes.
NOTHING = Given()


#: Arguments of SiT's training, and the only values at which its network predicts what is read here.
_SIT_ARGUMENTS = {"path_type": "Linear", "prediction": "velocity"}


def what_training_says(arguments: Mapping[str, Any], family: str, given: Given, source: Path) -> Given:
    """What the caller says, and what the arguments of DiT's or SiT's training add to it.

    Args:
        arguments: under "args" in a checkpoint of the published training; empty for a state dict alone.
        family: "dit" or "sit", as the caller says.
        source: the file, for messages.

    Raises:
        ArgumentError: the caller says something else than the file.
        CheckpointError: the network was trained to predict something else than the published ones.
    """
    model = str(arguments.get("model", ""))
    if model.lower().startswith(("dit", "sit")) and not model.lower().startswith(family):
        raise ArgumentError(
            f"family: got {family!r}, but {source} says that it is {model}; expected {model[:3].lower()!r}"
        )
    for name, value in _SIT_ARGUMENTS.items():
        if family == "sit" and arguments.get(name, value) != value:
            raise CheckpointError(
                f"{source}: was trained with {name} {arguments[name]!r}; only networks of {name} {value!r} are read"
            )
    classes = arguments.get("num_classes")
    if not isinstance(classes, int):
        return given
    if given.num_classes not in (None, classes):
        raise ArgumentError(f"num_classes: got {given.num_classes}, but {source} says {classes}; leave it out")
    return given._replace(num_classes=classes)


def published_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict that FastGen saved of its DiT under the published names; any other stays as it is."""
    if "y_embedder.class_embeddings.weight" not in tensors:
        return dict(tensors)
    renamed = {}
    for name, value in tensors.items():
        for theirs, published in _FASTGEN_NAMES.items():
            name = name.replace(theirs, published)
        renamed[name] = value
    return renamed


def transformer_tensors(tensors: Mapping[str, Tensor], config: Mapping[str, Any], source: Path) -> dict[str, Tensor]:
    """The tensors under their names in diffusers. A label embedding without "no class" gets a row of zeros for it,
    which DiTTransformer2DModel always has.

    Args:
        tensors: the published state dict.
        config: from `transformer_config`.
        source: the file, for messages.

    Raises:
        CheckpointError: a tensor is missing, or has no place in a DiT.
    """
    renamed: dict[str, Tensor] = {}
    used = {"pos_embed"}
    for target, name, third in _transformer_names(config["num_layers"]):
        if name not in tensors:
            raise CheckpointError(f"{source}: tensor {name} is missing; expected the tensors of a DiT or SiT")
        used.add(name)
        renamed[target] = tensors[name] if third is None else tensors[name].chunk(3)[third]
    foreign = sorted(tensors.keys() - used)
    if foreign:
        raise CheckpointError(f"{source}: tensor {foreign[0]} has no place in a DiT or SiT")
    if len(tensors[LABELS]) == config["num_embeds_ada_norm"]:
        table = torch.cat([tensors[LABELS], torch.zeros_like(tensors[LABELS][:1])])
        renamed |= {name: table for name in renamed if name.endswith("class_embedder.embedding_table.weight")}
    return renamed


def transformer_config(tensors: Mapping[str, Tensor], given: Given, source: Path) -> dict[str, Any]:
    """The config of the DiTTransformer2DModel, derived from the shapes of the tensors and what the caller says.

    Args:
        tensors: the published state dict.
        source: the file, for messages.

    Raises:
        CheckpointError: a tensor is missing, or the position embedding is not the published one.
        ArgumentError: the caller has to say the number of heads or classes, or what he says does not fit.
    """
    dimensions = {
        "x_embedder.proj.weight": 4,
        "pos_embed": 3,
        LABELS: 2,
        "final_layer.linear.weight": 2,
    }
    for name, ndim in dimensions.items():
        if name not in tensors or tensors[name].ndim != ndim:
            raise CheckpointError(f"{source}: no tensor {name} of {ndim} dimensions; expected a DiT or SiT")
    kernel, positions, classes, last = (tensors[name] for name in dimensions)
    width, channels, patch, _ = kernel.shape
    grid = math.isqrt(positions.shape[1])
    heads = _heads(width, given.heads, source)
    if positions.shape != (1, grid**2, width) or not torch.allclose(
        positions[0].double(), _position_embedding(grid, width), atol=1e-4
    ):
        raise CheckpointError(f"{source}: pos_embed is not the fixed sines and cosines of DiT, the only supported one")
    blocks = [int(found[1]) for found in (re.match(r"blocks\.(\d{1,4})\.", name) for name in tensors) if found]
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": last.shape[0] // patch**2,
        "num_layers": 1 + max(blocks, default=0),
        "sample_size": grid * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": _classes(len(classes), given.num_classes, source),
        "norm_eps": 1e-6,
    }


def _heads(width: int, given: int | None, source: Path) -> int:
    heads = ATTENTION_HEADS.get(width) if given is None else given
    if heads is None:
        raise ArgumentError(
            f"heads: {source} has width {width}, none of the published {sorted(ATTENTION_HEADS)}, and tensors do not "
            "say the number of attention heads; pass it"
        )
    if heads < 1 or width % heads:
        raise ArgumentError(f"heads: got {heads}, but {source} has width {width}; expected a divisor of it")
    return heads


def _classes(rows: int, given: int | None, source: Path) -> int:
    if given is None and rows == _PUBLISHED_ROWS:
        return rows - 1
    if given not in (rows, rows - 1):
        raise ArgumentError(
            f"num_classes: got {given}, but the label embedding of {source} has {rows} rows; expected {rows - 1}, if "
            f"the last row means `no class` (trained with class dropout), or {rows}, if every row is a class"
        )
    return given


def _position_embedding(grid: int, width: int) -> Tensor:
    """The fixed position embedding [grid^2, width] float64: sines and cosines of a patch's column, then of its row."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    one = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([one.repeat(grid, 1), one.repeat_interleave(grid, dim=0)], dim=1)


def _transformer_names(num_layers: int) -> Iterator[tuple[str, str, int | None]]:
    """Yields (name in DiTTransformer2DModel, name in the file, which third of that tensor or None for all of it).

    Every block of diffusers has its own embedder of time and label; the file has one for all blocks.
    """
    modules: list[tuple[str, str, int | None]] = [
        ("pos_embed.proj", "x_embedder.proj", None),
        ("proj_out_1", "final_layer.adaLN_modulation.1", None),
        ("proj_out_2", "final_layer.linear", None),
    ]
    for i in range(num_layers):
        theirs, ours = f"blocks.{i}", f"transformer_blocks.{i}"
        embedder = f"{ours}.norm1.emb"
        yield f"{embedder}.class_embedder.embedding_table.weight", "y_embedder.embedding_table.weight", None
        modules += [
            (f"{embedder}.timestep_embedder.linear_1", "t_embedder.mlp.0", None),
            (f"{embedder}.timestep_embedder.linear_2", "t_embedder.mlp.2", None),
            (f"{ours}.norm1.linear", f"{theirs}.adaLN_modulation.1", None),
            (f"{ours}.attn1.to_q", f"{theirs}.attn.qkv", 0),
            (f"{ours}.attn1.to_k", f"{theirs}.attn.qkv", 1),
            (f"{ours}.attn1.to_v", f"{theirs}.attn.qkv", 2),
            (f"{ours}.attn1.to_out.0", f"{theirs}.attn.proj", None),
            (f"{ours}.ff.net.0.proj", f"{theirs}.mlp.fc1", None),
            (f"{ours}.ff.net.2", f"{theirs}.mlp.fc2", None),
        ]
    for ours, theirs, third in modules:
        for kind in ("weight", "bias"):
            yield f"{ours}.{kind}", f"{theirs}.{kind}", third
