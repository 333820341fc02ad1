"""A teacher with a LoRA merged in (W + scale * alpha / rank * up down, arXiv 2106.09685), as a pipeline folder.

Layers are found by name, exactly or not at all: as diffusers calls them, as the model's publisher does, or either with
underscores for dots (kohya's scripts). So a LoRA of another base cannot pass unnoticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fdistill.adapters import network_components, original_layout
from fdistill.adapters.original_names import swap_halves
from fdistill.base.errors import CheckpointError
from fdistill.base.files import made_once, sha256_of_files
from fdistill.formats.comfy.text_encoders import without_wrapper
from fdistill.formats.lora_file import LoraLayer, read_lora
from fdistill.formats.peft_config import lora_files
from fdistill.formats.pipeline_folder import (
    components,
    pipeline_hashes,
    read_config,
    read_tensors,
    share_files,
    weight_files,
    weight_shapes,
)

#: Component -> what may stand before the names of its layers in a LoRA file; for the network also nothing.
_PREFIXES = {
    "unet": ("lora_unet_", "unet.", ""),
    "transformer": (
        "diffusion_model.",
        "lora_transformer_",
        "lora_unet_",
        "model.diffusion_model.",
        "transformer.",
        "",
    ),
    "text_encoder": ("lora_te1_", "lora_te_", "text_encoder."),
    "text_encoder_2": ("lora_te2_", "text_encoder_2."),
    "text_encoder_3": ("lora_te3_", "text_encoder_3."),
}


#: kohya numbers text encoders by what they are: the third is T5, which is the second in FLUX's pipelines.
_T5, _T5_PREFIX = "T5EncoderModel", "lora_te3_"


def _prefixes(component: str, class_name: str) -> tuple[str, ...]:
    """The prefixes of a component's layers; () for components that no LoRA changes."""
    own = (f"lora_{component}_", f"{component}.", "") if component in network_components() else ()
    found = _PREFIXES.get(component, own)
    return (*found, _T5_PREFIX) if class_name == _T5 and _T5_PREFIX not in found else found


def merged_folder(folder: Path, lora: Path, scale: float = 1.0) -> Path:
    """A copy of a pipeline folder with a LoRA merged into its network and text encoders, made once and cached.

    Weights keep their dtype; each sum is taken in float32 and rounded once. Files without changes are shared.

    Args:
        folder: a pipeline folder.
        lora: a safetensors file in the naming of diffusers, peft, kohya or the model's publisher; or a folder that
            peft or diffusers saved.
        scale: times the LoRA's own alpha / rank.

    Returns:
        $FDISTILL_CACHE/merged/<hash of the pipeline's files, the LoRA and the scale>.

    Raises:
        CheckpointError: the file is unreadable, no plain LoRA, or of another base model: the pipeline lacks one of its
            layers, or has it in another shape.
        OutputError: the cache folder cannot be written.
    """
    layers = read_lora(lora)
    key = {
        "pipeline": pipeline_hashes(folder),
        "lora": sha256_of_files(lora_files(lora)),
        "scale": float(scale),
        "format": 2,
    }

    def fill(temporary: Path) -> None:
        changes = _assign(folder, lora, layers)
        share_files(folder, temporary)
        for component, updates in changes.items():
            for path in weight_files(folder / component):
                tensors = read_tensors(path)
                for name in tensors.keys() & updates.keys():
                    weight = tensors[name]
                    merged = weight.float()
                    for update in updates[name]:
                        merged = merged + scale * update.delta().reshape(weight.shape)
                    tensors[name] = merged.to(weight.dtype)
                shared = temporary / component / path.name
                shared.unlink()  # it may be a link to the original
                save_file(tensors, shared, metadata={"format": "pt"})

    return made_once("merged", key, fill)


@dataclass(frozen=True)
class _Target:
    """A layer that a LoRA can name: its weights in diffusers, as in `original_names.Original`, and their shapes."""

    component: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    swapped: bool

    @property
    def matrix(self) -> tuple[int, int]:
        """[out, in * ...] of all weights on top of each other."""
        return sum(shape[0] for shape in self.shapes), prod(self.shapes[0][1:])


@dataclass(frozen=True)
class _Update:
    """What a LoRA's layer adds to one weight: rows [first, last) of its update."""

    layer: LoraLayer
    first: int
    last: int
    swapped: bool

    def delta(self) -> Tensor:
        whole = self.layer.delta()
        return (swap_halves(whole) if self.swapped else whole)[self.first : self.last]


def _assign(folder: Path, lora: Path, layers: Mapping[str, LoraLayer]) -> dict[str, dict[str, list[_Update]]]:
    """Component -> name of a weight -> what is added to it.

    Raises:
        CheckpointError: the pipeline lacks a layer of the LoRA, or has it in another shape.
    """
    targets = _targets(folder)
    unknown = [name for name in layers if name not in targets]
    if unknown:
        raise CheckpointError(
            f"{lora}: {len(unknown)} of {len(layers)} layers are not in {folder}, such as {unknown[0]!r}; the LoRA was "
            "made for another base model, expected one for this pipeline"
        )
    changes: dict[str, dict[str, list[_Update]]] = {}
    for name, layer in layers.items():
        target = targets[name]
        shape = (len(layer.up), prod(layer.down.shape[1:]))
        if shape != target.matrix or prod(layer.up.shape[1:]) != len(layer.down):
            raise CheckpointError(
                f"{lora}: layer {name!r} is for a weight of {shape[0]} x {shape[1]}, but {target.component}'s is of "
                f"{target.matrix[0]} x {target.matrix[1]}; the LoRA was made for another base model"
            )
        first = 0
        for weight, rows in zip(target.names, (shape[0] for shape in target.shapes), strict=True):
            update = _Update(layer, first, first + rows, target.swapped)
            changes.setdefault(target.component, {}).setdefault(weight, []).append(update)
            first += rows
    return changes


def _targets(folder: Path) -> dict[str, _Target]:
    """Every name that a LoRA file can have for a layer of the pipeline."""
    targets: dict[str, _Target] = {}
    for component, class_name in components(folder).items():
        prefixes = _prefixes(component, class_name)
        if not prefixes:
            continue
        shapes = weight_shapes(folder / component)
        layers: dict[str, tuple[tuple[str, ...], bool]] = {}
        if component in network_components():
            with suppress(CheckpointError):  # a network of its own kind has diffusers' names alone
                config = read_config(folder / component / "config.json")
                layout = original_layout(class_name, shapes, config) or {}
                layers = {name: (original.parts, original.swapped) for name, original in layout.items()}
        for name in shapes:
            layers[name] = ((name,), False)
            if component.startswith("text_encoder"):
                layers[without_wrapper(name)] = layers[f"text_model.{without_wrapper(name)}"] = ((name,), False)
        for name, (parts, swapped) in layers.items():
            path, _, leaf = name.rpartition(".")
            if leaf != "weight":
                continue
            target = _Target(component, parts, tuple(shapes[part] for part in parts), swapped)
            for prefix in prefixes:
                targets[prefix + (path.replace(".", "_") if prefix.startswith("lora_") else path)] = target
    return targets
